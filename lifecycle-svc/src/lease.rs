//! A lease: the right of one replica to do a piece of work until a given time. It is stored in a KV bucket and written
//! by compare-and-set.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmwatch_api::time::unix_millis;

/// A stored lease: the replica that does the work, and the time until which no other replica may do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    /// Random name of the replica.
    pub(crate) owner: String,
    /// End of the lease, in Unix milliseconds.
    pub(crate) until_ms: u64,
}

impl Lease {
    /// End of a lease that begins now, in Unix milliseconds.
    pub(crate) fn until(length: Duration) -> u64 {
        unix_millis().saturating_add(u64::try_from(length.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_matches_golden_file_and_unknown_fields_are_ignored() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/forms/hypervisor-lease.json")).unwrap();
        let lease: Lease = serde_json::from_value(golden.clone()).unwrap();
        assert_eq!(serde_json::to_value(&lease).unwrap(), golden);
        let mut newer = golden;
        newer["of_a_newer_version"] = 1.into();
        assert_eq!(serde_json::from_value::<Lease>(newer).unwrap(), lease);
    }
}
