//! The encoding of a sample on the bus, whose rows are the columns of blocks.

use vmwatch_api::{
    InstanceId,
    metrics::{
        CpuSeconds, FilesystemSample, ProcessOwner, ProcessSample, Restriction, SAMPLE_FILESYSTEMS,
        SAMPLE_PART_DECODED_BYTES, SAMPLE_PART_ROWS, Sample, ShortLived, SumSample, SystemSample, VmSample,
    },
    time::CreateDate,
};

use crate::{
    Block, BlockError, Column, Encoder, Kind, Limits, RowError, Rows, Value,
    block::unseal,
    bytes::{Reader, push_varint},
    layout,
};

/// The `Content-Type` of a sample in this encoding.
pub const SAMPLE_CONTENT_TYPE: &str = "application/vnd.vmwatch.sample.v1";
/// How much of one sample part may be decoded.
pub const SAMPLE_LIMITS: Limits = Limits {
    rows: SAMPLE_PART_ROWS,
    bytes: SAMPLE_PART_DECODED_BYTES,
};

/// The first bytes of an encoded sample.
const MAGIC: [u8; 3] = *b"VMS";
/// The version of the encoding, which follows the magic.
const VERSION: u8 = 1;
/// Maximum length of an instance id or a date; their own types check the rest.
const MAX_HEAD_TEXT: usize = 64;

/// What identifies a part of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleHead {
    pub instance_id: InstanceId,
    pub create_date: CreateDate,
    pub part: u32,
}

/// Encodes a sample, or a part of one. It fails only for rows that no block can hold.
pub fn encode_sample(sample: &Sample, encoder: &mut Encoder) -> Result<Vec<u8>, RowError> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&MAGIC);
    bytes.push(VERSION);
    bytes.extend_from_slice(&[0; 4]);
    push_text(&mut bytes, sample.instance_id.as_str());
    push_text(&mut bytes, sample.create_date.as_str());
    push_varint(&mut bytes, sample.part.into());
    bytes.extend_from_slice(&sample.net_incoming.to_le_bytes());
    bytes.extend_from_slice(&sample.net_outgoing.to_le_bytes());
    let mut kinds = vec![vm_rows(sample)?, process_rows(sample)?];
    // Samples of agents that do not report filesystems end here.
    if !sample.filesystems.is_empty() {
        kinds.push(filesystem_rows(sample)?);
    }
    for rows in kinds {
        let block = encoder.encode(&rows).pop();
        let block = block.map(|block| block.bytes).unwrap_or_default();
        push_varint(&mut bytes, block.len() as u64);
        bytes.extend_from_slice(&block);
    }
    layout::seal(&mut bytes);
    Ok(bytes)
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    push_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn double(number: Option<f64>) -> Value<'static> {
    number.map_or(Value::Missing, Value::Double)
}

fn integer(number: Option<u32>) -> Value<'static> {
    number.map_or(Value::Missing, |number| Value::Int64(number.into()))
}

fn text(words: Option<&str>) -> Value<'_> {
    words.map_or(Value::Missing, Value::Text)
}

fn vm_rows(sample: &Sample) -> Result<Rows, RowError> {
    let mut rows = Rows::new(Kind::Vm, sample.instance_id.as_str(), 0);
    if let Some(vm) = &sample.vm {
        let fields = [
            ("cpu_util", double(vm.cpu_util)),
            ("mem", double(vm.mem)),
            ("disk_read", Value::Double(vm.disk_read)),
            ("disk_write", Value::Double(vm.disk_write)),
            ("proc", integer(vm.proc)),
            ("restricted", text(vm.restricted.map(Restriction::as_str))),
            ("cores", integer(vm.system.cores)),
            ("steal", double(vm.system.steal)),
            ("load", double(vm.system.load)),
            ("swap", double(vm.system.swap)),
            ("pressure_cpu", double(vm.system.pressure_cpu)),
            ("pressure_mem", double(vm.system.pressure_mem)),
            ("pressure_io", double(vm.system.pressure_io)),
            ("dropped_parts", Value::Int64(vm.dropped_parts.into())),
            (
                "lost_exit_records",
                integer(Some(vm.lost_exit_records).filter(|lost| *lost > 0)),
            ),
        ];
        rows.push(sample.create_date.as_str(), None, None, fields)?;
    }
    Ok(rows)
}

