//! Groups of processes with the same name, user, unit and container, and how they changed between two moments.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
};

use vmwatch_api::{
    PageRoom,
    alerts::culprits::TopMeasure,
    process_changes::{ChangedGroup, ChangedGroups, GroupUsage, ProcessChanges},
    processes::{ProcessRow, ProcessRowKind},
};

use super::super::{series::tidy, starts::is_same_start};

/// A group has grown if it uses at least this much more: CPU in percent of one core, memory in percent of the VM's
/// memory, disk in KiB/s. Smaller differences occur between any two samples.
const GROWN_CPU: f64 = 1.0;
const GROWN_MEM: f64 = 0.1;
const GROWN_DISK: f64 = 10.0;

/// All groups of both moments.
#[derive(Default)]
pub(super) struct Groups(BTreeMap<Key, Pair>);

/// What the processes of a group have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    name: String,
    user: Option<String>,
    unit: Option<String>,
    container: Option<String>,
}

/// A group at both moments.
#[derive(Default)]
struct Pair {
    before: Side,
    after: Side,
}

/// A group at one moment.
#[derive(Default)]
struct Side {
    usage: Option<GroupUsage>,
    /// The start of each process, by its pid.
    starts: HashMap<u32, u64>,
}

impl Groups {
    pub(super) fn add_before(&mut self, rows: &[ProcessRow]) {
        for row in rows {
            self.pair(row).before.add(row);
        }
    }

    pub(super) fn add_after(&mut self, rows: &[ProcessRow]) {
        for row in rows {
            self.pair(row).after.add(row);
        }
    }

    fn pair(&mut self, row: &ProcessRow) -> &mut Pair {
        self.0.entry(Key::of_row(row)).or_default()
    }

    /// Sorts the groups that changed into the lists of the answer.
    pub(super) fn sort_into(self, changes: &mut ProcessChanges, by: TopMeasure, limit: usize) {
        let is_rebooted = changes.rebooted == Some(true);
        let (mut came, mut went) = (Vec::new(), Vec::new());
        let (mut grew, mut restarted) = (Vec::new(), Vec::new());
        for (key, pair) in self.0 {
            let is_restarted = pair.is_restarted() && !is_rebooted;
            let group = pair.into_group(key);
            match (group.before, group.after) {
                (None, Some(_)) => came.push(group),
                (Some(_), None) => went.push(group),
                (Some(before), Some(after)) if has_grown(&before, &after) => grew.push(group),
                (Some(_), Some(_)) if is_restarted => restarted.push(group),
                _ => {}
            }
        }
        // All lists are in one reply, and the size of a reply is limited.
        let mut room = PageRoom::new(usize::MAX);
        changes.came = listed(came, by, limit, &mut room);
        changes.went = listed(went, by, limit, &mut room);
        changes.grew = listed(grew, by, limit, &mut room);
        changes.restarted = listed(restarted, by, limit, &mut room);
    }
}

impl Key {
    fn of_row(row: &ProcessRow) -> Self {
        // The scope of a session has another name in each session.
        let is_lasting = |unit: &String| {
            let kind = unit.rsplit_once('.').map(|(_, kind)| kind);
            kind != Some("scope")
        };
        Self {
            name: row.name.clone(),
            user: row.owner.user.clone(),
            unit: row.owner.unit.clone().filter(is_lasting),
            container: row.owner.container.clone(),
        }
    }
}

impl Pair {
    /// Number of processes that ran at both moments.
    fn kept(&self) -> u32 {
        let is_kept = |(pid, after_ms): (&u32, &u64)| {
            let before_ms = self.before.starts.get(pid);
            before_ms.is_some_and(|&before_ms| is_same_start(before_ms, *after_ms))
        };
        let kept = self.after.starts.iter().filter(|&process| is_kept(process));
        u32::try_from(kept.count()).unwrap_or(u32::MAX)
    }

    fn is_restarted(&self) -> bool {
        !self.before.starts.is_empty() && !self.after.starts.is_empty() && self.kept() == 0
    }

    fn into_group(self, key: Key) -> ChangedGroup {
        ChangedGroup {
            kept: self.kept(),
            name: key.name,
            user: key.user,
            unit: key.unit,
            container: key.container,
            before: self.before.rounded(),
            after: self.after.rounded(),
        }
    }
}

impl Side {
    fn add(&mut self, row: &ProcessRow) {
        let usage = self.usage.get_or_insert_default();
        usage.cpu_util += row.cpu_util;
        usage.mem += row.mem;
        usage.disk_read += row.disk_read;
        usage.disk_write += row.disk_write;
        match row.kind {
            ProcessRowKind::Process => {
                usage.processes = usage.processes.saturating_add(1);
                let started_ms = usage.started_ms.unwrap_or(row.started_ms);
                usage.started_ms = Some(started_ms.min(row.started_ms));
                self.starts.insert(row.pid, row.started_ms);
            }
            ProcessRowKind::Sum => {
                usage.processes = usage.processes.saturating_add(row.processes.unwrap_or(0));
            }
        }
    }

