//! The meaning of the parameters in which libvirt reports the counters of a domain.

use std::collections::BTreeMap;

use crate::domain::{Balloon, Device, DomainStats, MAX_DEVICES, MAX_VCPUS, Vcpu};

/// A longer name of a device is ignored.
const MAX_NAME: usize = 64;

/// The value of a parameter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    Number(u64),
    Text(&'a str),
}

impl DomainStats {
    /// Takes over a parameter. Parameters with other names, of other types or beyond the limits are ignored.
    pub(crate) fn set(&mut self, name: &str, value: Value<'_>) {
        let Some((group, rest)) = name.split_once('.') else {
            return;
        };
        match (group, value) {
            ("state", Value::Number(number)) if rest == "state" => self.state = Some(number),
            ("cpu", Value::Number(number)) if rest == "time" => self.cpu_time = Some(number),
            ("vcpu", Value::Number(number)) => self.set_vcpu(rest, number),
            ("balloon", Value::Number(number)) => self.balloon.set(rest, number),
            ("block", Value::Number(number)) if rest == "count" => self.disk_count = Some(number),
            ("block", value) => set_device(&mut self.disks, rest, ["rd.bytes", "wr.bytes"], value),
            ("net", Value::Number(number)) if rest == "count" => self.nic_count = Some(number),
            ("net", value) => set_device(&mut self.nics, rest, ["rx.bytes", "tx.bytes"], value),
            _ => {}
        }
    }

    fn set_vcpu(&mut self, name: &str, number: u64) {
        if name == "current" {
            self.cores = Some(number);
        }
        let Some((index, name)) = indexed(name, MAX_VCPUS) else {
            return;
        };
        let pick: fn(&mut Vcpu) -> &mut Option<u64> = match name {
            "time" => |vcpu| &mut vcpu.time,
            "wait" => |vcpu| &mut vcpu.wait,
            "delay" => |vcpu| &mut vcpu.delay,
            _ => return,
        };
        *pick(self.vcpus.entry(index).or_default()) = Some(number);
    }
}

impl Balloon {
    fn set(&mut self, name: &str, number: u64) {
        let field = match name {
            "available" => &mut self.available,
            "usable" => &mut self.usable,
            "last-update" => &mut self.last_update,
            _ => return,
        };
        *field = Some(number);
    }
}

/// Takes over a parameter of a device. `counters` are the names of the parameters for [`Device::input`] and
/// [`Device::output`].
fn set_device(devices: &mut BTreeMap<u32, Device>, name: &str, counters: [&str; 2], value: Value<'_>) {
    let Some((index, name)) = indexed(name, MAX_DEVICES) else {
        return;
    };
    match value {
        Value::Text(text) if name == "name" && text.len() <= MAX_NAME => {
            devices.entry(index).or_default().name = Some(text.to_owned());
        }
        Value::Number(number) if name == counters[0] => {
            devices.entry(index).or_default().input = Some(number);
        }
        Value::Number(number) if name == counters[1] => {
            devices.entry(index).or_default().output = Some(number);
        }
        _ => {}
    }
}

/// Splits `N.name` into an index below the limit and the name.
fn indexed(name: &str, limit: u32) -> Option<(u32, &str)> {
    let (index, name) = name.split_once('.')?;
    let index = index.parse().ok().filter(|index| *index < limit)?;
    Some((index, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(parameters: &[(&str, Value<'_>)]) -> DomainStats {
        let mut stats = DomainStats::default();
        for (name, value) in parameters {
            stats.set(name, *value);
        }
        stats
    }

    /// The parameters are those of libvirt 9.0 for a QEMU domain with a disk, a tap and an interface of user space.
    #[test]
    fn counters_of_qemu_domain_are_read() {
        use Value::{Number, Text};
        let stats = parsed(&[
            ("state.state", Number(3)),
            ("state.reason", Number(1)),
            ("cpu.time", Number(170_000_000)),
            ("cpu.user", Number(50_000_000)),
            ("cpu.cache.monitor.count", Number(0)),
            ("balloon.current", Number(262_144)),
            ("balloon.maximum", Number(262_145)),
            ("balloon.available", Number(7)),
            ("balloon.unused", Number(8)),
            ("balloon.usable", Number(9)),
            ("balloon.last-update", Number(10)),
            ("balloon.rss", Number(54_852)),
            ("vcpu.current", Number(2)),
            ("vcpu.maximum", Number(4)),
            ("vcpu.0.state", Number(1)),
            ("vcpu.0.time", Number(11)),
            ("vcpu.0.wait", Number(12)),
            ("vcpu.0.delay", Number(13)),
            ("vcpu.3.time", Number(14)),
            ("net.count", Number(2)),
            ("net.0.name", Text("vnet0")),
            ("net.0.rx.bytes", Number(90)),
            ("net.0.rx.pkts", Number(1)),
            ("net.0.tx.bytes", Number(91)),
            ("block.count", Number(1)),
            ("block.0.name", Text("vda")),
            ("block.0.path", Text("/var/lib/disk.img")),
            ("block.0.rd.bytes", Number(92)),
            ("block.0.rd.times", Number(5)),
            ("block.0.wr.bytes", Number(93)),
            ("dirtyrate.calc_mode", Text("page-sampling")),
        ]);
        let device = |name: &str, input, output| Device {
            name: Some(name.to_owned()),
            input: Some(input),
            output: Some(output),
        };
        let vcpu = |time, wait, delay| Vcpu { time, wait, delay };
        let expected = DomainStats {
            uuid: [0; 16],
            run: None,
            state: Some(3),
            cpu_time: Some(170_000_000),
            cores: Some(2),
            vcpus: [
                (0, vcpu(Some(11), Some(12), Some(13))),
                (3, vcpu(Some(14), None, None)),
            ]
            .into(),
            balloon: Balloon {
                available: Some(7),
                usable: Some(9),
                last_update: Some(10),
            },
            disk_count: Some(1),
            disks: [(0, device("vda", 92, 93))].into(),
            nic_count: Some(2),
            nics: [(0, device("vnet0", 90, 91))].into(),
        };
        assert_eq!(stats, expected);
    }

    #[test]
    fn parameters_beyond_the_limits_or_of_other_types_are_ignored() {
        use Value::{Number, Text};
        let long = "n".repeat(MAX_NAME + 1);
        let stats = parsed(&[
            ("", Number(1)),
            ("cpu", Number(1)),
            ("cpu.time", Text("1")),
            ("vcpu.1024.time", Number(1)),
            ("vcpu.-1.time", Number(1)),
            ("vcpu.time", Number(1)),
            ("block.256.rd.bytes", Number(1)),
            ("block.x.rd.bytes", Number(1)),
            ("block.0.rd.bytes", Text("1")),
            ("net.0.name", Number(1)),
            ("net.0.name", Text(&long)),
            ("net.4294967296.rx.bytes", Number(1)),
        ]);
        assert_eq!(stats, DomainStats::default());
        let stats = parsed(&[("vcpu.1023.time", Number(1)), ("block.255.rd.bytes", Number(2))]);
        assert_eq!(stats.vcpus[&1023].time, Some(1));
        assert_eq!(stats.disks[&255].input, Some(2));
    }
}