fn process_rows(sample: &Sample) -> Result<Rows, RowError> {
    let mut rows = Rows::new(Kind::Process, sample.instance_id.as_str(), 0);
    for process in &sample.processes {
        let owner = &process.owner;
        let fields = [
            ("cmd", Value::Text(&process.cmd)),
            ("pid", Value::Int64(process.pid.into())),
            ("cpu_util", Value::Double(process.cpu_util)),
            ("mem", Value::Double(process.mem)),
            ("disk_read", Value::Double(process.disk_read)),
            ("disk_write", Value::Double(process.disk_write)),
            ("running_time", Value::Double(process.running_time)),
            ("shutdown_time", double(process.shutdown_time)),
            ("cpu_seconds", double(process.cpu_seconds)),
            ("vm_user_seconds", double(sample.vm_cpu.map(|cpu| cpu.user))),
            ("vm_nice_seconds", double(sample.vm_cpu.map(|cpu| cpu.nice))),
            ("vm_system_seconds", double(sample.vm_cpu.map(|cpu| cpu.system))),
            ("user", text(owner.user.as_deref())),
            ("parent_pid", integer(owner.parent_pid)),
            ("unit", text(owner.unit.as_deref())),
            ("container", text(owner.container.as_deref())),
            ("command_line", text(owner.command_line.as_deref())),
            ("owner_inherited", flag(owner.inherited)),
            ("exit_code", integer(process.exit_code)),
            ("short_lived", text(sample.short_lived.map(ShortLived::as_str))),
        ];
        rows.push(sample.create_date.as_str(), None, None, fields)?;
    }
    for sum in &sample.sums {
        let owner = &sum.owner;
        let fields = [
            ("cmd", Value::Text(&sum.cmd)),
            ("cpu_util", Value::Double(sum.cpu_util)),
            ("mem", Value::Double(sum.mem)),
            ("disk_read", Value::Double(sum.disk_read)),
            ("disk_write", Value::Double(sum.disk_write)),
            ("cpu_seconds", Value::Double(sum.cpu_seconds)),
            ("vm_user_seconds", double(sample.vm_cpu.map(|cpu| cpu.user))),
            ("vm_nice_seconds", double(sample.vm_cpu.map(|cpu| cpu.nice))),
            ("vm_system_seconds", double(sample.vm_cpu.map(|cpu| cpu.system))),
            ("user", text(owner.user.as_deref())),
            ("unit", text(owner.unit.as_deref())),
            ("container", text(owner.container.as_deref())),
            ("owner_inherited", flag(owner.inherited)),
            // This field makes the row a summed one.
            (
                "processes",
                sum.processes
                    .map_or(Value::Null, |count| Value::Int64(count.into())),
            ),
            ("short_lived", text(sample.short_lived.map(ShortLived::as_str))),
        ];
        rows.push(sample.create_date.as_str(), None, None, fields)?;
    }
    Ok(rows)
}

fn filesystem_rows(sample: &Sample) -> Result<Rows, RowError> {
    let mut rows = Rows::new(Kind::Filesystem, sample.instance_id.as_str(), 0);
    // No filesystem is as large as the largest integer (8 EiB).
    let bytes = |bytes: u64| Value::Int64(i64::try_from(bytes).unwrap_or(i64::MAX));
    for filesystem in &sample.filesystems {
        let fields = [
            ("mount_point", Value::Text(&filesystem.mount_point)),
            ("filesystem", Value::Text(&filesystem.filesystem)),
            ("used_bytes", bytes(filesystem.used_bytes)),
            ("total_bytes", bytes(filesystem.total_bytes)),
        ];
        rows.push(sample.create_date.as_str(), None, None, fields)?;
    }
    Ok(rows)
}

/// A flag that most rows do not have.
const fn flag(is_set: bool) -> Value<'static> {
    if is_set { Value::Bool(true) } else { Value::Missing }
}

