//! Converts a sample into the MongoDB documents to store.

mod hypervisor;
mod rows;
#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bson::{RawDocumentBuf, oid::ObjectId};
use vmwatch_api::{
    agents::Sender,
    events::UnstoredEvent,
    history::Resolution,
    metrics::{SAMPLE_FILESYSTEMS, SAMPLE_PART_ROWS, Sample},
    time::{CreateDate, UtcOffset},
};
use vmwatch_blocks::RowIdentity;

use self::rows::{
    Dates, MAX_CPU_SECONDS, MAX_RATE, filesystem_document, process_document, sum_document, vm_document,
    vm_seconds, within,
};
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
    /// The time of the sample is invalid or before 1970.
    #[error("create_date is not a valid date or is before 1970")]
    Time,
    /// The time of the sample is too far ahead; contains the time.
    #[error("create_date is more than a day ahead of the time at which the sample arrived")]
    Ahead(SystemTime),
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
    /// Documents of rows that a hypervisor measured.
    pub hypervisor: Vec<RawDocumentBuf>,
    /// Number of the sample part within its sample.
    pub(crate) part: u32,
    /// Number of parts of earlier samples that the agent reports as dropped.
    pub dropped_parts: u64,
    /// Number of times that records of ended processes were lost, as the agent reports it.
    pub lost_exit_records: u64,
    /// When the sample arrived, in Unix microseconds.
    pub(crate) arrival: Option<i64>,
    /// Whether the time of the sample is so far ahead of its arrival that its rows may be stored with another effective
    /// date.
    pub(crate) far_ahead: bool,
    /// The sender of the sample; `None` if it did not come in a message.
    pub(crate) sender: Option<Sender>,
    /// The rows that were refused although the others are stored; `None` if there are none.
    pub(crate) refused: Option<RefusedRows>,
    /// The rows that were removed because they are past their retention; `None` if there are none.
    pub(crate) expired: Option<ExpiredRows>,
}

/// Rows of a sample that are past their retention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpiredRows {
    pub(crate) count: u64,
    /// The live event about these rows; `None` for rows of a hypervisor, which are no fault of the agent.
    pub(crate) event: Option<UnstoredEvent>,
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
        self.vms.len() + self.processes.len() + self.filesystems.len() + self.hypervisor.len()
    }

    /// The documents of one kind.
    pub(crate) fn of(&self, kind: RowKind) -> &[RawDocumentBuf] {
        match kind {
            RowKind::Vm => &self.vms,
            RowKind::Process => &self.processes,
            RowKind::Filesystem => &self.filesystems,
            RowKind::Hypervisor => &self.hypervisor,
        }
    }

    /// All documents, by kind.
    pub(crate) fn each_mut(&mut self) -> [(RowKind, &mut Vec<RawDocumentBuf>); 4] {
        [
            (RowKind::Vm, &mut self.vms),
            (RowKind::Process, &mut self.processes),
            (RowKind::Filesystem, &mut self.filesystems),
            (RowKind::Hypervisor, &mut self.hypervisor),
        ]
    }

    /// A row that says when the sample was taken. All rows of a sample have the same effective date.
    pub(crate) fn first(&self) -> Option<&RawDocumentBuf> {
        let any = self.vms.first().or(self.processes.first());
        any.or(self.hypervisor.first())
    }

    /// Start of the five-minute time bucket that contains the sample's rows.
    pub fn five_minutes(&self, offset: UtcOffset) -> Option<u64> {
        let at = self.first()?.get_datetime(SAMPLED_AT).ok()?.timestamp_millis();
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
        let moment = possible_moment(&sample.create_date, offset, arrival)?;
        within("net_incoming", sample.net_incoming, MAX_RATE)?;
        within("net_outgoing", sample.net_outgoing, MAX_RATE)?;
        for (name, seconds) in vm_seconds(sample) {
            within(name, seconds.unwrap_or(0.0), MAX_CPU_SECONDS)?;
        }
        let at = Dates::of(moment, arrival);
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
            part: sample.part,
            vms,
            processes,
            filesystems,
            hypervisor: Vec::new(),
            refused: RefusedRows::of(&refused),
            expired: None,
            dropped_parts: sample.vm.as_ref().map_or(0, |vm| vm.dropped_parts.into()),
            lost_exit_records: sample.vm.as_ref().map_or(0, |vm| vm.lost_exit_records.into()),
            arrival: Some(micros_of(arrival)),
            far_ahead: moment > arrival + FAR_AHEAD,
        })
    }
}

/// The time of a sample, unless it is impossible.
fn possible_moment(date: &CreateDate, offset: UtcOffset, arrival: SystemTime) -> Result<SystemTime, Refusal> {
    let moment = date.moment(offset).map_err(|_| Refusal::Time)?;
    if moment < UNIX_EPOCH {
        return Err(Refusal::Time);
    }
    if moment > arrival + MAX_AHEAD {
        return Err(Refusal::Ahead(moment));
    }
    Ok(moment)
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

/// Converts a system time to Unix milliseconds; 0 for a time before 1970.
pub(crate) fn millis_of(moment: SystemTime) -> u64 {
    u64::try_from(micros_of(moment) / 1000).unwrap_or(0)
}

/// Computes the `_id` of a row whose sample was taken in this Unix second.
pub(crate) fn row_id(instance: &str, create_date: &str, second: i64, identity: RowIdentity) -> ObjectId {
    ObjectId::from_bytes(vmwatch_blocks::row_id(instance, create_date, second, identity))
}
