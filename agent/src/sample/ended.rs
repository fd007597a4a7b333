//! Makes the rows of processes that ended since the previous sample.
//!
//! The time in the kernel's record of a process is a lower limit (see [`Exit::cpu_seconds`]). What the kernel added to the
//! times of the reaping processes is exact in sum, so the difference is shared out to the ended processes, in proportion
//! to what their records can lack. Without records, that time becomes one row for each reaping process.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use vmwatch_api::metrics::{OTHER_PROCESSES, ProcessOwner, ProcessSample, SumSample};

use super::{
    exits::{Exit, Exits, Group, missing},
    percent,
};

/// Maximum number of summed rows with different names and users in a sample; the others become one row.
const MAX_SUMS: usize = 500;

/// A process that ended since the previous sample.
#[derive(Debug)]
pub(super) struct Ended {
    /// The row, with a rate and CPU seconds that are computed at the end.
    pub(super) row: ProcessSample,
    /// CPU time in seconds that earlier samples saw.
    pub(super) earlier_seconds: f64,
    /// When `/proc` was last read.
    pub(super) read_at: Instant,
    /// Whether an earlier sample had a row of the process, so that it gets a last row in any case.
    pub(super) is_known: bool,
    /// CPU time since the previous sample; `None` if unknown.
    pub(super) cpu_seconds: Option<f64>,
    /// At most how many seconds the CPU time may lack.
    pub(super) missing: f64,
}

impl Ended {
    /// Adds what the kernel's record says about a process that an earlier pass over `/proc` found.
    pub(super) fn add_record(&mut self, exit: &Exit) {
        // The time of a process that has not been reaped is exact.
        if self.cpu_seconds.is_none() {
            self.cpu_seconds = Some((exit.cpu_seconds - self.earlier_seconds).max(0.0));
            self.missing = missing(exit.cpu_seconds, exit.elapsed);
        }
        self.row.shutdown_time = Some(exit.ended);
        self.row.exit_code = Some(exit.code);
    }

    /// The row of the process, for a sample at this time in Unix seconds.
    pub(super) fn into_row(self, now: f64, elapsed: Duration) -> ProcessSample {
        ProcessSample {
            cpu_util: percent(self.cpu_seconds.unwrap_or(0.0), elapsed.as_secs_f64()),
            cpu_seconds: self.cpu_seconds.map(micros),
            shutdown_time: self.row.shutdown_time.or(Some(now)),
            ..self.row
        }
    }
}

/// Shares out CPU time to ended processes; if records were lost, at most what the others can lack. Returns what remains,
/// which belongs to processes without records.
pub(super) fn share_out(seconds: f64, ended: &mut [Ended], exits: &mut Exits) -> f64 {
    let groups = exits.groups.values_mut();
    let known: f64 = ended
        .iter()
        .filter_map(|process| process.cpu_seconds)
        .sum::<f64>()
        + groups.map(|group| group.cpu_seconds).sum::<f64>();
    let surplus = seconds - known;
    let groups = exits.groups.values();
    let missing: f64 = ended.iter().map(|process| process.missing).sum::<f64>()
        + groups.map(|group| group.missing).sum::<f64>();
    if surplus <= 0.0 {
        return 0.0;
    }
    if missing <= 0.0 {
        return surplus;
    }
    // If records were lost, what these processes cannot have used is that of others.
    let shared = if exits.lost > 0 {
        surplus.min(missing)
    } else {
        surplus
    };
    for process in ended {
        if let Some(cpu_seconds) = &mut process.cpu_seconds {
            *cpu_seconds += shared * process.missing / missing;
        }
    }
    for group in exits.groups.values_mut() {
        group.cpu_seconds += shared * group.missing / missing;
    }
    surplus - shared
}

/// Summed rows by name and user.
#[derive(Debug)]
pub(super) struct Sums {
    rows: BTreeMap<(String, Option<String>), SumSample>,
    /// Whether all processes become one row.
    only_one: bool,
}

impl Sums {
    pub(super) const fn new(only_one: bool) -> Self {
        Self {
            rows: BTreeMap::new(),
            only_one,
        }
    }

