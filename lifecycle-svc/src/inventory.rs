//! The VMs of all hypervisors. Each hypervisor is polled by one replica, which writes changes into a KV bucket.
//! metrics-svc follows the bucket and answers requests for the list of VMs; every replica of this service follows it
//! too, and answers these requests from memory while metrics-svc is unreachable.
//!
//! ```text
//! hypervisor ──> poll, by the holder of the lease ──> KV bucket ──> metrics-svc, lifecycle-svc: list of VMs
//! ```
//!
//! A hypervisor that hangs therefore delays no request: its VMs keep their last known state, and lists name it as silent.

mod lease;
mod poll;
mod removed;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_nats::{
    HeaderMap,
    header::NATS_MESSAGE_TTL,
    jetstream::{publish::PublishAck, stream::Config},
};
use bytes::Bytes;
use metrics::{counter, gauge};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId, Scope, Service,
    inventory::{INVENTORY_BUCKET, InventoryHypervisor, InventoryKey},
    labels::LABELS_BUCKET,
    time::unix_millis,
    vms::{Stale, VmDetail, VmPage, VmQuery},
    wire::Fault,
};
use vmwatch_bus::{
    Bus,
    follow::Follower,
    jetstream::{Bucket, JetStreamError},
    provision::{BucketConfig, ProvisionError, ensure_stream},
    vms::{InventoryTable, LabelTable, Vms},
};

use self::lease::{LEASE_BUCKET, Leases};
pub(crate) use self::{poll::Polling, removed::remove_unconfigured};

/// Maximum size of the KV bucket, enough for the records of 100,000 VMs.
const MAX_BYTES: i64 = 64 << 20;
/// Maximum size of the KV bucket of leases, enough for 5,000 names of hypervisors.
const MAX_LEASE_BYTES: i64 = 1 << 20;
/// If the table has not been confirmed to be current for this long, lists of VMs name all hypervisors as silent.
const STALE_AFTER: Duration = Duration::from_secs(10);
/// Deadline of a write. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);
/// How long NATS keeps the marker of a deleted key. A follower that misses a marker during a longer interruption does
/// not need it, because it reads the whole bucket again after the interruption.
pub(crate) const MARKER_TTL: &str = "1h";
/// How long a starting replica waits for the first list of each hypervisor.
const FIRST_LISTS: Duration = Duration::from_secs(2);
const FIRST_LISTS_PAUSE: Duration = Duration::from_millis(20);
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The in-memory copy of the KV bucket, and the leases on polling.
pub(crate) struct Inventory {
    pub(crate) bus: Bus,
    vms: Follower<InventoryTable>,
    labels: Follower<LabelTable>,
    leases: Follower<Leases>,
    lease_bucket: Bucket,
}

