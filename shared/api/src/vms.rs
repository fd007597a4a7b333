//! The list of VMs: its filters, order and pages, and its answer.
//!
//! metrics-svc answers. If it is unreachable, lifecycle-svc answers the same requests without measures.

use std::{borrow::Cow, collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use sha2::{Digest, Sha256};

use super::{
    InstanceId, Kind, Method, MethodInfo, Service,
    actions::Refused,
    agents::{AgentFault, AgentStatus, AgentText},
    bounded_text,
    history::query,
    lifecycle::{MachineState, Target},
    measures::VmValues,
    metrics::{Limit, Restriction},
    processes::Order,
};

/// Maximum length of a search in characters.
pub const MAX_SEARCH: usize = 128;
/// Maximum length of a filter by hypervisor in characters.
pub const MAX_HYPERVISOR: usize = 128;
/// Maximum length of a filter by label in characters: `hv/`, a key of 63, `=` and a value of 255.
pub const MAX_LABEL_FILTER: usize = 322;
/// Texts are sorted by their first bytes; this is their number.
pub const MAX_SORT_BYTES: usize = 256;
/// Maximum number of hypervisors in an answer.
pub const MAX_PARTS: usize = 500;

/// Value by which the VM list is sorted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum VmSort {
    /// Id of the VM.
    #[default]
    Id,
    /// Name of the VM on its hypervisor.
    Name,
    /// Name of the hypervisor.
    Hypervisor,
    /// State of the VM on its hypervisor.
    State,
    /// CPU usage of the VM, as its agent reports it, or else its hypervisor.
    Cpu,
    /// Memory usage of the VM, as its agent reports it, or else its hypervisor.
    Mem,
    /// Disk rate of the VM, reads plus writes.
    Disk,
    /// Network rate of the VM, received plus sent.
    Net,
    /// Time of the agent's last report.
    LastReport,
}

impl VmSort {
    /// Sort order that is used if the request does not specify one.
    pub const fn usual_order(self) -> Order {
        match self {
            Self::Id | Self::Name | Self::Hypervisor | Self::State => Order::Asc,
            Self::Cpu | Self::Mem | Self::Disk | Self::Net | Self::LastReport => Order::Desc,
        }
    }
}

/// Whether the agent in a VM reports samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Agent {
    /// The agent reported recently. If its samples are not stored, `agent_faults` has the reason.
    Reporting,
    /// The agent has not reported for longer than `VMWATCH_SILENT_AFTER`.
    Silent,
    /// The agent has never reported.
    Never,
}

/// Selects VMs by their agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum AgentFilter {
    /// The agent reported recently.
    Reporting,
    /// The agent has not reported for longer than `VMWATCH_SILENT_AFTER`.
    Silent,
    /// The agent has never reported.
    Never,
    /// The samples of the agent may be wrong or misleading: the VM has `agent_faults`.
    Faulty,
}

/// Selects VMs that have a label, whatever its value, or a label with this value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelFilter {
    pub key: String,
    pub value: Option<String>,
}

impl LabelFilter {
    /// The validation rule for a filter by label, as quoted in error messages to callers.
    pub const RULE: &str = "must be key or key=value, of at most 322 characters";
}

impl FromStr for LabelFilter {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (text, None),
        };
        if key.is_empty() || text.chars().count() > MAX_LABEL_FILTER {
            return Err(Self::RULE);
        }
        Ok(Self {
            key: key.to_owned(),
            value,
        })
    }
}

impl fmt::Display for LabelFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={value}", self.key),
            None => f.write_str(&self.key),
        }
    }
}

impl<'de> Deserialize<'de> for LabelFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = bounded_text(deserializer, Self::RULE, |_| true)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl Serialize for LabelFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn search<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be a text of at most 128 characters";
    bounded_text(deserializer, rule, |text| text.chars().count() <= MAX_SEARCH).map(Some)
}