    pub(super) fn add(&mut self, mut row: SumSample) {
        let key = (row.cmd.clone(), row.owner.user.clone());
        if self.only_one || self.rows.len() >= MAX_SUMS && !self.rows.contains_key(&key) {
            OTHER_PROCESSES.clone_into(&mut row.cmd);
            row.owner = ProcessOwner::default();
        }
        let key = (row.cmd.clone(), row.owner.user.clone());
        let Some(sum) = self.rows.get_mut(&key) else {
            self.rows.insert(key, row);
            return;
        };
        sum.processes = match (sum.processes, row.processes) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            _ => None,
        };
        sum.cpu_seconds += row.cpu_seconds;
        sum.mem += row.mem;
        sum.disk_read += row.disk_read;
        sum.disk_write += row.disk_write;
        let (owner, other) = (&mut sum.owner, row.owner);
        owner.inherited |= other.inherited;
        if owner.unit != other.unit {
            owner.unit = None;
        }
        if owner.container != other.container {
            owner.container = None;
        }
    }

    /// Adds a process that gets no row of its own.
    pub(super) fn add_process(&mut self, row: ProcessSample) {
        self.add(SumSample {
            cmd: row.cmd,
            processes: Some(1),
            cpu_util: 0.0,
            mem: row.mem,
            disk_read: row.disk_read,
            disk_write: row.disk_write,
            cpu_seconds: row.cpu_seconds.unwrap_or(0.0),
            owner: ProcessOwner {
                parent_pid: None,
                command_line: None,
                ..row.owner
            },
        });
    }

    /// Adds processes that the queue has added up.
    pub(super) fn add_group(
        &mut self,
        name: String,
        group: &Group,
        owner: ProcessOwner,
        rate: impl Fn(u64) -> f64,
    ) {
        self.add(SumSample {
            cmd: name,
            processes: Some(group.processes),
            cpu_seconds: group.cpu_seconds,
            disk_read: rate(group.read_bytes),
            disk_write: rate(group.written_bytes),
            owner,
            ..SumSample::default()
        });
    }

    /// The rows; `percent` converts CPU seconds to a usage, and `round` rounds sums of measures.
    pub(super) fn into_rows(
        self,
        percent: impl Fn(f64) -> f64,
        round: impl Fn(f64) -> f64,
    ) -> Vec<SumSample> {
        let finish = |row: SumSample| SumSample {
            cpu_util: percent(row.cpu_seconds),
            mem: round(row.mem),
            disk_read: round(row.disk_read),
            disk_write: round(row.disk_write),
            cpu_seconds: micros(row.cpu_seconds),
            ..row
        };
        self.rows.into_values().map(finish).collect()
    }
}

/// Rounds shared out CPU time to microseconds, which compress better.
pub(super) fn micros(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(cpu_seconds: Option<f64>, missing: f64) -> Ended {
        Ended {
            row: ProcessSample::default(),
            earlier_seconds: 0.0,
            read_at: Instant::now(),
            is_known: false,
            cpu_seconds,
            missing,
        }
    }

    #[test]
    fn time_that_records_lack_is_shared_out() {
        let mut processes = [ended(Some(50.0), 0.25), ended(Some(0.0), 0.75), ended(None, 0.0)];
        let mut exits = Exits::default();
        let group = Group {
            processes: 10,
            cpu_seconds: 1.0,
            missing: 1.0,
            ..Group::default()
        };
        exits.groups.insert(("sh".to_owned(), 0, 1), group);
        assert_eq!(share_out(53.0, &mut processes, &mut exits), 0.0);
        let seconds: Vec<_> = processes.iter().map(|process| process.cpu_seconds).collect();
        assert_eq!(seconds, [Some(50.25), Some(0.75), None]);
        assert_eq!(exits.groups[&("sh".to_owned(), 0, 1)].cpu_seconds, 2.0);
        // The records are a lower limit, for example if a parent ignores its ended children.
        assert_eq!(share_out(1.0, &mut processes, &mut exits), 0.0);
        assert_eq!(processes[0].cpu_seconds, Some(50.25));
        assert_eq!(share_out(1.5, &mut [], &mut Exits::default()), 1.5);
        let mut short = [ended(Some(0.0), 0.25)];
        let mut exits = Exits {
            lost: 1,
            ..Exits::default()
        };
        assert_eq!(share_out(20.0, &mut short, &mut exits), 19.75);
        assert_eq!(short[0].cpu_seconds, Some(0.25));
    }

    #[test]
    fn sums_have_what_all_their_processes_share() {
        let process = |user: &str, unit: &str, seconds| ProcessSample {
            cmd: "sh".to_owned(),
            pid: 7,
            cpu_seconds: Some(seconds),
            owner: ProcessOwner {
                user: Some(user.to_owned()),
                unit: Some(unit.to_owned()),
                parent_pid: Some(1),
                ..ProcessOwner::default()
            },
            ..ProcessSample::default()
        };
        let rows = [
            process("root", "a.service", 1.0),
            process("root", "a.service", 2.0),
            process("www", "a.service", 4.0),
            process("www", "b.service", 8.0),
        ];
        let (mut sums, mut one) = (Sums::new(false), Sums::new(true));
        for row in rows {
            sums.add_process(row.clone());
            one.add_process(row);
        }
        let rows = sums.into_rows(|seconds| seconds, |value| value);
        let found: Vec<_> = rows
            .iter()
            .map(|row| {
                (
                    row.owner.user.as_deref(),
                    row.owner.unit.as_deref(),
                    row.cpu_util,
                    row.processes,
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                (Some("root"), Some("a.service"), 3.0, Some(2)),
                (Some("www"), None, 12.0, Some(2))
            ]
        );
        let one = one.into_rows(|seconds| seconds, |value| value);
        assert_eq!((one.len(), one[0].cmd.as_str()), (1, OTHER_PROCESSES));
        assert_eq!((one[0].cpu_seconds, one[0].processes), (15.0, Some(4)));
    }
}
