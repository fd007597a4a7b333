//! Asynchronous access to the spool, with a time limit.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Mutex;

use crate::spool::{Queued, Spool};

/// A disk that takes longer than this is considered hung.
const DEADLINE: Duration = Duration::from_secs(5);

/// Calls the spool on a blocking thread, one call at a time. While a call hangs, further calls fail at once.
#[derive(Debug)]
pub(crate) struct Disk {
    spool: Arc<Mutex<Spool>>,
    waiting: Arc<AtomicU64>,
    deadline: Duration,
}

/// The result of writing parts.
#[derive(Debug)]
pub(crate) struct Written {
    /// The number of parts written, counted from the first.
    pub(crate) count: usize,
    /// The error that stopped the rest.
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

    /// The number of parts on disk.
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

    pub(crate) async fn remove(&self, sequence: u64) -> io::Result<()> {
        self.call(move |spool| spool.remove(sequence)).await
    }

    /// A call that times out continues on its thread. At worst, a part that it still writes is sent twice.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Spool) -> T + Send + 'static,
    ) -> io::Result<T> {
        let hung = || io::Error::new(io::ErrorKind::TimedOut, "the spool's disk timed out");
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
    use crate::{config::SpoolSettings, parts::Part};

    fn queued(sequence: u64) -> Queued {
        let body = r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","part":0}"#;
        let part = Part {
            id: "vm-1:2017-01-01T21:37:59.001065:0".into(),
            body: body.into(),
        };
        Queued { sequence, part }
    }

    #[tokio::test]
    async fn hung_disk_times_out_once_then_fails_at_once_until_it_recovers() {
        let dir = tempfile::tempdir().unwrap();
        let settings = SpoolSettings {
            dir: dir.path().to_owned(),
            limit: ByteSize(1 << 20),
        };
        let mut disk = Disk::new(Spool::open(&settings, "vm-1".parse().unwrap()).unwrap());
        assert!(disk.write(vec![queued(0)]).await.error.is_none());

        disk.deadline = Duration::from_millis(50);
        let (release, released) = mpsc::channel();
        let hung = disk.call(move |_| released.recv()).await.unwrap_err();
        assert_eq!(hung.kind(), io::ErrorKind::TimedOut);
        // Far longer than the test may take: calls that waited would be noticed.
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