fn hypervisor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let rule = "must be a text of at most 128 characters";
    bounded_text(deserializer, rule, |text| text.chars().count() <= MAX_HYPERVISOR).map(Some)
}

/// The VMs that a list contains.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFilter {
    /// Only VMs whose id, name, hypervisor or label (`key=value`) contains this text; case-insensitive.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "search")]
    pub search: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<MachineState>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentFilter>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "hypervisor"
    )]
    pub hypervisor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<LabelFilter>,
}

/// Selects a page of the VMs that the principal may see.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmQuery {
    #[serde(flatten)]
    pub filter: VmFilter,
    #[serde(default)]
    pub sort: VmSort,
    /// `None` means the usual order of the sort value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// The `next` value of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<VmCursor>,
    #[serde(default)]
    pub limit: Limit,
}

impl VmQuery {
    /// The direction in which the list is sorted.
    pub fn order(&self) -> Order {
        self.order.unwrap_or(self.sort.usual_order())
    }

    /// Whether the cursor, if there is one, belongs to a list with this filter, sort value and order.
    pub fn has_own_cursor(&self) -> bool {
        let cursor = self.cursor.as_ref();
        cursor.is_none_or(|cursor| cursor.list == self.list())
    }

    /// The cursor for the page after this VM.
    pub fn cursor_after(&self, value: Option<SortValue<'static>>, id: InstanceId) -> VmCursor {
        VmCursor {
            list: self.list(),
            value,
            id,
        }
    }

    /// A hash that identifies the list by its filter, sort value and order.
    fn list(&self) -> u64 {
        let list = (&self.filter, self.sort, self.order());
        // Encoding cannot fail, because the values are texts.
        let hash = Sha256::digest(serde_json::to_vec(&list).unwrap_or_default());
        let first = hash.first_chunk().copied();
        u64::from_be_bytes(first.unwrap_or_default())
    }
}

/// The value of a VM by which the list is sorted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SortValue<'a> {
    /// A number that has the same order as the value.
    Number(u64),
    /// At most [`MAX_SORT_BYTES`] bytes of a text.
    Text(Cow<'a, [u8]>),
}

impl<'a> SortValue<'a> {
    /// Sorts by the beginning of a text.
    pub fn text(text: &'a str) -> Self {
        let bytes = text.as_bytes();
        Self::Text(Cow::Borrowed(bytes.get(..MAX_SORT_BYTES).unwrap_or(bytes)))
    }

    /// Maps a float to an integer such that the integers have the same order as the floats.
    pub const fn float(number: f64) -> Self {
        let bits = number.to_bits();
        Self::Number(if number.is_sign_negative() {
            !bits
        } else {
            bits | (1 << 63)
        })
    }

    pub fn into_owned(self) -> SortValue<'static> {
        match self {
            Self::Number(number) => SortValue::Number(number),
            Self::Text(text) => SortValue::Text(Cow::Owned(text.into_owned())),
        }
    }
}

/// Marks the end of a page with the sort value and the id of its last VM, so that the next page is correct even if VMs
/// were added or removed meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmCursor {
    list: u64,
    /// `None` if the VM does not have the value; such VMs come last.
    pub value: Option<SortValue<'static>>,
    pub id: InstanceId,
}

impl VmCursor {
    /// Regular expression that matches exactly the valid cursors.
    #[cfg(feature = "openapi")]
    const PATTERN: &str = "^[0-9a-f]{16}\\.(n[0-9a-f]{16}|t([0-9a-f]{2}){0,256})?\\.[0-9A-Za-z_-]{1,64}$";

    fn read(text: &str) -> Option<Self> {
        let (list, rest) = text.split_once('.')?;
        let (value, id) = rest.split_once('.')?;
        let value = match value.split_at_checked(1) {
            None => None,
            Some(("n", number)) => Some(SortValue::Number(hex_number(number)?)),
            Some(("t", text)) if text.len() <= 2 * MAX_SORT_BYTES && is_lower(text) => {
                Some(SortValue::Text(Cow::Owned(hex::decode(text).ok()?)))
            }
            Some(_) => return None,
        };
        Some(Self {
            list: hex_number(list)?,
            value,
            id: id.parse().ok()?,
        })
    }
}

