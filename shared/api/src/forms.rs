//! Compares the stored and transmitted JSON formats with golden files (docs/compatibility.md), so every change of
//! a format is visible in a review.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    Principal, Role, Scope,
    alerts::{
        Alert,
        channels::{Channel, Message},
        evaluation::{EvaluationRecord, WatchedNames},
        rules::Rule,
        silences::Silence,
    },
    api_tokens::{ApiTokenAccess, ApiTokenRecord},
    audit::{AuditRecord, AuditResult},
    enrollment::{AgentRecord, JoinTokenRecord},
    events::LiveEvent,
    hypervisor_samples::HypervisorSample,
    inventory::{InventoryHypervisor, InventoryVm},
    labels::VmLabels,
    lifecycle::MachineState,
    metrics::Sample,
    sessions::{SessionList, SessionRecord, UserRecord},
};
use crate::wire::{Envelope, FaultKind};

/// Asserts that the JSON of the golden file is unchanged after decoding and encoding. Returns the value and the JSON.
fn holds<T: Serialize + DeserializeOwned>(golden: &str) -> (T, Value) {
    let golden: Value = serde_json::from_str(golden).unwrap();
    let read: T = serde_json::from_value(golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), golden);
    (read, golden)
}

/// Adds an unknown field to the JSON, as a newer version of vmwatch may do.
fn with_more(mut golden: Value) -> Value {
    let object = golden.as_object_mut().unwrap();
    object.insert("of_a_newer_version".to_owned(), serde_json::json!({ "a": [1] }));
    golden
}

fn reads_more<T: Serialize + DeserializeOwned>(golden: &str) {
    let (_, golden) = holds::<T>(golden);
    serde_json::from_value::<T>(with_more(golden)).unwrap();
}

const PRINCIPAL: &str = include_str!("../../../tests/golden/forms/principal.json");
const AUDIT_RECORD: &str = include_str!("../../../tests/golden/forms/audit-record-token.json");
const FORMER_AUDIT_RECORD: &str = include_str!("../../../tests/golden/forms/audit-record.json");
const SESSION_RECORD: &str = include_str!("../../../tests/golden/forms/session-record.json");
const SESSION_LIST: &str = include_str!("../../../tests/golden/forms/session-list.json");
const USER_RECORD: &str = include_str!("../../../tests/golden/forms/user-record-created.json");
const FORMER_USER_RECORD: &str = include_str!("../../../tests/golden/forms/user-record.json");
const SAMPLE: &str = include_str!("../../../tests/golden/forms/sample.json");
const HYPERVISOR_SAMPLE: &str = include_str!("../../../tests/golden/forms/hypervisor-sample.json");
const FAULT: &str = include_str!("../../../tests/golden/forms/envelope-fault.json");
const INVENTORY_VM: &str = include_str!("../../../tests/golden/forms/inventory-vm.json");
const INVENTORY_VM_REFUSED: &str = include_str!("../../../tests/golden/forms/inventory-vm-refused.json");
const INVENTORY_HYPERVISOR: &str = include_str!("../../../tests/golden/forms/inventory-hypervisor.json");
const INVENTORY_HYPERVISOR_KEEP: &str =
    include_str!("../../../tests/golden/forms/inventory-hypervisor-keep.json");
const VM_LABELS: &str = include_str!("../../../tests/golden/forms/vm-labels.json");
const JOIN_TOKEN: &str = include_str!("../../../tests/golden/forms/join-token.json");
const API_TOKEN: &str = include_str!("../../../tests/golden/forms/api-token.json");
const AGENT: &str = include_str!("../../../tests/golden/forms/agent.json");
const ALERTS: [&str; 2] = [
    include_str!("../../../tests/golden/forms/alert.json"),
    include_str!("../../../tests/golden/forms/alert-silent.json"),
];
const ALERT_RULE: &str = include_str!("../../../tests/golden/forms/alert-rule.json");
const ALERT_SILENCE: &str = include_str!("../../../tests/golden/forms/alert-silence.json");
const ALERT_CHANNEL: &str = include_str!("../../../tests/golden/forms/alert-channel.json");
const ALERT_MESSAGE: &str = include_str!("../../../tests/golden/forms/alert-message.json");
const EVALUATION_RECORD: &str = include_str!("../../../tests/golden/forms/evaluation-record.json");
const WATCHED_NAMES: &str = include_str!("../../../tests/golden/forms/watched-names.json");
const EVENTS: [&str; 8] = [
    include_str!("../../../tests/golden/forms/event-alert.json"),
    include_str!("../../../tests/golden/forms/event-alert-vmwatch.json"),
    include_str!("../../../tests/golden/forms/event-hypervisor-sample.json"),
    include_str!("../../../tests/golden/forms/event-sample.json"),
    include_str!("../../../tests/golden/forms/event-processes.json"),
    include_str!("../../../tests/golden/forms/event-machine.json"),
    include_str!("../../../tests/golden/forms/event-operation.json"),
    include_str!("../../../tests/golden/forms/event-removed.json"),
];

