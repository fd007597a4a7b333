//! English texts for the processes that explain an alert.

use std::fmt::Write as _;

use vmwatch_api::{
    alerts::culprits::{Culprits, TopMeasure, TopProcess},
    processes::ProcessRowKind,
    time::UtcOffset,
};

use super::{number, percent, time};

/// Maximum length of a command line in a text, in characters.
const MAX_COMMAND: usize = 160;

/// What explains an alert, one line each.
pub(in crate::notify) fn culprits(culprits: &Culprits, now_ms: u64, offset: UtcOffset) -> Vec<String> {
    let mut lines = Vec::new();
    if culprits.last_known && !culprits.processes.is_empty() {
        let at = time(culprits.to_ms, now_ms, offset);
        lines.push(format!("last known processes, of {at}:"));
    }
    let measure = culprits.measure;
    lines.extend(
        culprits
            .processes
            .iter()
            .map(|process| self::process(process, measure, now_ms, offset)),
    );
    if let Some(operation) = &culprits.operation {
        lines.push(format!(
            "last operation: {} by {}",
            operation.action, operation.user
        ));
    }
    if let Some(problem) = &culprits.problem {
        lines.push(format!("processes are unknown: {problem}"));
    }
    lines
}

/// A process, such as `81 % of it pg_restore (pid 4121, user postgres, unit backup.service), started 02:51`.
fn process(process: &TopProcess, measure: TopMeasure, now_ms: u64, offset: UtcOffset) -> String {
    let mut text = amount(process, measure);
    if let (ProcessRowKind::Sum, Some(count)) = (process.kind, process.processes) {
        let _ = write!(text, "{count} × ");
    }
    text += &process.name;
    let owner = &process.owner;
    let pid = (process.kind == ProcessRowKind::Process).then(|| format!("pid {}", process.pid));
    let details = [
        pid,
        owner.user.as_ref().map(|user| format!("user {user}")),
        owner.unit.as_ref().map(|unit| format!("unit {unit}")),
        owner
            .container
            .as_ref()
            .map(|container| format!("container {container}")),
    ];
    let details: Vec<_> = details.into_iter().flatten().collect();
    if !details.is_empty() {
        let _ = write!(text, " ({})", details.join(", "));
    }
    if process.started_ms > 0 {
        let _ = write!(text, ", started {}", time(process.started_ms, now_ms, offset));
    }
    if let Some(ended) = process.ended_ms {
        let _ = write!(text, ", ended {}", time(ended, now_ms, offset));
    }
    if let Some(code) = process.exit_code {
        let _ = write!(text, ", exit code {code}");
    }
    if let Some(command) = &owner.command_line {
        let cut: String = command.chars().take(MAX_COMMAND).collect();
        let dots = if cut.len() < command.len() { "…" } else { "" };
        let _ = write!(text, ": {cut}{dots}");
    }
    text
}

fn amount(process: &TopProcess, measure: TopMeasure) -> String {
    let share = process.share.map(|share| percent((share * 100.0).round()));
    match (measure, share) {
        (TopMeasure::Mem, Some(share)) => format!("{share} of the memory "),
        (TopMeasure::Mem, None) => format!("{} of the memory ", percent(process.amount)),
        (_, Some(share)) => format!("{share} of it "),
        (TopMeasure::Cpu, None) => format!("{} s of CPU time ", number(process.amount)),
        (TopMeasure::Disk, None) => format!("{} MiB read and written ", number(process.amount / 1024.0)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn culprit_names_share_owner_and_start() {
        let offset: UtcOffset = "+01:00".parse().unwrap();
        // 2017-01-01 02:51 and 02:57 with this offset.
        let (started, now) = (1_483_235_460_000_u64, 1_483_235_820_000);
        let culprits: Culprits = serde_json::from_value(json!({
            "from_ms": 0, "to_ms": now, "processes": [
                { "name": "pg_restore", "pid": 4121, "started_ms": started, "amount": 290.1, "share": 0.8123,
                  "owner": { "user": "postgres", "unit": "backup.service", "command_line": "pg_restore -j 4 all.dump" } },
                { "kind": "sum", "name": "nginx", "pid": 0, "started_ms": 0, "processes": 12, "amount": 3.25,
                  "owner": { "user": "www-data" } },
                { "name": "worker", "pid": 7, "started_ms": started - 86_400_000, "amount": 1.0, "share": 0.01,
                  "exit_code": 137, "ended_ms": started },
            ],
        }))
        .unwrap();
        assert_eq!(
            super::culprits(&culprits, now, offset),
            [
                "81 % of it pg_restore (pid 4121, user postgres, unit backup.service), started 02:51: pg_restore -j 4 all.dump",
                "3.2 s of CPU time 12 × nginx (user www-data)",
                "1 % of it worker (pid 7), started 2016-12-31 02:51, ended 02:51, exit code 137",
            ]
        );
    }

    #[test]
    fn last_known_table_and_operation_are_named() {
        let culprits: Culprits = serde_json::from_value(json!({
            "from_ms": 0, "to_ms": 60_000, "last_known": true, "measure": "mem",
            "processes": [{ "name": "java", "pid": 9, "started_ms": 0, "amount": 40.0, "share": 0.4 }],
            "operation": { "operation_id": "0".repeat(32), "action": "stop", "user": "alice" },
            "problem": "metrics-svc did not answer",
        }))
        .unwrap();
        assert_eq!(
            super::culprits(&culprits, 60_000, UtcOffset::UTC),
            [
                "last known processes, of 00:01:",
                "40 % of the memory java (pid 9)",
                "last operation: stop by alice",
                "processes are unknown: metrics-svc did not answer",
            ]
        );
    }
}
