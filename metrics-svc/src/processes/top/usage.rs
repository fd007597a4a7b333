//! Adds up the process rows of a time range by process.

use std::{collections::HashMap, ops::RangeInclusive, time::Duration};

use vmwatch_api::{
    alerts::culprits::{TopMeasure, TopProcess, TopReply},
    processes::ProcessRowKind,
};

use super::super::{row::StoredProcess, series::tidy};
use crate::{names::NameMatch, reads::Row};

/// Maximum time that the rates of a sample cover, in microseconds: one day.
const MAX_INTERVAL: i64 = 86_400_000_000;

/// What the processes of a VM used in a time range.
pub(super) struct Usage {
    measure: TopMeasure,
    /// Only processes with this name are listed. The rows of the others still show when samples were taken.
    name: Option<NameMatch>,
    samples: Vec<Sample>,
    /// Index of each sample by its `create_date`.
    by_date: HashMap<String, usize>,
    processes: Vec<Used>,
    /// Index of each process.
    by_key: HashMap<Key, usize>,
    rates: Vec<Rate>,
}

/// A sample of processes.
struct Sample {
    /// Effective date, Unix microseconds.
    at: i64,
    /// CPU seconds of the VM since the previous sample.
    vm_cpu: Option<f64>,
}

/// What identifies the rows of one process, or of one sum of processes.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    Process { pid: u32, started_ms: u64 },
    Sum { name: String, user: Option<String> },
}

/// What one process used.
struct Used {
    process: TopProcess,
    /// Effective date of the row that name and owner are from.
    described: i64,
    /// The part of the amount that is from samples in which the VM's amount is known.
    comparable: f64,
}

/// Usage per second in the time before a sample. Its length is known when all samples have been read.
struct Rate {
    process: usize,
    sample: usize,
    per_second: f64,
}

/// A value of the VM in one sample.
pub(super) struct VmValue {
    /// Effective date, Unix microseconds.
    pub(super) at: i64,
    pub(super) value: f64,
}

impl Usage {
    pub(super) fn new(measure: TopMeasure, name: Option<NameMatch>) -> Self {
        Self {
            measure,
            name,
            samples: Vec::new(),
            by_date: HashMap::new(),
            processes: Vec::new(),
            by_key: HashMap::new(),
            rates: Vec::new(),
        }
    }

    /// Adds a row.
    pub(super) fn add(&mut self, row: Row, stored: StoredProcess) {
        let at = row.effective;
        let sample = self.sample(row, &stored);
        if self
            .name
            .as_ref()
            .is_some_and(|name| !name.matches(&stored.row.name))
        {
            return;
        }
        let is_comparable = self
            .samples
            .get(sample)
            .is_some_and(|sample| sample.vm_cpu.is_some());
        let (cpu_seconds, cpu_util) = (stored.row.cpu_seconds, stored.row.cpu_util);
        let (mem, disk) = (stored.row.mem, stored.row.disk_read + stored.row.disk_write);
        let runs = stored.row.ended_ms.is_none();
        let index = self.process(at, stored);
        let (amount, per_second) = match self.measure {
            TopMeasure::Cpu => match cpu_seconds {
                Some(seconds) => (seconds, 0.0),
                None => (0.0, cpu_util / 100.0),
            },
            TopMeasure::Mem if runs => (mem, 0.0),
            TopMeasure::Mem => (0.0, 0.0),
            TopMeasure::Disk => (0.0, disk),
        };
        if let Some(used) = self.processes.get_mut(index) {
            used.add(amount, is_comparable);
        }
        if per_second > 0.0 {
            self.rates.push(Rate {
                process: index,
                sample,
                per_second,
            });
        }
    }

    /// Returns the index of the sample that a row belongs to.
    fn sample(&mut self, row: Row, stored: &StoredProcess) -> usize {
        let next = self.samples.len();
        let index = *self.by_date.entry(row.create_date).or_insert(next);
        if index == next {
            let vm_cpu = stored.vm_cpu.map(|cpu| cpu.total());
            let at = row.effective;
            self.samples.push(Sample { at, vm_cpu });
        }
        index
    }

