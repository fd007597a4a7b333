//! Compares the processes of a VM at two moments.

mod groups;

use vmwatch_api::{
    InstanceId,
    metrics::OTHER_PROCESSES,
    process_changes::{ChangesQuery, ComparedTable, ProcessChanges},
    processes::{ProcessRow, ProcessRowKind},
};

use self::groups::Groups;
use super::{
    Processes,
    starts::{boot, is_same_start},
};
use crate::{MetricsError, deadline::Deadline, reads::micros, store::RowKind};

/// The process table of a moment.
struct Table {
    at_ms: u64,
    /// Rows of running processes, and sums.
    rows: Vec<ProcessRow>,
}

impl Processes {
    /// Compares the process tables at or before the two moments.
    pub(crate) async fn changes(
        &self,
        query: &ChangesQuery,
        deadline: Deadline,
    ) -> Result<ProcessChanges, MetricsError> {
        let instance = &query.instance_id;
        let before = self.table_at(instance, query.moments.from_ms(), deadline).await?;
        let after = self.table_at(instance, query.moments.to_ms(), deadline).await?;
        Ok(compare(before.as_ref(), after.as_ref(), query))
    }

    /// Reads the newest process table at or before a moment.
    async fn table_at(
        &self,
        instance: &InstanceId,
        at_ms: u64,
        deadline: Deadline,
    ) -> Result<Option<Table>, MetricsError> {
        // A sample within the requested millisecond also counts as "at the moment".
        let end = micros(at_ms).saturating_add(1000);
        let sample = self
            .rows
            .sample_before(RowKind::Process, instance, end, deadline)
            .await?;
        let Some(sample) = sample else {
            return Ok(None);
        };
        let stored = self.rows_of(instance, &sample, None, deadline).await?;
        let rows = stored.into_iter().map(|stored| stored.row);
        Ok(Some(Table {
            at_ms: sample.at_ms(),
            rows: rows.filter(|row| row.ended_ms.is_none()).collect(),
        }))
    }
}

impl Table {
    fn summary(&self) -> ComparedTable {
        let processes = self.rows.iter().filter(|row| row.kind == ProcessRowKind::Process);
        ComparedTable {
            at_ms: self.at_ms,
            processes: processes.count() as u64,
            booted_ms: boot(&self.rows),
        }
    }

    /// Whether the agent reported only some of the processes.
    fn is_incomplete(&self) -> bool {
        let is_rest = |row: &ProcessRow| row.kind == ProcessRowKind::Sum && row.name == OTHER_PROCESSES;
        self.rows.iter().any(is_rest)
    }
}

fn compare(before: Option<&Table>, after: Option<&Table>, query: &ChangesQuery) -> ProcessChanges {
    let mut changes = ProcessChanges {
        before: before.map(Table::summary),
        after: after.map(Table::summary),
        ..ProcessChanges::default()
    };
    let (Some(before), Some(after)) = (before, after) else {
        return changes;
    };
    let boots = boot(&before.rows).zip(boot(&after.rows));
    changes.rebooted = boots.map(|(before_ms, after_ms)| !is_same_start(before_ms, after_ms));
    changes.incomplete = before.is_incomplete() || after.is_incomplete();
    let mut groups = Groups::default();
    groups.add_before(&before.rows);
    groups.add_after(&after.rows);
    groups.sort_into(&mut changes, query.by, usize::from(query.limit.get()));
    changes
}

#[cfg(test)]
mod tests {
    use vmwatch_api::{alerts::culprits::TopMeasure, history::TimeRange, process_changes::ChangedGroups};

    use super::*;

    fn row(name: &str, pid: u32, started_ms: u64, cpu_util: f64) -> ProcessRow {
        ProcessRow {
            name: name.to_owned(),
            pid,
            started_ms,
            cpu_util,
            ..ProcessRow::default()
        }
    }

