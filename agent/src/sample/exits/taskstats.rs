//! Parses the messages of the kernel's taskstats interface (`include/uapi/linux/taskstats.h`,
//! Documentation/accounting/taskstats.rst) and composes the records of threads into records of processes.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Length of the header of a netlink message, and of the generic netlink header after it.
const HEADERS: usize = 20;
/// Type of a netlink message that answers a request.
pub(super) const NLMSG_ERROR: u16 = 2;
// Attributes of a message, and of the attributes within.
const AGGREGATE_PID: u16 = 4;
const AGGREGATE_TGID: u16 = 5;
const STATS: u16 = 3;

/// The first version of the structure that says to which process a thread belongs (Linux 5.19).
const FIRST_VERSION: u16 = 12;
/// A version whose fields have other offsets (Linux 6.15 only).
const OTHER_LAYOUT: u16 = 15;
/// Length of the structure in the first version.
const LEAST_BYTES: usize = 400;
/// The flag of the last thread of a process (`AGROUP`).
const LAST_THREAD: u8 = 0x20;
/// Maximum number of main threads that are remembered because they ended before other threads of their process.
const MAX_LEADERS: usize = 1024;

/// Splits what was received into netlink messages: type and whole content of each.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let message = bytes.get(..length).filter(|message| message.len() >= 16)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16_at(message, 4)?, message))
    })
}

/// Splits the attributes of a generic netlink message, or of an attribute.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        // The two highest bits are flags.
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let content = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

/// The value of an attribute of a generic netlink message.
pub(super) fn attribute(message: &[u8], wanted: u16) -> Option<&[u8]> {
    let attributes = attributes(message.get(HEADERS..)?);
    attributes
        .into_iter()
        .find_map(|(kind, content)| (kind == wanted).then_some(content))
}

/// Appends an attribute to a message.
pub(super) fn push_attribute(message: &mut Vec<u8>, kind: u16, content: &[u8]) {
    let length = u16::try_from(content.len() + 4).unwrap_or(u16::MAX);
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(content);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// Why a message holds no usable record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::sample) enum RecordError {
    /// The message is not a record, or it is truncated.
    #[error("the kernel sent a record of an ended process that cannot be read")]
    Malformed,
    /// The kernel has a version of the structure that the agent does not know.
    #[error("the kernel's records of ended processes have version {0}, which the agent does not support")]
    Version(u16),
}

/// The record of one thread that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pid: u32,
    pub(super) process: u32,
    /// Whether it is the last thread of its process.
    is_last: bool,
    comm: String,
    user: u32,
    parent: u32,
    /// Exit status in the format of wait(2).
    status: u32,
    elapsed_micros: u64,
    /// Time since the start of the process.
    process_elapsed_micros: u64,
    run_nanos: u64,
    read_bytes: u64,
    written_bytes: u64,
    /// CPU time of all threads of the process; only in the record of the last one.
    process_run_nanos: Option<u64>,
}

impl Record {
    /// Parses a message of the taskstats family.
    pub(super) fn parse(message: &[u8]) -> Result<Self, RecordError> {
        let of_kind = |kind: u16| {
            let aggregate = attribute(message, kind)?;
            attributes(aggregate).find_map(|(kind, content)| (kind == STATS).then_some(content))
        };
        let stats = of_kind(AGGREGATE_PID).ok_or(RecordError::Malformed)?;
        let version = u16_at(stats, 0).ok_or(RecordError::Malformed)?;
        if version < FIRST_VERSION || version == OTHER_LAYOUT {
            return Err(RecordError::Version(version));
        }
        if stats.len() < LEAST_BYTES {
            return Err(RecordError::Malformed);
        }
        let process = of_kind(AGGREGATE_TGID);
        Self::of_stats(stats, process.and_then(|stats| u64_at(stats, 72))).ok_or(RecordError::Malformed)
    }