    /// Returns the index of the process that a row describes.
    fn process(&mut self, at: i64, stored: StoredProcess) -> usize {
        let row = stored.row;
        let key = match row.kind {
            ProcessRowKind::Process => Key::Process {
                pid: row.pid,
                started_ms: row.started_ms,
            },
            ProcessRowKind::Sum => Key::Sum {
                name: row.name.clone(),
                user: row.owner.user.clone(),
            },
        };
        let next = self.processes.len();
        let index = *self.by_key.entry(key).or_insert(next);
        if index == next {
            self.processes.push(Used {
                process: TopProcess {
                    kind: row.kind,
                    name: row.name,
                    pid: row.pid,
                    started_ms: row.started_ms,
                    processes: row.processes,
                    owner: row.owner,
                    amount: 0.0,
                    share: None,
                    exit_code: row.exit_code,
                    ended_ms: row.ended_ms,
                },
                described: at,
                comparable: 0.0,
            });
            return index;
        }
        if let Some(Used {
            process, described, ..
        }) = self.processes.get_mut(index)
        {
            process.processes = process.processes.max(row.processes);
            process.ended_ms = process.ended_ms.or(row.ended_ms);
            process.exit_code = process.exit_code.or(row.exit_code);
            // A process changes its name when it executes another program.
            if at > *described {
                *described = at;
                process.name = row.name;
                process.owner = row.owner;
            }
        }
        index
    }

    /// Effective dates of the first and the last sample.
    pub(super) fn times(&self) -> Option<RangeInclusive<i64>> {
        let times = || self.samples.iter().map(|sample| sample.at);
        Some(times().min()?..=times().max()?)
    }

    /// Whether [`Usage::into_reply`] needs the time of the sample before the first one.
    pub(super) const fn needs_intervals(&self) -> bool {
        !self.rates.is_empty()
    }

    /// Returns the greatest processes. `before` is the effective date of the sample before the first one.
    pub(super) fn into_reply(mut self, before: Option<i64>, vm: &[VmValue], limit: usize) -> TopReply {
        let times: Vec<i64> = self.samples.iter().map(|sample| sample.at).collect();
        let seconds = intervals(&times, before);
        for rate in &self.rates {
            let is_comparable = self
                .samples
                .get(rate.sample)
                .is_some_and(|sample| sample.vm_cpu.is_some());
            if let (Some(used), Some(seconds)) =
                (self.processes.get_mut(rate.process), seconds.get(rate.sample))
            {
                used.add(rate.per_second * seconds, is_comparable);
            }
        }
        let total = self.total(before, vm);
        let (measure, samples) = (self.measure, self.samples.len());
        let is_listed = |used: &Used| used.process.amount > 0.0 || self.name.is_some();
        let mut processes: Vec<TopProcess> = self
            .processes
            .into_iter()
            .filter(is_listed)
            .map(|used| used.finish(measure, samples, total))
            .collect();
        processes.sort_by(|one, other| {
            let by_amount = other.amount.total_cmp(&one.amount);
            by_amount.then_with(|| {
                (one.pid, one.started_ms, &one.name).cmp(&(other.pid, other.started_ms, &other.name))
            })
        });
        processes.truncate(limit);
        TopReply {
            samples: samples as u64,
            total: total.map(tidy),
            processes,
            partial: false,
        }
    }

    /// The VM's amount; `None` if it is not known.
    fn total(&self, before: Option<i64>, vm: &[VmValue]) -> Option<f64> {
        match self.measure {
            TopMeasure::Cpu => {
                let known = || self.samples.iter().filter_map(|sample| sample.vm_cpu);
                known().next().is_some().then(|| known().sum())
            }
            TopMeasure::Mem | TopMeasure::Disk if vm.is_empty() => None,
            TopMeasure::Mem => {
                let sum: f64 = vm.iter().map(|row| row.value).sum();
                Some(sum / count(vm.len()))
            }
            TopMeasure::Disk => {
                let times: Vec<i64> = vm.iter().map(|row| row.at).collect();
                let seconds = intervals(&times, before);
                Some(
                    vm.iter()
                        .zip(seconds)
                        .map(|(row, seconds)| row.value * seconds)
                        .sum(),
                )
            }
        }
    }
}

impl Used {
    fn add(&mut self, amount: f64, is_comparable: bool) {
        self.process.amount += amount;
        if is_comparable {
            self.comparable += amount;
        }
    }

    fn finish(self, measure: TopMeasure, samples: usize, total: Option<f64>) -> TopProcess {
        let mut process = self.process;
        let share = match measure {
            TopMeasure::Cpu => total.map(|total| self.comparable / total),
            TopMeasure::Mem => {
                process.amount /= count(samples);
                Some(process.amount / 100.0)
            }
            TopMeasure::Disk => total.map(|total| process.amount / total),
        };
        process.amount = tidy(process.amount);
        // Clocks of samples and rounded values may make a sum a little larger than the VM's.
        process.share = share
            .filter(|share| share.is_finite())
            .map(|share| tidy(share.min(1.0)));
        process
    }
}

