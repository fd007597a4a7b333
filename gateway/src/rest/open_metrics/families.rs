//! The names, units and descriptions of the metrics of a fleet.

use vmwatch_api::measures::VmMeasures;

use super::text::Family;

pub(super) const VMS: Family = Family::gauge("vmwatch_vms", "", "Number of VMs in this answer.");
pub(super) const SOURCES: Family = Family::gauge(
    "vmwatch_source_current",
    "",
    "Whether a source of these metrics is current (1), or missing or out of date (0).",
);
pub(super) const ALERTS: Family = Family::gauge(
    "vmwatch_alerts_active",
    "",
    "Number of firing and acknowledged alerts, by severity.",
);
pub(super) const INFO: Family = Family {
    kind: "info",
    ..Family::gauge(
        "vmwatch_vm",
        "",
        "Version of the VM's agent, and the VM's labels as label_KEY.",
    )
};
pub(super) const STATE: Family = Family::gauge(
    "vmwatch_vm_state",
    "",
    "The state of the VM on its hypervisor; always 1.",
);
pub(super) const REPORTING: Family = Family::gauge(
    "vmwatch_vm_agent_reporting",
    "",
    "Whether the VM's agent reports samples (1), or is silent or has never reported (0).",
);
pub(super) const FAULTY: Family = Family::gauge(
    "vmwatch_vm_agent_faulty",
    "",
    "Whether the samples of the VM's agent may be wrong or are stored late or not at all (1), such as with a wrong clock.",
);
pub(super) const LAST_REPORT: Family = Family::gauge(
    "vmwatch_vm_last_report_timestamp_seconds",
    "seconds",
    "Time of the agent's last report, Unix seconds.",
);
pub(super) const SAMPLED_AT: Family = Family::gauge(
    "vmwatch_vm_sample_timestamp_seconds",
    "seconds",
    "Time of the sample that has the VM's measures, Unix seconds.",
);
pub(super) const PROCESS_CPU: Family = Family::gauge(
    "vmwatch_process_cpu_usage_cores",
    "cores",
    "CPU cores that the processes of one name use in a VM.",
);
pub(super) const PROCESS_MEMORY: Family = Family::gauge(
    "vmwatch_process_memory_usage_ratio",
    "ratio",
    "Part of the VM's memory that the processes of one name use.",
);
pub(super) const PROCESSES_LEFT_OUT: Family = Family::gauge(
    "vmwatch_process_series_left_out",
    "",
    "Number of series of processes that are not in this answer, because others are greater.",
);

/// The metric of a measure, and what its values are divided by.
#[derive(Debug, Clone, Copy)]
pub(super) struct MeasureFamily {
    pub(super) family: Family,
    pub(super) divisor: f64,
}

impl MeasureFamily {
    const fn ratio(name: &'static str, help: &'static str) -> Self {
        Self {
            family: Family::gauge(name, "ratio", help),
            divisor: 100.0,
        }
    }

    const fn bytes_per_second(name: &'static str, help: &'static str) -> Self {
        Self {
            family: Family::gauge(name, "bytes_per_second", help),
            // Measures are in KiB/s.
            divisor: 1.0 / 1024.0,
        }
    }

    const fn number(name: &'static str, help: &'static str) -> Self {
        Self {
            family: Family::gauge(name, "", help),
            divisor: 1.0,
        }
    }
}

pub(super) const MEASURES: VmMeasures<MeasureFamily> = VmMeasures {
    cpu_util: MeasureFamily::ratio("vmwatch_vm_cpu_usage_ratio", "CPU usage of all cores, 0 to 1."),
    mem: MeasureFamily::ratio("vmwatch_vm_memory_usage_ratio", "Memory usage, 0 to 1."),
    disk_read: MeasureFamily::bytes_per_second(
        "vmwatch_vm_disk_read_bytes_per_second",
        "Read rate of all disks.",
    ),
    disk_write: MeasureFamily::bytes_per_second(
        "vmwatch_vm_disk_write_bytes_per_second",
        "Write rate of all disks.",
    ),
    net_incoming: MeasureFamily::bytes_per_second(
        "vmwatch_vm_network_receive_bytes_per_second",
        "Network receive rate.",
    ),
    net_outgoing: MeasureFamily::bytes_per_second(
        "vmwatch_vm_network_transmit_bytes_per_second",
        "Network transmit rate.",
    ),
    proc: MeasureFamily::number("vmwatch_vm_processes", "Number of processes."),
    cores: MeasureFamily::number("vmwatch_vm_cpu_cores", "Number of CPU cores that are online."),
    steal: MeasureFamily::ratio(
        "vmwatch_vm_cpu_steal_ratio",
        "CPU time that the hypervisor gave to others while the VM had work, 0 to 1 of all cores.",
    ),
    load: MeasureFamily::number(
        "vmwatch_vm_load1",
        "Processes that ran or waited for a core or a disk, averaged by the kernel over one minute.",
    ),
    swap: MeasureFamily::ratio("vmwatch_vm_swap_usage_ratio", "Swap space in use, 0 to 1."),
    pressure_cpu: MeasureFamily::ratio(
        "vmwatch_vm_pressure_cpu_ratio",
        "Share of the time in which some process waited for a core, 0 to 1.",
    ),
    pressure_mem: MeasureFamily::ratio(
        "vmwatch_vm_pressure_memory_ratio",
        "Share of the time in which some process waited for memory, 0 to 1.",
    ),
    pressure_io: MeasureFamily::ratio(
        "vmwatch_vm_pressure_io_ratio",
        "Share of the time in which some process waited for a disk, 0 to 1.",
    ),
};