/// Compares an encoded sample with its checksum, and decodes what identifies it.
pub fn sample_head(bytes: &[u8]) -> Result<SampleHead, BlockError> {
    read_head(&mut Reader(unseal(bytes, MAGIC, VERSION)?))
}

fn read_head(reader: &mut Reader<'_>) -> Result<SampleHead, BlockError> {
    let instance_id = reader
        .text(MAX_HEAD_TEXT)?
        .parse()
        .map_err(|_| BlockError::Corrupt("its instance_id is invalid"))?;
    let create_date = reader
        .text(MAX_HEAD_TEXT)?
        .parse()
        .map_err(|_| BlockError::Corrupt("its create_date is invalid"))?;
    let part = u32::try_from(reader.varint()?).map_err(|_| BlockError::TooLarge)?;
    Ok(SampleHead {
        instance_id,
        create_date,
        part,
    })
}

/// Decodes a sample. The limits apply to its process rows; of the other kinds, it has fewer.
pub fn decode_sample(bytes: &[u8], limits: Limits) -> Result<Sample, BlockError> {
    let mut reader = Reader(unseal(bytes, MAGIC, VERSION)?);
    let head = read_head(&mut reader)?;
    let (net_incoming, net_outgoing) = (read_double(&mut reader)?, read_double(&mut reader)?);
    let one = Limits { rows: 1, ..limits };
    let vm = read_block(&mut reader, Kind::Vm, one)?
        .map(|mut block| vm_sample(&mut block))
        .transpose()?;
    let mut of_processes = OfProcesses::default();
    if let Some(mut block) = read_block(&mut reader, Kind::Process, limits)? {
        of_processes = OfProcesses {
            processes: process_samples(&mut block)?,
            sums: sum_samples(&mut block)?,
            vm_cpu: vm_cpu(&mut block)?,
            short_lived: short_lived(&mut block)?,
        };
    }
    let OfProcesses {
        processes,
        sums,
        vm_cpu,
        short_lived,
    } = of_processes;
    let few = Limits {
        rows: SAMPLE_FILESYSTEMS,
        ..limits
    };
    let mut filesystems = Vec::new();
    if !reader.0.is_empty()
        && let Some(mut block) = read_block(&mut reader, Kind::Filesystem, few)?
    {
        filesystems = filesystem_samples(&mut block)?;
    }
    reader.end()?;
    Ok(Sample {
        instance_id: head.instance_id,
        create_date: head.create_date,
        part: head.part,
        net_incoming,
        net_outgoing,
        vm,
        vm_cpu,
        processes,
        sums,
        short_lived,
        filesystems,
    })
}

/// What the block of process rows holds.
#[derive(Default)]
struct OfProcesses {
    processes: Vec<ProcessSample>,
    sums: Vec<SumSample>,
    vm_cpu: Option<CpuSeconds>,
    short_lived: Option<ShortLived>,
}

fn read_double(reader: &mut Reader<'_>) -> Result<f64, BlockError> {
    let bytes = reader.take(8)?.first_chunk().copied().unwrap_or_default();
    Ok(f64::from_le_bytes(bytes))
}

/// Reads a block with its length; `None` if it has no rows.
fn read_block<'a>(
    reader: &mut Reader<'a>,
    kind: Kind,
    limits: Limits,
) -> Result<Option<Block<'a>>, BlockError> {
    let length = reader.size(reader.0.len())?;
    if length == 0 {
        return Ok(None);
    }
    let block = Block::open(reader.take(length)?, limits)?;
    if block.kind() != kind || block.is_empty() {
        return Err(BlockError::Corrupt("it has rows of another kind"));
    }
    Ok(Some(block))
}

