//! What lifecycle-svc knows about VMs: the inventory of the hypervisors and the labels that operators have set. Both are
//! followed in KV buckets.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{InstanceId, inventory::INVENTORY_BUCKET, labels::LABELS_BUCKET, vms::LabelFilter};
use vmwatch_bus::{
    Bus,
    follow::Follower,
    vms::{InventoryTable, LabelTable, Vms},
};

/// A copy in memory is stale if its KV bucket was last confirmed to be current longer ago than this.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// The VMs of hypervisors and the labels of VMs, in memory.
#[derive(Clone)]
pub(crate) struct KnownVms {
    pub(crate) inventory: Follower<InventoryTable>,
    pub(crate) labels: Follower<LabelTable>,
}

impl KnownVms {
    /// Starts following the KV buckets until shutdown, even if they do not exist yet.
    pub(crate) fn follow(bus: &Bus, shutdown: &CancellationToken) -> Self {
        let (inventory, labels) = (InventoryTable::default(), LabelTable::default());
        Self {
            inventory: Follower::start(bus, INVENTORY_BUCKET, STALE_AFTER, inventory, shutdown.clone()),
            labels: Follower::start(bus, LABELS_BUCKET, STALE_AFTER, labels, shutdown.clone()),
        }
    }

    /// Waits until the KV buckets have been read once; returns `false` if they were not read within the time limit. If
    /// lifecycle-svc has never run, they do not exist.
    pub(crate) async fn filled(&self, limit: Duration) -> bool {
        let filled = async { tokio::join!(self.inventory.filled(), self.labels.filled()) };
        timeout(limit, filled).await.is_ok()
    }

    /// Whether a VM has a label; `None` if the labels have not been read yet.
    pub(crate) fn has_label(&self, id: &InstanceId, label: &LabelFilter) -> Option<bool> {
        if !(self.inventory.is_filled() && self.labels.is_filled()) {
            return None;
        }
        let (inventory, labels) = (self.inventory.read(), self.labels.read());
        let vms = Vms {
            inventory: &inventory,
            labels: &labels,
            measures: None,
        };
        Some(vms.has_label(id, label))
    }
}