fn is_lower(hex: &str) -> bool {
    !hex.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn hex_number(text: &str) -> Option<u64> {
    let mut bytes = [0; 8];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    is_lower(text).then_some(u64::from_be_bytes(bytes))
}

impl fmt::Display for VmCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.", self.list)?;
        match &self.value {
            None => {}
            Some(SortValue::Number(number)) => write!(f, "n{number:016x}")?,
            Some(SortValue::Text(text)) => write!(f, "t{}", hex::encode(text))?,
        }
        write!(f, ".{}", self.id)
    }
}

impl<'de> Deserialize<'de> for VmCursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let rule = "must be the `next` value of the previous page";
        let text = bounded_text(deserializer, rule, |_| true)?;
        Self::read(&text).ok_or_else(|| D::Error::custom(rule))
    }
}

impl Serialize for VmCursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for VmCursor {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::Type::String)
            .pattern(Some(Self::PATTERN))
            .description(Some("Opaque cursor that marks the end of a page."))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for VmCursor {}

/// The newest sample of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NewestSample {
    /// Time of the sample by the VM's clock, Unix milliseconds.
    pub at_ms: u64,
    #[serde(flatten)]
    pub values: VmValues,
    /// Why the agent cannot see all processes of the VM; `None` if it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restricted: Option<Restriction>,
}

/// A VM on one of several hypervisors that have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOnHypervisor {
    /// The configured name of the hypervisor.
    pub hypervisor: String,
    pub state: MachineState,
    /// The actions on this hypervisor that are not allowed; empty if unknown.
    #[serde(default, skip_serializing_if = "Refused::is_empty")]
    pub refused: Refused,
}

/// A VM in the list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListedVm {
    pub instance_id: InstanceId,
    /// The hypervisor's name for the VM; `None` if no hypervisor has it.
    pub name: Option<String>,
    /// The configured name of the hypervisor that has the VM.
    pub hypervisor: Option<String>,
    /// Other hypervisors that have a VM with this id.
    #[serde(default)]
    pub also_on: Vec<String>,
    pub state: Option<MachineState>,
    /// The actions that the state does not allow; empty if unknown.
    #[serde(default, skip_serializing_if = "Refused::is_empty")]
    pub refused: Refused,
    /// The VM on each hypervisor that has it, if several have it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<CopyOnHypervisor>,
    /// Labels of the hypervisor, whose keys begin with `hv/`, and labels that operators have set.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// `None` if unknown.
    pub agent: Option<Agent>,
    /// When metrics-svc last stored a row of the VM, by the clock of the server. For rows that were imported, it is the
    /// time of the newest row. A VM is silent by this time, because it does not depend on the VM's clock.
    pub last_report_ms: Option<u64>,
    pub sample: Option<NewestSample>,
    /// The newest sample that the hypervisor measured; `None` if it has measured none for longer than
    /// `VMWATCH_SILENT_AFTER`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_sample: Option<NewestSample>,
    /// Why the samples may be wrong or misleading, or are stored late or not at all, by the recent messages of the agent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agent_faults: Vec<AgentFault>,
    /// The version of the agent, as it last reported it; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<AgentText>,
    /// Whether the agent is older than the service that answers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub agent_outdated: bool,
    /// Maximum CPU usage in each three minutes of the last hour, oldest first; null where there was no sample. Empty if
    /// there is no sample at all. It is computed from the samples of the hypervisor if the agent sent none.
    #[serde(default)]
    pub cpu_sparkline: Vec<Option<f64>>,
}

/// How current the VMs of a hypervisor are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorPart {
    pub name: String,
    /// Whether the last attempt to list the VMs of the hypervisor succeeded.
    pub reachable: bool,
    /// Whether the hypervisor is reachable and its VMs should have been listed again by now.
    pub late: bool,
    /// When its VMs were last listed completely, Unix milliseconds; renewed once per minute while nothing changes.
    pub listed_at_ms: Option<u64>,
}

