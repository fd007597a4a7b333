//! The measures of a VM's row, such as CPU usage. Live events, summaries, histories, rollups, the REST API, the OpenAPI
//! document, CSV files and the web page all derive their list of measures from this module.

use serde::{Deserialize, Serialize};

/// A value for each measure of a VM's row; [`VM_MEASURES`] describes the measures. Values have the type `T`, except
/// counts (`proc`, `cores`), which can have a type of their own, `Count`. The measures after `proc` are not part of the
/// documented API, and programs of an older version do not send them.
#[expect(missing_docs, reason = "VM_MEASURES describes the fields")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMeasures<T, Count = T> {
    pub cpu_util: T,
    pub mem: T,
    pub disk_read: T,
    pub disk_write: T,
    pub net_incoming: T,
    pub net_outgoing: T,
    pub proc: Count,
    #[serde(default)]
    pub cores: Count,
    #[serde(default)]
    pub steal: T,
    #[serde(default)]
    pub load: T,
    #[serde(default)]
    pub swap: T,
    #[serde(default)]
    pub pressure_cpu: T,
    #[serde(default)]
    pub pressure_mem: T,
    #[serde(default)]
    pub pressure_io: T,
}

/// The measured values of one VM row; `None` where a value is unknown.
pub type VmValues = VmMeasures<Option<f64>, Option<u32>>;

/// The unit of a measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A percentage from 0 to 100.
    Percent,
    /// A non-negative rate in KiB/s.
    KibPerSecond,
    /// A non-negative integer.
    Count,
    /// A non-negative number of processes, averaged over time.
    Load,
}

/// Describes a measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// The name of the measure in rows, JSON and CSV.
    pub name: &'static str,
    /// The unit of the measure's values.
    pub unit: Unit,
    /// The description of the measure in the OpenAPI document.
    pub help: &'static str,
}

/// The descriptions of all measures, in the order used in JSON and CSV.
pub const VM_MEASURES: VmMeasures<Measure> = VmMeasures {
    cpu_util: Measure::new(
        "cpu_util",
        Unit::Percent,
        "CPU usage of all cores, percent, 0 to 100.",
    ),
    mem: Measure::new("mem", Unit::Percent, "Memory usage, percent, 0 to 100."),
    disk_read: Measure::new("disk_read", Unit::KibPerSecond, "Read rate of all disks, KiB/s."),
    disk_write: Measure::new(
        "disk_write",
        Unit::KibPerSecond,
        "Write rate of all disks, KiB/s.",
    ),
    net_incoming: Measure::new("net_incoming", Unit::KibPerSecond, "Network receive rate, KiB/s."),
    net_outgoing: Measure::new(
        "net_outgoing",
        Unit::KibPerSecond,
        "Network transmit rate, KiB/s.",
    ),
    proc: Measure::new("proc", Unit::Count, "Number of processes."),
    cores: Measure::new("cores", Unit::Count, "Number of CPU cores that are online."),
    steal: Measure::new(
        "steal",
        Unit::Percent,
        "CPU time that the hypervisor gave to others while the VM had work, percent of all cores, 0 to 100.",
    ),
    load: Measure::new(
        "load",
        Unit::Load,
        "Processes that ran or waited for a core or a disk, averaged by the kernel over one minute.",
    ),
    swap: Measure::new(
        "swap",
        Unit::Percent,
        "Swap space in use, percent, 0 to 100; unknown if the VM has no swap space.",
    ),
    pressure_cpu: Measure::new(
        "pressure_cpu",
        Unit::Percent,
        "Share of the time in which some process waited for a core, percent, 0 to 100.",
    ),
    pressure_mem: Measure::new(
        "pressure_mem",
        Unit::Percent,
        "Share of the time in which some process waited for memory, percent, 0 to 100.",
    ),
    pressure_io: Measure::new(
        "pressure_io",
        Unit::Percent,
        "Share of the time in which some process waited for a disk, percent, 0 to 100.",
    ),
};

impl Measure {
    const fn new(name: &'static str, unit: Unit, help: &'static str) -> Self {
        Self { name, unit, help }
    }
}

impl<T> VmMeasures<T> {
    /// The values as an array, in the order of [`VM_MEASURES`].
    pub fn into_array(self) -> [T; 14] {
        [
            self.cpu_util,
            self.mem,
            self.disk_read,
            self.disk_write,
            self.net_incoming,
            self.net_outgoing,
            self.proc,
            self.cores,
            self.steal,
            self.load,
            self.swap,
            self.pressure_cpu,
            self.pressure_mem,
            self.pressure_io,
        ]
    }

    /// Applies a function to the value of each measure.
    pub fn map<U>(self, convert: impl FnMut(T) -> U) -> VmMeasures<U> {
        let [
            cpu_util,
            mem,
            disk_read,
            disk_write,
            net_incoming,
            net_outgoing,
            proc,
            cores,
            steal,
            load,
            swap,
            pressure_cpu,
            pressure_mem,
            pressure_io,
        ] = self.into_array().map(convert);
        VmMeasures {
            cpu_util,
            mem,
            disk_read,
            disk_write,
            net_incoming,
            net_outgoing,
            proc,
            cores,
            steal,
            load,
            swap,
            pressure_cpu,
            pressure_mem,
            pressure_io,
        }
    }