/// The time in seconds that each of these samples (effective dates, in any order) covers: the time since the previous one.
/// For the first one it is the time to the next one if no earlier sample is known.
fn intervals(times: &[i64], before: Option<i64>) -> Vec<f64> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let (first, second) = (sorted.first().copied(), sorted.get(1).copied());
    let before = before.or_else(|| Some(first? - (second? - first?)));
    let seconds = |at: &i64| {
        let earlier = sorted.partition_point(|other| other < at).checked_sub(1);
        let previous = earlier.map_or(before, |earlier| sorted.get(earlier).copied());
        let micros = at.saturating_sub(previous?).clamp(0, MAX_INTERVAL);
        Some(Duration::from_micros(u64::try_from(micros).ok()?).as_secs_f64())
    };
    times.iter().map(|at| seconds(at).unwrap_or(0.0)).collect()
}

/// A number of samples, for a mean.
fn count(samples: usize) -> f64 {
    u32::try_from(samples).map_or(f64::INFINITY, f64::from)
}

#[cfg(test)]
mod tests {
    use vmwatch_api::{
        metrics::{CpuSeconds, ProcessOwner},
        processes::ProcessRow,
    };

    use super::*;

    const SECOND: i64 = 1_000_000;

    fn add(usage: &mut Usage, at: i64, vm_cpu: Option<f64>, row: ProcessRow) {
        let stored = StoredProcess {
            id: None,
            row,
            vm_cpu: vm_cpu.map(|user| CpuSeconds {
                user,
                ..CpuSeconds::default()
            }),
            short_lived: None,
        };
        let row = Row {
            effective: at * SECOND,
            create_date: format!("second {at}"),
            id: None,
            document: bson::RawDocumentBuf::new(),
        };
        usage.add(row, stored);
    }

    fn process(name: &str, pid: u32) -> ProcessRow {
        ProcessRow {
            name: name.to_owned(),
            pid,
            started_ms: 5,
            ..ProcessRow::default()
        }
    }

    fn amounts(reply: &TopReply) -> Vec<(&str, u32, f64, Option<f64>)> {
        let each = reply.processes.iter();
        each.map(|found| (found.name.as_str(), found.pid, found.amount, found.share))
            .collect()
    }

    #[test]
    fn cpu_seconds_are_added_by_process_and_compared_with_the_vm() {
        let mut usage = Usage::new(TopMeasure::Cpu, None);
        for (at, burnt) in [(10, 8.0), (20, 9.0)] {
            let burner = ProcessRow {
                cpu_seconds: Some(burnt),
                ..process("burner", 7)
            };
            add(&mut usage, at, Some(20.0), burner);
        }
        // The same pid belongs to another process.
        let reused = ProcessRow {
            started_ms: 9,
            cpu_seconds: Some(2.0),
            ended_ms: Some(15),
            exit_code: Some(137),
            ..process("reused", 7)
        };
        add(&mut usage, 20, Some(20.0), reused);
        add(&mut usage, 20, Some(20.0), process("idle", 8));
        assert!(!usage.needs_intervals());
        let reply = usage.into_reply(None, &[], 10);
        assert_eq!((reply.samples, reply.total), (2, Some(40.0)));
        assert_eq!(
            amounts(&reply),
            [("burner", 7, 17.0, Some(0.425)), ("reused", 7, 2.0, Some(0.05))]
        );
        let ended = &reply.processes[1];
        assert_eq!((ended.ended_ms, ended.exit_code), (Some(15), Some(137)));
    }

    #[test]
    fn usage_is_multiplied_by_the_interval_if_cpu_seconds_are_unknown() {
        let rows = [30, 10, 20].map(|at| {
            let cpu_util = if at == 10 { 50.0 } else { 100.0 };
            (
                at,
                ProcessRow {
                    cpu_util,
                    ..process("burner", 7)
                },
            )
        });
        // The first sample covers the time since the sample before it or, if there is none, as much as the second one.
        for (before, first) in [(Some(4 * SECOND), 3.0), (None, 5.0)] {
            let mut usage = Usage::new(TopMeasure::Cpu, None);
            for (at, row) in rows.clone() {
                add(&mut usage, at, None, row);
            }
            assert!(usage.needs_intervals());
            let reply = usage.into_reply(before, &[], 10);
            assert_eq!(amounts(&reply), [("burner", 7, 20.0 + first, None)]);
            assert_eq!(reply.total, None);
        }
    }

