//! Whether an act on a VM may still begin: asked by the driver immediately before the call that acts.
//!
//! A command may wait for a call to its hypervisor, for the hypervisor's login or for a look at the VM, after its record
//! was written. By then its deadline may have passed, or another replica may have adopted it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use vmwatch_api::time::unix_millis;

use crate::driver::DriverError;

/// The moments by which an act must have begun.
#[derive(Debug, Clone)]
pub(crate) struct Fence {
    /// Of the command, Unix milliseconds.
    deadline_ms: u64,
    /// Of this replica's lease on the command, as it was last written.
    lease_until_ms: Arc<AtomicU64>,
}

impl Fence {
    pub(crate) const fn new(deadline_ms: u64, lease_until_ms: Arc<AtomicU64>) -> Self {
        Self {
            deadline_ms,
            lease_until_ms,
        }
    }

    /// Fails once the deadline has passed or the lease has run out.
    pub(crate) fn check(&self) -> Result<(), DriverError> {
        let now = unix_millis();
        if now >= self.deadline_ms {
            return Err(DriverError::NotBegun("the deadline has passed"));
        }
        if now >= self.lease_until_ms.load(Ordering::Relaxed) {
            return Err(DriverError::NotBegun("the lease on the command has run out"));
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
    fn an_act_begins_before_the_deadline_and_under_the_lease() {
        let later = unix_millis() + 60_000;
        let lease = Arc::new(AtomicU64::new(later));
        let fence = Fence::new(later, Arc::clone(&lease));
        assert_eq!(fence.check(), Ok(()));
        lease.store(unix_millis(), Ordering::Relaxed);
        assert_eq!(
            fence.check(),
            Err(DriverError::NotBegun("the lease on the command has run out"))
        );
        assert_eq!(
            Fence::until(unix_millis()).check(),
            Err(DriverError::NotBegun("the deadline has passed"))
        );
    }
}