/// Data that may be incomplete or out of date, because the service cannot follow its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stale {
    /// Names, hypervisors and states of VMs.
    Inventory,
    /// Labels that operators have set.
    Labels,
    /// Samples.
    Samples,
    /// Data that only a newer version of vmwatch knows.
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VmPage {
    pub vms: Vec<ListedVm>,
    /// Number of VMs that match the filter, on all pages.
    pub total: u64,
    /// The cursor of the next page; `None` on the last page.
    pub next: Option<VmCursor>,
    /// The hypervisors, at most [`MAX_PARTS`], those that are unreachable or late first. With a limited scope, only
    /// those that have VMs in the scope.
    pub hypervisors: Vec<HypervisorPart>,
    pub stale: Vec<Stale>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmDetail {
    pub vm: ListedVm,
    /// The hypervisors that have the VM.
    pub hypervisors: Vec<HypervisorPart>,
    /// The status that the agent last sent; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_status: Option<AgentStatus>,
    pub stale: Vec<Stale>,
}

/// Lists the VMs that the principal may see: those that hypervisors have, and those that have rows.
#[derive(Debug)]
pub struct List;

impl Method for List {
    type Params = VmQuery;
    type Reply = VmPage;
    const INFO: MethodInfo = query("metrics.vm.list");
}

/// Reads a VM of the list.
#[derive(Debug)]
pub struct Get;

impl Method for Get {
    type Params = Target;
    type Reply = VmDetail;
    const INFO: MethodInfo = query("metrics.vm.get");

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Lists the VMs that hypervisors have, without measures, while metrics-svc is unreachable.
#[derive(Debug)]
pub struct ListWithoutMeasures;

impl Method for ListWithoutMeasures {
    type Params = VmQuery;
    type Reply = VmPage;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Lifecycle,
        kind: Kind::Query,
        ..query("lifecycle.vm.list")
    };
}

/// Reads a VM of the list, without measures, while metrics-svc is unreachable.
#[derive(Debug)]
pub struct GetWithoutMeasures;

impl Method for GetWithoutMeasures {
    type Params = Target;
    type Reply = VmDetail;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Lifecycle,
        ..query("lifecycle.vm.get")
    };

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sort_keys_of_floats_have_numeric_order() {
        let numbers = [f64::NEG_INFINITY, -1.5, -0.0, 0.0, 0.1, 99.9, 100.0, 1e300];
        assert!(numbers.map(SortValue::float).is_sorted());
    }

    #[test]
    fn vm_list_cursor_can_be_decoded_after_encoding() {
        let query = VmQuery::default();
        let long = "x".repeat(MAX_SORT_BYTES + 1);
        for value in [
            None,
            Some(SortValue::text("")),
            Some(SortValue::float(1.5)),
            Some(SortValue::text(&long)),
        ] {
            let cursor = query.cursor_after(value.map(SortValue::into_owned), "VM_1".parse().unwrap());
            let text = serde_json::to_value(&cursor).unwrap();
            assert_eq!(serde_json::from_value::<VmCursor>(text).unwrap(), cursor);
        }
        let list = "0123456789abcdef";
        let long = "00".repeat(MAX_SORT_BYTES + 1);
        for bad in [
            String::new(),
            "a".to_owned(),
            format!("{list}.a"),
            format!("{list}.x.a"),
            format!("{list}.t0.a"),
            format!("{list}.tAA.a"),
            format!("{list}.n0.a"),
            format!("{list}.t{long}.a"),
            format!("{list}..a b"),
            format!("{}..a", list.to_uppercase()),
        ] {
            assert!(
                serde_json::from_value::<VmCursor>(bad.clone().into()).is_err(),
                "{bad}"
            );
        }
        assert!(serde_json::from_value::<VmCursor>(format!("{list}..a").into()).is_ok());
    }

    #[test]
    fn cursor_belongs_to_one_list() {
        let mut query: VmQuery = serde_json::from_str(r#"{"sort":"cpu","search":"a"}"#).unwrap();
        query.cursor = Some(query.cursor_after(None, "a".parse().unwrap()));
        assert!(query.has_own_cursor());
        query.limit = Limit::new(7).unwrap();
        query.order = Some(Order::Desc);
        assert!(
            query.has_own_cursor(),
            "the page size and the usual order change nothing"
        );
        let changed = |change: fn(&mut VmQuery)| {
            let mut other = query.clone();
            change(&mut other);
            other.has_own_cursor()
        };
        assert!(!changed(|query| query.sort = VmSort::Mem));
        assert!(!changed(|query| query.order = Some(Order::Asc)));
        assert!(!changed(|query| query.filter.search = None));
        assert!(!changed(|query| query.filter.label = "a=b".parse().ok()));
    }

    #[test]
    fn too_long_or_unknown_filters_are_rejected() {
        let long = |length| "é".repeat(length);
        for (bad, rule) in [
            (
                format!(r#"{{"search":"{}"}}"#, long(129)),
                "at most 128 characters",
            ),
            (
                format!(r#"{{"hypervisor":"{}"}}"#, long(129)),
                "at most 128 characters",
            ),
            (format!(r#"{{"label":"{}"}}"#, long(323)), LabelFilter::RULE),
            (r#"{"label":"=x"}"#.to_owned(), LabelFilter::RULE),
            (r#"{"agent":"asleep"}"#.to_owned(), "unknown variant"),
            (r#"{"sort":"size"}"#.to_owned(), "unknown variant"),
            (r#"{"cursor":"x"}"#.to_owned(), "`next`"),
            (r#"{"limit":1001}"#.to_owned(), Limit::RULE),
        ] {
            let error = serde_json::from_str::<VmQuery>(&bad).unwrap_err().to_string();
            assert!(error.contains(rule), "{bad}: {error}");
        }
        let good = format!(r#"{{"search":"{}","label":"hv/a=b=c"}}"#, long(128));
        let query: VmQuery = serde_json::from_str(&good).unwrap();
        let label = query.filter.label.unwrap();
        assert_eq!(
            (label.key.as_str(), label.value.as_deref()),
            ("hv/a", Some("b=c"))
        );
    }

    #[test]
    fn listed_vm_of_an_agent_and_of_a_hypervisor_matches_golden_json() {
        let both = r#"{"instance_id":"vm-1","name":null,"hypervisor":null,"also_on":[],"state":null,"labels":{},"agent":"never","last_report_ms":null,"sample":null,"hypervisor_sample":{"at_ms":1483277879001,"cpu_util":1.5,"mem":null,"disk_read":0.0,"disk_write":128.8,"net_incoming":0.6,"net_outgoing":5.7,"proc":null,"cores":4,"steal":0.5,"load":null,"swap":null,"pressure_cpu":null,"pressure_mem":null,"pressure_io":null},"cpu_sparkline":[]}"#;
        let vm: ListedVm = serde_json::from_str(both).unwrap();
        assert_eq!(serde_json::to_string(&vm).unwrap(), both);
        let golden = r#"{"instance_id":"vm-1","name":"web","hypervisor":"lab","also_on":[],"state":"running","labels":{"hv/os":"debian"},"agent":"reporting","last_report_ms":1483277880000,"sample":{"at_ms":1483277879001,"cpu_util":1.5,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"net_incoming":0.6,"net_outgoing":5.7,"proc":95,"cores":4,"steal":0.5,"load":2.25,"swap":null,"pressure_cpu":30.5,"pressure_mem":0.0,"pressure_io":7.0},"cpu_sparkline":[null,1.5]}"#;
        let vm: ListedVm = serde_json::from_str(golden).unwrap();
        assert_eq!(serde_json::to_string(&vm).unwrap(), golden);
    }
}