    fn changes(before: Vec<ProcessRow>, after: Vec<ProcessRow>) -> ProcessChanges {
        let table = |at_ms, rows| Table { at_ms, rows };
        let query = ChangesQuery {
            instance_id: "vm-1".parse().unwrap(),
            moments: TimeRange::new(1, 2).unwrap(),
            by: TopMeasure::Cpu,
            limit: vmwatch_api::metrics::Limit::default(),
        };
        compare(Some(&table(1, before)), Some(&table(2, after)), &query)
    }

    fn names(groups: &ChangedGroups) -> Vec<(&str, u32)> {
        let each = groups.groups.iter();
        each.map(|group| (group.name.as_str(), group.kept)).collect()
    }

    #[test]
    fn each_kind_of_change_has_its_own_list() {
        let before = vec![
            row("init", 1, 1000, 0.0),
            row("nginx", 10, 2000, 1.0),
            row("nginx", 11, 2000, 1.0),
            row("backup", 20, 3000, 50.0),
            row("redis", 30, 4000, 2.0),
        ];
        let after = vec![
            row("init", 1, 1300, 0.0),
            row("nginx", 10, 2200, 30.0),
            row("nginx", 12, 90_000, 1.0),
            row("burner", 40, 90_000, 99.0),
            row("redis", 31, 95_000, 2.0),
        ];
        let found = changes(before, after);
        assert_eq!(found.rebooted, Some(false));
        assert_eq!(names(&found.came), [("burner", 0)]);
        assert_eq!(names(&found.went), [("backup", 0)]);
        assert_eq!(names(&found.grew), [("nginx", 1)]);
        assert_eq!(names(&found.restarted), [("redis", 0)]);
        let grew = &found.grew.groups[0];
        let usage = |usage: Option<vmwatch_api::process_changes::GroupUsage>| {
            usage.map(|usage| (usage.processes, usage.cpu_util, usage.started_ms))
        };
        assert_eq!(usage(grew.before), Some((2, 2.0, Some(2000))));
        assert_eq!(usage(grew.after), Some((2, 31.0, Some(2200))));
        assert_eq!(
            found.after.map(|table| (table.processes, table.booted_ms)),
            Some((5, Some(1300)))
        );
    }

    #[test]
    fn processes_are_compared_across_a_reboot() {
        let before = vec![
            row("init", 1, 1000, 0.0),
            row("nginx", 10, 2000, 1.0),
            row("old", 11, 2000, 1.0),
        ];
        // Another process has the pid of the former nginx.
        let after = vec![
            row("init", 1, 90_000, 0.0),
            row("new", 10, 91_000, 1.0),
            row("nginx", 12, 92_000, 1.0),
        ];
        let found = changes(before, after);
        assert_eq!(found.rebooted, Some(true));
        assert_eq!(
            (names(&found.came), names(&found.went)),
            (vec![("new", 0)], vec![("old", 0)])
        );
        assert_eq!((found.grew.total, found.restarted.total), (0, 0));
    }

    #[test]
    fn table_without_all_processes_is_marked_as_incomplete() {
        let sum = |name: &str| ProcessRow {
            kind: ProcessRowKind::Sum,
            processes: Some(3),
            ..row(name, 0, 0, 1.0)
        };
        let found = changes(vec![sum("sh")], vec![sum("sh")]);
        assert_eq!(
            (found.incomplete, found.rebooted, found.restarted.total),
            (false, None, 0)
        );
        let found = changes(vec![sum("sh")], vec![sum("sh"), sum(OTHER_PROCESSES)]);
        assert!(found.incomplete);
        assert_eq!(found.came.groups[0].after.map(|usage| usage.processes), Some(3));
        let nothing = compare(
            None,
            None,
            &ChangesQuery {
                instance_id: "vm-1".parse().unwrap(),
                moments: TimeRange::new(1, 2).unwrap(),
                by: TopMeasure::Mem,
                limit: vmwatch_api::metrics::Limit::default(),
            },
        );
        assert_eq!(nothing, ProcessChanges::default());
    }
}
