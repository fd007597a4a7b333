//! Runs work that may block forever on a thread outside the async event loop.

use tokio::task::JoinHandle;

/// Runs jobs on a thread for blocking work, one at a time. A job is refused while the previous one is still running, so
/// a hung disk blocks at most one thread.
#[derive(Debug)]
pub(crate) struct BlockingWorker<S, T> {
    idle: Option<S>,
    running: Option<JoinHandle<(S, T)>>,
}

/// A job panicked, which ended the worker.
#[derive(Debug, thiserror::Error)]
#[error("a sampler panicked; this is a bug in the agent")]
pub struct WorkerPanicked;

impl<S: Send + 'static, T: Send + 'static> BlockingWorker<S, T> {
    pub(crate) const fn new(worker: S) -> Self {
        Self {
            idle: Some(worker),
            running: None,
        }
    }

    /// Starts a job. Returns false if the previous job is still running.
    pub(crate) fn start(&mut self, job: impl FnOnce(&mut S) -> T + Send + 'static) -> bool {
        let Some(mut worker) = self.idle.take() else {
            return false;
        };
        self.running = Some(tokio::task::spawn_blocking(move || {
            let outcome = job(&mut worker);
            (worker, outcome)
        }));
        true
    }

    /// Waits until the running job has finished; waits forever if there is none. The returned future may be cancelled
    /// safely.
    pub(crate) async fn finished(&mut self) -> Result<T, WorkerPanicked> {
        let Some(running) = &mut self.running else {
            return std::future::pending().await;
        };
        let outcome = running.await;
        self.running = None;
        let (worker, outcome) = outcome.map_err(|_| WorkerPanicked)?;
        self.idle = Some(worker);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn blocking_worker_runs_one_job_at_a_time() {
        let mut worker = BlockingWorker::new(1);
        let (release, released) = mpsc::channel();
        assert!(worker.start(move |worker| {
            *worker += 1;
            released.recv().unwrap();
            *worker
        }));
        let waited = timeout(Duration::from_millis(10), worker.finished()).await;
        assert!(waited.is_err());
        assert!(!worker.start(|worker| *worker));
        release.send(()).unwrap();
        assert_eq!(worker.finished().await.unwrap(), 2);
        assert!(worker.start(|worker| *worker));
        assert_eq!(worker.finished().await.unwrap(), 2);
    }

    #[tokio::test]
    async fn panicking_job_ends_the_worker_with_an_error() {
        let mut worker = BlockingWorker::<u8, u8>::new(1);
        assert!(worker.start(|_| panic!("on purpose")));
        assert!(worker.finished().await.is_err());
        assert!(!worker.start(|worker| *worker));
    }
}