#[test]
fn formats_match_golden_files_and_unknown_fields_are_ignored() {
    reads_more::<Principal>(PRINCIPAL);
    reads_more::<AuditRecord>(AUDIT_RECORD);
    reads_more::<AuditRecord>(FORMER_AUDIT_RECORD);
    reads_more::<SessionRecord>(SESSION_RECORD);
    reads_more::<SessionList>(SESSION_LIST);
    reads_more::<UserRecord>(USER_RECORD);
    reads_more::<UserRecord>(FORMER_USER_RECORD);
    reads_more::<Sample>(SAMPLE);
    reads_more::<HypervisorSample>(HYPERVISOR_SAMPLE);
    reads_more::<Envelope<()>>(FAULT);
    reads_more::<InventoryVm>(INVENTORY_VM);
    reads_more::<InventoryVm>(INVENTORY_VM_REFUSED);
    reads_more::<InventoryHypervisor>(INVENTORY_HYPERVISOR);
    reads_more::<InventoryHypervisor>(INVENTORY_HYPERVISOR_KEEP);
    reads_more::<VmLabels>(VM_LABELS);
    reads_more::<JoinTokenRecord>(JOIN_TOKEN);
    reads_more::<ApiTokenRecord>(API_TOKEN);
    reads_more::<AgentRecord>(AGENT);
    for alert in ALERTS {
        reads_more::<Alert>(alert);
    }
    reads_more::<Rule>(ALERT_RULE);
    reads_more::<Silence>(ALERT_SILENCE);
    reads_more::<Channel>(ALERT_CHANNEL);
    reads_more::<Message>(ALERT_MESSAGE);
    reads_more::<EvaluationRecord>(EVALUATION_RECORD);
    reads_more::<WatchedNames>(WATCHED_NAMES);
    for event in EVENTS {
        reads_more::<LiveEvent>(event);
    }
}

#[test]
fn enum_values_of_newer_version_decode_as_unknown() {
    let changed = |golden: &str, field: &str, value: Value| {
        let mut form: Value = serde_json::from_str(golden).unwrap();
        form[field] = value;
        form
    };
    let record: AuditRecord =
        serde_json::from_value(changed(AUDIT_RECORD, "result", "deferred".into())).unwrap();
    assert_eq!(record.result, AuditResult::Unknown);
    let vm: InventoryVm =
        serde_json::from_value(changed(INVENTORY_VM, "state", "hibernated".into())).unwrap();
    assert_eq!(vm.state, MachineState::Unknown);
    let principal: Principal = serde_json::from_value(changed(PRINCIPAL, "role", "auditor".into())).unwrap();
    assert_eq!(principal.role, Role::Unknown);
    let mut user: Value = serde_json::from_str(USER_RECORD).unwrap();
    user["principal"]["role"] = "auditor".into();
    user["principal"]["scope"] = serde_json::json!({ "tenant": "x" });
    let user: UserRecord = serde_json::from_value(user).unwrap();
    assert_eq!(
        (user.principal.role, user.principal.scope),
        (Role::Unknown, Scope::Unknown)
    );
    let token: ApiTokenRecord =
        serde_json::from_value(changed(API_TOKEN, "access", "writes".into())).unwrap();
    assert_eq!(token.access, ApiTokenAccess::Unknown);
    let fault: Envelope<()> = serde_json::from_value(changed(FAULT, "fault", "quota".into())).unwrap();
    assert_eq!(fault.into_result().unwrap_err().kind, FaultKind::Internal);
}
