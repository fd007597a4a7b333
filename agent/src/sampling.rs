//! The loop that samples. What reads the kernel's files runs on threads of its own and is waited for only so long:
//! `/proc/<pid>/io` waits for a process that is starting a program, which may hang on a disk.

use std::{sync::Arc, time::Duration};

use metrics::counter;
use shared::api::{
    InstanceId,
    metrics::{ProcessSample, Sample},
};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::{
    config::Intervals,
    sample::{ProcessSampler, SampleError, Sampler, VmReading, VmSampler},
    schedule::Schedule,
    seat::{Lost, Seat},
    ship::Taken,
    status::Status,
};

/// How long a reading may take before the loop goes on without it; less where the interval is short.
const PATIENCE: Duration = Duration::from_secs(2);

/// Samples until shutdown.
#[derive(Debug)]
pub(crate) struct SampleLoop {
    instance_id: InstanceId,
    vm: Seat<VmSampler, Result<VmReading, SampleError>>,
    processes: Seat<ProcessSampler, Result<Vec<ProcessSample>, SampleError>>,
    /// The sample that process rows which are late belong to.
    late: Option<Sample>,
    schedule: Schedule,
    patience: Duration,
    taken: mpsc::Sender<Taken>,
    status: Arc<Status>,
}

impl SampleLoop {
    pub(crate) fn new(
        instance_id: InstanceId,
        sampler: Sampler,
        intervals: Intervals,
        taken: mpsc::Sender<Taken>,
        status: Arc<Status>,
    ) -> Self {
        Self {
            instance_id,
            vm: Seat::new(sampler.vm),
            processes: Seat::new(sampler.processes),
            late: None,
            schedule: Schedule::start(intervals),
            patience: PATIENCE.min(intervals.vm / 2),
            taken,
            status,
        }
    }

    pub(crate) async fn run(mut self, shutdown: CancellationToken) -> Result<(), Lost> {
        self.prime().await?;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                rows = self.processes.finished() => self.send_late(rows?),
                () = sleep_until(self.schedule.next()) => self.tick().await?,
            }
        }
    }

    /// The first reading, which only gives the rates their beginning.
    async fn prime(&mut self) -> Result<(), Lost> {
        self.processes
            .start(|sampler| sampler.prime().map(|()| Vec::new()));
        self.read_vm().await?;
        Ok(())
    }

    async fn tick(&mut self) -> Result<(), Lost> {
        let tick = self.schedule.wake(Instant::now());
        missed("late", tick.missed);
        let Some(reading) = self.read_vm().await? else {
            return Ok(());
        };
        let memory_bytes = reading.memory_bytes;
        let mut sample = reading.into_sample(&self.instance_id, Vec::new());
        if tick.processes {
            if self.processes.start(move |sampler| sampler.read(memory_bytes)) {
                match timeout(self.patience, self.processes.finished()).await {
                    Ok(rows) => sample.processes = self.rows(rows?),
                    Err(_) => self.go_on_without(&sample),
                }
            } else {
                missed("processes_hang", 1);
            }
        }
        self.send(sample, 0);
        Ok(())
    }

    /// The VM's row; `None` where it could not be taken in time.
    async fn read_vm(&mut self) -> Result<Option<VmReading>, Lost> {
        if !self.vm.start(VmSampler::read) {
            // If it has come back meanwhile, its rates are of a time that has passed.
            if timeout(Duration::ZERO, self.vm.finished()).await.is_err() || !self.vm.start(VmSampler::read) {
                missed("vm_hangs", 1);
                return Ok(None);
            }
        }
        let Ok(reading) = timeout(self.patience, self.vm.finished()).await else {
            warn!("the kernel's statistics hang: this sample is skipped");
            self.status.sampling(Err("the kernel's statistics hang"));
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

    /// The sample goes out with the VM's row alone; the process rows follow as its further parts.
    fn go_on_without(&mut self, sample: &Sample) {
        warn!("the files of some process hang: process rows will be late");
        self.status.sampling(Err("the files of some process hang"));
        self.late = Some(Sample {
            vm: None,
            ..sample.clone()
        });
    }

    fn send_late(&mut self, rows: Result<Vec<ProcessSample>, SampleError>) {
        let processes = self.rows(rows);
        if let Some(sample) = self.late.take()
            && !processes.is_empty()
        {
            warn!(rows = processes.len(), "late process rows have come");
            self.send(Sample { processes, ..sample }, 1);
        }
    }

    fn rows(&self, rows: Result<Vec<ProcessSample>, SampleError>) -> Vec<ProcessSample> {
        rows.inspect_err(|error| self.failed(error)).unwrap_or_default()
    }

    fn failed(&self, error: &SampleError) {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        warn!(cause, "{error}");
        self.status
            .sampling(Err("a sample could not be taken (see the log)"));
        missed("unreadable", 1);
    }

    fn send(&self, sample: Sample, first_part: u32) {
        counter!("vmwatch_agent_samples_total").increment(1);
        counter!("vmwatch_agent_process_rows_total").increment(sample.processes.len() as u64);
        // It is closed only while the program ends on a defect, which is told.
        if let Err(TrySendError::Full(_)) = self.taken.try_send(Taken { sample, first_part }) {
            error!("samples come faster than they can be spooled: one was dropped");
            counter!("vmwatch_agent_parts_dropped_total", "reason" => "queue_full").increment(1);
        }
    }
}

fn missed(reason: &'static str, count: u64) {
    counter!("vmwatch_agent_ticks_missed_total", "reason" => reason).increment(count);
}
