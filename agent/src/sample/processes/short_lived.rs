//! Processes that ended since the previous sample: the kernel's records of them, or estimates without these records.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    time::{Duration, Instant},
};

use vmwatch_api::metrics::{OTHER_PROCESSES, ProcessOwner, ProcessSample, SumSample};

use super::{
    super::{
        ended::{Ended, Sums},
        exits::{Exit, Exits, missing},
        kib_per_second,
        reaped::Counted,
    },
    ProcessSampler, Running,
    usage::Tracked,
};
use crate::select::Selection;

/// Tolerance when a record is matched to a process of the previous pass: the computed start is late by the delay with
/// which the record was received.
const KNOWN_TOLERANCE: Duration = Duration::from_millis(500);
/// Maximum ratio of the processes' CPU time to the VM's. It exceeds 1, because the kernel measures the VM's time only at
/// clock ticks.
const CPU_TOLERANCE: f64 = 1.02;
/// Maximum number of ancestors of a process that are followed to find its owner.
const MAX_ANCESTORS: usize = 32;

impl ProcessSampler {
    /// Takes the kernel's records. Those of processes that the current pass over `/proc` found running are held until the
    /// next sample.
    pub(super) fn take_exits(&mut self) -> Exits {
        let Some(listener) = self.exits.take() else {
            return Exits::default();
        };
        let mut exits = listener.take();
        if listener.is_running() {
            self.exits = Some(listener);
        }
        exits.processes.append(&mut self.held);
        let (tracked, passes) = (&self.tracked, self.passes);
        let is_running = |exit: &mut Exit| {
            let process = tracked.get(&exit.pid);
            process.is_some_and(|process| process.last_pass == passes && exit.at >= process.at)
        };
        self.held = exits.processes.extract_if(.., is_running).collect();
        exits
    }

    /// Adds what the records say about ended processes, and the processes that no pass over `/proc` found.
    pub(super) fn add_records(
        &mut self,
        ended: &mut Vec<Ended>,
        exits: &mut Exits,
        previous: Option<(Instant, Duration)>,
        owners: &HashMap<u32, ProcessOwner>,
    ) {
        let Some((previous, elapsed)) = previous else {
            exits.groups.clear();
            return;
        };
        let places: HashMap<u32, usize> = ended
            .iter()
            .enumerate()
            .map(|(place, process)| (process.row.pid, place))
            .collect();
        let mut others = Vec::new();
        for exit in mem::take(&mut exits.processes) {
            // A pid may have been reused, but only one process had it in the previous pass.
            if let Some(known) = places.get(&exit.pid).and_then(|place| ended.get_mut(*place))
                && exit.started_before(known.read_at + KNOWN_TOLERANCE)
            {
                known.add_record(&exit);
            } else if !exit.started_before(previous) {
                others.push(exit);
            }
            // Otherwise the agent could not read the process earlier. Its CPU time before the previous sample is unknown.
        }
        // Of all processes, only the largest get rows of their own. A storm has many more.
        let rows = self.short_lived_rows;
        if matches!(self.selection, Selection::All) && others.len() > rows {
            others.select_nth_unstable_by(rows, |one, other| other.cpu_seconds.total_cmp(&one.cpu_seconds));
            for exit in others.drain(rows..) {
                exits.add_up(exit);
            }
        }
        for exit in others {
            let owner = self.inherited(exit.parent_pid, exit.user, exits, owners);
            ended.push(unseen(exit, owner, elapsed));
        }
    }

    /// The owner of a process that no pass over `/proc` found: its user, and the unit and container of its nearest
    /// sampled ancestor.
    pub(super) fn inherited(
        &self,
        parent_pid: u32,
        user: u32,
        exits: &Exits,
        ended: &HashMap<u32, ProcessOwner>,
    ) -> ProcessOwner {
        let mut owner = ProcessOwner {
            user: Some(self.owners.user(user)),
            parent_pid: Some(parent_pid),
            ..ProcessOwner::default()
        };
        let mut ancestor = parent_pid;
        for _ in 0..MAX_ANCESTORS {
            let running = self
                .tracked
                .get(&ancestor)
                .map(|process| &process.description.owner);
            if let Some(found) = running.or_else(|| ended.get(&ancestor)) {
                owner.unit.clone_from(&found.unit);
                owner.container.clone_from(&found.container);
                owner.inherited = owner.unit.is_some() || owner.container.is_some();
                break;
            }
            match exits.parents.get(&ancestor) {
                Some(parent) => ancestor = *parent,
                None => break,
            }
        }
        owner
    }

