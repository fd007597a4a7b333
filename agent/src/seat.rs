//! Work that may block for ever, kept off the loop.

use tokio::task::JoinHandle;

/// Holds something that does its work on a thread of its own, one piece at a time: while it is out, no second piece
/// begins, so that a hung disk holds one thread and no more.
#[derive(Debug)]
pub(crate) struct Seat<S, T> {
    at_hand: Option<S>,
    out: Option<JoinHandle<(S, T)>>,
}

/// The work panicked, and its worker is lost.
#[derive(Debug, thiserror::Error)]
#[error("a sampler failed: this is a defect of the agent")]
pub struct Lost;

impl<S: Send + 'static, T: Send + 'static> Seat<S, T> {
    pub(crate) const fn new(worker: S) -> Self {
        Self {
            at_hand: Some(worker),
            out: None,
        }
    }

    /// Begins a piece of work; false where the one before has not come back.
    pub(crate) fn start(&mut self, work: impl FnOnce(&mut S) -> T + Send + 'static) -> bool {
        let Some(mut worker) = self.at_hand.take() else {
            return false;
        };
        self.out = Some(tokio::task::spawn_blocking(move || {
            let outcome = work(&mut worker);
            (worker, outcome)
        }));
        true
    }

    /// Waits for the work that is out, for ever where none is. May be dropped and called again.
    pub(crate) async fn finished(&mut self) -> Result<T, Lost> {
        let Some(out) = &mut self.out else {
            return std::future::pending().await;
        };
        let outcome = out.await;
        self.out = None;
        let (worker, outcome) = outcome.map_err(|_| Lost)?;
        self.at_hand = Some(worker);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn one_piece_of_work_at_a_time() {
        let mut seat = Seat::new(1);
        let (release, released) = mpsc::channel();
        assert!(seat.start(move |worker| {
            *worker += 1;
            released.recv().unwrap();
            *worker
        }));
        let waited = timeout(Duration::from_millis(10), seat.finished()).await;
        assert!(waited.is_err());
        assert!(!seat.start(|worker| *worker));
        release.send(()).unwrap();
        assert_eq!(seat.finished().await.unwrap(), 2);
        assert!(seat.start(|worker| *worker));
        assert_eq!(seat.finished().await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_panic_loses_the_worker_and_says_so() {
        let mut seat = Seat::<u8, u8>::new(1);
        assert!(seat.start(|_| panic!("on purpose")));
        assert!(seat.finished().await.is_err());
        assert!(!seat.start(|worker| *worker));
    }
}