fn vm_sample(block: &mut Block<'_>) -> Result<VmSample, BlockError> {
    let restricted = match block.column("restricted")?.get(0) {
        Value::Missing => None,
        Value::Text(name) => Some(Restriction::from_name(name).ok_or_else(wrong_type)?),
        _ => return Err(wrong_type()),
    };
    Ok(VmSample {
        cpu_util: optional(&block.column("cpu_util")?, 0, measure)?,
        mem: optional(&block.column("mem")?, 0, measure)?,
        disk_read: measure(&block.column("disk_read")?, 0)?,
        disk_write: measure(&block.column("disk_write")?, 0)?,
        proc: optional(&block.column("proc")?, 0, count)?,
        restricted,
        system: system_sample(block)?,
        dropped_parts: count(&block.column("dropped_parts")?, 0)?,
        lost_exit_records: optional(&block.column("lost_exit_records")?, 0, count)?.unwrap_or(0),
    })
}

fn system_sample(block: &mut Block<'_>) -> Result<SystemSample, BlockError> {
    let mut value = |name: &str| {
        block
            .column(name)
            .and_then(|column| optional(&column, 0, measure))
    };
    Ok(SystemSample {
        steal: value("steal")?,
        load: value("load")?,
        swap: value("swap")?,
        pressure_cpu: value("pressure_cpu")?,
        pressure_mem: value("pressure_mem")?,
        pressure_io: value("pressure_io")?,
        cores: optional(&block.column("cores")?, 0, count)?,
    })
}

/// The CPU time of the VM, which all process rows of a sample have.
fn vm_cpu(block: &mut Block<'_>) -> Result<Option<CpuSeconds>, BlockError> {
    let mut seconds = |name: &str| {
        block
            .column(name)
            .and_then(|column| optional(&column, 0, measure))
    };
    let (user, nice, system) = (
        seconds("vm_user_seconds")?,
        seconds("vm_nice_seconds")?,
        seconds("vm_system_seconds")?,
    );
    let known = user.zip(nice).zip(system);
    Ok(known.map(|((user, nice), system)| CpuSeconds { user, nice, system }))
}

fn process_samples(block: &mut Block<'_>) -> Result<Vec<ProcessSample>, BlockError> {
    let (cmd, pid) = (block.column("cmd")?, block.column("pid")?);
    let (cpu_util, mem) = (block.column("cpu_util")?, block.column("mem")?);
    let (disk_read, disk_write) = (block.column("disk_read")?, block.column("disk_write")?);
    let (started, ended) = (block.column("running_time")?, block.column("shutdown_time")?);
    let cpu_seconds = block.column("cpu_seconds")?;
    let (user, parent) = (block.column("user")?, block.column("parent_pid")?);
    let (unit, container) = (block.column("unit")?, block.column("container")?);
    let command_line = block.column("command_line")?;
    let (inherited, exit_code) = (block.column("owner_inherited")?, block.column("exit_code")?);
    let is_process = |row: &usize| !matches!(pid.get(*row), Value::Missing);
    let process = |row| {
        Ok(ProcessSample {
            cmd: read_text(&cmd, row)?,
            pid: count(&pid, row)?,
            cpu_util: measure(&cpu_util, row)?,
            mem: measure(&mem, row)?,
            disk_read: measure(&disk_read, row)?,
            disk_write: measure(&disk_write, row)?,
            running_time: measure(&started, row)?,
            shutdown_time: optional(&ended, row, measure)?,
            cpu_seconds: optional(&cpu_seconds, row, measure)?,
            owner: ProcessOwner {
                user: optional(&user, row, read_text)?,
                parent_pid: optional(&parent, row, count)?,
                unit: optional(&unit, row, read_text)?,
                container: optional(&container, row, read_text)?,
                command_line: optional(&command_line, row, read_text)?,
                inherited: is_set(&inherited, row)?,
            },
            exit_code: optional(&exit_code, row, count)?,
        })
    };
    (0..block.len()).filter(is_process).map(process).collect()
}

