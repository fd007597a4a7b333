//! The process rows.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use procfs::{FromRead, Uptime};
use shared::api::metrics::ProcessSample;
use tracing::warn;

use super::{
    SampleError, float, kib_per_second, percent,
    proc_files::{DiskBytes, ProcFiles, Stat, is_gone, process_ids},
    vm::kernel_stats,
};
use crate::select::Selection;

/// Takes the rows of processes.
///
/// A process is known by its pid *and* its start: a pid that came into use again between two readings gives the
/// last row of the old process and a row of the new one. A process that started and ended between two readings is
/// never seen. A process that was reported and has ended gives exactly one last row, with `shutdown_time`; its
/// rates and its memory are 0 there, since what it used last can no longer be read.
#[derive(Debug)]
pub struct ProcessSampler {
    selection: Selection,
    files: ProcFiles,
    clock: Clock,
    page_bytes: u64,
    tracked: HashMap<u32, Tracked>,
    /// Ended, reported before, and without their last row as yet.
    ended: Vec<ProcessSample>,
    /// When the previous reading began, and the same in clock ticks since boot.
    previous: Option<(Instant, u64)>,
    /// How many there have been.
    readings: u64,
}

/// A process as the previous reading saw it.
#[derive(Debug)]
struct Tracked {
    name: String,
    start_ticks: u64,
    cpu_ticks: u64,
    disk: Option<DiskBytes>,
    at: Instant,
    /// The number of the last reading that saw it.
    reading: u64,
    /// Whether a row of it was given out: only then it gets a last one.
    reported: bool,
}

impl ProcessSampler {
    /// A sampler that has read no process yet.
    pub fn new(selection: Selection, proc: PathBuf) -> Result<Self, SampleError> {
        let clock = Clock {
            ticks_per_second: rustix::param::clock_ticks_per_second().max(1),
            boot: kernel_stats(&proc)?.btime,
        };
        Ok(Self {
            selection,
            files: ProcFiles::new(proc),
            clock,
            page_bytes: rustix::param::page_size() as u64,
            tracked: HashMap::new(),
            ended: Vec::new(),
            previous: None,
            readings: 0,
        })
    }

    /// Reads all processes without giving out a row, so that the next reading has rates.
    pub fn prime(&mut self) -> Result<(), SampleError> {
        self.running(0)?;
        self.forget_ended();
        let denied = self
            .tracked
            .values()
            .filter(|process| process.disk.is_none())
            .count();
        if denied > 0 {
            warn!(
                processes = self.tracked.len(),
                denied,
                "the disk rates of some processes may not be read and are reported as 0.0; run the agent as root, or \
                 with CAP_SYS_PTRACE"
            );
        }
        Ok(())
    }

    /// The rows of the selected processes, then the last rows of those that have ended. Shares of memory are taken
    /// of `memory_bytes`.
    pub fn read(&mut self, memory_bytes: u64) -> Result<Vec<ProcessSample>, SampleError> {
        let mut rows = self.running(memory_bytes)?;
        self.selection.keep(&mut rows);
        for row in &rows {
            if let Some(process) = self.tracked.get_mut(&row.pid) {
                process.reported = true;
            }
        }
        rows.extend(self.forget_ended());
        Ok(rows)
    }

    /// The rows of all that run. Nothing is changed where the list of processes cannot be read: whoever were missing
    /// in it would seem to have ended.
    fn running(&mut self, memory_bytes: u64) -> Result<Vec<ProcessSample>, SampleError> {
        let began = (Instant::now(), self.clock.ticks_since_boot(self.files.root())?);
        let pids = process_ids(self.files.root())?;
        self.readings += 1;
        let rows = pids
            .into_iter()
            .filter_map(|pid| self.row(pid, memory_bytes))
            .collect();
        self.previous = Some(began);
        Ok(rows)
    }

