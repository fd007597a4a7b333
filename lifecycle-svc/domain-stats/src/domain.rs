//! The counters of one domain.

use std::collections::BTreeMap;

/// Maximum number of virtual CPUs of a domain whose counters are read. Further ones are left out; then
/// [`DomainStats::vcpus`] has fewer entries than [`DomainStats::cores`] says.
pub const MAX_VCPUS: u32 = 1024;
/// Maximum number of disks, and of network interfaces, of a domain whose counters are read. Further ones are left out;
/// then the number in the domain's count exceeds this limit.
pub const MAX_DEVICES: u32 = 256;

/// The counters of an active domain. A value is absent if libvirt did not report it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainStats {
    /// UUID of the domain.
    pub uuid: [u8; 16],
    /// libvirt's id of this run of the domain. A domain gets another id at each start, and on each host that it
    /// migrates to; then its counters begin again at 0.
    pub run: Option<u32>,
    /// State as a `virDomainState`.
    pub state: Option<u64>,
    /// CPU time of the domain, including what its devices use on the host, in nanoseconds.
    pub cpu_time: Option<u64>,
    /// Number of virtual CPUs that the domain has now.
    pub cores: Option<u64>,
    /// Counters of the virtual CPUs, by number.
    pub vcpus: BTreeMap<u32, Vcpu>,
    /// Memory of the domain.
    pub balloon: Balloon,
    /// Number of disks.
    pub disk_count: Option<u64>,
    /// Counters of the disks, by libvirt's index: bytes read and written.
    pub disks: BTreeMap<u32, Device>,
    /// Number of network interfaces.
    pub nic_count: Option<u64>,
    /// Counters of the network interfaces, by libvirt's index: bytes received and sent by the guest.
    pub nics: BTreeMap<u32, Device>,
}

/// Counters of a virtual CPU, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vcpu {
    /// Time in which it ran.
    pub time: Option<u64>,
    /// Time in which it waited for input, output or the host's scheduler.
    pub wait: Option<u64>,
    /// Time in which it could have run but waited for a CPU of the host.
    pub delay: Option<u64>,
}

/// Memory of a domain in KiB, as the guest reports it through its balloon driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Balloon {
    /// Memory that the guest can use at all.
    pub available: Option<u64>,
    /// Memory that the guest could use without swapping.
    pub usable: Option<u64>,
    /// Time of the guest's report, in seconds since 1970 by the clock of the host; 0 if there was none.
    pub last_update: Option<u64>,
}

/// Counters of a disk or a network interface, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// Name of the device, such as `vda` or `vnet0`. A device without counters may have no name.
    pub name: Option<String>,
    /// Bytes read or received.
    pub input: Option<u64>,
    /// Bytes written or sent.
    pub output: Option<u64>,
}
