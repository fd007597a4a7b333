//! The sampling loop. It reads the kernel's files on threads for blocking work and with a time limit, because
//! `/proc/<pid>/io` blocks while the process is executing a new program, which may hang on a disk.

use std::{sync::Arc, time::Duration};

use metrics::counter;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use vmwatch_api::{
    InstanceId,
    metrics::{FilesystemSample, Sample},
};

use crate::{
    blocking_worker::{BlockingWorker, WorkerPanicked},
    config::Intervals,
    dropped,
    sample::{FilesystemSampler, ProcessReading, ProcessSampler, SampleError, Sampler, VmReading, VmSampler},
    schedule::Schedule,
    status::Status,
};

/// Time limit for reading the kernel's files, after which the loop continues without the values. The limit is at most
/// half of the VM's sampling interval.
const PATIENCE: Duration = Duration::from_secs(2);

/// The sampling loop: takes samples until shutdown.
#[derive(Debug)]
pub(crate) struct SampleLoop {
    instance_id: InstanceId,
    vm: BlockingWorker<VmSampler, Result<VmReading, SampleError>>,
    processes: BlockingWorker<ProcessSampler, Result<ProcessReading, SampleError>>,
    filesystems: BlockingWorker<FilesystemSampler, Vec<FilesystemSample>>,
    /// The sample that the process rows belong to if they are read only after the time limit.
    late: Option<Sample>,
    schedule: Schedule,
    patience: Duration,
    taken: mpsc::Sender<Sample>,
    status: Arc<Status>,
}

impl SampleLoop {
    pub(crate) fn new(
        instance_id: InstanceId,
        sampler: Sampler,
        intervals: Intervals,
        taken: mpsc::Sender<Sample>,
        status: Arc<Status>,
    ) -> Self {
        Self {
            instance_id,
            vm: BlockingWorker::new(sampler.vm),
            processes: BlockingWorker::new(sampler.processes),
            filesystems: BlockingWorker::new(sampler.filesystems),
            late: None,
            schedule: Schedule::start(intervals),
            patience: PATIENCE.min(intervals.vm / 2),
            taken,
            status,
        }
    }

