//! Converts a sample into the MongoDB documents to store.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bson::{DateTime, RawBson, RawDocumentBuf, cstr, oid::ObjectId, raw::CStr, rawdoc};
use vmwatch_api::{
    agents::Sender,
    history::Resolution,
    measures::{Unit, VmMeasures},
    metrics::{
        CpuSeconds, FilesystemSample, MOUNT_POINT_BYTES, ProcessOwner, ProcessSample, SAMPLE_FILESYSTEMS,
        SAMPLE_PART_ROWS, Sample, ShortLived, SumSample, SystemSample, VmSample,
    },
    time::UtcOffset,
};
use vmwatch_blocks::RowIdentity;

use crate::{
    row_kind::RowKind,
    time_buckets::{bucket_start, width_ms},
};

/// Name of the internal date field, which retention uses. It is never part of an answer.
pub const SAMPLED_AT: &str = "sampled_at";

/// How far the time of a sample may be ahead of its arrival. The clocks of guests drift, but no clock is so wrong.
const MAX_AHEAD: Duration = Duration::from_hours(24);
/// A sample whose time is further ahead of its arrival is searched for among the stored rows before it is stored,
/// because its effective date, and therefore its hour, would differ if it arrived again.
const FAR_AHEAD: Duration = Duration::from_mins(1);
/// Maximum of a disk or network rate: 2^50 KiB/s, far above any hardware.
const MAX_RATE: f64 = 1_125_899_906_842_624.0;
/// Maximum CPU usage of a process in percent of one core: 65,536 cores.
const MAX_CPU_SHARE: f64 = 100.0 * 65_536.0;
/// Maximum memory usage of a process in percent. The kernel counts each mapping of shared memory, so the usage of a
/// process can exceed the VM's memory, but not the largest address space (2^57 bytes) in a VM with 1 MiB.
const MAX_MEMORY_SHARE: f64 = 100.0 * 137_438_953_472.0;
/// Maximum load average: more processes than the kernel allows (2^22).
const MAX_LOAD: f64 = 4_194_304.0;
/// Maximum CPU time between two samples, in seconds: 65,536 cores for a week.
const MAX_CPU_SECONDS: f64 = 65_536.0 * 604_800.0;
/// Maximum length of a name in bytes.
const MAX_NAME: usize = 256;
/// Maximum length of a command line in bytes.
const MAX_COMMAND_LINE: usize = 512;
/// End of the year 9999, in Unix seconds.
const MAX_SECOND: f64 = 253_402_300_800.0;

/// Why a sample is refused for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The sample has more rows than one message may hold.
    #[error("the sample has more than {SAMPLE_PART_ROWS} rows")]
    TooManyRows,
    /// The sample has more filesystems than one message may hold.
    #[error("the sample has more than {SAMPLE_FILESYSTEMS} filesystems")]
    TooManyFilesystems,
    /// The sample has no rows of the VM or its processes, without which filesystems are not stored.
    #[error("the sample has neither a row of the VM nor rows of processes")]
    Empty,
    /// The time of the sample is invalid, before 1970, or too far in the future.
    #[error(
        "create_date is not a valid date, is before 1970, or is more than a day ahead of the time at which the sample arrived"
    )]
    Time,
    /// A value of the sample is out of range; contains the name of its field.
    #[error("`{0}` is out of range")]
    Number(&'static str),
    /// A text of a process is too long.
    #[error("`{0}` is longer than {1} bytes")]
    Text(&'static str, usize),
}

/// The MongoDB documents of a sample, by collection.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    /// Documents for the collection of VM rows.
    pub vms: Vec<RawDocumentBuf>,
    /// Documents for the collection of process rows.
    pub processes: Vec<RawDocumentBuf>,
    /// Documents of filesystem rows.
    pub filesystems: Vec<RawDocumentBuf>,
    /// Number of parts of earlier samples that the agent reports as dropped.
    pub dropped_parts: u64,
    /// Number of times that records of ended processes were lost, as the agent reports it.
    pub lost_exit_records: u64,
    /// When the sample arrived, in Unix microseconds.
    pub(crate) arrival: Option<i64>,
    /// Whether the time of the sample is so far ahead of its arrival that its rows may be stored with another effective
    /// date.
    pub(crate) far_ahead: bool,
    /// The sender of the sample; `None` if it did not come in a message with headers.
    pub(crate) sender: Option<Sender>,
    /// The rows that were refused although the others are stored; `None` if there are none.
    pub(crate) refused: Option<RefusedRows>,
}

