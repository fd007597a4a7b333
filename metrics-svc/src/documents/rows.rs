//! The MongoDB documents of single rows, and the limits of their values.

use std::time::SystemTime;

use bson::{DateTime, RawBson, RawDocumentBuf, cstr, raw::CStr, rawdoc};
use vmwatch_api::{
    measures::{Unit, VmMeasures},
    metrics::{
        CpuSeconds, FilesystemSample, MOUNT_POINT_BYTES, ProcessOwner, ProcessSample, Sample, ShortLived,
        SumSample, SystemSample, VmSample,
    },
};
use vmwatch_blocks::RowIdentity;

use super::{Refusal, row_id};

/// Maximum of a disk or network rate: 2^50 KiB/s, far above any hardware.
pub(super) const MAX_RATE: f64 = 1_125_899_906_842_624.0;
/// Maximum CPU usage of a process in percent of one core: 65,536 cores.
const MAX_CPU_SHARE: f64 = 100.0 * 65_536.0;
/// Maximum memory usage of a process in percent. The kernel counts each mapping of shared memory, so the usage of a
/// process can exceed the VM's memory, but not the largest address space (2^57 bytes) in a VM with 1 MiB.
const MAX_MEMORY_SHARE: f64 = 100.0 * 137_438_953_472.0;
/// Maximum load average: more processes than the kernel allows (2^22).
const MAX_LOAD: f64 = 4_194_304.0;
/// Maximum CPU time between two samples, in seconds: 65,536 cores for a week.
pub(super) const MAX_CPU_SECONDS: f64 = 65_536.0 * 604_800.0;
/// Maximum length of a name in bytes.
pub(super) const MAX_NAME: usize = 256;
/// Maximum length of a command line in bytes.
const MAX_COMMAND_LINE: usize = 512;
/// End of the year 9999, in Unix seconds.
const MAX_SECOND: f64 = 253_402_300_800.0;

/// Dates of a sample's rows.
#[derive(Clone, Copy)]
pub(super) struct Dates {
    /// Unix second of `create_date`, which begins each `_id`.
    pub(super) second: i64,
    /// The internal date.
    pub(super) effective: DateTime,
}

impl Dates {
    /// The dates of the rows of a sample that was taken and arrived at these times.
    pub(super) fn of(moment: SystemTime, arrival: SystemTime) -> Self {
        Self {
            second: DateTime::from_system_time(moment)
                .timestamp_millis()
                .div_euclid(1000),
            effective: DateTime::from_system_time(moment.min(arrival)),
        }
    }
}

pub(super) fn within(name: &'static str, number: f64, most: f64) -> Result<(), Refusal> {
    if (0.0..=most).contains(&number) {
        Ok(())
    } else {
        Err(Refusal::Number(name))
    }
}

pub(super) fn not_longer(name: &'static str, text: &str, most: usize) -> Result<(), Refusal> {
    if text.len() <= most {
        Ok(())
    } else {
        Err(Refusal::Text(name, most))
    }
}

/// Maximum value of a VM's measure. Counts are stored as 32-bit integers.
pub(super) fn max_value(unit: Unit) -> f64 {
    match unit {
        Unit::Percent => 100.0,
        Unit::KibPerSecond => MAX_RATE,
        Unit::Count => i32::MAX.into(),
        Unit::Load => MAX_LOAD,
    }
}

pub(super) fn vm_document(sample: &Sample, vm: &VmSample, at: Dates) -> Result<RawDocumentBuf, Refusal> {
    let values = VmMeasures {
        cpu_util: vm.cpu_util,
        mem: vm.mem,
        disk_read: Some(vm.disk_read),
        disk_write: Some(vm.disk_write),
        net_incoming: Some(sample.net_incoming),
        net_outgoing: Some(sample.net_outgoing),
        proc: vm.proc.map(f64::from),
        cores: vm.system.cores.map(f64::from),
        steal: vm.system.steal,
        load: vm.system.load,
        swap: vm.system.swap,
        pressure_cpu: vm.system.pressure_cpu,
        pressure_mem: vm.system.pressure_mem,
        pressure_io: vm.system.pressure_io,
    };
    for (measure, value) in values.described() {
        within(measure.name, value.unwrap_or(0.0), max_value(measure.unit))?;
    }
    let count = vm.proc.map(i32::try_from).transpose();
    let count = count.map_err(|_| Refusal::Number("proc"))?;
    let mut row = rawdoc! {
        "net_incoming": sample.net_incoming,
        "disk_write": vm.disk_write,
        "mem": vm.mem.map_or(RawBson::Null, RawBson::Double),
        "net_outgoing": sample.net_outgoing,
        "instance_id": sample.instance_id.as_str(),
        "cpu_util": vm.cpu_util.map_or(RawBson::Null, RawBson::Double),
        "disk_read": vm.disk_read,
        "create_date": sample.create_date.as_str(),
        "_id": row_id(sample.instance_id.as_str(), sample.create_date.as_str(), at.second, RowIdentity::Vm),
        "proc": count.map_or(RawBson::Null, RawBson::Int32),
        "sampled_at": at.effective,
    };
    if let Some(restricted) = vm.restricted {
        row.append(cstr!("restricted"), restricted.as_str());
    }
    append_system(&mut row, &vm.system)?;
    if vm.lost_exit_records > 0 {
        row.append(cstr!("lost_exit_records"), i64::from(vm.lost_exit_records));
    }
    Ok(row)
}

