//! Classifies disks and network interfaces, and computes how much data they transferred since the previous sample.

use std::{collections::HashMap, path::Path};

/// The two counters of a device, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Bytes read from a disk or received by a network interface.
    pub(super) inward: u64,
    /// Bytes written to a disk or sent by a network interface.
    pub(super) outward: u64,
}

impl Traffic {
    fn plus(self, other: Self) -> Self {
        Self {
            inward: self.inward.saturating_add(other.inward),
            outward: self.outward.saturating_add(other.outward),
        }
    }

    fn since(self, previous: Self) -> Self {
        Self {
            inward: self.inward.saturating_sub(previous.inward),
            outward: self.outward.saturating_sub(previous.outward),
        }
    }
}

/// Whether a device counts toward the VM's disk or network rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// A device of the VM itself; its traffic counts.
    Own,
    /// A virtual device. Its traffic also passes through a device of the VM itself, or never leaves the VM (a bridge,
    /// bond or tunnel).
    Virtual,
    /// A device that never counts.
    Ignored,
}

/// Classifies a disk. A whole disk of the VM has a `device` link in sysfs. Loop devices, RAM disks, zram, and
/// device-mapper and md devices on top of other disks have none. The individual paths of a multipath `NVMe` disk are
/// marked as hidden.
pub(super) fn disk_class(sys: &Path, name: &str) -> Class {
    let block = sys.join("block").join(sysfs_name(name));
    let hidden = std::fs::read(block.join("hidden")).is_ok_and(|flag| flag.starts_with(b"1"));
    if block.join("device").exists() && !hidden {
        Class::Own
    } else {
        Class::Ignored
    }
}

/// Classifies a network interface. The VM's own interfaces have a `device` link in sysfs. The loopback interface is
/// always called `lo`.
pub(super) fn interface_class(sys: &Path, name: &str) -> Class {
    if name == "lo" {
        Class::Ignored
    } else if sys
        .join("class/net")
        .join(sysfs_name(name))
        .join("device")
        .exists()
    {
        Class::Own
    } else {
        Class::Virtual
    }
}

/// The bridge, bond or other interface that the interface belongs to. The traffic of the interface may be part of its
/// master's.
pub(super) fn master(sys: &Path, name: &str) -> Option<String> {
    let link = std::fs::read_link(sys.join("class/net").join(sysfs_name(name)).join("master")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The device's name in sysfs, which replaces the `/` in names such as `cciss/c0d0` with `!`.
fn sysfs_name(name: &str) -> String {
    name.replace('/', "!")
}

#[derive(Debug)]
struct Device {
    class: Class,
    total: Traffic,
    present: bool,
}

/// All disks or all network interfaces, with their counters at the previous sample.
#[derive(Debug, Default)]
pub(super) struct Devices(HashMap<String, Device>);

impl Devices {
    /// The data transferred by the VM's own devices since the previous sample, or by virtual devices if there are no
    /// others (as in a container). A device that is new, or whose counters decreased, adds nothing. A device whose
    /// master counts as well adds nothing either, because its traffic passes through the master.
    pub(super) fn advance<'a>(
        &mut self,
        totals: impl Iterator<Item = (&'a str, Traffic)>,
        class_of: impl Fn(&str) -> Class,
        master_of: impl Fn(&str) -> Option<String>,
    ) -> Traffic {
        let mut passed = HashMap::new();
        for (name, total) in totals {
            let device = self.0.entry(name.to_owned()).or_insert_with(|| Device {
                class: class_of(name),
                total,
                present: true,
            });
            passed.insert(name, (device.class, total.since(device.total)));
            device.total = total;
            device.present = true;
        }
        self.0.retain(|_, device| std::mem::take(&mut device.present));
        let any_own = passed.values().any(|(class, _)| *class == Class::Own);
        let counted = if any_own { Class::Own } else { Class::Virtual };
        passed.retain(|_, (class, _)| *class == counted);
        let within_master = |name: &str| master_of(name).is_some_and(|master| passed.contains_key(&*master));
        passed
            .iter()
            .filter(|(name, _)| !within_master(name))
            .fold(Traffic::default(), |sum, (_, (_, traffic))| sum.plus(*traffic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(inward: u64, outward: u64) -> Traffic {
        Traffic { inward, outward }
    }

    fn class_of(name: &str) -> Class {
        match name {
            "lo" => Class::Ignored,
            "eth0" | "eth1" => Class::Own,
            _ => Class::Virtual,
        }
    }

    fn advance(devices: &mut Devices, totals: &[(&'static str, u64, u64)]) -> Traffic {
        let totals = totals
            .iter()
            .map(|&(name, inward, outward)| (name, traffic(inward, outward)));
        devices.advance(totals, class_of, |_| None)
    }

    #[test]
    fn device_traffic_is_zero_in_first_sample_and_measured_in_second_sample() {
        let mut devices = Devices::default();
        let first = [("lo", 5, 5), ("eth0", 1000, 100), ("docker0", 7, 7)];
        assert_eq!(advance(&mut devices, &first), traffic(0, 0));
        let second = [("lo", 900, 900), ("eth0", 1500, 120), ("docker0", 99, 99)];
        assert_eq!(advance(&mut devices, &second), traffic(500, 20));
    }

    #[test]
    fn decreased_device_counters_and_new_devices_add_no_traffic() {
        let mut devices = Devices::default();
        advance(&mut devices, &[("eth0", 1000, 1000)]);
        assert_eq!(
            advance(&mut devices, &[("eth0", 10, 1010), ("eth1", 500, 0)]),
            traffic(0, 10)
        );
        assert_eq!(
            advance(&mut devices, &[("eth0", 11, 1010), ("eth1", 507, 0)]),
            traffic(8, 0)
        );
        // A device that disappeared and came back counts as new.
        advance(&mut devices, &[("eth0", 11, 1010)]);
        assert_eq!(
            advance(&mut devices, &[("eth0", 11, 1010), ("eth1", 900, 0)]),
            traffic(0, 0)
        );
    }

    #[test]
    fn virtual_devices_count_only_without_physical_devices() {
        let mut devices = Devices::default();
        advance(&mut devices, &[("lo", 0, 0), ("veth", 0, 0)]);
        assert_eq!(
            advance(&mut devices, &[("lo", 9, 9), ("veth", 3, 4)]),
            traffic(3, 4)
        );
    }

    #[test]
    fn devices_are_classified_by_their_sysfs_link() {
        let sys = tempfile::tempdir().unwrap();
        for dir in [
            "block/vda/device",
            "block/cciss!c0d0/device",
            "block/nvme0c0n1/device",
            "block/loop0",
            "block/dm-0/slaves/vda1",
            "class/net/eth0/device",
            "class/net/br0/bridge",
        ] {
            std::fs::create_dir_all(sys.path().join(dir)).unwrap();
        }
        std::fs::write(sys.path().join("block/vda/hidden"), "0\n").unwrap();
        std::fs::write(sys.path().join("block/nvme0c0n1/hidden"), "1\n").unwrap();
        for (name, class) in [
            ("vda", Class::Own),
            ("cciss/c0d0", Class::Own),
            ("vda1", Class::Ignored),
            ("nvme0c0n1", Class::Ignored),
            ("loop0", Class::Ignored),
            ("dm-0", Class::Ignored),
        ] {
            assert_eq!(disk_class(sys.path(), name), class, "{name}");
        }
        for (name, class) in [
            ("eth0", Class::Own),
            ("br0", Class::Virtual),
            ("lo", Class::Ignored),
        ] {
            assert_eq!(interface_class(sys.path(), name), class, "{name}");
        }
    }
}