/// The summed rows, which have no pid, sorted by name and user.
fn sum_samples(block: &mut Block<'_>) -> Result<Vec<SumSample>, BlockError> {
    let pid = block.column("pid")?;
    let rows: Vec<usize> = (0..block.len())
        .filter(|row| matches!(pid.get(*row), Value::Missing))
        .collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let (cmd, processes) = (block.column("cmd")?, block.column("processes")?);
    let (cpu_util, mem) = (block.column("cpu_util")?, block.column("mem")?);
    let (disk_read, disk_write) = (block.column("disk_read")?, block.column("disk_write")?);
    let (cpu_seconds, user) = (block.column("cpu_seconds")?, block.column("user")?);
    let (unit, container) = (block.column("unit")?, block.column("container")?);
    let inherited = block.column("owner_inherited")?;
    let sum = |row| {
        Ok(SumSample {
            cmd: read_text(&cmd, row)?,
            processes: optional(&processes, row, count)?,
            cpu_util: measure(&cpu_util, row)?,
            mem: measure(&mem, row)?,
            disk_read: measure(&disk_read, row)?,
            disk_write: measure(&disk_write, row)?,
            cpu_seconds: measure(&cpu_seconds, row)?,
            owner: ProcessOwner {
                user: optional(&user, row, read_text)?,
                unit: optional(&unit, row, read_text)?,
                container: optional(&container, row, read_text)?,
                inherited: is_set(&inherited, row)?,
                ..ProcessOwner::default()
            },
        })
    };
    let mut sums: Vec<SumSample> = rows.into_iter().map(sum).collect::<Result<_, _>>()?;
    sums.sort_by(|one, other| (&one.cmd, &one.owner.user).cmp(&(&other.cmd, &other.owner.user)));
    Ok(sums)
}

/// The filesystems, sorted by mount point.
fn filesystem_samples(block: &mut Block<'_>) -> Result<Vec<FilesystemSample>, BlockError> {
    let (mount_point, kind) = (block.column("mount_point")?, block.column("filesystem")?);
    let (used, total) = (block.column("used_bytes")?, block.column("total_bytes")?);
    let filesystem = |row| {
        Ok(FilesystemSample {
            mount_point: read_text(&mount_point, row)?,
            filesystem: read_text(&kind, row)?,
            used_bytes: bytes(&used, row)?,
            total_bytes: bytes(&total, row)?,
        })
    };
    let filesystems: Result<Vec<FilesystemSample>, _> = (0..block.len()).map(filesystem).collect();
    let mut filesystems = filesystems?;
    filesystems.sort_by(|one, other| one.mount_point.cmp(&other.mount_point));
    Ok(filesystems)
}

/// How short-lived processes were measured, which all process rows of a sample have.
fn short_lived(block: &mut Block<'_>) -> Result<Option<ShortLived>, BlockError> {
    match block.column("short_lived")?.get(0) {
        Value::Missing => Ok(None),
        Value::Text(name) => ShortLived::from_name(name).map(Some).ok_or_else(wrong_type),
        _ => Err(wrong_type()),
    }
}

fn is_set(column: &Column, row: usize) -> Result<bool, BlockError> {
    match column.get(row) {
        Value::Missing => Ok(false),
        Value::Bool(truth) => Ok(truth),
        _ => Err(wrong_type()),
    }
}

/// Reads a value that a row may lack.
fn optional<T>(
    column: &Column,
    row: usize,
    read: impl FnOnce(&Column, usize) -> Result<T, BlockError>,
) -> Result<Option<T>, BlockError> {
    match column.get(row) {
        Value::Missing | Value::Null => Ok(None),
        _ => read(column, row).map(Some),
    }
}

fn measure(column: &Column, row: usize) -> Result<f64, BlockError> {
    match column.get(row) {
        Value::Double(number) => Ok(number),
        _ => Err(wrong_type()),
    }
}

fn read_text(column: &Column, row: usize) -> Result<String, BlockError> {
    match column.get(row) {
        Value::Text(text) => Ok(text.to_owned()),
        _ => Err(wrong_type()),
    }
}

fn count(column: &Column, row: usize) -> Result<u32, BlockError> {
    match column.get(row) {
        Value::Int64(number) => u32::try_from(number).map_err(|_| wrong_type()),
        _ => Err(wrong_type()),
    }
}

fn bytes(column: &Column, row: usize) -> Result<u64, BlockError> {
    match column.get(row) {
        Value::Int64(number) => u64::try_from(number).map_err(|_| wrong_type()),
        _ => Err(wrong_type()),
    }
}

const fn wrong_type() -> BlockError {
    BlockError::Corrupt("a value of the sample is missing or has the wrong type")
}