/// Appends the values that the documented API does not have.
fn append_system(row: &mut RawDocumentBuf, system: &SystemSample) -> Result<(), Refusal> {
    let cores = system.cores.map(i32::try_from).transpose();
    let cores = cores.map_err(|_| Refusal::Number("cores"))?;
    append(row, "cores", cores.map(RawBson::Int32));
    for (name, value) in [
        ("steal", system.steal),
        ("load", system.load),
        ("swap", system.swap),
        ("pressure_cpu", system.pressure_cpu),
        ("pressure_mem", system.pressure_mem),
        ("pressure_io", system.pressure_io),
    ] {
        append(row, name, value.map(RawBson::Double));
    }
    Ok(())
}

pub(super) fn process_document(
    sample: &Sample,
    process: &ProcessSample,
    at: Dates,
) -> Result<RawDocumentBuf, Refusal> {
    within("cpu_util", process.cpu_util, MAX_CPU_SHARE)?;
    within("mem", process.mem, MAX_MEMORY_SHARE)?;
    within("disk_read", process.disk_read, MAX_RATE)?;
    within("disk_write", process.disk_write, MAX_RATE)?;
    within("running_time", process.running_time, MAX_SECOND)?;
    within("shutdown_time", process.shutdown_time.unwrap_or(0.0), MAX_SECOND)?;
    within("cpu_seconds", process.cpu_seconds.unwrap_or(0.0), MAX_CPU_SECONDS)?;
    not_longer("cmd", &process.cmd, MAX_NAME)?;
    let pid = i32::try_from(process.pid).map_err(|_| Refusal::Number("pid"))?;
    let identity = RowIdentity::Process {
        pid: process.pid,
        started: process.running_time,
    };
    let mut row = rawdoc! {
        "net_incoming": sample.net_incoming,
        "shutdown_time": process.shutdown_time.map_or(RawBson::Null, RawBson::Double),
        "mem": process.mem,
        "net_outgoing": sample.net_outgoing,
        "cmd": process.cmd.as_str(),
        "pid": pid,
        "instance_id": sample.instance_id.as_str(),
        "disk_write": process.disk_write,
        "disk_read": process.disk_read,
        "create_date": sample.create_date.as_str(),
        "_id": row_id(sample.instance_id.as_str(), sample.create_date.as_str(), at.second, identity),
        "cpu_util": process.cpu_util,
        "running_time": process.running_time,
        "sampled_at": at.effective,
    };
    append_owner(&mut row, &process.owner)?;
    let exit_code = process.exit_code.map(i32::try_from).transpose();
    let exit_code = exit_code.map_err(|_| Refusal::Number("exit_code"))?;
    append(&mut row, "exit_code", exit_code.map(RawBson::Int32));
    append_shared(&mut row, sample, process.cpu_seconds);
    Ok(row)
}

