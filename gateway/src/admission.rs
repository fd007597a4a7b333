//! Who is let in: so many requests at once, and so many a second. Who is not is told so before anything else is done
//! for him.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use metrics::counter;
use shared::wire::{Fault, FaultKind};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// The bounds of the gateway.
#[derive(Debug)]
pub(crate) struct Admission {
    permits: Arc<Semaphore>,
    rate: Option<Rate>,
}

impl Admission {
    pub(crate) fn new(at_once: usize, a_second: Option<NonZeroU32>) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(at_once)),
            rate: a_second.map(Rate::new),
        }
    }

    /// A place until the permit is dropped, or the fault to answer with; `what` is asked for, in the metrics.
    pub(crate) fn enter(&self, what: &str) -> Result<SemaphorePermit<'_>, Fault> {
        let in_time = self.rate.as_ref().is_none_or(Rate::admits);
        match self.permits.try_acquire() {
            Ok(permit) if in_time => Ok(permit),
            _ => Err(full(what)),
        }
    }

    /// One more place, for what goes on when the request that began it has been answered.
    pub(crate) fn hold(&self, what: &str) -> Result<OwnedSemaphorePermit, Fault> {
        let held = Arc::clone(&self.permits).try_acquire_owned();
        held.map_err(|_| full(what))
    }
}

fn full(what: &str) -> Fault {
    counter!("vmwatch_requests_shed_total", "method" => what.to_owned()).increment(1);
    let text = "the gateway is at its limit; try again shortly";
    Fault::new(FaultKind::Overloaded, text)
}

/// A bound on requests a second: a bucket of tokens, kept as the moment at which it would be full again (the generic
/// cell rate algorithm of ATM).
#[derive(Debug)]
struct Rate {
    began: Instant,
    /// Nanoseconds that one request is worth.
    each: u64,
    /// Since the beginning, in nanoseconds.
    full_at: AtomicU64,
}

impl Rate {
    /// What may come at one moment, in nanoseconds: a second's worth.
    const BURST: u64 = 1_000_000_000;

    fn new(a_second: NonZeroU32) -> Self {
        Self {
            began: Instant::now(),
            each: 1_000_000_000 / u64::from(a_second.get()),
            full_at: AtomicU64::new(0),
        }
    }

    fn admits(&self) -> bool {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.admits_at(now)
    }

    fn admits_at(&self, now: u64) -> bool {
        let admitted = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                let next = full_at.max(now) + self.each;
                (next - now <= Self::BURST).then_some(next)
            });
        admitted.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn rate(a_second: u32) -> Rate {
        Rate::new(NonZeroU32::new(a_second).unwrap())
    }

    #[test]
    fn so_many_a_second_are_admitted_whatever_comes() {
        let rate = rate(2000);
        // Ten thousand a second, for ten seconds.
        let admitted = (0..100_000_u64).filter(|turn| rate.admits_at(turn * MILLISECOND / 10));
        // And the burst at the beginning.
        assert_eq!(admitted.count(), 20_000 + 2_000 - 1);
    }

    #[test]
    fn a_burst_is_bounded_and_comes_back_with_time() {
        let rate = rate(100);
        let at_once = |now| (0..1_000).filter(|_| rate.admits_at(now)).count();
        assert_eq!(at_once(0), 100);
        assert_eq!(at_once(30 * MILLISECOND), 3);
        assert_eq!(at_once(10_000 * MILLISECOND), 100);
    }

    #[test]
    fn a_slow_rate_admits_one() {
        let rate = rate(1);
        assert!(rate.admits_at(0));
        assert!(!rate.admits_at(999 * MILLISECOND));
        assert!(rate.admits_at(1000 * MILLISECOND));
    }

    #[test]
    fn places_are_given_back() {
        let admission = Admission::new(1, None);
        let held = admission.enter("x").unwrap();
        assert_eq!(admission.enter("x").unwrap_err().kind, FaultKind::Overloaded);
        drop(held);
        assert!(admission.enter("x").is_ok());
    }
}
