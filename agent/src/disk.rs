//! The spool as seen from the loop that ships parts: never waited for without a limit.

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

/// A disk that takes longer than this counts as hung.
const DEADLINE: Duration = Duration::from_secs(5);

/// Access to the spool, one call at a time on a thread of its own. While a call hangs, others are refused at once.
#[derive(Debug)]
pub(crate) struct Disk {
    spool: Arc<Mutex<Spool>>,
    waiting: Arc<AtomicU64>,
}

/// What became of parts that were to be written.
#[derive(Debug)]
pub(crate) struct Written {
    /// So many of them, from the first.
    pub(crate) count: usize,
    /// What kept the rest from it.
    pub(crate) error: Option<io::Error>,
}

impl Disk {
    pub(crate) fn new(spool: Spool) -> Self {
        Self {
            waiting: spool.waiting(),
            spool: Arc::new(Mutex::new(spool)),
        }
    }

    /// How many parts wait on disk.
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

    /// A call that is given up on goes on in its thread. What it then still writes is sent twice at worst.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Spool) -> T + Send + 'static,
    ) -> io::Result<T> {
        let hung = || io::Error::new(io::ErrorKind::TimedOut, "the disk of the spool does not answer");
        let mut spool = Arc::clone(&self.spool).try_lock_owned().map_err(|_| hung())?;
        let call = tokio::task::spawn_blocking(move || work(&mut spool));
        match tokio::time::timeout(DEADLINE, call).await {
            Ok(outcome) => outcome.map_err(io::Error::other),
            Err(_) => Err(hung()),
        }
    }
}
