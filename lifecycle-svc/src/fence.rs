//! Decides whether an action on a VM may still begin. The driver checks this immediately before the call that takes
//! effect.
//!
//! After its record was written, an operation may have to wait for a permit of its hypervisor, for the login at the
//! hypervisor or for the VM's state. Meanwhile its deadline may pass, or another replica may adopt it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use vmwatch_api::time::unix_millis;

use crate::driver::DriverError;

/// Duration that stands for "never ends": longer than any lease.
const LONGEST: Duration = Duration::from_hours(24 * 365);

/// The two times before which an action on a VM must begin: its deadline and the end of the lease.
#[derive(Debug, Clone)]
pub(crate) struct Fence {
    /// Deadline of the operation, in Unix milliseconds.
    deadline_ms: u64,
    /// End of this replica's lease on the operation, as last written to the record.
    lease: Arc<LeaseEnd>,
}

/// End of a lease, by two clocks. The lease has ended once either clock says so, because the system clock may be set
/// back and the monotonic clock stands still while the machine is suspended.
#[derive(Debug)]
pub(crate) struct LeaseEnd(Mutex<(u64, Instant)>);

impl LeaseEnd {
    /// Creates the end of a lease that was just taken, from Unix milliseconds.
    pub(crate) fn at(until_ms: u64) -> Self {
        Self(Mutex::new(Self::moment(until_ms)))
    }

    /// Converts the end of a lease to both clocks. Must be called before the lease is written, so that the time which
    /// the write takes counts as part of the lease.
    pub(crate) fn moment(until_ms: u64) -> (u64, Instant) {
        let left = Duration::from_millis(until_ms.saturating_sub(unix_millis()));
        let now = Instant::now();
        // The sum overflows only for a lease that never ends, as tests use.
        (until_ms, now.checked_add(left).unwrap_or(now + LONGEST))
    }

    /// Replaces the end of the lease after a renewal.
    pub(crate) fn renew(&self, moment: (u64, Instant)) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = moment;
    }

    /// Whether the lease has ended by either clock.
    pub(crate) fn has_passed(&self) -> bool {
        let (until_ms, until) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unix_millis() >= until_ms || Instant::now() >= until
    }
}

impl Fence {
    pub(crate) const fn new(deadline_ms: u64, lease: Arc<LeaseEnd>) -> Self {
        Self { deadline_ms, lease }
    }

    /// Returns an error if the deadline has passed or the lease has expired.
    pub(crate) fn check(&self) -> Result<(), DriverError> {
        if unix_millis() >= self.deadline_ms {
            return Err(DriverError::NotBegun("the deadline has passed"));
        }
        if self.lease.has_passed() {
            return Err(DriverError::NotBegun("the lease on the operation has expired"));
        }
        Ok(())
    }

    /// Creates a fence without a lease, for tests.
    #[cfg(test)]
    pub(crate) fn until(deadline_ms: u64) -> Self {
        Self::new(deadline_ms, Arc::new(LeaseEnd::at(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn action_is_refused_after_deadline_or_end_of_lease() {
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
    fn lease_ends_even_if_the_system_clock_is_set_back() {
        let later = unix_millis() + 60_000;
        let lease = Arc::new(LeaseEnd::at(later));
        let fence = Fence::new(later, Arc::clone(&lease));
        // By the system clock a minute is left; by the monotonic clock the lease has ended.
        lease.renew((later, Instant::now()));
        assert_eq!(
            fence.check(),
            Err(DriverError::NotBegun("the lease on the operation has expired"))
        );
    }
}