    /// Reads the structure, whose fields have had these offsets since version 12, except in version 15.
    fn of_stats(stats: &[u8], process_run_nanos: Option<u64>) -> Option<Self> {
        let comm = stats.get(80..112)?.split(|&byte| byte == 0).next()?;
        Some(Self {
            status: u32_at(stats, 4)?,
            is_last: stats.get(8)? & LAST_THREAD != 0,
            run_nanos: u64_at(stats, 72)?,
            comm: String::from_utf8_lossy(comm).into_owned(),
            user: u32_at(stats, 120)?,
            pid: u32_at(stats, 128)?,
            parent: u32_at(stats, 132)?,
            elapsed_micros: u64_at(stats, 144)?,
            read_bytes: u64_at(stats, 248)?,
            written_bytes: u64_at(stats, 256)?,
            process: u32_at(stats, 368)?,
            process_elapsed_micros: u64_at(stats, 376)?,
            process_run_nanos,
        })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

/// A process that ended.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::sample) struct Exit {
    pub(in crate::sample) pid: u32,
    pub(in crate::sample) name: String,
    pub(in crate::sample) user: u32,
    pub(in crate::sample) parent_pid: u32,
    /// Exit status, or 128 plus the number of the signal that ended the process.
    pub(in crate::sample) code: u32,
    /// CPU time of the process from its start, in seconds. The kernel counts the time of a thread when it is preempted
    /// and at each clock tick, and writes the record before it releases the thread's memory, so the CPU time is some
    /// milliseconds too low.
    pub(in crate::sample) cpu_seconds: f64,
    /// Time from start to end.
    pub(in crate::sample) elapsed: Duration,
    /// End, as the agent saw it.
    pub(in crate::sample) at: Instant,
    /// End in Unix seconds, as the agent saw it.
    pub(in crate::sample) ended: f64,
    pub(in crate::sample) read_bytes: u64,
    pub(in crate::sample) written_bytes: u64,
}

impl Exit {
    /// Start in Unix seconds with two decimals.
    pub(in crate::sample) fn started(&self) -> f64 {
        ((self.ended - self.elapsed.as_secs_f64()) * 100.0)
            .round()
            .max(0.0)
            / 100.0
    }

    /// Whether the process had started before this time. It may seem to have started later than it did, because the
    /// agent receives the record some time after the end.
    pub(in crate::sample) fn started_before(&self, time: Instant) -> bool {
        self.at.checked_sub(self.elapsed).is_none_or(|start| start < time)
    }
}

/// Composes records of threads into records of processes: of the records of a process, the last one has the CPU time of
/// all its threads, and that of its main thread has its name and exit status.
#[derive(Debug, Default)]
pub(super) struct Composer {
    /// Main threads that ended before other threads of their process, by pid.
    leaders: HashMap<u32, Record>,
}

impl Composer {
    /// Adds a record, received at this time, also given in Unix seconds. Returns the process if it has ended.
    pub(super) fn add(&mut self, record: Record, at: Instant, ended: f64) -> Option<Exit> {
        let is_leader = record.pid == record.process;
        if !record.is_last {
            if is_leader {
                if self.leaders.len() >= MAX_LEADERS {
                    self.leaders.clear();
                }
                self.leaders.insert(record.process, record);
            }
            return None;
        }
        let leader = self.leaders.remove(&record.process).filter(|_| !is_leader);
        let elapsed = record.process_elapsed_micros.max(record.elapsed_micros);
        let run_nanos = record.process_run_nanos.unwrap_or(record.run_nanos);
        let main = leader.as_ref().unwrap_or(&record);
        Some(Exit {
            pid: record.process,
            name: main.comm.clone(),
            user: main.user,
            parent_pid: record.parent,
            code: exit_code(main.status),
            cpu_seconds: crate::sample::float(run_nanos) / 1e9,
            elapsed: Duration::from_micros(elapsed),
            at,
            ended,
            read_bytes: main.read_bytes,
            written_bytes: main.written_bytes,
        })
    }
}

/// Converts the status of wait(2) to the exit code that shells report.
const fn exit_code(status: u32) -> u32 {
    match status & 0x7f {
        0 => status >> 8 & 0xff,
        signal => 128 + signal,
    }
}

#[cfg(test)]
mod tests;