    #[test]
    fn share_is_that_of_samples_with_a_known_total() {
        let mut usage = Usage::new(TopMeasure::Cpu, None);
        let row = ProcessRow {
            cpu_seconds: Some(5.0),
            ..process("burner", 7)
        };
        add(&mut usage, 10, None, row.clone());
        add(&mut usage, 20, Some(10.0), row);
        let reply = usage.into_reply(None, &[], 10);
        assert_eq!(amounts(&reply), [("burner", 7, 10.0, Some(0.5))]);
    }

    #[test]
    fn memory_is_the_mean_of_all_samples_without_that_of_ended_processes() {
        let mut usage = Usage::new(TopMeasure::Mem, None);
        let of = |pid, mem, ended_ms| ProcessRow {
            mem,
            ended_ms,
            ..process("hoarder", pid)
        };
        add(&mut usage, 10, None, of(1, 40.0, None));
        add(&mut usage, 20, None, of(1, 60.0, None));
        add(&mut usage, 20, None, of(2, 30.0, None));
        add(&mut usage, 20, None, of(3, 90.0, Some(15)));
        let vm = [70.0, 90.0].map(|value| VmValue { at: 10, value });
        let reply = usage.into_reply(None, &vm, 10);
        assert_eq!(reply.total, Some(80.0));
        assert_eq!(
            amounts(&reply),
            [("hoarder", 1, 50.0, Some(0.5)), ("hoarder", 2, 15.0, Some(0.15))]
        );
    }

    #[test]
    fn disk_rates_are_multiplied_by_the_intervals_of_their_samples() {
        let mut usage = Usage::new(TopMeasure::Disk, None);
        for at in [60, 120] {
            let writer = ProcessRow {
                disk_read: 1.0,
                disk_write: 9.0,
                ..process("writer", 1)
            };
            add(&mut usage, at, None, writer);
        }
        // The VM is sampled more often than its processes.
        let vm = (1..=6).map(|index| VmValue {
            at: index * 20 * SECOND,
            value: 20.0,
        });
        let reply = usage.into_reply(Some(0), &vm.collect::<Vec<_>>(), 10);
        assert_eq!(reply.total, Some(2400.0));
        assert_eq!(amounts(&reply), [("writer", 1, 1200.0, Some(0.5))]);
    }

    #[test]
    fn summed_rows_are_added_by_name_and_user() {
        let mut usage = Usage::new(TopMeasure::Cpu, None);
        let sum = |user: &str, processes, cpu_seconds| ProcessRow {
            kind: ProcessRowKind::Sum,
            processes,
            name: "cc1".to_owned(),
            cpu_seconds: Some(cpu_seconds),
            owner: ProcessOwner {
                user: Some(user.to_owned()),
                ..ProcessOwner::default()
            },
            ..ProcessRow::default()
        };
        for (at, user, processes, seconds) in [
            (10, "root", Some(3), 1.0),
            (20, "root", Some(8), 2.0),
            (20, "ci", None, 9.0),
        ] {
            add(&mut usage, at, Some(100.0), sum(user, processes, seconds));
        }
        let reply = usage.into_reply(None, &[], 10);
        let found: Vec<_> = reply
            .processes
            .iter()
            .map(|found| (found.owner.user.as_deref(), found.processes, found.amount))
            .collect();
        assert_eq!(found, [(Some("ci"), None, 9.0), (Some("root"), Some(8), 3.0)]);
    }

    #[test]
    fn selected_name_is_listed_even_without_usage_and_compared_with_the_whole_vm() {
        let mut usage = Usage::new(TopMeasure::Cpu, Some(NameMatch::exact("nginx")));
        let burner = ProcessRow {
            cpu_seconds: Some(9.0),
            ..process("burner", 7)
        };
        add(&mut usage, 10, Some(10.0), burner);
        add(&mut usage, 10, Some(10.0), process("nginx", 8));
        add(&mut usage, 20, Some(10.0), process("burner", 7));
        let reply = usage.into_reply(None, &[], 10);
        assert_eq!((reply.samples, reply.total), (2, Some(20.0)));
        assert_eq!(amounts(&reply), [("nginx", 8, 0.0, Some(0.0))]);
    }

    #[test]
    fn process_has_the_name_of_its_newest_row() {
        let mut usage = Usage::new(TopMeasure::Cpu, None);
        for (at, name) in [(20, "bash"), (30, "pg_restore"), (10, "sh")] {
            let row = ProcessRow {
                cpu_seconds: Some(1.0),
                ..process(name, 7)
            };
            add(&mut usage, at, None, row);
        }
        assert_eq!(
            amounts(&usage.into_reply(None, &[], 10)),
            [("pg_restore", 7, 3.0, None)]
        );
    }
}