/// Rows of a sample that were refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RefusedRows {
    pub(crate) count: u64,
    /// Why the rows were refused, by row.
    pub(crate) reason: String,
}

/// Maximum number of refused rows of a sample whose reasons are listed.
const MAX_REASONS: usize = 20;

impl Documents {
    /// Total number of documents (rows).
    pub fn rows(&self) -> usize {
        self.vms.len() + self.processes.len() + self.filesystems.len()
    }

    /// The documents of one kind.
    pub(crate) fn of(&self, kind: RowKind) -> &[RawDocumentBuf] {
        match kind {
            RowKind::Vm => &self.vms,
            RowKind::Process => &self.processes,
            RowKind::Filesystem => &self.filesystems,
        }
    }

    /// Start of the five-minute time bucket that contains the sample's rows.
    pub fn five_minutes(&self, offset: UtcOffset) -> Option<u64> {
        let row = self.vms.first().or(self.processes.first());
        let at = row?.get_datetime(SAMPLED_AT).ok()?.timestamp_millis();
        let at = u64::try_from(at).unwrap_or(0);
        Some(bucket_start(
            at,
            width_ms(Resolution::FiveMinutes),
            offset.as_millis(),
        ))
    }

    /// Validates a sample and converts it into MongoDB documents. The internal date of its rows is their effective date:
    /// the earlier of `create_date` and the sample's arrival.
    ///
    /// An impossible row is refused, and the others are kept. If more than half of the rows are impossible, something is
    /// wrong with the sample, and it is refused as a whole.
    pub fn from_sample(sample: &Sample, offset: UtcOffset, arrival: SystemTime) -> Result<Self, Refusal> {
        if sample.processes.len() + sample.sums.len() > SAMPLE_PART_ROWS {
            return Err(Refusal::TooManyRows);
        }
        if sample.filesystems.len() > SAMPLE_FILESYSTEMS {
            return Err(Refusal::TooManyFilesystems);
        }
        if sample.vm.is_none() && sample.processes.is_empty() && sample.sums.is_empty() {
            return Err(Refusal::Empty);
        }
        let moment = sample.create_date.moment(offset).map_err(|_| Refusal::Time)?;
        if moment < UNIX_EPOCH || moment > arrival + MAX_AHEAD {
            return Err(Refusal::Time);
        }
        within("net_incoming", sample.net_incoming, MAX_RATE)?;
        within("net_outgoing", sample.net_outgoing, MAX_RATE)?;
        for (name, seconds) in vm_seconds(sample) {
            within(name, seconds.unwrap_or(0.0), MAX_CPU_SECONDS)?;
        }
        let at = Dates {
            second: DateTime::from_system_time(moment)
                .timestamp_millis()
                .div_euclid(1000),
            effective: DateTime::from_system_time(moment.min(arrival)),
        };
        let mut refused = Vec::new();
        let mut vms = Vec::new();
        if let Some(vm) = &sample.vm {
            match vm_document(sample, vm, at) {
                Ok(row) => vms.push(row),
                Err(refusal) => refused.push(("VM".to_owned(), refusal)),
            }
        }
        let mut processes = Vec::with_capacity(sample.processes.len() + sample.sums.len());
        for process in &sample.processes {
            match process_document(sample, process, at) {
                Ok(row) => processes.push(row),
                Err(refusal) => refused.push((format!("process {}", process.pid), refusal)),
            }
        }
        for sum in &sample.sums {
            match sum_document(sample, sum, at) {
                Ok(row) => processes.push(row),
                Err(refusal) => refused.push(("sum of processes".to_owned(), refusal)),
            }
        }
        let mut filesystems = Vec::with_capacity(sample.filesystems.len());
        for filesystem in &sample.filesystems {
            match filesystem_document(sample, filesystem, at) {
                Ok(row) => filesystems.push(row),
                Err(refusal) => refused.push(("filesystem".to_owned(), refusal)),
            }
        }
        if let Some((_, refusal)) = refused.first()
            && refused.len() > vms.len() + processes.len() + filesystems.len()
        {
            return Err(*refusal);
        }
        Ok(Self {
            sender: None,
            vms,
            processes,
            filesystems,
            refused: RefusedRows::of(&refused),
            dropped_parts: sample.vm.as_ref().map_or(0, |vm| vm.dropped_parts.into()),
            lost_exit_records: sample.vm.as_ref().map_or(0, |vm| vm.lost_exit_records.into()),
            arrival: Some(micros_of(arrival)),
            far_ahead: moment > arrival + FAR_AHEAD,
        })
    }
}

