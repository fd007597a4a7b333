//! Answers of the REST API, with the fields that commands show. Types of the contract crate are used where the JSON is
//! the same; the tests compare all of them with the OpenAPI document.
//!
//! Names of states and kinds are texts, so that this program shows also those that only a newer gateway knows.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use vmwatch_api::{
    InstanceId, Role,
    measures::{VmMeasures, VmValues},
    metrics::CpuSeconds,
};

/// A time in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Timestamp(pub(crate) jiff::Timestamp);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map(Self).map_err(D::Error::custom)
    }
}

/// A new session.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) token: String,
    pub(crate) user_name: String,
    pub(crate) role: Role,
    pub(crate) expires_at: Timestamp,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) at: Timestamp,
    #[serde(flatten)]
    pub(crate) values: VmValues,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Vm {
    pub(crate) instance_id: InstanceId,
    pub(crate) name: Option<String>,
    pub(crate) hypervisor: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) agent: Option<String>,
    pub(crate) last_report_at: Option<Timestamp>,
    pub(crate) sample: Option<Sample>,
    pub(crate) hypervisor_sample: Option<Sample>,
    pub(crate) cpu_sparkline: Vec<Option<f64>>,
}

impl Vm {
    /// The newest values of the VM: those of its agent if it reports, or else those of its hypervisor.
    pub(crate) fn values(&self) -> Option<&VmValues> {
        let reports = self.agent.as_deref() == Some("reporting");
        let agent = self.sample.as_ref().filter(|_| reports);
        agent
            .or(self.hypervisor_sample.as_ref())
            .map(|sample| &sample.values)
    }

    /// The name of the VM or, without one, its id.
    pub(crate) fn title(&self) -> &str {
        self.name.as_deref().unwrap_or(self.instance_id.as_str())
    }
}

/// A process, or several that are summed in one row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) processes: Option<u32>,
    pub(crate) name: String,
    pub(crate) pid: Option<u32>,
    pub(crate) cpu_util: f64,
    pub(crate) mem: f64,
    pub(crate) disk_read: f64,
    pub(crate) disk_write: f64,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) ended_at: Option<Timestamp>,
    pub(crate) exit_code: Option<u32>,
    pub(crate) user: Option<String>,
    pub(crate) parent_pid: Option<u32>,
    pub(crate) unit: Option<String>,
    pub(crate) container: Option<String>,
    pub(crate) command_line: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProcessTable {
    pub(crate) at: Option<Timestamp>,
    pub(crate) total: u64,
    pub(crate) vm_cpu: Option<CpuSeconds>,
    pub(crate) cpu_seconds: f64,
    pub(crate) processes: Vec<Process>,
    pub(crate) next: Option<String>,
}

/// A VM in which a process ran.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VmThatRan {
    pub(crate) instance_id: InstanceId,
    pub(crate) name: Option<String>,
    pub(crate) process_names: Vec<String>,
    pub(crate) first_at: Timestamp,
    pub(crate) last_at: Timestamp,
    pub(crate) hours: u32,
    pub(crate) max_processes: u32,
    pub(crate) max_cpu_util: f64,
    pub(crate) max_mem: f64,
}

