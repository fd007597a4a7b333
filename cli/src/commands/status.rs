//! `vmwatch status`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmwatch_api::InstanceId;

use crate::{
    client::Client,
    error::CliError,
    output::{Output, note},
    table::{Cell, Column, Table, Tone},
};

/// Maximum number of VMs that a line names.
const MAX_NAMED: usize = 5;

#[derive(Debug, Serialize, Deserialize)]
struct Status {
    notices: Vec<Notice>,
    programs: Option<Vec<Program>>,
    samples: Option<Samples>,
    compaction: Option<Compaction>,
    disk: Option<Disk>,
    agents: Option<Agents>,
    hypervisors: Option<Vec<Hypervisor>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Notice {
    part: String,
    detail: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Program {
    name: String,
    replicas: Vec<Replica>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Replica {
    version: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Samples {
    messages: u64,
    oldest_ms: Option<u64>,
    dead_letters: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Compaction {
    lag_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Disk {
    used_bytes: u64,
    size_bytes: u64,
    days_left: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Agents {
    reporting: u64,
    silent: u64,
    never: u64,
    outdated: Vms,
    over_limit: Vms,
    wrong_clock: Vms,
    other_faults: Vms,
}

#[derive(Debug, Serialize, Deserialize)]
struct Vms {
    count: u64,
    vms: Vec<InstanceId>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Hypervisor {
    name: String,
    reachable: bool,
    late: bool,
}

pub(crate) async fn run(client: &Client, output: &Output) -> Result<(), CliError> {
    let answer: Value = client.get("/status", &[]).await?;
    if output.json {
        return output.print_json(&answer);
    }
    let status: Status =
        serde_json::from_value(answer).map_err(|error| CliError::Answer(error.to_string()))?;
    output.print_table(&table(&status), "the gateway reports nothing")?;
    match status.notices.len() {
        0 => note("nothing needs attention"),
        1 => note("1 thing needs attention"),
        count => note(&format!("{count} things need attention")),
    }
    Ok(())
}

fn table(status: &Status) -> Table {
    let mut table = Table::new([Column::Left("PART"), Column::Left("STATE")]);
    for notice in &status.notices {
        let part = Cell::new(&notice.part, Tone::Warning);
        table.row([part, Cell::new(&notice.detail, Tone::Warning)]);
    }
    for program in status.programs.iter().flatten() {
        let versions: Vec<&str> = program
            .replicas
            .iter()
            .map(|replica| replica.version.as_str())
            .collect();
        let noun = if versions.len() == 1 {
            "replica"
        } else {
            "replicas"
        };
        let text = format!("{} {noun}: {}", versions.len(), versions.join(", "));
        table.row([Cell::from(&program.name), Cell::from(text)]);
    }
    let mut line = |part: &str, text: Option<String>| {
        table.row([
            Cell::from(part),
            Cell::from(text.unwrap_or_else(|| "unknown".to_owned())),
        ]);
    };
    line("samples", status.samples.as_ref().map(samples));
    line(
        "compaction",
        status
            .compaction
            .as_ref()
            .map(|compaction| format!("{} behind", minutes(compaction.lag_ms))),
    );
    line("disk", status.disk.as_ref().map(disk));
    if let Some(agents) = &status.agents {
        let counts = (agents.reporting, agents.silent, agents.never);
        line(
            "agents",
            Some(format!(
                "{} report, {} silent, {} VMs without",
                counts.0, counts.1, counts.2
            )),
        );
        line("outdated agents", Some(vms(&agents.outdated)));
        line("agents over a limit", Some(vms(&agents.over_limit)));
        line("agents with a wrong clock", Some(vms(&agents.wrong_clock)));
        line("agents with another fault", Some(vms(&agents.other_faults)));
    } else {
        line("agents", None);
    }
    for hypervisor in status.hypervisors.iter().flatten() {
        let (text, tone) = match (hypervisor.reachable, hypervisor.late) {
            (false, _) => ("unreachable", Tone::Bad),
            (true, true) => ("late", Tone::Warning),
            (true, false) => ("reachable", Tone::Plain),
        };
        table.row([
            Cell::from(format!("hypervisor {}", hypervisor.name)),
            Cell::new(text, tone),
        ]);
    }
    table
}

fn samples(samples: &Samples) -> String {
    let oldest = samples
        .oldest_ms
        .map(|age| format!(", the oldest for {} s", age / 1000));
    let dead = samples.dead_letters.map(|dead| format!("; {dead} dead letters"));
    format!(
        "{} wait{}{}",
        samples.messages,
        oldest.unwrap_or_default(),
        dead.unwrap_or_default()
    )
}

fn disk(disk: &Disk) -> String {
    let gib = |bytes: u64| bytes / (1 << 30);
    let left = disk.days_left.map(|days| format!(", full in {days} days"));
    format!(
        "{} of {} GiB used{}",
        gib(disk.used_bytes),
        gib(disk.size_bytes),
        left.unwrap_or_default()
    )
}

fn vms(group: &Vms) -> String {
    if group.count == 0 {
        return "none".to_owned();
    }
    let named: Vec<&str> = group.vms.iter().take(MAX_NAMED).map(InstanceId::as_str).collect();
    let more = if u64::try_from(named.len()).is_ok_and(|named| named < group.count) {
        ", …"
    } else {
        ""
    };
    format!("{}: {}{more}", group.count, named.join(", "))
}

fn minutes(ms: u64) -> String {
    format!("{} min", ms / 60_000)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn status_lists_notices_first_and_unknown_parts() {
        crate::answers::tests::check::<Status>("Status");
        let group = |count: u64| json!({ "count": count, "vms": (0..count.min(20)).map(|n| format!("vm-{n}")).collect::<Vec<_>>() });
        let status: Status = serde_json::from_value(json!({
            "notices": [{ "part": "disk", "kind": "attention", "detail": "the disk is full in 3 days" }],
            "programs": [{ "name": "vmwatch-auth", "replicas": [{ "id": "a", "version": "0.1.0" }] }],
            "samples": { "messages": 3, "bytes": 1, "max_bytes": 2, "oldest_ms": 4000, "dead_letters": 1 },
            "compaction": null,
            "disk": { "used_bytes": 5u64 << 30, "size_bytes": 8u64 << 30, "bytes_per_day": 1, "days_left": 3 },
            "agents": { "reporting": 9, "silent": 1, "never": 2, "outdated": group(7), "over_limit": group(0),
                "wrong_clock": group(1), "other_faults": group(0) },
            "hypervisors": [{ "name": "lab", "reachable": false, "late": false, "listed_ago_ms": null }],
        }))
        .unwrap();
        let expected = "\
PART                       STATE
disk                       the disk is full in 3 days
vmwatch-auth               1 replica: 0.1.0
samples                    3 wait, the oldest for 4 s; 1 dead letters
compaction                 unknown
disk                       5 of 8 GiB used, full in 3 days
agents                     9 report, 1 silent, 2 VMs without
outdated agents            7: vm-0, vm-1, vm-2, vm-3, vm-4, …
agents over a limit        none
agents with a wrong clock  1: vm-0
agents with another fault  none
hypervisor lab             unreachable
";
        assert_eq!(table(&status).render(None, false), expected);
    }
}
