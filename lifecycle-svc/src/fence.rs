//! Decides whether an action on a VM may still begin. The driver checks it immediately before the call that takes
//! effect.
//!
//! After its record was written, an operation may wait for a call to its hypervisor, for the hypervisor's login or for
//! the VM's state. By then its deadline may have passed, or another replica may have adopted it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use vmwatch_api::time::unix_millis;

use crate::driver::DriverError;

/// The times before which an action must begin.
#[derive(Debug, Clone)]
pub(crate) struct Fence {
    /// Deadline of the operation, Unix milliseconds.
    deadline_ms: u64,
    /// End of this replica's lease on the operation as last written, Unix milliseconds.
    lease_until_ms: Arc<AtomicU64>,
}

impl Fence {
    pub(crate) const fn new(deadline_ms: u64, lease_until_ms: Arc<AtomicU64>) -> Self {
        Self {
            deadline_ms,
            lease_until_ms,
        }
    }

    /// Fails once the deadline has passed or the lease has expired.
    pub(crate) fn check(&self) -> Result<(), DriverError> {
        let now = unix_millis();
        if now >= self.deadline_ms {
            return Err(DriverError::NotBegun("the deadline has passed"));
        }
        if now >= self.lease_until_ms.load(Ordering::Relaxed) {
            return Err(DriverError::NotBegun("the lease on the operation has expired"));
        }
        Ok(())
    }

    /// A fence without a lease, for tests.
    #[cfg(test)]
    pub(crate) fn until(deadline_ms: u64) -> Self {
        Self::new(deadline_ms, Arc::new(AtomicU64::new(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closes_at_deadline_or_end_of_lease() {
        let later = unix_millis() + 60_000;
        let lease = Arc::new(AtomicU64::new(later));
        let fence = Fence::new(later, Arc::clone(&lease));
        assert_eq!(fence.check(), Ok(()));
        lease.store(unix_millis(), Ordering::Relaxed);
        assert_eq!(
            fence.check(),
            Err(DriverError::NotBegun("the lease on the operation has expired"))
        );
        assert_eq!(
            Fence::until(unix_millis()).check(),
            Err(DriverError::NotBegun("the deadline has passed"))
        );
    }
}