    fn rounded(&self) -> Option<GroupUsage> {
        self.usage.map(|usage| GroupUsage {
            cpu_util: tidy(usage.cpu_util),
            mem: tidy(usage.mem),
            disk_read: tidy(usage.disk_read),
            disk_write: tidy(usage.disk_write),
            ..usage
        })
    }
}

const fn disk(usage: &GroupUsage) -> f64 {
    usage.disk_read + usage.disk_write
}

fn has_grown(before: &GroupUsage, after: &GroupUsage) -> bool {
    after.cpu_util - before.cpu_util >= GROWN_CPU
        || after.mem - before.mem >= GROWN_MEM
        || disk(after) - disk(before) >= GROWN_DISK
}

/// By how much a group changed. A group without processes at one moment used nothing then.
fn change(group: &ChangedGroup, by: TopMeasure) -> f64 {
    let amount = |usage: Option<GroupUsage>| match (usage, by) {
        (None, _) => 0.0,
        (Some(usage), TopMeasure::Cpu) => usage.cpu_util,
        (Some(usage), TopMeasure::Mem) => usage.mem,
        (Some(usage), TopMeasure::Disk) => disk(&usage),
    };
    let (before, after) = (amount(group.before), amount(group.after));
    if group.after.is_none() {
        before
    } else {
        after - before
    }
}

/// The first groups of a list, those with the greatest change first. Groups with the same change stay sorted by name.
fn listed(mut groups: Vec<ChangedGroup>, by: TopMeasure, limit: usize, room: &mut PageRoom) -> ChangedGroups {
    let order = |one: &ChangedGroup, other: &ChangedGroup| -> Ordering {
        change(other, by).total_cmp(&change(one, by))
    };
    groups.sort_by(order);
    let total = groups.len() as u64;
    groups.truncate(limit);
    let fitting = groups.iter().take_while(|group| room.take_item(group)).count();
    groups.truncate(fitting);
    ChangedGroups { total, groups }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::metrics::ProcessOwner;

    use super::*;

    fn row(name: &str, pid: u32, mem: f64, unit: &str) -> ProcessRow {
        ProcessRow {
            name: name.to_owned(),
            pid,
            started_ms: 1000,
            mem,
            owner: ProcessOwner {
                unit: Some(unit.to_owned()),
                ..ProcessOwner::default()
            },
            ..ProcessRow::default()
        }
    }

    fn sorted(before: &[ProcessRow], after: &[ProcessRow], limit: usize) -> ProcessChanges {
        let mut groups = Groups::default();
        groups.add_before(before);
        groups.add_after(after);
        let mut changes = ProcessChanges::default();
        groups.sort_into(&mut changes, TopMeasure::Mem, limit);
        changes
    }

    #[test]
    fn session_scopes_do_not_separate_groups() {
        let changes = sorted(
            &[
                row("bash", 7, 1.0, "session-3.scope"),
                row("java", 8, 1.0, "a.service"),
            ],
            &[
                row("bash", 7, 1.0, "session-4.scope"),
                row("java", 8, 1.0, "b.service"),
            ],
            10,
        );
        let units = |groups: &ChangedGroups| -> Vec<Option<String>> {
            groups.groups.iter().map(|group| group.unit.clone()).collect()
        };
        assert_eq!(units(&changes.came), [Some("b.service".to_owned())]);
        assert_eq!(units(&changes.went), [Some("a.service".to_owned())]);
        assert_eq!((changes.grew.total, changes.restarted.total), (0, 0));
    }

    #[test]
    fn greatest_changes_are_listed_first_up_to_the_limit() {
        let unit = "x.service";
        let before = [
            row("slow", 1, 50.0, unit),
            row("fast", 2, 1.0, unit),
            row("same", 3, 9.0, unit),
        ];
        let after = [
            row("slow", 1, 51.0, unit),
            row("fast", 2, 20.0, unit),
            row("same", 3, 9.05, unit),
        ];
        let changes = sorted(&before, &after, 1);
        let first = &changes.grew.groups[0];
        assert_eq!((changes.grew.total, changes.grew.groups.len()), (2, 1));
        assert_eq!((first.name.as_str(), first.kept), ("fast", 1));
    }

    #[test]
    fn lists_together_fit_into_one_reply() {
        let long = |pid: u32| row(&format!("{pid:0>256}"), pid, f64::from(pid), "x.service");
        let rows: Vec<ProcessRow> = (1..=4000).map(long).collect();
        let changes = sorted(&[], &rows, 1000);
        assert_eq!((changes.came.total, changes.came.groups.len()), (4000, 1000));
        let changes = sorted(&[], &rows, 4000);
        assert_eq!(changes.came.total, 4000);
        let bytes = serde_json::to_vec(&changes).unwrap().len();
        assert!((700_000..800_000).contains(&bytes), "{bytes}");
    }
}
