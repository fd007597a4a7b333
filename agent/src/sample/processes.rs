//! Samples a VM's processes.

mod short_lived;
#[cfg(test)]
mod tests;
mod usage;

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tracing::{info, warn};
use vmwatch_api::{
    measures::one_decimal,
    metrics::{CpuSeconds, ProcessOwner, ProcessSample, ShortLived, SumSample},
};

use self::usage::{Baseline, Clock, Description, Tracked};
use super::{
    Roots, SampleError,
    ended::{Ended, Sums, share_out},
    exits::{Exit, ExitListener},
    float, kib_per_second,
    owner::Owners,
    percent,
    proc_files::{ProcFiles, is_gone, process_ids},
    reaped::{Counted, Reaped},
    system::{CpuTicks, SystemStat},
};
use crate::select::Selection;

/// Samples a VM's processes.
///
/// A process is identified by its pid *and* its start time. If a pid was reused between two samples, the sample has the
/// last row of the old process and a row of the new one. A process that was reported and has ended gets exactly one last
/// row, with `shutdown_time` and the CPU time since the previous sample. Its memory and disk rates are 0, because they can
/// no longer be read. A process that started and ended between two samples gets its only row from the kernel's record of
/// its end, or is part of a summed row.
#[derive(Debug)]
pub struct ProcessSampler {
    selection: Selection,
    roots: Roots,
    files: ProcFiles,
    owners: Owners,
    clock: Clock,
    page_bytes: u64,
    tracked: HashMap<u32, Tracked>,
    /// Processes that ended and whose pids were reused in the current pass over `/proc`.
    replaced: Vec<(u32, Tracked)>,
    /// The kernel's records of ended processes; `None` if it does not report to the agent.
    exits: Option<ExitListener>,
    /// Records of processes that ended after the current pass over `/proc` had read them. They belong to the next sample.
    held: Vec<Exit>,
    /// Maximum number of rows per sample for processes that no pass over `/proc` found.
    short_lived_rows: usize,
    reaped: Reaped,
    /// The CPU times of all processes in the current pass over `/proc`.
    counted: HashMap<u32, Counted>,
    /// The beginning of the previous pass over `/proc`.
    previous: Option<Pass>,
    /// The number of passes over `/proc` so far.
    passes: u64,
}

/// The processes of a sample.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProcessReading {
    /// Rows of the selected processes, followed by the last rows of ended processes.
    pub rows: Vec<ProcessSample>,
    /// CPU time of processes without rows of their own.
    pub sums: Vec<SumSample>,
    /// CPU time of the VM since the previous sample; `None` if there is none.
    pub vm_cpu: Option<CpuSeconds>,
    /// How processes that end between two samples are measured; `None` if nothing was sampled.
    pub short_lived: Option<ShortLived>,
    /// Number of times that records of ended processes were lost.
    pub lost: u32,
    /// CPU time in seconds that ended processes seem to have used, but that no row has, because the processes would then
    /// have used more than the VM.
    pub excess_seconds: f64,
}

/// The rows of running processes, and the CPU time of the others.
#[derive(Debug, Default)]
struct Running {
    rows: Vec<ProcessSample>,
    vm_cpu: Option<CpuSeconds>,
    /// The beginning of the previous pass over `/proc`, and the time since then.
    previous: Option<(Instant, Duration)>,
    /// CPU seconds of processes that ended since then, by the process that reaped them.
    reaped: BTreeMap<u32, f64>,
}

/// The beginning of a pass over `/proc`.
#[derive(Debug, Clone, Copy)]
struct Pass {
    at: Instant,
    /// Clock ticks since boot.
    ticks: u64,
    /// CPU time of the VM.
    cpu: CpuTicks,
}

impl ProcessSampler {
    /// Creates a process sampler. The only value read is the boot time.
    pub fn new(selection: Selection, roots: Roots) -> Result<Self, SampleError> {
        let clock = Clock {
            ticks_per_second: rustix::param::clock_ticks_per_second().max(1),
            boot: SystemStat::read(&roots.proc)?
                .boot
                .ok_or(SampleError::NoBootTime)?,
        };
        Ok(Self {
            selection,
            files: ProcFiles::new(roots.proc.clone()).map_err(SampleError::List)?,
            owners: Owners::new(&roots.root, false),
            roots,
            clock,
            page_bytes: rustix::param::page_size() as u64,
            tracked: HashMap::new(),
            replaced: Vec::new(),
            exits: None,
            held: Vec::new(),
            short_lived_rows: 200,
            reaped: Reaped::default(),
            counted: HashMap::new(),
            previous: None,
            passes: 0,
        })
    }

    /// Reports command lines as well, without secrets.
    pub fn report_command_lines(&mut self) {
        self.owners = Owners::new(&self.roots.root, true);
    }

