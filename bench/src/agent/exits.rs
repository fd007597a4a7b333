//! Short-lived processes at a steady rate.

use std::{
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Number of threads that start processes.
const THREADS: u32 = 2;
/// Time between two groups of processes of a thread.
const PAUSE: Duration = Duration::from_millis(10);

/// Starts processes that end at once, until it is dropped.
pub(super) struct Exits {
    ended: Arc<AtomicU64>,
    has_stopped: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Exits {
    /// Starts at most this number of processes per second.
    pub(super) fn start(per_second: u32) -> Self {
        let (ended, has_stopped) = (Arc::default(), Arc::default());
        let threads = (0..THREADS).map(|_| {
            let (ended, has_stopped) = (Arc::clone(&ended), Arc::clone(&has_stopped));
            let group = f64::from(per_second / THREADS) * PAUSE.as_secs_f64();
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a group has some tens of processes"
            )]
            let group = group.round() as usize;
            thread::spawn(move || run(group, &ended, &has_stopped))
        });
        Self {
            threads: threads.collect(),
            ended,
            has_stopped,
        }
    }

    /// Number of processes that have ended so far.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }
}

impl Drop for Exits {
    fn drop(&mut self) {
        self.has_stopped.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Starts a group of processes after each pause, one process after another. A group that takes longer than the pause is
/// followed by the next one at once.
fn run(group: usize, ended: &AtomicU64, has_stopped: &AtomicBool) {
    let mut next = Instant::now();
    while !has_stopped.load(Ordering::Relaxed) {
        for _ in 0..group {
            let status = Command::new("/bin/true")
                .env_clear()
                .stdin(Stdio::null())
                .status();
            if status.is_ok() {
                ended.fetch_add(1, Ordering::Relaxed);
            }
        }
        next = (next + PAUSE).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
