//! What users set of rules. The types have the JSON of the types of the bus; a test compares them.

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};
use vmwatch_api::{
    InstanceId,
    alerts::{
        RecordId, Severity,
        rules::{Direction, FaultKind},
    },
    lifecycle::MachineState,
    measures::VM_MEASURES,
};

use super::closed;
use crate::rest::extract::Number;

/// A limit, and the value at which an alert ends again.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct Threshold {
    /// Side of the limit on which the condition holds.
    direction: Direction,
    /// The condition begins to hold beyond this value.
    limit: f64,
    /// The condition ends at this value, which is at the limit or on its other side. Default: the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clear: Option<f64>,
}

/// The condition of a rule.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(in crate::rest) struct Condition(OneCondition);

impl PartialSchema for Condition {
    fn schema() -> RefOr<Schema> {
        closed(OneCondition::schema())
    }
}

impl ToSchema for Condition {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        OneCondition::schemas(schemas);
    }
}

/// The condition of a rule.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum OneCondition {
    /// A measure of the VM is beyond a threshold.
    Measure {
        #[schema(schema_with = measure_schema)]
        measure: String,
        threshold: Threshold,
    },
    /// The used part of a filesystem, in percent, is beyond a threshold.
    Filesystem {
        /// Only mount points that match this path, in which `*` stands for any text. Default: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(max_length = 1024, pattern = "^[/*]", example = "/var*")]
        mount_point: Option<String>,
        threshold: Threshold,
    },
    /// The number of processes with this name is beyond a threshold; below 1 means that there is none.
    ProcessCount {
        #[schema(min_length = 1, max_length = 256)]
        name: String,
        threshold: Threshold,
    },
    /// The CPU usage of all processes with this name, in percent of one core, is beyond a threshold.
    ProcessCpu {
        #[schema(min_length = 1, max_length = 256)]
        name: String,
        threshold: Threshold,
    },
    /// The memory usage of all processes with this name, in percent of the VM's memory, is beyond a threshold.
    ProcessMem {
        #[schema(min_length = 1, max_length = 256)]
        name: String,
        threshold: Threshold,
    },
    /// The hypervisor reports the VM in one of these states.
    VmState {
        #[schema(min_items = 1, max_items = 7)]
        states: Vec<MachineState>,
    },
    /// The agent has sent no sample for the duration of the rule.
    AgentSilent {},
    /// The samples of the agent may be wrong, or are stored late or not at all.
    AgentFault { fault: FaultKind },
    /// An operation on the VM failed, timed out or has an unknown outcome.
    OperationFailed {},
    /// vmwatch receives no samples. The alert is about no VM.
    NotReceiving {},
}

/// Schema of the name of a measure.
fn measure_schema() -> Schema {
    let names = VM_MEASURES.into_array().map(|measure| measure.name);
    let schema = ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some("Name of a measure of VMs."))
        .enum_values(Some(names));
    schema.into()
}

/// The VMs that a rule applies to: those that meet all that is given. Without anything, all VMs.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct VmSelector {
    /// Only VMs with one of these ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 1000)]
    ids: Vec<InstanceId>,
    /// Only VMs that have all of these labels: `key`, whatever the value, or `key=value`. Keys of labels of hypervisors
    /// begin with `hv/`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 16, example = json!(["env=production"]))]
    labels: Vec<String>,
    /// Only VMs of the hypervisor with this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 128)]
    hypervisor: Option<String>,
    /// Only VMs whose name on their hypervisor matches this pattern, in which `*` stands for any text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 128, example = "db-*")]
    name: Option<String>,
}

/// What users set of a rule.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct RuleSpec {
    /// Name of the rule: 1 to 128 bytes without control characters and without space at its ends.
    #[schema(min_length = 1, max_length = 128)]
    name: String,
    /// Whether the rule is evaluated. The alerts of a rule that is not are resolved.
    enabled: bool,
    condition: Condition,
    /// For how many seconds the condition must hold before the alert fires.
    #[schema(value_type = u32, maximum = 86_400)]
    for_seconds: Number<0, 86_400>,
    /// Severity of the alerts.
    severity: Severity,
    /// VMs that the rule applies to. Default: all.
    #[serde(default)]
    vms: VmSelector,
    /// Ids of the channels that are notified. Default: none.
    #[serde(default)]
    #[schema(max_items = 10)]
    recipients: Vec<RecordId>,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use vmwatch_api::alerts::rules;

    use super::*;

    #[test]
    fn rules_have_the_json_of_the_bus() {
        let threshold = json!({ "direction": "above", "limit": 95.0, "clear": 90.0 });
        let low = json!({ "direction": "below", "limit": 1.0 });
        for condition in [
            json!({ "kind": "measure", "measure": "cpu_util", "threshold": threshold }),
            json!({ "kind": "filesystem", "threshold": threshold }),
            json!({ "kind": "filesystem", "mount_point": "/var*", "threshold": threshold }),
            json!({ "kind": "process_count", "name": "postgres", "threshold": low }),
            json!({ "kind": "process_cpu", "name": "postgres", "threshold": threshold }),
            json!({ "kind": "process_mem", "name": "postgres", "threshold": threshold }),
            json!({ "kind": "vm_state", "states": ["shut_off"] }),
            json!({ "kind": "agent_silent" }),
            json!({ "kind": "agent_fault", "fault": "two_agents" }),
            json!({ "kind": "operation_failed" }),
            json!({ "kind": "not_receiving" }),
        ] {
            let vms = json!({ "ids": ["vm-1"], "labels": ["env=prod"], "hypervisor": "lab", "name": "db-*" });
            let rule = json!({
                "name": "a rule", "enabled": true, "condition": condition, "for_seconds": 60, "severity": "critical",
                "vms": vms, "recipients": ["0".repeat(32)],
            });
            let given: RuleSpec = serde_json::from_value(rule.clone()).unwrap();
            let spec: rules::RuleSpec = super::super::checked("", &given).unwrap();
            assert_eq!(serde_json::to_value(spec).unwrap(), rule);
        }
    }

    #[test]
    fn condition_with_a_field_of_another_kind_is_rejected() {
        let read = |condition: Value| serde_json::from_value::<Condition>(condition).is_ok();
        assert!(read(json!({ "kind": "agent_silent" })));
        assert!(!read(json!({ "kind": "agent_silent", "name": "x" })));
        assert!(!read(
            json!({ "kind": "vm_state", "states": ["shut_off"], "fault": "clock" })
        ));
        let schema = serde_json::to_value(Condition::schema()).unwrap();
        let kinds = schema["oneOf"].as_array().unwrap();
        assert_eq!(kinds.len(), 10);
        assert!(
            kinds.iter().all(|kind| kind["additionalProperties"] == false),
            "{schema}"
        );
    }
}
