//! Claims on starting a VM, which prevent two operations from starting it on two hypervisors at once.
//!
//! An operation that starts a VM first claims it, then reads its state on every hypervisor, and only then sends the start.
//! As long as it holds the claim, no other operation sends a start. Claims are keys of the KV bucket of the inventory; NATS
//! deletes a claim that is not released.

use std::time::Duration;

use async_nats::jetstream::kv::Operation as Kind;
use serde::{Deserialize, Serialize};
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    inventory::{INVENTORY_BUCKET, InventoryKey},
    lifecycle::OperationId,
};
use vmwatch_bus::{
    Bus,
    jetstream::{Bucket, JetStreamError},
};

use crate::inventory::MARKER_TTL;

/// Lifetime of a claim; each attempt to send a start renews it. If a call to libvirt takes longer, the VM may be started
/// elsewhere while the call may still take effect.
const CLAIM_TTL: &str = "15m";
/// Deadline of a read or write. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);

/// A stored claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// The hypervisor that the start is sent to.
    hypervisor: String,
    /// The operation that holds the claim. `None` if it has ended although its start may still take effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    operation_id: Option<OperationId>,
    /// Whether a start of an earlier operation may still take effect on the hypervisor.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_inherited: bool,
}

/// What is known of an operation's starts when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The VM runs on the hypervisor of the claim.
    Running,
    /// No start of the operation can still take effect.
    Settled,
    /// A start of the operation may still take effect.
    Unsettled,
}

/// Result of an attempt to claim a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Claimed {
    /// The operation held the claim already, and has renewed it.
    Held,
    /// The operation has taken the claim. The state of the VM must be read again, because it may have changed before.
    Taken,
    /// Another operation starts the VM.
    ByOther,
    /// A start was sent to this hypervisor, and may still take effect.
    Unsettled(String),
}

#[derive(Debug, Clone)]
pub(super) struct Claims(Bucket);

impl Claims {
    pub(super) fn new(bus: &Bus) -> Self {
        Self(Bucket::new(bus, INVENTORY_BUCKET, DEADLINE))
    }

    /// Claims the start of a VM on a hypervisor for an operation, which may have sent a start before.
    pub(super) async fn take(
        &self,
        id: &InstanceId,
        hypervisor: &str,
        operation_id: &OperationId,
        was_sent: bool,
    ) -> Result<Claimed, JetStreamError> {
        let key = InventoryKey::Start(id.clone()).to_string();
        let Some((claim, revision)) = self.read(&key).await? else {
            // A newer version of vmwatch has stored a claim that this version cannot decode.
            return Ok(Claimed::ByOther);
        };
        let mut own = Claim {
            hypervisor: hypervisor.to_owned(),
            operation_id: Some(operation_id.clone()),
            is_inherited: false,
        };
        let claimed = match claim {
            Some(claim) => {
                let is_others = claim
                    .operation_id
                    .as_ref()
                    .is_some_and(|holder| holder != operation_id);
                if is_others {
                    return Ok(Claimed::ByOther);
                }
                let is_held = claim.operation_id.is_some();
                own.is_inherited = claim.is_inherited || !is_held;
                let is_same = claim.hypervisor == hypervisor;
                if !is_same && (was_sent || own.is_inherited) {
                    return Ok(Claimed::Unsettled(claim.hypervisor));
                }
                if is_same && is_held {
                    Claimed::Held
                } else {
                    Claimed::Taken
                }
            }
            None => Claimed::Taken,
        };
        let value = serde_json::to_vec(&own).unwrap_or_default();
        let written = self.0.update_for(&key, value.into(), revision, CLAIM_TTL).await?;
        Ok(written.map_or(Claimed::ByOther, |_| claimed))
    }

    /// Releases the claim, if the operation holds it. If its start or that of an earlier operation may still take effect, the
    /// claim continues to prevent starts on other hypervisors until it expires.
    pub(super) async fn release(&self, id: &InstanceId, operation_id: &OperationId, ended: Ended) {
        if let Err(error) = self.try_release(id, operation_id, ended).await {
            warn!(instance_id = %id, %error, "releasing the claim on starting a VM failed; it expires after {CLAIM_TTL}");
        }
    }