    /// Reads the counters of all processes without returning rows, so the next call can compute rates.
    pub fn prime(&mut self) -> Result<(), SampleError> {
        self.running(0)?;
        self.ended_processes();
        if let Some(exits) = &self.exits {
            drop(exits.take());
        }
        // A process that ended during the pass does not count as unreadable.
        let unreadable =
            |(pid, process): &(&u32, &Tracked)| process.disk.is_none() && self.files.exist(**pid);
        let unreadable = self.tracked.iter().filter(unreadable).count();
        if unreadable > 0 {
            warn!(
                unreadable,
                processes = self.tracked.len(),
                "the disk counters of some processes cannot be read and are reported as 0; run the agent as root, or with both CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
            );
        }
        Ok(())
    }

    /// Listens to the kernel's records of ended processes; see [`super::Sampler::with_exit_records`].
    pub fn listen_to_exits(&mut self, rows: usize) {
        self.short_lived_rows = rows;
        match ExitListener::start() {
            Ok(exits) => {
                info!("the kernel reports processes that end, so their CPU time is recorded");
                self.exits = Some(exits);
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                warn!(
                    %error,
                    cause,
                    "the kernel does not report processes that end; their CPU time is estimated"
                );
            }
        }
    }

    /// Samples the processes. Memory usage is a percentage of `memory_bytes`.
    pub fn read(&mut self, memory_bytes: u64) -> Result<ProcessReading, SampleError> {
        let mut running = self.running(memory_bytes)?;
        let mut exits = self.take_exits();
        let mut ended = self.ended_processes();
        let owners: HashMap<u32, ProcessOwner> = ended
            .iter()
            .map(|process| (process.row.pid, process.row.owner.clone()))
            .collect();
        // This may lose further records.
        self.add_records(&mut ended, &mut exits, running.previous, &owners);
        let short_lived = match &self.exits {
            Some(_) if exits.lost == 0 => ShortLived::Recorded,
            _ => ShortLived::Estimated,
        };
        let (reaped, excess_seconds) = running.unexplained();
        let rest = share_out(reaped, &mut ended, &mut exits);
        let elapsed = running.previous.map_or(Duration::MAX, |(_, elapsed)| elapsed);
        let mut sums = Sums::new(matches!(self.selection, Selection::Top { .. }));
        if short_lived == ShortLived::Estimated {
            self.add_estimates(&mut sums, &running.reaped, rest, &ended);
        }
        for ((name, user, parent), group) in &exits.groups {
            let owner = self.inherited(*parent, *user, &exits, &owners);
            sums.add_group(name.clone(), group, owner, |bytes| kib_per_second(bytes, elapsed));
        }
        let last_rows = self.select(&mut running.rows, ended, &mut sums, elapsed);
        for row in &running.rows {
            if let Some(process) = self.tracked.get_mut(&row.pid) {
                process.reported = true;
            }
        }
        running.rows.extend(last_rows);
        let percent = |seconds| percent(seconds, elapsed.as_secs_f64());
        Ok(ProcessReading {
            rows: running.rows,
            sums: sums.into_rows(percent, one_decimal),
            vm_cpu: running.vm_cpu,
            short_lived: Some(short_lived),
            lost: exits.lost,
            excess_seconds,
        })
    }

    /// Decides which processes get rows of their own, and sums up the others. Returns the rows of ended processes.
    fn select(
        &self,
        running: &mut Vec<ProcessSample>,
        ended: Vec<Ended>,
        sums: &mut Sums,
        elapsed: Duration,
    ) -> Vec<ProcessSample> {
        // The CPU clock is read after all processes, so every missing process had really ended by this time.
        let now = unix_seconds(SystemTime::now());
        let (mut last_rows, mut unseen) = (Vec::new(), Vec::new());
        for process in ended {
            let is_known = process.is_known;
            let row = process.into_row(now, elapsed);
            if is_known {
                last_rows.push(row);
            } else if row.cpu_seconds.is_some() {
                unseen.push(row);
            }
        }
        match &self.selection {
            Selection::All => {
                unseen.sort_by(|one, other| {
                    other
                        .cpu_seconds
                        .unwrap_or(0.0)
                        .total_cmp(&one.cpu_seconds.unwrap_or(0.0))
                });
                let rest = unseen.split_off(self.short_lived_rows.min(unseen.len()));
                for row in rest {
                    sums.add_process(row);
                }
                last_rows.append(&mut unseen);
            }
            Selection::Top { .. } => {
                running.append(&mut unseen);
                let others = self.selection.split_off_others(running);
                for row in others {
                    sums.add_process(row);
                }
            }
        }
        last_rows
    }