/// A write to the KV bucket failed; it may still have taken effect.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("writing the inventory failed")]
    JetStream(#[from] JetStreamError),
    #[error("a record of the inventory could not be encoded")]
    Encode(#[from] serde_json::Error),
}

/// This replica's copy of the inventory is out of date.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the in-memory copy of the inventory is out of date")]
pub(crate) struct OutOfDate;

/// Configurations of the KV buckets of VMs and of leases, with this number of replicas in a NATS cluster.
pub(crate) fn buckets(replicas: usize) -> [Config; 2] {
    let vms = BucketConfig {
        name: INVENTORY_BUCKET,
        description: "VMs of all hypervisors",
        max_age: Duration::ZERO,
        max_bytes: MAX_BYTES,
        replicas,
    };
    let leases = BucketConfig {
        name: LEASE_BUCKET,
        description: "replicas of lifecycle-svc that poll the hypervisors",
        max_bytes: MAX_LEASE_BYTES,
        ..vms
    };
    let vms = Config {
        allow_message_ttl: true,
        ..vms.into()
    };
    [vms, leases.into()]
}

impl Inventory {
    /// Starts following both KV buckets until shutdown, even if they do not exist yet.
    pub(crate) fn follow(bus: &Bus, shutdown: &CancellationToken) -> Self {
        let (vms, leases) = (InventoryTable::default(), Leases::default());
        let labels = LabelTable::default();
        Self {
            bus: bus.clone(),
            vms: Follower::start(bus, INVENTORY_BUCKET, STALE_AFTER, vms, shutdown.clone()),
            labels: Follower::start(bus, LABELS_BUCKET, STALE_AFTER, labels, shutdown.clone()),
            leases: Follower::start(bus, LEASE_BUCKET, STALE_AFTER, leases, shutdown.clone()),
            lease_bucket: Bucket::new(bus, LEASE_BUCKET, DEADLINE),
        }
    }

    /// Creates the KV buckets if they are missing.
    pub(crate) async fn ensure_buckets(&self, replicas: usize) -> Result<(), ProvisionError> {
        for bucket in buckets(replicas) {
            ensure_stream(&self.bus, Service::Lifecycle, &bucket).await?;
        }
        Ok(())
    }

    /// Waits until both KV buckets have been read once.
    pub(crate) async fn filled(&self) {
        self.vms.filled().await;
        self.leases.filled().await;
    }

    /// Waits until each of these hypervisors has been listed by some replica, or for at most [`FIRST_LISTS`].
    pub(crate) async fn first_lists(&self, hypervisors: &[&str]) {
        let end = Instant::now() + FIRST_LISTS;
        let is_known = |name: &&str| self.vms.read().hypervisor(name).is_some();
        while Instant::now() < end && !hypervisors.iter().all(is_known) {
            sleep(FIRST_LISTS_PAUSE).await;
        }
    }

    /// Name of the VM when it was last listed.
    pub(crate) fn name(&self, id: &InstanceId) -> Option<String> {
        self.vms.read().name(id)
    }

    /// The labels that hypervisors have for the VM, and whether any hypervisor has the VM.
    pub(crate) fn labels(&self, id: &InstanceId) -> (BTreeMap<String, String>, bool) {
        let table = self.vms.read();
        let mut labels = BTreeMap::new();
        let mut is_listed = false;
        for copy in table.copies(id) {
            is_listed = true;
            labels.extend(copy.vm.labels.clone());
        }
        (labels, is_listed)
    }

    /// Names of the hypervisors that have the VM, and whether each is reachable. Fails if this replica's copy of the
    /// inventory is out of date.
    pub(crate) fn hypervisors_of(&self, id: &InstanceId) -> Result<Vec<(String, bool)>, OutOfDate> {
        if !self.vms.is_current() {
            return Err(OutOfDate);
        }
        let now = unix_millis();
        let table = self.vms.read();
        let names = table.copies(id).iter().map(|copy| {
            let state = table.hypervisor(&copy.hypervisor);
            let is_reachable = state.is_some_and(|state| state.is_reachable(now));
            (copy.hypervisor.to_string(), is_reachable)
        });
        Ok(names.collect())
    }

    /// Deletes what is known of a VM on a hypervisor.
    pub(crate) async fn forget(&self, hypervisor: &str, id: &InstanceId) -> Result<(), WriteError> {
        let key = InventoryKey::Vm(hypervisor, id.clone());
        self.delete(key.to_string()).await
    }

    /// Whether the hypervisor had the VM when its VMs were last listed. If the hypervisor is unreachable since, this is
    /// forgotten after the time `keep`. While this replica's copy of the inventory is out of date, it may have had the VM.
    pub(crate) fn had(&self, hypervisor: &str, id: &InstanceId, keep: Duration) -> bool {
        if !self.vms.is_current() {
            return true;
        }
        let (table, now) = (self.vms.read(), unix_millis());
        let Some(vm) = table.vm(hypervisor, id) else {
            return false;
        };
        let keep_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        table.hypervisor(hypervisor).map_or_else(
            || now.saturating_sub(vm.changed_at_ms) <= keep_ms,
            |state| state.may_run(vm, keep_ms, now),
        )
    }

    /// Whether the measures that a hypervisor gives of a VM are used, of which it has an active one.
    pub(crate) fn is_measured_on(&self, hypervisor: &str, id: &InstanceId) -> bool {
        self.vms.read().is_measured_on(hypervisor, id, unix_millis())
    }

    /// Whether several hypervisors had the VM when their VMs were last listed.
    pub(crate) fn is_disputed(&self, id: &InstanceId) -> bool {
        self.vms.read().copies(id).len() > 1
    }

    /// Returns a page of the VMs that the scope allows, as last listed.
    pub(crate) fn list(&self, scope: &Scope, query: &VmQuery) -> Result<VmPage, Fault> {
        let (inventory, labels) = (self.vms.read(), self.labels.read());
        let mut page = vms(&inventory, &labels).list(scope, query, unix_millis())?;
        page.stale = self.stale();
        Ok(page)
    }

    /// Returns a VM as last listed; `None` if no hypervisor has it.
    pub(crate) fn get(&self, id: &InstanceId) -> Option<VmDetail> {
        let (inventory, labels) = (self.vms.read(), self.labels.read());
        let mut detail = vms(&inventory, &labels).get(id, unix_millis())?;
        detail.stale = self.stale();
        Some(detail)
    }

    /// The data that may be out of date, because this replica cannot follow its KV bucket.
    pub(crate) fn stale(&self) -> Vec<Stale> {
        let of = [
            (Stale::Inventory, self.vms.is_current()),
            (Stale::Labels, self.labels.is_current()),
        ];
        of.into_iter()
            .filter(|(_, is_current)| !is_current)
            .map(|(stale, _)| stale)
            .collect()
    }

    /// Returns the names of all silent hypervisors, whose VMs may be out of date, among those in the inventory and the
    /// given ones.
    fn silent(&self, hypervisors: &[&str]) -> Vec<String> {
        let is_current = self.vms.is_current();
        let now = unix_millis();
        let table = self.vms.read();
        let mut names: Vec<_> = table.names().chain(hypervisors.iter().copied()).collect();
        names.sort_unstable();
        names.dedup();
        names.retain(|name| {
            let state = table.hypervisor(name);
            !is_current || state.is_none_or(|state| state.is_silent(now))
        });
        names.into_iter().map(str::to_owned).collect()
    }

    /// Exports a metric that shows which of these hypervisors are silent, and updates it periodically; never returns.
    pub(crate) async fn export(self: Arc<Self>, hypervisors: Vec<String>) {
        let names: Vec<_> = hypervisors.iter().map(String::as_str).collect();
        loop {
            let silent = self.silent(&names);
            for name in &hypervisors {
                let is_silent = u8::from(silent.contains(name));
                gauge!("vmwatch_hypervisor_silent", "hypervisor" => name.clone()).set(f64::from(is_silent));
            }
            sleep(EXPORT_INTERVAL).await;
        }
    }

    /// The stored state of a hypervisor.
    fn hypervisor(&self, name: &str) -> Option<InventoryHypervisor> {
        self.vms.read().hypervisor(name).cloned()
    }

    /// Waits until the table contains everything that has been written; `false` if it could not be confirmed.
    async fn catch_up(&self) -> bool {
        self.vms.find(|_| None::<()>).await.is_ok()
    }

    async fn put(&self, key: InventoryKey<'_>, record: &impl serde::Serialize) -> Result<(), WriteError> {
        let value = serde_json::to_vec(record)?;
        self.write(key.to_string(), HeaderMap::new(), value.into()).await
    }

    /// Deletes a key. Its delete marker expires, so that the markers of former VMs do not fill the KV bucket.
    async fn delete(&self, key: String) -> Result<(), WriteError> {
        let mut headers = HeaderMap::new();
        headers.insert("KV-Operation", "DEL");
        headers.insert(NATS_MESSAGE_TTL, MARKER_TTL);
        self.write(key, headers, Bytes::new()).await
    }

    async fn write(&self, key: String, headers: HeaderMap, value: Bytes) -> Result<(), WriteError> {
        let subject = format!("$KV.{INVENTORY_BUCKET}.{key}");
        let written = self.bus.publish_stored(subject, headers, value, DEADLINE).await;
        let result = if written.is_ok() { "stored" } else { "failed" };
        counter!("vmwatch_inventory_writes_total", "result" => result).increment(1);
        let _: PublishAck = written?;
        Ok(())
    }
}

const fn vms<'a>(inventory: &'a InventoryTable, labels: &'a LabelTable) -> Vms<'a> {
    Vms {
        inventory,
        labels,
        measures: None,
    }
}
