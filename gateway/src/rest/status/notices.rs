//! Decides which parts of the status need attention. The limits are those of the alerts in deploy/observability, where
//! there is such an alert.

use std::{collections::BTreeSet, time::Duration};

use vmwatch_api::status::{
    AgentsStatus, CompactionStatus, DatabaseDisk, HypervisorStatus, Notice, NoticeKind, ProgramStatus,
    SampleBacklog, Status, StatusPart, VmGroup,
};

/// Age of the oldest waiting sample from which on samples are late.
const MAX_WAITING: Duration = Duration::from_mins(1);
const MAX_COMPACTION_LAG: Duration = Duration::from_hours(2);
/// Time without a complete pass of compaction.
const MAX_PASS_AGE: Duration = Duration::from_mins(30);
/// Share of the file system of the database that may be in use, in percent.
const MAX_DISK_PERCENT: u64 = 80;
const MIN_DAYS_LEFT: u64 = 14;
/// Maximum number of hypervisors that a notice names.
const MAX_NAMED: usize = 5;

/// The notices about parts that need attention.
pub(super) fn of(status: &Status) -> Vec<Notice> {
    let mut found = Vec::new();
    if let Some(programs) = &status.programs {
        add(&mut found, StatusPart::Programs, of_programs(programs));
    }
    if let Some(samples) = &status.samples {
        add(&mut found, StatusPart::Samples, of_samples(*samples));
    }
    if let Some(compaction) = &status.compaction {
        add(&mut found, StatusPart::Compaction, of_compaction(*compaction));
    }
    if let Some(disk) = &status.disk {
        add(&mut found, StatusPart::Disk, of_disk(*disk));
    }
    if let Some(agents) = &status.agents {
        add(&mut found, StatusPart::Agents, of_agents(agents));
    }
    if let Some(hypervisors) = &status.hypervisors {
        add(&mut found, StatusPart::Hypervisors, of_hypervisors(hypervisors));
    }
    found
}

fn add(notices: &mut Vec<Notice>, part: StatusPart, details: Vec<String>) {
    notices.extend(details.into_iter().map(|detail| Notice {
        part,
        kind: NoticeKind::Attention,
        detail,
    }));
}

fn of_programs(programs: &[ProgramStatus]) -> Vec<String> {
    let mut details: Vec<_> = programs
        .iter()
        .filter(|program| program.replicas.is_empty())
        .map(|program| format!("no replica of {} answers", program.name))
        .collect();
    let replicas = programs.iter().flat_map(|program| &program.replicas);
    let versions: BTreeSet<_> = replicas.map(|replica| replica.version.as_str()).collect();
    if versions.len() > 1 {
        let versions: Vec<_> = versions.into_iter().collect();
        details.push(format!(
            "several versions run: {}; finish the upgrade",
            versions.join(", ")
        ));
    }
    details
}

fn of_samples(samples: SampleBacklog) -> Vec<String> {
    let mut details = Vec::new();
    if let Some(oldest) = samples.oldest_ms.filter(|oldest| *oldest > millis(MAX_WAITING)) {
        details.push(format!(
            "the oldest of {} waiting messages has waited for {}; check metrics-svc and the database",
            samples.messages,
            time(oldest)
        ));
    }
    if samples.max_bytes > 0 && samples.bytes > samples.max_bytes / 2 {
        details.push(
            "the stream of samples is more than half full; once it is full, agents keep their samples"
                .to_owned(),
        );
    }
    details
}

fn of_compaction(compaction: CompactionStatus) -> Vec<String> {
    let mut details = Vec::new();
    if compaction.lag_ms > millis(MAX_COMPACTION_LAG) {
        details.push(format!(
            "blocks have not been merged for {}",
            time(compaction.lag_ms)
        ));
    }
    if compaction.passed_ago_ms > millis(MAX_PASS_AGE) {
        details.push(format!(
            "compaction has not completed a pass for {}; the log of metrics-svc has the reason",
            time(compaction.passed_ago_ms)
        ));
    }
    details
}

fn of_disk(disk: DatabaseDisk) -> Vec<String> {
    let percent = disk.used_bytes.saturating_mul(100).checked_div(disk.size_bytes);
    let few_days = disk.days_left.filter(|days| *days < MIN_DAYS_LEFT);
    match (few_days, percent) {
        (Some(days), _) => vec![format!(
            "the disk of the database is full in {days} days at its present growth"
        )],
        (None, Some(percent)) if percent > MAX_DISK_PERCENT => {
            vec![format!("the disk of the database is {percent} % full")]
        }
        _ => Vec::new(),
    }
}

fn of_agents(agents: &AgentsStatus) -> Vec<String> {
    let group = |group: &VmGroup, text: &str| match group.count {
        0 => None,
        1 => Some(format!("1 VM {text}")),
        count => Some(format!("{count} VMs {text}")),
    };
    let details = [
        group(&agents.outdated, "with an outdated agent"),
        group(
            &agents.over_limit,
            "above a limit of one VM; their samples are stored late",
        ),
        group(&agents.wrong_clock, "with a wrong clock or UTC offset"),
        group(&agents.other_faults, "with another fault of the agent"),
    ];
    details.into_iter().flatten().collect()
}