    /// Returns the rows of all running processes. If the list of processes cannot be read completely, the state of the
    /// sampler does not change, because the missing processes would seem to have ended.
    fn running(&mut self, memory_bytes: u64) -> Result<Running, SampleError> {
        let stat = SystemStat::read(&self.roots.proc)?;
        let began = Pass {
            at: Instant::now(),
            ticks: self.clock.ticks_since_boot(&self.roots.proc)?,
            cpu: stat.ticks,
        };
        if let Some(boot) = stat.boot {
            self.clock.set_boot(boot);
        }
        let mut pids = process_ids(&self.roots.proc)?;
        self.reaped.sort(&mut pids);
        self.owners.refresh();
        self.passes += 1;
        self.counted = HashMap::with_capacity(pids.len());
        let rows = pids
            .into_iter()
            .filter_map(|pid| self.row(pid, memory_bytes))
            .collect();
        let previous = self.previous.replace(began);
        let vm_cpu = previous.map(|previous| self.clock.cpu_seconds(&began.cpu.since(&previous.cpu)));
        let reaped = self.reaped.advance(mem::take(&mut self.counted));
        Ok(Running {
            rows,
            vm_cpu,
            previous: previous.map(|previous| (previous.at, began.at - previous.at)),
            reaped: reaped
                .into_iter()
                .map(|(pid, ticks)| (pid, self.clock.seconds(ticks)))
                .collect(),
        })
    }

    fn row(&mut self, pid: u32, memory_bytes: u64) -> Option<ProcessSample> {
        let (mut seen, parent_pid, rss_pages) = match self.files.stat(pid) {
            Ok(stat) => {
                self.counted.insert(pid, Counted::of(&stat));
                if stat.has_ended() {
                    return None;
                }
                (Tracked::new(&stat, self.passes), stat.parent_pid, stat.rss_pages)
            }
            Err(error) if is_gone(&error) => return None,
            Err(_) => {
                // The process exists but cannot be read at the moment, for example because the agent has no free file
                // descriptor. It has not ended.
                if let Some(process) = self.tracked.get_mut(&pid) {
                    process.last_pass = self.passes;
                }
                if let Some(counted) = self.reaped.previous(pid) {
                    self.counted.insert(pid, counted);
                }
                return None;
            }
        };
        seen.disk = self.files.disk_bytes(pid);
        let known = self.tracked.remove(&pid);
        let mut description = None;
        let baseline = match known {
            Some(known) if known.start_ticks == seen.start_ticks => {
                seen.reported = known.reported;
                let baseline = Baseline::from_tracked(&known);
                description = Some(known.description);
                Some(baseline)
            }
            other => {
                // This is a new process. If its pid was reused, the previous process with this pid has ended.
                self.replaced.extend(other.map(|old| (pid, old)));
                self.previous
                    .and_then(|pass| (seen.start_ticks >= pass.ticks).then_some(Baseline::zero(pass.at)))
            }
        };
        self.describe(pid, parent_pid, &mut seen.description, description);
        let usage = baseline
            .map(|baseline| seen.usage_since(&baseline, self.clock))
            .unwrap_or_default();
        let row = ProcessSample {
            cmd: seen.description.name.clone(),
            pid,
            cpu_util: usage.cpu_util,
            mem: percent(
                float(rss_pages.saturating_mul(self.page_bytes)),
                float(memory_bytes),
            ),
            disk_read: usage.disk_read,
            disk_write: usage.disk_write,
            running_time: self.clock.unix_seconds(seen.start_ticks),
            shutdown_time: None,
            cpu_seconds: usage.cpu_seconds,
            exit_code: None,
            owner: seen.description.owner.clone(),
        };
        self.tracked.insert(pid, seen);
        Some(row)
    }

    /// Adds name and owner to the description of a process. They are read only in the first two samples of a process,
    /// because a service often gets its user and unit just after its start, and when its name or parent has changed.
    fn describe(&mut self, pid: u32, parent_pid: u32, seen: &mut Description, known: Option<Description>) {
        let mut readings = 0;
        if let Some(known) = known.filter(|known| known.comm == seen.comm) {
            if known.readings > 1 && known.owner.parent_pid == Some(parent_pid) {
                *seen = known;
                return;
            }
            readings = known.readings;
        }
        seen.name = self.files.name(pid, &seen.comm);
        seen.owner = self.owners.of(&mut self.files, pid, parent_pid);
        seen.readings = readings.saturating_add(1).min(2);
    }
}

fn unix_seconds(moment: SystemTime) -> f64 {
    moment
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
impl ProcessSampler {
    /// Makes the previous sample seem older.
    pub(super) fn age(&mut self, by: std::time::Duration) {
        let older = |at: Instant| at.checked_sub(by).unwrap();
        if let Some(previous) = &mut self.previous {
            previous.at = older(previous.at);
        }
        for process in self.tracked.values_mut() {
            process.at = older(process.at);
        }
    }
}