impl RefusedRows {
    /// `refused` are the refused rows, each with what it describes.
    fn of(refused: &[(String, Refusal)]) -> Option<Self> {
        let row = |(subject, refusal): &(String, Refusal)| format!("{subject}: {refusal}");
        let mut reasons: Vec<String> = refused.iter().take(MAX_REASONS).map(row).collect();
        if let Some(more @ 1..) = refused.len().checked_sub(MAX_REASONS) {
            reasons.push(format!("{more} more rows"));
        }
        (!refused.is_empty()).then(|| Self {
            count: refused.len() as u64,
            reason: format!("rows were refused and the others stored: {}", reasons.join("; ")),
        })
    }
}

/// Converts a system time to Unix microseconds.
pub(crate) fn micros_of(moment: SystemTime) -> i64 {
    let since = moment
        .duration_since(UNIX_EPOCH)
        .map_err(|before| before.duration());
    let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    since.map_or_else(|before| -micros(before), micros)
}

/// Dates of a sample's rows.
#[derive(Clone, Copy)]
struct Dates {
    /// Unix second of `create_date`, which begins each `_id`.
    second: i64,
    /// The internal date.
    effective: DateTime,
}

fn within(name: &'static str, number: f64, most: f64) -> Result<(), Refusal> {
    if (0.0..=most).contains(&number) {
        Ok(())
    } else {
        Err(Refusal::Number(name))
    }
}

fn not_longer(name: &'static str, text: &str, most: usize) -> Result<(), Refusal> {
    if text.len() <= most {
        Ok(())
    } else {
        Err(Refusal::Text(name, most))
    }
}

/// Maximum value of a VM's measure. Counts are stored as 32-bit integers.
fn max_value(unit: Unit) -> f64 {
    match unit {
        Unit::Percent => 100.0,
        Unit::KibPerSecond => MAX_RATE,
        Unit::Count => i32::MAX.into(),
        Unit::Load => MAX_LOAD,
    }
}

