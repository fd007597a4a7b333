//! Asynchronous access to the spool on disk, with a time limit.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Mutex;

use crate::{
    parts::Part,
    spool::{Queued, Spool},
};

/// A disk that does not complete a call within this time counts as hung.
const DEADLINE: Duration = Duration::from_secs(5);

/// Runs calls to the spool on a thread for blocking work, one at a time. While a call hangs, further calls fail
/// immediately.
#[derive(Debug)]
pub(crate) struct Disk {
    spool: Arc<Mutex<Spool>>,
    waiting: Arc<AtomicU64>,
    deadline: Duration,
}

/// The result of writing several sample parts to the spool.
#[derive(Debug)]
pub(crate) struct Written {
    /// Number of sample parts written. Parts are written in order, so these are the first ones.
    pub(crate) count: usize,
    /// The error that kept the remaining sample parts from being written.
    pub(crate) error: Option<io::Error>,
}

impl Disk {
    pub(crate) fn new(spool: Spool) -> Self {
        Self {
            waiting: spool.waiting(),
            spool: Arc::new(Mutex::new(spool)),
            deadline: DEADLINE,
        }
    }

    /// The number of sample parts on disk.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(crate) async fn write(&self, parts: Vec<Queued>) -> Written {
        let write = move |spool: &mut Spool| {
            let mut count = 0;
            for queued in &parts {
                if let Err(error) = spool.push(queued) {
                    let error = Some(error);
                    return Written { count, error };
                }
                count += 1;
            }
            Written { count, error: None }
        };
        self.call(write).await.unwrap_or_else(|error| Written {
            count: 0,
            error: Some(error),
        })
    }

    pub(crate) async fn oldest(&self) -> io::Result<Option<Queued>> {
        self.call(Spool::oldest).await.flatten()
    }

    pub(crate) async fn keep_refused(&self, part: Part) -> io::Result<PathBuf> {
        self.call(move |spool| spool.keep_refused(&part)).await.flatten()
    }

    pub(crate) async fn remove(&self, sequence: u64) -> io::Result<()> {
        self.call(move |spool| spool.remove(sequence)).await
    }

    /// A call that times out continues on its thread. A sample part that this call is still writing also stays in
    /// memory; in the worst case the part is sent twice.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Spool) -> T + Send + 'static,
    ) -> io::Result<T> {
        let hung = || io::Error::new(io::ErrorKind::TimedOut, "the disk of the spool folder timed out");
        let mut spool = Arc::clone(&self.spool).try_lock_owned().map_err(|_| hung())?;
        let call = tokio::task::spawn_blocking(move || work(&mut spool));
        match tokio::time::timeout(self.deadline, call).await {
            Ok(outcome) => outcome.map_err(io::Error::other),
            Err(_) => Err(hung()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vmwatch_service::config::ByteSize;

    use super::*;
    use crate::{
        config::SpoolSettings,
        spool::{SpoolLock, tests::part},
    };

    fn queued(sequence: u64) -> Queued {
        part(sequence, 200)
    }

    #[tokio::test]
    async fn once_a_call_timed_out_further_calls_to_hung_disk_fail_immediately() {
        let dir = tempfile::tempdir().unwrap();
        let settings = SpoolSettings {
            dir: dir.path().to_owned(),
            limit: ByteSize(1 << 20),
        };
        let lock = SpoolLock::take(&settings.dir).unwrap();
        let mut disk = Disk::new(Spool::open(&settings, "vm-1".parse().unwrap(), lock).unwrap());
        assert!(disk.write(vec![queued(0)]).await.error.is_none());

        disk.deadline = Duration::from_millis(50);
        let (release, released) = mpsc::channel();
        let hung = disk.call(move |_| released.recv()).await.unwrap_err();
        assert_eq!(hung.kind(), io::ErrorKind::TimedOut);
        // The time limit is far longer than the test may take, so a call that waited for it would be noticed.
        disk.deadline = Duration::from_hours(1);
        let written = disk.write(vec![queued(1)]).await;
        assert_eq!(
            (written.count, written.error.unwrap().kind()),
            (0, io::ErrorKind::TimedOut)
        );
        assert!(disk.oldest().await.is_err() && disk.remove(0).await.is_err());
        assert_eq!(disk.waiting(), 1);

        release.send(()).unwrap();
        while disk.write(vec![queued(1)]).await.error.is_some() {
            tokio::task::yield_now().await;
        }
        assert_eq!(disk.oldest().await.unwrap(), Some(queued(0)));
        assert_eq!(disk.waiting(), 2);
    }
}
