//! Sort order and page cursor of the list of VMs.

use std::{cmp::Ordering, fmt::Write as _, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};
use vmwatch_api::{InstanceId, processes::Order};

use super::{
    cursors::cursor_schema,
    vms::{Agent, Vm},
};

/// Maximum length of a sort key in bytes; longer values are truncated.
const MAX_KEY_BYTES: usize = 256;

/// Value by which the VM list is sorted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum VmSort {
    /// Id of the VM.
    #[default]
    Id,
    /// Name of the VM on its hypervisor.
    Name,
    /// State of the VM on its hypervisor.
    State,
    /// CPU usage of the VM.
    Cpu,
    /// Memory usage of the VM.
    Mem,
    /// Disk rate of the VM, reads plus writes.
    Disk,
    /// Network rate of the VM, received plus sent.
    Net,
    /// Time of the agent's last report.
    LastReport,
}

/// Sort key of a VM: the value by which the list is sorted, and the VM's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// Value as bytes in sort order. It is empty for a VM without a value; such VMs come last in either order.
    value: Vec<u8>,
    id: InstanceId,
}

impl VmSort {
    /// Sort order that is used if the request does not specify one.
    pub(super) const fn usual_order(self) -> Order {
        match self {
            Self::Id | Self::Name | Self::State => Order::Asc,
            Self::Cpu | Self::Mem | Self::Disk | Self::Net | Self::LastReport => Order::Desc,
        }
    }

    pub(super) fn key(self, vm: &Vm) -> Key {
        let text = |text: &str| text.to_lowercase().bytes().take(MAX_KEY_BYTES).collect();
        let number = |number: f64| sortable(number).to_be_bytes().to_vec();
        // The last values of a VM whose agent is silent are stale, so such a VM comes last.
        let reporting = vm.sample.as_ref().filter(|_| vm.agent == Some(Agent::Reporting));
        let values = reporting.map(|sample| &sample.values);
        let value = match self {
            Self::Id => Some(vm.instance_id.as_str().as_bytes().to_vec()),
            Self::Name => vm.name.as_deref().map(text),
            Self::State => vm.state.map(|state| text(&state.to_string())),
            Self::Cpu => values.map(|values| number(values.cpu_util)),
            Self::Mem => values.map(|values| number(values.mem)),
            Self::Disk => values.map(|values| number(values.disk_read + values.disk_write)),
            Self::Net => values.map(|values| number(values.net_incoming + values.net_outgoing)),
            Self::LastReport => vm.last_report_at.map(|at| at.as_ms().to_be_bytes().to_vec()),
        };
        Key {
            value: value.unwrap_or_default(),
            id: vm.instance_id.clone(),
        }
    }
}

/// Maps a float to an integer such that the integers have the same order as the floats.
fn sortable(number: f64) -> u64 {
    let bits = number.to_bits();
    if number.is_sign_negative() {
        !bits
    } else {
        bits | (1 << 63)
    }
}

impl Key {
    /// Compares two sort keys; VMs with equal values are ordered by id.
    pub(super) fn compare(&self, other: &Self, order: Order) -> Ordering {
        let values = match (self.value.is_empty(), other.value.is_empty(), order) {
            (false, false, Order::Desc) => other.value.cmp(&self.value),
            (false, false, Order::Asc) => self.value.cmp(&other.value),
            (mine, others, _) => mine.cmp(&others),
        };
        values.then_with(|| self.id.cmp(&other.id))
    }
}

/// Marks the end of a page with the sort key of its last VM, so that the next page is correct even if VMs were added or
/// removed meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cursor(Key);

impl Cursor {
    /// Regular expression that matches exactly the valid cursors.
    const PATTERN: &str = "^([0-9a-f]{2}){0,256}\\.[0-9A-Za-z_-]{1,64}$";

    pub(super) fn of(key: &Key) -> Self {
        Self(key.clone())
    }

    pub(super) fn into_key(self) -> Key {
        self.0
    }
}

impl FromStr for Cursor {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('.').and_then(|(value, id)| {
            let lower =
                value.len() <= 2 * MAX_KEY_BYTES && !value.bytes().any(|byte| byte.is_ascii_uppercase());
            Some(Key {
                value: lower.then(|| hex::decode(value).ok()).flatten()?,
                id: id.parse().ok()?,
            })
        });
        parsed
            .map(Self)
            .ok_or("must be the `next` value of the previous page")
    }
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

impl Serialize for Cursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = hex::encode(&self.0.value);
        // Writing to a String cannot fail.
        let _ = write!(text, ".{}", self.0.id);
        serializer.serialize_str(&text)
    }
}

impl PartialSchema for Cursor {
    fn schema() -> RefOr<Schema> {
        cursor_schema(Self::PATTERN)
    }
}

impl ToSchema for Cursor {}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(value: &[u8], id: &str) -> Key {
        Key {
            value: value.to_vec(),
            id: id.parse().unwrap(),
        }
    }

    #[test]
    fn sort_keys_of_floats_have_numeric_order() {
        let numbers = [f64::NEG_INFINITY, -1.5, -0.0, 0.0, 0.1, 99.9, 100.0, 1e300];
        assert!(numbers.map(sortable).is_sorted());
    }

    #[test]
    fn vms_without_value_sort_last_and_equal_values_sort_by_id() {
        let (none, low, high) = (key(b"", "a"), key(b"1", "b"), key(b"2", "c"));
        assert!(low.compare(&high, Order::Asc).is_lt() && low.compare(&high, Order::Desc).is_gt());
        for order in [Order::Asc, Order::Desc] {
            assert!(none.compare(&low, order).is_gt() && low.compare(&none, order).is_lt());
            assert!(key(b"1", "a").compare(&low, order).is_lt());
        }
    }

    #[test]
    fn vm_list_cursor_can_be_decoded_after_encoding() {
        for key in [
            key(b"", "vm-1"),
            key(&[0, 255, 7], "VM_2"),
            key(&[1; MAX_KEY_BYTES], "x"),
        ] {
            let cursor = Cursor::of(&key);
            let text = serde_json::to_value(&cursor).unwrap();
            assert_eq!(text.as_str().unwrap().parse::<Cursor>().unwrap().into_key(), key);
        }
        let long = format!("{}.a", "00".repeat(MAX_KEY_BYTES + 1));
        for bad in ["", "a", ".", "0.a", "0G.a", "0A.a", "00.a b", &long] {
            assert!(bad.parse::<Cursor>().is_err(), "{bad}");
        }
    }
}