/// Average and maximum of a measure in a time bucket.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Stat {
    pub(crate) avg: f64,
    pub(crate) max: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bucket {
    pub(crate) at: Timestamp,
    #[serde(flatten)]
    pub(crate) stats: VmMeasures<Option<Stat>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) buckets: Vec<Bucket>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProcessPoint {
    pub(crate) at: Timestamp,
    pub(crate) processes: Stat,
    pub(crate) cpu_util: Stat,
    pub(crate) mem: Stat,
    pub(crate) disk_read: Stat,
    pub(crate) disk_write: Stat,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProcessSeries {
    pub(crate) buckets: Vec<ProcessPoint>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Operation {
    pub(crate) id: String,
    pub(crate) action: String,
    pub(crate) instance_id: InstanceId,
    pub(crate) hypervisor: Option<String>,
    pub(crate) user: String,
    pub(crate) requested_at: Timestamp,
    pub(crate) deadline: Timestamp,
    pub(crate) finished_at: Option<Timestamp>,
    pub(crate) state: String,
    pub(crate) machine_state: Option<String>,
    pub(crate) failure: Option<Failure>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) detail: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Alert {
    pub(crate) id: String,
    pub(crate) rule_name: String,
    pub(crate) severity: String,
    pub(crate) instance_id: Option<InstanceId>,
    pub(crate) vm_name: Option<String>,
    pub(crate) subject: String,
    pub(crate) state: String,
    pub(crate) value: Option<f64>,
    pub(crate) since: Timestamp,
    pub(crate) culprits: Option<Culprits>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Culprits {
    pub(crate) processes: Vec<Culprit>,
    pub(crate) problem: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Culprit {
    pub(crate) name: String,
    pub(crate) pid: Option<u32>,
    pub(crate) processes: Option<u32>,
    pub(crate) share: Option<f64>,
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{collections::BTreeMap, sync::LazyLock};

    use serde::de::DeserializeOwned;
    use serde_json::{Map, Value, json};

    use super::*;

    static DOCUMENT: LazyLock<Value> =
        LazyLock::new(|| serde_json::from_str(include_str!("../../gateway/openapi.json")).unwrap());

    /// A value that the schema allows, with all properties and no null.
    fn example(schema: &Value) -> Value {
        if let Some(reference) = schema["$ref"].as_str() {
            let pointer = reference.strip_prefix('#').unwrap();
            return example(DOCUMENT.pointer(pointer).unwrap());
        }
        if let Some(parts) = schema["allOf"].as_array() {
            let mut whole = Map::new();
            for part in parts {
                whole.extend(example(part).as_object().unwrap().clone());
            }
            return whole.into();
        }
        if let Some(choices) = schema["oneOf"].as_array() {
            return example(&choices[0]);
        }
        if let Some(values) = schema["enum"].as_array() {
            return values[0].clone();
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => kinds[0].as_str(),
            kind => kind.as_str(),
        };
        match (kind.unwrap_or("object"), schema["format"].as_str()) {
            ("string", Some("date-time")) => json!("2017-01-01T13:37:59.001Z"),
            ("string", _) => json!("58690637594c10403e25b04858690637"),
            ("integer", _) => json!(7),
            ("number", _) => json!(1.5),
            ("boolean", _) => json!(true),
            ("array", _) => json!([example(&schema["items"])]),
            ("object", _) => {
                let properties: BTreeMap<String, Value> =
                    serde_json::from_value(schema["properties"].clone()).unwrap_or_default();
                properties
                    .iter()
                    .map(|(name, schema)| (name.clone(), example(schema)))
                    .collect()
            }
            (other, _) => panic!("{other}"),
        }
    }

    /// Whether each value of `part` is also in `whole`.
    fn is_part(part: &Value, whole: &Value) -> bool {
        match (part, whole) {
            (Value::Object(part), Value::Object(whole)) => part
                .iter()
                .all(|(name, value)| whole.get(name).is_some_and(|other| is_part(value, other))),
            (Value::Array(part), Value::Array(whole)) => {
                part.len() == whole.len()
                    && part.iter().zip(whole).all(|(value, other)| is_part(value, other))
            }
            _ => part == whole,
        }
    }

    /// A field that the document does not have would be null or missing when the example is read.
    pub(crate) fn check<T: Serialize + DeserializeOwned>(name: &str) {
        let example = example(&json!({ "$ref": format!("#/components/schemas/{name}") }));
        let read: T =
            serde_json::from_value(example.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let shown = serde_json::to_value(read).unwrap();
        assert!(
            is_part(&shown, &example),
            "{name}: {shown} is not part of {example}"
        );
    }

    #[test]
    fn answers_have_the_fields_of_the_openapi_document() {
        check::<Session>("Session");
        check::<Vm>("Vm");
        check::<Vm>("VmDetail");
        check::<ProcessTable>("ProcessTable");
        check::<VmThatRan>("VmThatRan");
        check::<Series>("Series");
        check::<ProcessSeries>("ProcessSeries");
        check::<Operation>("Operation");
        check::<Alert>("Alert");
    }

    #[test]
    fn values_of_a_silent_agent_are_not_current() {
        let sample = json!({ "at": "2017-01-01T13:37:59Z", "cpu_util": 1.5, "mem": null, "disk_read": 0.0,
            "disk_write": 0.0, "net_incoming": 0.0, "net_outgoing": 0.0, "proc": 3 });
        let vm = |agent: &str, hypervisor_sample: &Value| -> Vm {
            serde_json::from_value(json!({ "instance_id": "vm-1", "name": null, "hypervisor": null, "state": "running",
                "agent": agent, "last_report_at": null, "sample": sample, "hypervisor_sample": hypervisor_sample,
                "cpu_sparkline": [] }))
            .unwrap()
        };
        assert_eq!(
            vm("reporting", &Value::Null).values().unwrap().cpu_util,
            Some(1.5)
        );
        assert!(vm("silent", &Value::Null).values().is_none());
        let mut other = sample.clone();
        other["cpu_util"] = json!(7.5);
        assert_eq!(vm("silent", &other).values().unwrap().cpu_util, Some(7.5));
    }
}