    fn row(&mut self, pid: u32, memory_bytes: u64) -> Option<ProcessSample> {
        let (mut seen, rss_pages) = match self.files.stat(pid) {
            Ok(stat) if stat.has_ended() => return None,
            Ok(stat) => (Tracked::new(&stat, self.readings), stat.rss_pages),
            Err(error) if is_gone(&error) => return None,
            Err(_) => {
                // It is there all the same, only unreadable (out of file descriptors, say): not ended.
                if let Some(process) = self.tracked.get_mut(&pid) {
                    process.reading = self.readings;
                }
                return None;
            }
        };
        seen.disk = self.files.disk_bytes(pid);
        let known = self.tracked.remove(&pid);
        let baseline = match known {
            Some(known) if known.start_ticks == seen.start_ticks => {
                seen.reported = known.reported;
                Some(Baseline::of(&known))
            }
            other => {
                // The pid came into use again.
                self.ended.extend(other.and_then(|old| self.last_row(pid, old)));
                self.previous
                    .and_then(|(at, ticks)| (seen.start_ticks >= ticks).then_some(Baseline::zero(at)))
            }
        };
        let usage = baseline
            .map(|baseline| seen.usage_since(&baseline, self.clock))
            .unwrap_or_default();
        let row = ProcessSample {
            cmd: seen.name.clone(),
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
        };
        self.tracked.insert(pid, seen);
        Some(row)
    }

    /// Forgets all that the current reading did not see, and gives the last rows of those that were reported.
    fn forget_ended(&mut self) -> Vec<ProcessSample> {
        let readings = self.readings;
        let gone: Vec<_> = self
            .tracked
            .extract_if(|_, process| process.reading != readings)
            .collect();
        let mut ended = std::mem::take(&mut self.ended);
        ended.extend(
            gone.into_iter()
                .filter_map(|(pid, process)| self.last_row(pid, process)),
        );
        // Taken after the last look at any process: each has ended by then in truth.
        let now = unix_seconds(SystemTime::now());
        for row in &mut ended {
            row.shutdown_time = Some(now);
        }
        ended
    }

    /// The last row of a process that has ended, if it was reported.
    fn last_row(&self, pid: u32, process: Tracked) -> Option<ProcessSample> {
        process.reported.then(|| ProcessSample {
            cmd: process.name,
            pid,
            cpu_util: 0.0,
            mem: 0.0,
            disk_read: 0.0,
            disk_write: 0.0,
            running_time: self.clock.unix_seconds(process.start_ticks),
            shutdown_time: None,
        })
    }
}

impl Tracked {
    fn new(stat: &Stat<'_>, reading: u64) -> Self {
        Self {
            name: stat.name().into_owned(),
            start_ticks: stat.start_ticks,
            cpu_ticks: stat.cpu_ticks,
            disk: None,
            at: Instant::now(),
            reading,
            reported: false,
        }
    }

    fn usage_since(&self, baseline: &Baseline, clock: Clock) -> Usage {
        let elapsed = self.at - baseline.at;
        let cpu_ticks = self.cpu_ticks.saturating_sub(baseline.cpu_ticks);
        let cpu_seconds = float(cpu_ticks) / float(clock.ticks_per_second);
        let (disk_read, disk_write) = match (self.disk, baseline.disk) {
            (Some(now), Some(then)) => (
                kib_per_second(now.read.saturating_sub(then.read), elapsed),
                kib_per_second(now.written.saturating_sub(then.written), elapsed),
            ),
            _ => (0.0, 0.0),
        };
        Usage {
            cpu_util: percent(cpu_seconds, elapsed.as_secs_f64()),
            disk_read,
            disk_write,
        }
    }
}

/// What a process had used at an earlier moment.
struct Baseline {
    cpu_ticks: u64,
    disk: Option<DiskBytes>,
    at: Instant,
}

impl Baseline {
    fn of(process: &Tracked) -> Self {
        Self {
            cpu_ticks: process.cpu_ticks,
            disk: process.disk,
            at: process.at,
        }
    }

    /// Of a process that was not there yet.
    fn zero(at: Instant) -> Self {
        Self {
            cpu_ticks: 0,
            disk: Some(DiskBytes { read: 0, written: 0 }),
            at,
        }
    }
}

/// The rates of a process's row.
#[derive(Debug, Default)]
struct Usage {
    cpu_util: f64,
    disk_read: f64,
    disk_write: f64,
}

/// How the kernel counts time.
#[derive(Debug, Clone, Copy)]
struct Clock {
    ticks_per_second: u64,
    /// Unix seconds. Read once: the kernel's figure moves when the clock is set, and with it every start would.
    boot: u64,
}

impl Clock {
    /// Unix seconds of a moment in clock ticks since boot, to the hundredth, as in the document's samples.
    fn unix_seconds(self, ticks: u64) -> f64 {
        let whole = self.boot.saturating_add(ticks / self.ticks_per_second);
        let hundredths = ticks % self.ticks_per_second * 100 / self.ticks_per_second;
        float(whole.saturating_mul(100).saturating_add(hundredths)) / 100.0
    }