fn of_hypervisors(hypervisors: &[HypervisorStatus]) -> Vec<String> {
    let details = |is_so: fn(&HypervisorStatus) -> bool, text: &str| {
        let names: Vec<_> = hypervisors
            .iter()
            .filter(|hypervisor| is_so(hypervisor))
            .map(|hypervisor| hypervisor.name.as_str())
            .collect();
        let (shown, more) = names.split_at(names.len().min(MAX_NAMED));
        let more = match more.len() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        (!shown.is_empty()).then(|| format!("{text}: {}{more}", shown.join(", ")))
    };
    let unreachable = details(|hypervisor| !hypervisor.reachable, "unreachable");
    let late = details(|hypervisor| hypervisor.reachable && hypervisor.late, "slow");
    [unreachable, late].into_iter().flatten().collect()
}

/// A duration with its largest unit.
fn time(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use vmwatch_api::status::ReplicaStatus;

    use super::*;

    /// A change of a healthy status, and the notice that it causes.
    type Case = (fn(&mut Status), &'static str);

    fn program(name: &str, versions: &[&str]) -> ProgramStatus {
        let replica = |version: &&str| ReplicaStatus {
            id: "x".to_owned(),
            version: (*version).to_owned(),
        };
        ProgramStatus {
            name: name.to_owned(),
            replicas: versions.iter().map(replica).collect(),
        }
    }

    fn healthy() -> Status {
        Status {
            notices: Vec::new(),
            programs: Some(vec![program("vmwatch-gateway", &["1.0.0", "1.0.0"])]),
            samples: Some(SampleBacklog {
                messages: 10,
                bytes: 500,
                max_bytes: 1000,
                oldest_ms: Some(60_000),
                dead_letters: Some(3),
            }),
            compaction: Some(CompactionStatus {
                lag_ms: 7_200_000,
                passed_ago_ms: 10_000,
            }),
            disk: Some(DatabaseDisk {
                used_bytes: 80,
                size_bytes: 100,
                bytes_per_day: Some(1),
                days_left: Some(20),
            }),
            agents: Some(AgentsStatus {
                silent: 4,
                ..AgentsStatus::default()
            }),
            hypervisors: Some(vec![hypervisor("lab", true, false)]),
        }
    }

    fn hypervisor(name: &str, reachable: bool, late: bool) -> HypervisorStatus {
        HypervisorStatus {
            name: name.to_owned(),
            reachable,
            late,
            listed_ago_ms: None,
        }
    }

    #[test]
    fn each_part_above_its_limit_has_a_notice() {
        assert_eq!(of(&healthy()), []);
        let cases: [Case; 9] = [
            (
                |status| status.programs = Some(vec![program("vmwatch-auth", &[])]),
                "no replica of vmwatch-auth answers",
            ),
            (
                |status| status.programs = Some(vec![program("vmwatch-auth", &["1.1.0", "1.0.0"])]),
                "several versions run: 1.0.0, 1.1.0; finish the upgrade",
            ),
            (
                |status| status.samples.as_mut().unwrap().oldest_ms = Some(180_000),
                "the oldest of 10 waiting messages has waited for 3 min; check metrics-svc and the database",
            ),
            (
                |status| status.samples.as_mut().unwrap().bytes = 501,
                "the stream of samples is more than half full; once it is full, agents keep their samples",
            ),
            (
                |status| status.compaction.as_mut().unwrap().lag_ms = 7_200_001,
                "blocks have not been merged for 2 h",
            ),
            (
                |status| status.disk.as_mut().unwrap().used_bytes = 81,
                "the disk of the database is 81 % full",
            ),
            (
                |status| status.disk.as_mut().unwrap().days_left = Some(13),
                "the disk of the database is full in 13 days at its present growth",
            ),
            (
                |status| status.agents.as_mut().unwrap().outdated.count = 2,
                "2 VMs with an outdated agent",
            ),
            (
                |status| status.hypervisors = Some(vec![hypervisor("attic", false, false)]),
                "unreachable: attic",
            ),
        ];
        for (change, expected) in cases {
            let mut status = healthy();
            change(&mut status);
            let notices = of(&status);
            let details: Vec<_> = notices.iter().map(|notice| notice.detail.as_str()).collect();
            assert_eq!(details, [expected]);
        }
    }

    #[test]
    fn notice_names_some_of_many_hypervisors() {
        let many: Vec<_> = (0..8)
            .map(|number| hypervisor(&format!("h{number}"), true, true))
            .collect();
        assert_eq!(of_hypervisors(&many), ["slow: h0, h1, h2, h3, h4 and 3 more"]);
    }
}
