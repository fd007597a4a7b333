//! Answers the list of VMs from memory: the inventory and the labels, which this service follows in KV buckets of
//! lifecycle-svc, and the newest rows.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId, Scope,
    inventory::INVENTORY_BUCKET,
    labels::LABELS_BUCKET,
    no_such_vm,
    time::unix_millis,
    vms::{Stale, VmDetail, VmPage, VmQuery},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus,
    follow::Follower,
    vms::{InventoryTable, LabelTable, Measures, Vms},
};

use crate::{deadline::Deadline, newest::NewestRows};

/// The answer says that it may be out of date if a KV bucket was last confirmed to be current longer ago than this.
const STALE_AFTER: Duration = Duration::from_secs(10);
/// How long a starting replica waits for the KV buckets. If lifecycle-svc has never run, they do not exist.
const FIRST_READ: Duration = Duration::from_millis(500);

/// Everything that is known about VMs.
pub(crate) struct VmList {
    inventory: Follower<InventoryTable>,
    labels: Follower<LabelTable>,
    newest: Arc<NewestRows>,
    silent_after_ms: u64,
}

impl VmList {
    /// Starts following the KV buckets until shutdown, even if they do not exist yet.
    pub(crate) fn follow(
        bus: &Bus,
        newest: &Arc<NewestRows>,
        silent_after: Duration,
        shutdown: &CancellationToken,
    ) -> Self {
        let (inventory, labels) = (InventoryTable::default(), LabelTable::default());
        Self {
            inventory: Follower::start(bus, INVENTORY_BUCKET, STALE_AFTER, inventory, shutdown.clone()),
            labels: Follower::start(bus, LABELS_BUCKET, STALE_AFTER, labels, shutdown.clone()),
            newest: Arc::clone(newest),
            silent_after_ms: u64::try_from(silent_after.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Waits until the KV buckets have been read once, or for at most [`FIRST_READ`].
    pub(crate) async fn filled(&self) {
        let filled = async { tokio::join!(self.inventory.filled(), self.labels.filled()) };
        // The list says which of the buckets could not be read.
        let _ = timeout(FIRST_READ, filled).await;
    }

    /// Returns a page of the VMs that the scope allows.
    pub(crate) fn list(&self, scope: &Scope, query: &VmQuery) -> Result<VmPage, Fault> {
        let mut page = self.read(|vms| vms.list(scope, query, unix_millis()))?;
        page.stale = self.stale();
        Ok(page)
    }

    /// Returns a VM. If it has no row in memory, the row is read from the database.
    pub(crate) async fn get(&self, id: &InstanceId, deadline: Deadline) -> Result<VmDetail, Fault> {
        let is_known = self.newest.read().get(id).is_some();
        if !is_known {
            self.newest.load(id, deadline).await?;
        }
        let stale = self.stale();
        let found = self.read(|vms| vms.get(id, unix_millis()));
        let mut detail = found.ok_or_else(|| {
            if stale.contains(&Stale::Inventory) {
                let text = "the VMs of hypervisors cannot be read; try again shortly";
                return Fault::new(FaultKind::Unavailable, text);
            }
            no_such_vm()
        })?;
        detail.stale = stale;
        Ok(detail)
    }

    fn read<T>(&self, read: impl FnOnce(Vms<'_>) -> T) -> T {
        let (inventory, labels) = (self.inventory.read(), self.labels.read());
        let rows = self.newest.read();
        read(Vms {
            inventory: &inventory,
            labels: &labels,
            measures: Some(Measures {
                rows: &rows,
                silent_after_ms: self.silent_after_ms,
            }),
        })
    }

    /// The data that may be out of date or incomplete.
    fn stale(&self) -> Vec<Stale> {
        let of = [
            (Stale::Inventory, self.inventory.is_current()),
            (Stale::Labels, self.labels.is_current()),
            (Stale::Samples, self.newest.is_current()),
        ];
        of.into_iter()
            .filter(|(_, is_current)| !is_current)
            .map(|(stale, _)| stale)
            .collect()
    }
}