    fn ticks_since_boot(self, proc: &Path) -> Result<u64, SampleError> {
        let uptime = Uptime::from_file(proc.join("uptime"))?.uptime_duration();
        let fraction = u64::from(uptime.subsec_micros()) * self.ticks_per_second / 1_000_000;
        Ok(uptime
            .as_secs()
            .saturating_mul(self.ticks_per_second)
            .saturating_add(fraction))
    }
}

fn unix_seconds(moment: SystemTime) -> f64 {
    moment
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A `/proc` of processes made by hand.
    struct Proc(tempfile::TempDir);

    impl Proc {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let proc = Self(dir);
            proc.write("stat", "cpu 1 1 1 1\nctxt 1\nbtime 1482236500\nprocesses 1\n");
            proc.up(100);
            proc
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.0.path().join(name), text).unwrap();
        }

        /// Seconds since boot.
        fn up(&self, seconds: u64) {
            self.write("uptime", &format!("{seconds}.00 0.00\n"));
        }

        fn show(&self, pid: u32, start_ticks: u64, cpu_ticks: u64, disk: Option<(u64, u64)>) {
            self.show_as("S", pid, start_ticks, cpu_ticks, disk);
        }

        fn show_as(&self, state: &str, pid: u32, start_ticks: u64, cpu_ticks: u64, disk: Option<(u64, u64)>) {
            std::fs::create_dir_all(self.0.path().join(pid.to_string())).unwrap();
            let numbers = format!("1 1 1 0 -1 0 0 0 0 0 {cpu_ticks} 0 0 0 20 0 1 0 {start_ticks} 0 25 0");
            self.write(
                &format!("{pid}/stat"),
                &format!("{pid} (p{start_ticks}) {state} {numbers}\n"),
            );
            if let Some((read, written)) = disk {
                self.write(
                    &format!("{pid}/io"),
                    &format!("rchar: 9\nread_bytes: {read}\nwrite_bytes: {written}\n"),
                );
            }
        }

        fn end(&self, pid: u32) {
            std::fs::remove_dir_all(self.0.path().join(pid.to_string())).unwrap();
        }

        fn primed(&self) -> ProcessSampler {
            self.primed_for(Selection::All)
        }

        fn primed_for(&self, selection: Selection) -> ProcessSampler {
            let mut sampler = ProcessSampler::new(selection, self.0.path().to_owned()).unwrap();
            sampler.prime().unwrap();
            sampler
        }
    }

    /// As if the previous reading were ten seconds old.
    fn age(sampler: &mut ProcessSampler) {
        let older = |at: Instant| at.checked_sub(Duration::from_secs(10)).unwrap();
        sampler.previous = sampler.previous.map(|(at, ticks)| (older(at), ticks));
        for process in sampler.tracked.values_mut() {
            process.at = older(process.at);
        }
    }

    fn read(sampler: &mut ProcessSampler) -> Vec<ProcessSample> {
        let mut rows = sampler.read(1000 * 4096).unwrap();
        rows.sort_by_key(|row| (row.pid, row.shutdown_time.is_none()));
        rows
    }

    #[test]
    fn a_row_has_the_rates_since_the_previous_reading() {
        let proc = Proc::new();
        proc.show(7, 1607, 1000, Some((1024, 4096)));
        let mut sampler = proc.primed();
        age(&mut sampler);
        proc.show(7, 1607, 2500, Some((1024 + 20 * 1024, 4096)));
        let rows = read(&mut sampler);
        let expected = ProcessSample {
            cmd: "p1607".into(),
            pid: 7,
            cpu_util: 150.0,
            mem: 2.5,
            disk_read: 2.0,
            disk_write: 0.0,
            running_time: 1_482_236_516.07,
            shutdown_time: None,
        };
        assert_eq!(rows, [expected]);
    }

    #[test]
    fn what_a_new_process_used_it_used_since_the_previous_reading() {
        let proc = Proc::new();
        let mut sampler = proc.primed();
        age(&mut sampler);
        proc.show(8, 10_001, 500, Some((10 * 1024, 0)));
        // This one is older than the previous reading, which could not read it: what it used when is unknown.
        proc.show(9, 5, 500_000, Some((1 << 40, 0)));
        let rows = read(&mut sampler);
        assert_eq!((rows[0].cpu_util, rows[0].disk_read), (50.0, 1.0));
        assert_eq!((rows[1].cpu_util, rows[1].disk_read), (0.0, 0.0));
    }

    #[test]
    fn a_process_that_ended_gets_one_last_row() {
        let proc = Proc::new();
        proc.show(7, 1607, 0, None);
        let mut sampler = proc.primed();
        assert_eq!(read(&mut sampler)[0].shutdown_time, None);
        proc.end(7);
        let before = unix_seconds(SystemTime::now());
        let last = read(&mut sampler);
        assert_eq!(last.len(), 1);
        assert_eq!(
            (last[0].pid, last[0].cmd.as_str(), last[0].running_time),
            (7, "p1607", 1_482_236_516.07)
        );
        assert!(last[0].shutdown_time.unwrap() >= before);
        assert_eq!(read(&mut sampler), []);
    }

    #[test]
    fn a_zombie_has_ended() {
        let proc = Proc::new();
        proc.show(7, 1607, 0, None);
        let mut sampler = proc.primed();
        read(&mut sampler);
        proc.show_as("Z", 7, 1607, 0, None);
        assert!(read(&mut sampler)[0].shutdown_time.is_some());
        assert_eq!(read(&mut sampler), []);
    }

    #[test]
    fn a_pid_that_came_into_use_again_gives_the_last_row_and_the_new_process() {
        let proc = Proc::new();
        proc.show(7, 1607, 9000, Some((1 << 30, 0)));
        let mut sampler = proc.primed();
        read(&mut sampler);
        age(&mut sampler);
        proc.show(7, 11_000, 100, Some((0, 0)));
        let rows = read(&mut sampler);
        assert_eq!(rows.len(), 2);
        assert!(rows[0].cmd == "p1607" && rows[0].shutdown_time.is_some());
        assert!(rows[1].cmd == "p11000" && rows[1].shutdown_time.is_none());
        assert_eq!((rows[1].cpu_util, rows[1].running_time), (10.0, 1_482_236_610.0));
        assert_eq!(read(&mut sampler).len(), 1);
    }

    #[test]
    fn only_what_was_reported_gets_a_last_row() {
        let proc = Proc::new();
        proc.show(7, 1, 0, None);
        proc.show(8, 2, 0, None);
        let mut sampler = proc.primed_for(Selection::Top {
            count: 1,
            pinned: vec![],
        });
        // By memory they are equal: the older pid.
        assert_eq!(
            read(&mut sampler).iter().map(|row| row.pid).collect::<Vec<_>>(),
            [7]
        );
        proc.end(7);
        proc.end(8);
        assert_eq!(
            read(&mut sampler).iter().map(|row| row.pid).collect::<Vec<_>>(),
            [7]
        );
        assert_eq!(read(&mut sampler), []);
    }

    #[test]
    fn a_process_that_cannot_be_read_for_once_has_not_ended() {
        let proc = Proc::new();
        proc.show(7, 1607, 0, None);
        let mut sampler = proc.primed();
        read(&mut sampler);
        proc.write("7/stat", "half a li");
        assert_eq!(read(&mut sampler), []);
        proc.show(7, 1607, 0, None);
        assert_eq!(read(&mut sampler)[0].shutdown_time, None);
    }

    #[test]
    fn an_unreadable_list_ends_nobody() {
        let proc = Proc::new();
        proc.show(7, 1607, 0, None);
        let mut sampler = proc.primed();
        read(&mut sampler);
        let (here, away) = (proc.0.path().to_owned(), proc.0.path().with_extension("away"));
        std::fs::rename(&here, &away).unwrap();
        assert!(sampler.read(1).is_err());
        std::fs::rename(&away, &here).unwrap();
        assert_eq!(read(&mut sampler)[0].shutdown_time, None);
    }

    #[test]
    fn a_counter_that_went_back_gives_zero() {
        let proc = Proc::new();
        proc.show(7, 1607, 1000, Some((1000, 1000)));
        let mut sampler = proc.primed();
        age(&mut sampler);
        proc.show(7, 1607, 10, Some((0, 2000)));
        let rows = read(&mut sampler);
        assert_eq!(
            (rows[0].cpu_util, rows[0].disk_read, rows[0].disk_write),
            (0.0, 0.0, 0.1)
        );
    }
}
