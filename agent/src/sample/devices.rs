//! Classifies disks and network interfaces, and computes their traffic since the previous sample.

use std::{collections::HashMap, path::Path};

/// A device's two counters, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    /// Read or received.
    pub(super) inward: u64,
    /// Written or sent.
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

/// Whether a device counts toward the VM's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// One of the VM's own devices.
    Own,
    /// Its traffic also passes through one of the VM's own devices, or never leaves the VM (a bridge, bond or tunnel).
    Virtual,
    /// Never counted.
    Ignored,
}

/// A whole disk has a `device` link in sysfs. Loop devices, RAM disks, zram and the device-mapper and md devices on
/// top of other disks have none. The single paths of a multipath `NVMe` disk are marked hidden.
pub(super) fn disk_class(sys: &Path, name: &str) -> Class {
    let block = sys.join("block").join(sysfs_name(name));
    let hidden = std::fs::read(block.join("hidden")).is_ok_and(|flag| flag.starts_with(b"1"));
    if block.join("device").exists() && !hidden {
        Class::Own
    } else {
        Class::Ignored
    }
}

/// The VM's own interfaces have a `device` link in sysfs. The loopback interface is always called `lo`.
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

/// sysfs replaces the `/` in names such as `cciss/c0d0` with `!`.
fn sysfs_name(name: &str) -> String {
    name.replace('/', "!")
}

#[derive(Debug)]
struct Device {
    class: Class,
    total: Traffic,
    present: bool,
}

/// The devices of one kind, with their counters at the previous sample.
#[derive(Debug, Default)]
pub(super) struct Devices(HashMap<String, Device>);

impl Devices {
    /// The traffic of the VM's own devices since the previous sample, or that of the virtual ones if there are no
    /// others (as in a container). A device that is new, or whose counters decreased, adds nothing.
    pub(super) fn advance<'a>(
        &mut self,
        totals: impl Iterator<Item = (&'a str, Traffic)>,
        class_of: impl Fn(&str) -> Class,
    ) -> Traffic {
        let (mut own, mut in_virtual, mut any_own) = (Traffic::default(), Traffic::default(), false);
        for (name, total) in totals {
            let Some(device) = self.0.get_mut(name) else {
                let class = class_of(name);
                any_own |= class == Class::Own;
                let present = true;
                self.0.insert(
                    name.to_owned(),
                    Device {
                        class,
                        total,
                        present,
                    },
                );
                continue;
            };
            let passed = total.since(device.total);
            device.total = total;
            device.present = true;
            match device.class {
                Class::Own => (own, any_own) = (own.plus(passed), true),
                Class::Virtual => in_virtual = in_virtual.plus(passed),
                Class::Ignored => {}
            }
        }
        self.0.retain(|_, device| std::mem::take(&mut device.present));
        if any_own { own } else { in_virtual }
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
        devices.advance(totals, class_of)
    }

    #[test]
    fn first_sample_primes_and_second_gives_traffic() {
        let mut devices = Devices::default();
        let first = [("lo", 5, 5), ("eth0", 1000, 100), ("docker0", 7, 7)];
        assert_eq!(advance(&mut devices, &first), traffic(0, 0));
        let second = [("lo", 900, 900), ("eth0", 1500, 120), ("docker0", 99, 99)];
        assert_eq!(advance(&mut devices, &second), traffic(500, 20));
    }

    #[test]
    fn decreased_counter_and_new_device_add_nothing() {
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
        // A device that disappeared and returned is new again.
        advance(&mut devices, &[("eth0", 11, 1010)]);
        assert_eq!(
            advance(&mut devices, &[("eth0", 11, 1010), ("eth1", 900, 0)]),
            traffic(0, 0)
        );
    }

    #[test]
    fn counts_virtual_devices_only_if_there_are_no_physical_ones() {
        let mut devices = Devices::default();
        advance(&mut devices, &[("lo", 0, 0), ("veth", 0, 0)]);
        assert_eq!(
            advance(&mut devices, &[("lo", 9, 9), ("veth", 3, 4)]),
            traffic(3, 4)
        );
    }

    #[test]
    fn classifies_devices_by_their_sysfs_link() {
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