fn vm_document(sample: &Sample, vm: &VmSample, at: Dates) -> Result<RawDocumentBuf, Refusal> {
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

fn process_document(sample: &Sample, process: &ProcessSample, at: Dates) -> Result<RawDocumentBuf, Refusal> {
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
fn sum_document(sample: &Sample, sum: &SumSample, at: Dates) -> Result<RawDocumentBuf, Refusal> {
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

fn filesystem_document(
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
fn vm_seconds(sample: &Sample) -> [(&'static str, Option<f64>); 3] {
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
fn append(row: &mut RawDocumentBuf, name: &'static str, value: Option<RawBson>) {
    if let (Some(value), Ok(name)) = (value, <&CStr>::try_from(name)) {
        row.append(name, value);
    }
}

/// Computes the `_id` of a row whose sample was taken in this Unix second.
pub(crate) fn row_id(instance: &str, create_date: &str, second: i64, identity: RowIdentity) -> ObjectId {
    ObjectId::from_bytes(vmwatch_blocks::row_id(instance, create_date, second, identity))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use bson::RawBsonRef;
    use vmwatch_api::{metrics::Restriction, processes::ProcessRowKind};

    use super::*;
    use crate::{
        processes::row::StoredProcess,
        vm_row::{RESTRICTED, VmRow},
    };

    fn sample() -> Sample {
        serde_json::from_str(
            r#"{"instance_id":"vm-1","create_date":"2017-01-01T21:37:59.001065","net_incoming":0.6,"net_outgoing":5.7,
                "vm":{"cpu_util":0.0,"mem":8.6,"disk_read":0.0,"disk_write":128.8,"proc":95},
                "processes":[{"cmd":"lvmetad","pid":479,"cpu_util":0.0,"mem":0.2,"disk_read":0.0,"disk_write":0.0,"running_time":1482236515.63}]}"#,
        )
        .unwrap()
    }

    fn documents(sample: &Sample) -> Result<Documents, Refusal> {
        let now = UNIX_EPOCH + Duration::from_secs(1_490_000_000);
        Documents::from_sample(sample, "+08:00".parse().unwrap(), now)
    }

    #[test]
    fn document_of_a_sample_contains_every_measure() {
        let mut sample = sample();
        sample.vm.as_mut().unwrap().system = SystemSample {
            cores: Some(4),
            steal: Some(1.5),
            load: Some(2.25),
            swap: Some(12.0),
            pressure_cpu: Some(30.5),
            pressure_mem: Some(0.0),
            pressure_io: Some(7.0),
        };
        let row = &documents(&sample).unwrap().vms[0];
        let expected = VmMeasures {
            cpu_util: 0.0,
            mem: 8.6,
            disk_read: 0.0,
            disk_write: 128.8,
            net_incoming: 0.6,
            net_outgoing: 5.7,
            proc: 95.0,
            cores: 4.0,
            steal: 1.5,
            load: 2.25,
            swap: 12.0,
            pressure_cpu: 30.5,
            pressure_mem: 0.0,
            pressure_io: 7.0,
        };
        let read = VmRow::from_document(row).unwrap();
        assert_eq!((read.values, read.restricted), (expected.map(Some), None));
        assert_eq!(row.get(RESTRICTED).unwrap(), None);
    }

    #[test]
    fn values_that_the_agent_cannot_measure_are_null() {
        let mut sample = sample();
        let vm = sample.vm.as_mut().unwrap();
        (vm.cpu_util, vm.mem, vm.proc) = (None, None, None);
        vm.restricted = Some(Restriction::PidNamespace);
        let row = &documents(&sample).unwrap().vms[0];
        for name in ["cpu_util", "mem", "proc"] {
            assert_eq!(row.get(name).unwrap(), Some(RawBsonRef::Null), "{name}");
        }
        for name in ["cores", "steal", "load", "swap", "pressure_io"] {
            assert_eq!(row.get(name).unwrap(), None, "{name}");
        }
        let read = VmRow::from_document(row).unwrap();
        assert_eq!(read.restricted, Some(Restriction::PidNamespace));
    }

    #[test]
    fn process_may_use_more_than_the_memory_of_its_vm() {
        let mut sample = sample();
        sample.processes[0].mem = 312.5;
        let row = &documents(&sample).unwrap().processes[0];
        assert_eq!(row.get("mem").unwrap(), Some(RawBsonRef::Double(312.5)));
    }

    #[test]
    fn row_of_a_process_has_its_cpu_time_and_owner_where_they_are_known() {
        let unknown = documents(&sample()).unwrap().processes.remove(0);
        for name in ["cpu_seconds", "vm_user_seconds", "user", "unit", "parent_pid"] {
            assert_eq!(unknown.get(name).unwrap(), None, "{name}");
        }
        let mut sample = sample();
        sample.vm_cpu = Some(CpuSeconds {
            user: 2.5,
            nice: 0.0,
            system: 0.75,
        });
        sample.processes[0].cpu_seconds = Some(1.25);
        sample.processes[0].owner = ProcessOwner {
            user: Some("root".to_owned()),
            parent_pid: Some(1),
            unit: Some("lvm2-lvmetad.service".to_owned()),
            container: None,
            command_line: Some("/sbin/lvmetad -f".to_owned()),
            inherited: true,
        };
        sample.processes[0].exit_code = Some(143);
        sample.short_lived = Some(ShortLived::Recorded);
        let row = &documents(&sample).unwrap().processes[0];
        let read = StoredProcess::read(row).unwrap();
        assert_eq!(read.vm_cpu, sample.vm_cpu);
        assert_eq!(read.row.cpu_seconds, Some(1.25));
        assert_eq!(read.row.owner, sample.processes[0].owner);
        assert_eq!(row.get("container").unwrap(), None);
        assert_eq!(
            (read.row.exit_code, read.short_lived),
            (Some(143), Some(ShortLived::Recorded))
        );

        sample.vm = None;
        sample.processes[0].owner.command_line = Some("x".repeat(513));
        assert_eq!(
            documents(&sample).unwrap_err(),
            Refusal::Text("command_line", 512)
        );
    }

    #[test]
    fn summed_row_has_neither_pid_nor_start_and_fits_into_a_block() {
        let mut sample = sample();
        let of_user = |user: Option<&str>, processes| SumSample {
            cmd: "sh".to_owned(),
            processes,
            cpu_util: 80.0,
            cpu_seconds: 48.5,
            owner: ProcessOwner {
                user: user.map(str::to_owned),
                ..ProcessOwner::default()
            },
            ..SumSample::default()
        };
        sample.sums = vec![of_user(Some("root"), Some(1200)), of_user(None, None)];
        let documents = documents(&sample).unwrap();
        let mut rows = vmwatch_blocks::Rows::new(vmwatch_blocks::Kind::Process, "vm-1", 8 * 3_600_000);
        for document in &documents.processes {
            crate::blocks::push(&mut rows, document, None).unwrap();
        }
        let ids: Vec<_> = documents
            .processes
            .iter()
            .map(|row| row.get_object_id("_id").unwrap().bytes())
            .collect();
        assert_eq!(rows.ids(), ids);
        assert!(ids[1] != ids[2]);
        for (document, processes) in documents.processes[1..].iter().zip([Some(1200), None]) {
            for absent in ["pid", "running_time", "shutdown_time"] {
                assert_eq!(document.get(absent).unwrap(), None);
            }
            let read = StoredProcess::read(document).unwrap().row;
            assert_eq!((read.kind, read.processes), (ProcessRowKind::Sum, processes));
            assert_eq!(read.cpu_seconds, Some(48.5));
        }
    }

    #[test]
    fn rows_of_filesystems_fit_into_a_block_and_impossible_ones_are_refused_alone() {
        let mut sample = sample();
        let filesystem = |mount_point: &str, used_bytes, total_bytes| FilesystemSample {
            mount_point: mount_point.to_owned(),
            filesystem: "ext4".to_owned(),
            used_bytes,
            total_bytes,
        };
        sample.filesystems = vec![
            filesystem("/", 5, 10),
            filesystem("/full", 1 << 40, 1 << 40),
            filesystem("/more used than there is", 11, 10),
            filesystem("/larger than any", 1, u64::MAX),
            filesystem(&"/long".repeat(1024), 1, 10),
        ];
        let documents = documents(&sample).unwrap();
        assert_eq!(documents.rows(), 4);
        let reason = documents.refused.unwrap().reason;
        for field in [
            "`used_bytes` is out of",
            "`total_bytes` is out of",
            "`mount_point` is longer",
        ] {
            assert!(reason.contains(&format!("filesystem: {field}")), "{reason}");
        }
        let mut rows = vmwatch_blocks::Rows::new(vmwatch_blocks::Kind::Filesystem, "vm-1", 8 * 3_600_000);
        for document in &documents.filesystems {
            crate::blocks::push(&mut rows, document, None).unwrap();
        }
        let ids: Vec<_> = documents
            .filesystems
            .iter()
            .map(|row| row.get_object_id("_id").unwrap().bytes())
            .collect();
        assert_eq!(rows.ids(), ids);
        assert!(ids.len() == 2 && ids[0] != ids[1]);

        sample.filesystems = (0..=SAMPLE_FILESYSTEMS)
            .map(|number| filesystem(&format!("/{number}"), 1, 2))
            .collect();
        assert_eq!(
            super::Documents::from_sample(&sample, UtcOffset::UTC, SystemTime::now()).unwrap_err(),
            Refusal::TooManyFilesystems
        );
    }

    #[test]
    fn row_id_is_stable_and_starts_with_time_of_the_sample() {
        let (one, other) = (documents(&sample()).unwrap(), documents(&sample()).unwrap());
        assert_eq!(one.vms, other.vms);
        let id = one.vms[0].get_object_id("_id").unwrap();
        assert_eq!(id.timestamp().timestamp_millis(), 0x5869_0637 * 1000);
        // The id of a row must never change between versions; otherwise rows redelivered after an upgrade would be
        // stored twice.
        assert_eq!(id.to_hex(), "586906378b3cb134ee7c3336");
    }

    #[test]
    fn process_that_reuses_a_pid_gets_another_row_id() {
        let mut twice = sample();
        twice.processes.push(ProcessSample {
            running_time: 1_482_236_600.0,
            ..twice.processes[0].clone()
        });
        let rows = documents(&twice).unwrap().processes;
        assert_ne!(
            rows[0].get_object_id("_id").unwrap(),
            rows[1].get_object_id("_id").unwrap()
        );
    }

    #[test]
    fn impossible_row_is_refused_and_the_others_are_kept() {
        let mut many = sample();
        let process = many.processes[0].clone();
        let with_pid = |pid| ProcessSample {
            pid,
            ..process.clone()
        };
        many.processes = (0..50).map(with_pid).collect();
        many.processes[7].cpu_util = -1.0;
        let kept = documents(&many).unwrap();
        assert_eq!((kept.vms.len(), kept.processes.len()), (1, 49));
        let reason = "rows were refused and the others stored: process 7: `cpu_util` is out of range";
        let refused = |count, reason: &str| {
            let reason = reason.to_owned();
            Some(RefusedRows { count, reason })
        };
        assert_eq!(kept.refused, refused(1, reason));

        many.processes[7].cpu_util = 0.0;
        many.vm.as_mut().unwrap().mem = Some(101.0);
        let kept = documents(&many).unwrap();
        assert_eq!((kept.vms.len(), kept.processes.len()), (0, 50));
        let reason = "rows were refused and the others stored: VM: `mem` is out of range";
        assert_eq!(kept.refused, refused(1, reason));

        // 25 of 51 rows are impossible, and then 26.
        for process in &mut many.processes[..24] {
            process.disk_read = f64::NAN;
        }
        let kept = documents(&many).unwrap();
        assert_eq!((kept.vms.len(), kept.processes.len()), (0, 26));
        let reason = kept.refused.unwrap().reason;
        assert_eq!(reason.matches("is out of range").count(), MAX_REASONS);
        assert!(reason.ends_with("; 5 more rows"), "{reason}");
        many.processes[24].disk_read = f64::NAN;
        assert_eq!(documents(&many).unwrap_err(), Refusal::Number("mem"));
        assert_eq!(documents(&sample()).unwrap().refused, None);
    }

    #[test]
    fn sample_with_value_out_of_range_is_refused() {
        let refused = |change: fn(&mut Sample)| {
            let mut sample = sample();
            change(&mut sample);
            documents(&sample).unwrap_err()
        };
        assert_eq!(
            refused(|s| s.net_incoming = -1.0),
            Refusal::Number("net_incoming")
        );
        assert_eq!(
            refused(|s| s.net_outgoing = f64::NAN),
            Refusal::Number("net_outgoing")
        );
        assert_eq!(
            refused(|s| {
                s.processes.clear();
                s.vm.as_mut().unwrap().cpu_util = Some(100.1);
            }),
            Refusal::Number("cpu_util")
        );
        assert_eq!(
            refused(|s| {
                s.vm = None;
                s.processes[0].mem = f64::INFINITY;
            }),
            Refusal::Number("mem")
        );
        assert_eq!(
            refused(|s| {
                s.vm = None;
                s.processes[0].pid = u32::MAX;
            }),
            Refusal::Number("pid")
        );
        assert_eq!(
            refused(|s| {
                s.vm = None;
                s.processes[0].cmd = "x".repeat(257);
            }),
            Refusal::Text("cmd", 256)
        );
        assert_eq!(
            refused(|s| s.create_date = "2017-09-01T00:00:00.000000".parse().unwrap()),
            Refusal::Time
        );
        assert_eq!(
            refused(|s| (s.vm, s.processes) = (None, Vec::new())),
            Refusal::Empty
        );
    }
}