/// The document of a summed row. It has no pid. The field `processes`, which may be null, distinguishes it from a process
/// row.
pub(super) fn sum_document(sample: &Sample, sum: &SumSample, at: Dates) -> Result<RawDocumentBuf, Refusal> {
    within("cpu_util", sum.cpu_util, MAX_CPU_SHARE)?;
    within("mem", sum.mem, MAX_MEMORY_SHARE)?;
    within("disk_read", sum.disk_read, MAX_RATE)?;
    within("disk_write", sum.disk_write, MAX_RATE)?;
    within("cpu_seconds", sum.cpu_seconds, MAX_CPU_SECONDS)?;
    not_longer("cmd", &sum.cmd, MAX_NAME)?;
    let processes = sum.processes.map(i32::try_from).transpose();
    let processes = processes.map_err(|_| Refusal::Number("processes"))?;
    let identity = RowIdentity::sum(&sum.cmd, sum.owner.user.as_deref());
    let mut row = rawdoc! {
        "net_incoming": sample.net_incoming,
        "mem": sum.mem,
        "net_outgoing": sample.net_outgoing,
        "cmd": sum.cmd.as_str(),
        "instance_id": sample.instance_id.as_str(),
        "disk_write": sum.disk_write,
        "disk_read": sum.disk_read,
        "create_date": sample.create_date.as_str(),
        "_id": row_id(sample.instance_id.as_str(), sample.create_date.as_str(), at.second, identity),
        "cpu_util": sum.cpu_util,
        "processes": processes.map_or(RawBson::Null, RawBson::Int32),
        "sampled_at": at.effective,
    };
    let owner = ProcessOwner {
        parent_pid: None,
        command_line: None,
        ..sum.owner.clone()
    };
    append_owner(&mut row, &owner)?;
    append_shared(&mut row, sample, Some(sum.cpu_seconds));
    Ok(row)
}

pub(super) fn filesystem_document(
    sample: &Sample,
    filesystem: &FilesystemSample,
    at: Dates,
) -> Result<RawDocumentBuf, Refusal> {
    not_longer("mount_point", &filesystem.mount_point, MOUNT_POINT_BYTES)?;
    not_longer("filesystem", &filesystem.filesystem, MAX_NAME)?;
    let total = i64::try_from(filesystem.total_bytes).map_err(|_| Refusal::Number("total_bytes"))?;
    let used = i64::try_from(filesystem.used_bytes)
        .ok()
        .filter(|used| *used <= total);
    let used = used.ok_or(Refusal::Number("used_bytes"))?;
    let identity = RowIdentity::filesystem(&filesystem.mount_point);
    Ok(rawdoc! {
        "mount_point": filesystem.mount_point.as_str(),
        "filesystem": filesystem.filesystem.as_str(),
        "used_bytes": used,
        "total_bytes": total,
        "instance_id": sample.instance_id.as_str(),
        "create_date": sample.create_date.as_str(),
        "_id": row_id(sample.instance_id.as_str(), sample.create_date.as_str(), at.second, identity),
        "sampled_at": at.effective,
    })
}

/// Appends the CPU time of the row, and what all process rows of a sample have.
fn append_shared(row: &mut RawDocumentBuf, sample: &Sample, cpu_seconds: Option<f64>) {
    for (name, seconds) in vm_seconds(sample)
        .into_iter()
        .chain([("cpu_seconds", cpu_seconds)])
    {
        append(row, name, seconds.map(RawBson::Double));
    }
    let short_lived = sample.short_lived.map(ShortLived::as_str);
    append(
        row,
        "short_lived",
        short_lived.map(|name| RawBson::String(name.to_owned())),
    );
}

/// CPU time of the VM, which each process row of a sample has.
pub(super) fn vm_seconds(sample: &Sample) -> [(&'static str, Option<f64>); 3] {
    let of = |kind: fn(&CpuSeconds) -> f64| sample.vm_cpu.as_ref().map(kind);
    [
        ("vm_user_seconds", of(|cpu| cpu.user)),
        ("vm_nice_seconds", of(|cpu| cpu.nice)),
        ("vm_system_seconds", of(|cpu| cpu.system)),
    ]
}

fn append_owner(row: &mut RawDocumentBuf, owner: &ProcessOwner) -> Result<(), Refusal> {
    let texts = [
        ("user", &owner.user, MAX_NAME),
        ("unit", &owner.unit, MAX_NAME),
        ("container", &owner.container, MAX_NAME),
        ("command_line", &owner.command_line, MAX_COMMAND_LINE),
    ];
    for (name, text, most) in texts {
        not_longer(name, text.as_deref().unwrap_or_default(), most)?;
        append(row, name, text.clone().map(RawBson::String));
    }
    let parent_pid = owner.parent_pid.map(i32::try_from).transpose();
    let parent_pid = parent_pid.map_err(|_| Refusal::Number("parent_pid"))?;
    append(row, "parent_pid", parent_pid.map(RawBson::Int32));
    append(
        row,
        "owner_inherited",
        owner.inherited.then_some(RawBson::Boolean(true)),
    );
    Ok(())
}

/// Appends a field unless its value is unknown.
pub(super) fn append(row: &mut RawDocumentBuf, name: &'static str, value: Option<RawBson>) {
    if let (Some(value), Ok(name)) = (value, <&CStr>::try_from(name)) {
        row.append(name, value);
    }
}
