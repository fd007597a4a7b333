//! Removes the VMs of hypervisors that are no longer configured on any replica.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use tokio::time::sleep;
use tracing::{info, warn};
use vmwatch_api::{inventory::InventoryKey, time::unix_millis};

use super::{Inventory, poll::CONCURRENT_WRITES};

const INTERVAL: Duration = Duration::from_mins(1);
/// Records of a hypervisor that is not configured on this replica are removed this long after the lease on the
/// hypervisor expired. Until then another replica may still have the hypervisor in its settings.
const UNPOLLED_MS: u64 = 10 * 60_000;

/// Periodically removes the records of all hypervisors that are not configured; never returns.
pub(crate) async fn remove_unconfigured(inventory: Arc<Inventory>, configured: Vec<String>) {
    loop {
        if inventory.catch_up().await && inventory.leases.is_current() {
            remove(&inventory, &configured).await;
        }
        sleep(INTERVAL).await;
    }
}

async fn remove(inventory: &Inventory, configured: &[String]) {
    let expired_before = unix_millis().saturating_sub(UNPOLLED_MS);
    let is_former = |name: &&str| {
        let known = configured.iter().any(|one| one == name);
        !known && inventory.leases.read().until_ms(name) < expired_before
    };
    let former: Vec<String> = {
        let table = inventory.vms.read();
        table.names().filter(is_former).map(str::to_owned).collect()
    };
    for name in former {
        let ids: Vec<_> = {
            let table = inventory.vms.read();
            table.vms(&name).map(|(id, _)| id.clone()).collect()
        };
        info!(
            hypervisor = name,
            vms = ids.len(),
            "removing the VMs of a hypervisor that is no longer configured"
        );
        let vms = ids.into_iter().map(|id| InventoryKey::Vm(&name, id).to_string());
        let keys = vms.chain([InventoryKey::Hypervisor(&name).to_string()]);
        let deleting = stream::iter(keys).map(|key| async move { inventory.delete(key).await });
        let failed = deleting
            .buffer_unordered(CONCURRENT_WRITES)
            .filter(|done| std::future::ready(done.is_err()))
            .count();
        match failed.await {
            0 => {}
            failed => warn!(
                hypervisor = name,
                failed, "removing VMs from the inventory failed; retrying later"
            ),
        }
    }
}
