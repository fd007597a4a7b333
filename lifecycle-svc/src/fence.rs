//! Decides whether an action on a VM may still begin. The driver checks it immediately before the call that takes
//! effect.
//!
//! After its record was written, an operation may wait for a call to its hypervisor, for the hypervisor's login or for
//! the VM's state. By then its deadline may have passed, or another replica may have adopted it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use vmwatch_api::time::unix_millis;

use crate::driver::DriverError;

/// Longer than any lease.
const LONGEST: Duration = Duration::from_hours(24 * 365);

/// The times before which an action must begin.
#[derive(Debug, Clone)]
pub(crate) struct Fence {
    /// Deadline of the operation, Unix milliseconds.
    deadline_ms: u64,
    /// End of this replica's lease on the operation as last written.
    lease: Arc<LeaseEnd>,
}

/// When a lease ends. It has ended once either clock says so: the system's clock may be set back, and the monotonic one
/// stands still while the machine is suspended.
#[derive(Debug)]
pub(crate) struct LeaseEnd(Mutex<(u64, Instant)>);

impl LeaseEnd {
    /// The end of a lease that was just taken, Unix milliseconds.
    pub(crate) fn at(until_ms: u64) -> Self {
        Self(Mutex::new(Self::moment(until_ms)))
    }

    /// The same moment by both clocks. Called before the lease is written, so that the write takes its time from the lease.
    pub(crate) fn moment(until_ms: u64) -> (u64, Instant) {
        let left = Duration::from_millis(until_ms.saturating_sub(unix_millis()));
        let now = Instant::now();
        // Overflows only for a lease that never ends, which tests have.
        (until_ms, now.checked_add(left).unwrap_or(now + LONGEST))
    }

    /// Notes that the lease was renewed.
    pub(crate) fn renew(&self, moment: (u64, Instant)) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = moment;
    }

    fn has_passed(&self) -> bool {
        let (until_ms, until) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unix_millis() >= until_ms || Instant::now() >= until
    }
}

impl Fence {
    pub(crate) const fn new(deadline_ms: u64, lease: Arc<LeaseEnd>) -> Self {
        Self { deadline_ms, lease }
    }

    /// Fails once the deadline has passed or the lease has expired.
    pub(crate) fn check(&self) -> Result<(), DriverError> {
        if unix_millis() >= self.deadline_ms {
            return Err(DriverError::NotBegun("the deadline has passed"));
        }
        if self.lease.has_passed() {
            return Err(DriverError::NotBegun("the lease on the operation has expired"));
        }
        Ok(())
    }

    /// A fence without a lease, for tests.
    #[cfg(test)]
    pub(crate) fn until(deadline_ms: u64) -> Self {
        Self::new(deadline_ms, Arc::new(LeaseEnd::at(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closes_at_deadline_or_end_of_lease() {
        let later = unix_millis() + 60_000;
        let lease = Arc::new(LeaseEnd::at(later));
        let fence = Fence::new(later, Arc::clone(&lease));
        assert_eq!(fence.check(), Ok(()));
        lease.renew(LeaseEnd::moment(unix_millis()));
        assert_eq!(
            fence.check(),
            Err(DriverError::NotBegun("the lease on the operation has expired"))
        );
        assert_eq!(
            Fence::until(unix_millis()).check(),
            Err(DriverError::NotBegun("the deadline has passed"))
        );
    }

    #[test]
    fn lease_ends_although_the_system_clock_was_set_back() {
        let later = unix_millis() + 60_000;
        let lease = Arc::new(LeaseEnd::at(later));
        let fence = Fence::new(later, Arc::clone(&lease));
        // The wall clock says that a minute is left, the monotonic one that the lease is over.
        lease.renew((later, Instant::now()));
        assert_eq!(
            fence.check(),
            Err(DriverError::NotBegun("the lease on the operation has expired"))
        );
    }
}