    /// Adds rows with the CPU time of ended processes without records, each with the name and owner of the process that
    /// reaped them.
    pub(super) fn add_estimates(
        &self,
        sums: &mut Sums,
        reaped: &BTreeMap<u32, f64>,
        seconds: f64,
        ended: &[Ended],
    ) {
        let total: f64 = reaped.values().sum();
        for (pid, part) in reaped {
            let cpu_seconds = seconds * part / total;
            if cpu_seconds <= 0.0 {
                continue;
            }
            let (cmd, owner) = self.reaper(*pid, ended);
            sums.add(SumSample {
                cmd,
                cpu_seconds,
                owner: ProcessOwner {
                    parent_pid: None,
                    command_line: None,
                    inherited: true,
                    ..owner
                },
                ..SumSample::default()
            });
        }
    }

    /// Name and owner of a process that reaped others. If it has ended, and no sample has seen it, they are those of its
    /// nearest sampled ancestor.
    pub(super) fn reaper(&self, pid: u32, ended: &[Ended]) -> (String, ProcessOwner) {
        let mut ancestor = pid;
        for _ in 0..MAX_ANCESTORS {
            if let Some(process) = self.tracked.get(&ancestor) {
                let description = &process.description;
                return (description.name.clone(), description.owner.clone());
            }
            if let Some(process) = ended.iter().find(|process| process.row.pid == ancestor) {
                return (process.row.cmd.clone(), process.row.owner.clone());
            }
            let Some(counted) = self.reaped.previous(ancestor) else {
                break;
            };
            ancestor = counted.parent_pid;
        }
        (OTHER_PROCESSES.to_owned(), ProcessOwner::default())
    }

    /// Removes and returns the processes that the current pass over `/proc` did not find.
    pub(super) fn ended_processes(&mut self) -> Vec<Ended> {
        let passes = self.passes;
        let gone = self.tracked.extract_if(|_, process| process.last_pass != passes);
        let mut ended = mem::take(&mut self.replaced);
        ended.extend(gone);
        ended
            .into_iter()
            .map(|(pid, process)| self.ended(pid, process))
            .collect()
    }

    pub(super) fn ended(&self, pid: u32, process: Tracked) -> Ended {
        // The last values of a process that has not been reaped can still be read.
        let zombie = self
            .reaped
            .previous(pid)
            .filter(|now| now.is_zombie && now.start_ticks == process.start_ticks);
        let since = |now: Counted| self.clock.seconds(now.own.saturating_sub(process.cpu_ticks));
        Ended {
            row: ProcessSample {
                cmd: process.description.name,
                pid,
                running_time: self.clock.unix_seconds(process.start_ticks),
                owner: process.description.owner,
                ..ProcessSample::default()
            },
            is_known: process.reported,
            earlier_seconds: self.clock.seconds(process.cpu_ticks),
            read_at: process.at,
            cpu_seconds: zombie.map(since),
            missing: 0.0,
        }
    }
}

/// The row of a process that no pass over `/proc` found.
fn unseen(exit: Exit, owner: ProcessOwner, elapsed: Duration) -> Ended {
    Ended {
        is_known: false,
        earlier_seconds: 0.0,
        read_at: exit.at,
        cpu_seconds: Some(exit.cpu_seconds),
        missing: missing(exit.cpu_seconds, exit.elapsed),
        row: ProcessSample {
            running_time: exit.started(),
            shutdown_time: Some(exit.ended),
            pid: exit.pid,
            cmd: exit.name,
            disk_read: kib_per_second(exit.read_bytes, elapsed),
            disk_write: kib_per_second(exit.written_bytes, elapsed),
            exit_code: Some(exit.code),
            owner,
            ..ProcessSample::default()
        },
    }
}

impl Running {
    /// The CPU time of ended processes in seconds, and what exceeds it. Processes that end during a pass over `/proc` can
    /// make the sum wrong, so it is at most what the rows of running processes leave of the VM's CPU time.
    pub(super) fn unexplained(&self) -> (f64, f64) {
        let reaped: f64 = self.reaped.values().sum();
        let Some(vm_cpu) = &self.vm_cpu else {
            return (0.0, 0.0);
        };
        let running: f64 = self.rows.iter().filter_map(|row| row.cpu_seconds).sum();
        let seconds = reaped.min(vm_cpu.total() * CPU_TOLERANCE - running).max(0.0);
        (seconds, reaped - seconds)
    }
}