    pub(crate) async fn run(mut self, shutdown: CancellationToken) -> Result<(), WorkerPanicked> {
        self.prime().await?;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                rows = self.processes.finished() => self.send_late(rows?),
                () = sleep_until(self.schedule.next()) => self.tick().await?,
            }
        }
    }

    /// Reads the counters once, so the first sample already has rates.
    async fn prime(&mut self) -> Result<(), WorkerPanicked> {
        self.processes
            .start(|sampler| sampler.prime().map(|()| ProcessReading::default()));
        self.read_vm().await?;
        Ok(())
    }

    async fn tick(&mut self) -> Result<(), WorkerPanicked> {
        let tick = self.schedule.wake(Instant::now());
        missed("late", tick.missed);
        let Some(reading) = self.read_vm().await? else {
            return Ok(());
        };
        let memory_bytes = reading.memory_bytes;
        let mut sample = reading.into_sample(&self.instance_id, ProcessReading::default(), Vec::new());
        if tick.processes {
            let filesystems_until = self.start_filesystems().await?;
            if self.processes.start(move |sampler| sampler.read(memory_bytes)) {
                match timeout(self.patience, self.processes.finished()).await {
                    Ok(read) => self.add_processes(&mut sample, read?),
                    Err(_) => self.defer_processes(&sample),
                }
            } else {
                missed("processes_hang", 1);
            }
            if let Some(until) = filesystems_until {
                self.add_filesystems(&mut sample, until).await?;
            }
        }
        self.send(sample);
        Ok(())
    }

    /// Starts to read the filesystems, and returns until when to wait for them; `None` if an earlier reading hangs. Rows
    /// that an earlier reading found too late are discarded.
    async fn start_filesystems(&mut self) -> Result<Option<Instant>, WorkerPanicked> {
        // An earlier reading may have finished in the meantime.
        if let Ok(late) = timeout(Duration::ZERO, self.filesystems.finished()).await {
            late?;
        }
        // Half of the time is left for reading the list of mounts.
        let limit = self.patience / 2;
        if !self.filesystems.start(move |sampler| sampler.read(limit)) {
            missed("filesystems_hang", 1);
            return Ok(None);
        }
        Ok(Some(Instant::now() + self.patience))
    }

    /// Adds the filesystems if they are read in time.
    async fn add_filesystems(&mut self, sample: &mut Sample, until: Instant) -> Result<(), WorkerPanicked> {
        match timeout_at(until, self.filesystems.finished()).await {
            Ok(read) => sample.filesystems = read?,
            Err(_) => missed("filesystems_hang", 1),
        }
        Ok(())
    }

    /// The VM's own values; `None` if they could not be read in time.
    async fn read_vm(&mut self) -> Result<Option<VmReading>, WorkerPanicked> {
        if !self.vm.start(VmSampler::read) {
            // If an earlier reading has finished in the meantime, its values are outdated. They are discarded and a new
            // reading is started.
            if timeout(Duration::ZERO, self.vm.finished()).await.is_err() || !self.vm.start(VmSampler::read) {
                missed("vm_hangs", 1);
                return Ok(None);
            }
        }
        let Ok(reading) = timeout(self.patience, self.vm.finished()).await else {
            warn!("reading the kernel's statistics timed out; skipping this sample");
            self.status
                .sampling(Err("reading the kernel's statistics timed out"));
            missed("vm_hangs", 1);
            return Ok(None);
        };
        let reading = reading?;
        match &reading {
            Ok(_) => self.status.sampling(Ok(())),
            Err(error) => self.failed(error),
        }
        Ok(reading.ok())
    }

    /// Sends the sample with only the VM's row now. The process rows follow later as further parts of the same
    /// sample.
    fn defer_processes(&mut self, sample: &Sample) {
        warn!("reading the processes timed out; their rows will be sent later");
        self.status.sampling(Err("reading the processes timed out"));
        self.late = Some(Sample {
            vm: None,
            part: 1,
            ..sample.clone()
        });
    }

    fn send_late(&mut self, read: Result<ProcessReading, SampleError>) {
        let Some(mut sample) = self.late.take() else {
            // Only the first reading belongs to no sample: it has no rows.
            let _ = read.inspect_err(|error| self.failed(error));
            return;
        };
        self.add_processes(&mut sample, read);
        if !sample.processes.is_empty() || !sample.sums.is_empty() {
            warn!(
                rows = sample.processes.len(),
                "reading the processes took too long; sending their rows separately from the VM's row"
            );
            self.send(sample);
        }
    }

    fn add_processes(&self, sample: &mut Sample, read: Result<ProcessReading, SampleError>) {
        match read {
            Ok(read) => {
                (sample.processes, sample.sums) = (read.rows, read.sums);
                (sample.vm_cpu, sample.short_lived) = (read.vm_cpu, read.short_lived);
                // A late reading has no VM row. The loss was logged.
                if let Some(vm) = &mut sample.vm {
                    vm.lost_exit_records = read.lost;
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&self, error: &SampleError) {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        warn!(cause, "{error}");
        self.status.sampling(Err("sampling failed; see the log"));
        missed("unreadable", 1);
    }

    fn send(&self, mut sample: Sample) {
        if let Some(vm) = &mut sample.vm {
            vm.dropped_parts = dropped::take();
        }
        counter!("vmwatch_agent_samples_total").increment(1);
        counter!("vmwatch_agent_process_rows_total").increment(sample.processes.len() as u64);
        // The queue is closed only while the agent ends after a panic, which is logged elsewhere.
        if let Err(TrySendError::Full(unsent)) = self.taken.try_send(sample) {
            error!("dropped a sample, because samples are taken faster than they can be spooled");
            dropped::note("queue_full", 1);
            dropped::give_back(unsent.vm.map_or(0, |vm| vm.dropped_parts));
        }
    }
}

fn missed(reason: &'static str, count: u64) {
    counter!("vmwatch_agent_ticks_missed_total", "reason" => reason).increment(count);
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf, process::Command};

    use tempfile::TempDir;

    use super::*;
    use crate::{sample::Roots, select::Selection};

    /// A fake `/proc` in a temporary folder, with one process whose pid is 7.
    struct FakeProc(TempDir);

    impl FakeProc {
        fn new() -> Self {
            let proc = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(proc.path("net")).unwrap();
            fs::create_dir_all(proc.path("7")).unwrap();
            fs::copy("/proc/meminfo", proc.path("meminfo")).unwrap();
            let write = |name: &str, text: &str| fs::write(proc.path(name), text).unwrap();
            write("stat", "cpu 1 1 1 1\nctxt 1\nbtime 1482236500\nprocesses 1\n");
            write("uptime", "100.00 0.00\n");
            write("diskstats", "");
            write("net/dev", "head\nhead\n");
            write(
                "7/stat",
                "7 (writer) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 1607 0 25 0\n",
            );
            write("7/io", IO);
            proc
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// Makes reads of the process's disk counters hang, as they would while the process executes a program from a
        /// hung disk.
        fn hang(&self) -> Hanging {
            let pipe = self.path("pipe");
            assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
            fs::hard_link(&pipe, self.path("other")).unwrap();
            fs::rename(self.path("other"), self.path("7/io")).unwrap();
            Hanging {
                pipe,
                file: self.path("7/io"),
            }
        }
    }

    const IO: &str = "read_bytes: 0\nwrite_bytes: 0\n";

    /// Unblocks the hanging reads when it is dropped. Otherwise the test's runtime would wait forever for the blocked
    /// thread.
    struct Hanging {
        pipe: PathBuf,
        file: PathBuf,
    }

    impl Drop for Hanging {
        fn drop(&mut self) {
            let next = self.file.with_extension("next");
            fs::write(&next, IO).unwrap();
            fs::rename(&next, &self.file).unwrap();
            fs::write(&self.pipe, IO).unwrap();
        }
    }

    #[tokio::test]
    async fn hanging_process_delays_only_process_rows() {
        let proc = FakeProc::new();
        let id: InstanceId = "vm-1".parse().unwrap();
        let roots = Roots {
            proc: proc.path(""),
            sys: proc.path("no-devices"),
            root: proc.path("no-root"),
        };
        let sampler = Sampler::new(id.clone(), "+00:00".parse().unwrap(), Selection::All, roots).unwrap();
        let intervals = Intervals {
            vm: Duration::from_millis(100),
            vm_per_process: 1,
        };
        let (taken, mut receiver) = mpsc::channel(1000);
        let status = Arc::new(Status::default());
        let shutdown = CancellationToken::new();
        let sampling = SampleLoop::new(id, sampler, intervals, taken, Arc::clone(&status));
        let sampling = tokio::spawn(sampling.run(shutdown.clone()));
        let mut next_where = async |wanted: fn(&Sample) -> bool| {
            let found = async {
                loop {
                    let sample = receiver.recv().await.unwrap();
                    if wanted(&sample) {
                        return sample;
                    }
                }
            };
            timeout(Duration::from_secs(20), found).await.unwrap()
        };
        let has_processes = |sample: &Sample| sample.vm.is_some() && sample.processes.len() == 1;
        let has_only_vm = |sample: &Sample| sample.vm.is_some() && sample.processes.is_empty();
        next_where(has_processes).await;
        assert_eq!(status.ready(), Ok(()));

        let hanging = proc.hang();
        let first = next_where(has_only_vm).await;
        for _ in 0..3 {
            next_where(has_only_vm).await;
        }
        drop(hanging);
        let late = next_where(|sample| sample.vm.is_none()).await;
        assert_eq!(late.create_date, first.create_date);
        assert_eq!((first.part, late.part), (0, 1));
        assert_eq!((late.processes.len(), late.processes[0].pid), (1, 7));
        next_where(has_processes).await;

        shutdown.cancel();
        sampling.await.unwrap().unwrap();
    }
}