    /// Mutable references to the value of each measure.
    pub const fn each_mut(&mut self) -> VmMeasures<&mut T> {
        VmMeasures {
            cpu_util: &mut self.cpu_util,
            mem: &mut self.mem,
            disk_read: &mut self.disk_read,
            disk_write: &mut self.disk_write,
            net_incoming: &mut self.net_incoming,
            net_outgoing: &mut self.net_outgoing,
            proc: &mut self.proc,
            cores: &mut self.cores,
            steal: &mut self.steal,
            load: &mut self.load,
            swap: &mut self.swap,
            pressure_cpu: &mut self.pressure_cpu,
            pressure_mem: &mut self.pressure_mem,
            pressure_io: &mut self.pressure_io,
        }
    }

    /// Pairs the value of each measure in `self` with the value of the same measure in `other`.
    pub fn zip<U>(self, other: VmMeasures<U>) -> impl Iterator<Item = (T, U)> {
        self.into_array().into_iter().zip(other.into_array())
    }

    /// Pairs each measure's description with its value.
    pub fn described(self) -> impl Iterator<Item = (Measure, T)> {
        VM_MEASURES.zip(self)
    }

    /// The value of the measure with the given name.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut T> {
        let mut values = self.each_mut().described();
        values.find_map(|(measure, value)| (measure.name == name).then_some(value))
    }
}

impl VmValues {
    /// The values with counts as floats.
    pub fn as_floats(&self) -> VmMeasures<Option<f64>> {
        VmMeasures {
            cpu_util: self.cpu_util,
            mem: self.mem,
            disk_read: self.disk_read,
            disk_write: self.disk_write,
            net_incoming: self.net_incoming,
            net_outgoing: self.net_outgoing,
            proc: self.proc.map(f64::from),
            cores: self.cores.map(f64::from),
            steal: self.steal,
            load: self.load,
            swap: self.swap,
            pressure_cpu: self.pressure_cpu,
            pressure_mem: self.pressure_mem,
            pressure_io: self.pressure_io,
        }
    }
}

impl From<VmMeasures<Option<f64>>> for VmValues {
    fn from(values: VmMeasures<Option<f64>>) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the value is a count, and `as` saturates if it is out of range"
        )]
        let count = |count: f64| count as u32;
        Self {
            cpu_util: values.cpu_util,
            mem: values.mem,
            disk_read: values.disk_read,
            disk_write: values.disk_write,
            net_incoming: values.net_incoming,
            net_outgoing: values.net_outgoing,
            proc: values.proc.map(count),
            cores: values.cores.map(count),
            steal: values.steal,
            load: values.load,
            swap: values.swap,
            pressure_cpu: values.pressure_cpu,
            pressure_mem: values.pressure_mem,
            pressure_io: values.pressure_io,
        }
    }
}

/// Rounds a rate or a share to one decimal, as in the examples of the documented API. Returns 0 for a negative value and for a
/// division by zero.
pub fn one_decimal(value: f64) -> f64 {
    let rounded = (value * 10.0).round() / 10.0;
    if rounded.is_finite() && rounded > 0.0 {
        rounded
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::metrics::{VM_EXPORT_KEYS, VM_ROW_KEYS};

    fn names() -> [&'static str; 14] {
        VM_MEASURES.into_array().map(|measure| measure.name)
    }

    #[test]
    fn measures_have_the_names_and_order_of_their_json_fields() {
        let json = serde_json::to_string(&VM_MEASURES.map(|measure| measure.name)).unwrap();
        let pairs = names().map(|name| format!("\"{name}\":\"{name}\""));
        assert_eq!(json, format!("{{{}}}", pairs.join(",")));
    }

    #[test]
    fn first_measures_are_the_values_of_the_documented_vm_row() {
        let others = ["_id", "instance_id", "create_date"];
        let documented: BTreeSet<_> = VM_ROW_KEYS
            .into_iter()
            .filter(|key| !others.contains(key))
            .collect();
        assert_eq!(documented, names().into_iter().take(7).collect());
        let exported: BTreeSet<_> = VM_EXPORT_KEYS
            .into_iter()
            .filter(|key| !others.contains(key))
            .collect();
        assert_eq!(exported, BTreeSet::from(names()));
        assert_eq!(VM_EXPORT_KEYS[..VM_ROW_KEYS.len()], VM_ROW_KEYS);
    }

    #[test]
    fn values_of_an_older_version_have_no_newer_measures() {
        let older = r#"{"cpu_util":1.5,"mem":null,"disk_read":0.0,"disk_write":0.0,"net_incoming":0.0,"net_outgoing":0.0,"proc":95}"#;
        let values: VmValues = serde_json::from_str(older).unwrap();
        assert_eq!((values.proc, values.cores, values.load), (Some(95), None, None));
    }

    #[test]
    fn measure_is_found_by_name() {
        let mut values = VM_MEASURES.map(|measure| measure.name.len());
        for name in names() {
            assert_eq!(values.get_mut(name), Some(&mut name.len()));
        }
        assert_eq!(values.get_mut("cmd"), None);
    }
}
