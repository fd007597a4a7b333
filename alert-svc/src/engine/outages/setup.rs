//! The rules and VMs of the simulation, in a real database and real KV buckets.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use testkit::PATIENCE;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Service,
    actions::Refused,
    alerts::{RecordId, rules::RuleSpec},
    inventory::{INVENTORY_BUCKET, InventoryHypervisor, InventoryKey, InventoryVm},
    labels::LABELS_BUCKET,
    lifecycle::MachineState,
    time::unix_millis,
};
use vmwatch_bus::{
    Bus,
    provision::{BucketConfig, ensure_stream},
};
use vmwatch_service::config::Environment;

use crate::{
    definitions,
    engine::Setup,
    events::Events,
    known_vms::KnownVms,
    notify::{
        Delivery,
        addresses::Addresses,
        settings::{AddressSettings, NotifySettings},
    },
    starter,
    store::{Store, StoredRule},
};

pub(super) const AGENTS: u64 = 200;
/// Duration of the silence rule that is added to the starter rules, in seconds.
pub(super) const SHORT: u32 = 60;

/// The id of the VM of an agent.
pub(super) fn vm(agent: u64) -> String {
    format!("vm-{agent}")
}

/// Lists the VMs of all agents as running, as lifecycle-svc does.
async fn list_vms(bus: &Bus) {
    for name in [INVENTORY_BUCKET, LABELS_BUCKET] {
        let bucket = BucketConfig {
            name,
            description: "",
            max_age: Duration::ZERO,
            max_bytes: 1 << 20,
            replicas: 1,
        };
        let made = ensure_stream(bus, Service::Lifecycle, &bucket.into()).await;
        made.unwrap();
    }
    let inventory = bus.jetstream_for_tests().get_key_value(INVENTORY_BUCKET).await;
    let inventory = inventory.unwrap();
    let now = unix_millis();
    let hypervisor = InventoryHypervisor {
        reachable: true,
        late: false,
        listed_at_ms: Some(now),
        interval_ms: 5000,
        keep_ms: None,
    };
    let key = InventoryKey::Hypervisor("lab").to_string();
    let hypervisor = serde_json::to_vec(&hypervisor).unwrap();
    inventory.put(key, hypervisor.into()).await.unwrap();
    for agent in 0..AGENTS {
        let listed = InventoryVm {
            name: vm(agent),
            state: MachineState::Running,
            labels: BTreeMap::new(),
            refused: Refused::default(),
            changed_at_ms: now,
        };
        let key = InventoryKey::Vm("lab", vm(agent).parse().unwrap()).to_string();
        let listed = serde_json::to_vec(&listed).unwrap();
        inventory.put(key, listed.into()).await.unwrap();
    }
}

/// Stores the starter rules and a silence rule with a short duration.
async fn store_rules(store: &Store) {
    starter::create(store).await.unwrap();
    let spec = serde_json::json!({
        "name": "short", "enabled": true, "condition": { "kind": "agent_silent" }, "for_seconds": SHORT,
        "severity": "warning",
    });
    let spec: RuleSpec = serde_json::from_value(spec).unwrap();
    let rule = StoredRule {
        id: RecordId::from_parts(&["short"]).to_string(),
        revision: 1,
        spec,
        changed_by: "ann".to_owned(),
        changed_ms: 0,
        removed: false,
        problem: None,
    };
    store.rules.insert_one(rule).await.unwrap();
}

/// Makes everything that the engine needs.
pub(super) async fn setup(bus: Bus, store: Store, term: &CancellationToken) -> Setup {
    list_vms(&bus).await;
    store_rules(&store).await;
    let settings = NotifySettings::read(&Environment::from_variables([])).unwrap();
    let addresses = Arc::new(Addresses::new(AddressSettings::default()));
    let definitions = definitions::follow(store.clone(), term.clone());
    assert!(definitions.filled().await.is_some());
    let known = KnownVms::follow(&bus, term);
    assert!(known.filled(PATIENCE).await);
    Setup {
        events: Events::new(&bus),
        bus,
        store,
        definitions,
        known,
        changed: Arc::new(Notify::new()),
        delivery: Arc::new(Delivery::new(&settings, addresses).unwrap()),
    }
}