    async fn try_release(
        &self,
        id: &InstanceId,
        operation_id: &OperationId,
        ended: Ended,
    ) -> Result<(), JetStreamError> {
        let key = InventoryKey::Start(id.clone()).to_string();
        let Some((Some(claim), revision)) = self.read(&key).await? else {
            return Ok(());
        };
        if claim.operation_id.as_ref() != Some(operation_id) {
            return Ok(());
        }
        if ended == Ended::Running || ended == Ended::Settled && !claim.is_inherited {
            let deleted = self.0.delete_revision_for(&key, revision, MARKER_TTL).await;
            return deleted.map(drop);
        }
        let unsettled = Claim {
            operation_id: None,
            is_inherited: true,
            ..claim
        };
        let value = serde_json::to_vec(&unsettled).unwrap_or_default();
        let written = self.0.update_for(&key, value.into(), revision, CLAIM_TTL).await;
        written.map(drop)
    }

    /// The stored claim, if there is one, and the revision of its key; `None` if it cannot be decoded.
    async fn read(&self, key: &str) -> Result<Option<(Option<Claim>, u64)>, JetStreamError> {
        let Some(entry) = self.0.entry(key).await? else {
            return Ok(Some((None, 0)));
        };
        if entry.operation != Kind::Put {
            return Ok(Some((None, entry.revision)));
        }
        let claim = serde_json::from_slice(&entry.value).ok();
        Ok(claim.map(|claim| (Some(claim), entry.revision)))
    }
}

#[cfg(test)]
mod tests {
    use testkit::Nats;
    use vmwatch_api::Service;
    use vmwatch_bus::provision::ensure_stream;

    use super::*;
    use crate::inventory::buckets;

    const GOLDEN: &str = include_str!("../../../tests/golden/forms/start-claim.json");

    #[test]
    fn claim_is_encoded_as_in_golden_file() {
        let claim: Claim = serde_json::from_str(GOLDEN).unwrap();
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        assert_eq!(serde_json::to_value(&claim).unwrap(), golden);
    }

    #[tokio::test]
    async fn start_that_may_take_effect_is_not_forgotten_by_later_operations() {
        let folder = tempfile::tempdir().unwrap();
        let nats = Nats::start(folder.path()).await;
        let bus = nats.connect("vmwatch-test").await;
        let [vms, _] = buckets(1);
        ensure_stream(&bus, Service::Lifecycle, &vms).await.unwrap();
        let (claims, id) = (Claims::new(&bus), "vm-1".parse().unwrap());
        let operations: [OperationId; 6] =
            std::array::from_fn(|number| format!("{number:032x}").parse().unwrap());
        let take = async |hypervisor: &str, operation: usize| {
            let claimed = claims.take(&id, hypervisor, &operations[operation], false).await;
            claimed.unwrap()
        };
        let release =
            async |operation: usize, ended| claims.release(&id, &operations[operation], ended).await;

        assert_eq!(take("a", 0).await, Claimed::Taken);
        assert_eq!(take("a", 0).await, Claimed::Held);
        assert_eq!(take("b", 1).await, Claimed::ByOther);
        release(0, Ended::Unsettled).await;
        let unsettled = Claimed::Unsettled("a".to_owned());
        assert_eq!(take("b", 1).await, unsettled);
        // An operation that sent nothing does not settle the start of the first one.
        assert_eq!(take("a", 2).await, Claimed::Taken);
        release(2, Ended::Settled).await;
        assert_eq!(take("b", 3).await, unsettled);
        // It is settled once the VM runs there.
        assert_eq!(take("a", 4).await, Claimed::Taken);
        release(4, Ended::Running).await;
        assert_eq!(take("b", 5).await, Claimed::Taken);
        release(5, Ended::Settled).await;
        assert_eq!(take("a", 0).await, Claimed::Taken);
    }
}
