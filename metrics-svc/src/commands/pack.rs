//! Makes blocks of rows that were not ingested: rows of files, and rows of the flat collections.

use std::time::{Duration, SystemTime};

use bson::{RawDocument, RawDocumentBuf};
use vmwatch_api::{InstanceId, time::UtcOffset};
use vmwatch_blocks::MAX_ROWS;

use crate::{
    MetricsError,
    blocks::{self, BlockEncoder, CLOSED_AFTER, HOUR_MICROS, hour_of},
    documents::{SAMPLED_AT, micros_of},
    reads::micros_of_date,
    store::{RowKind, RowStore, Unstored},
};

/// Which rows of a VM may share a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Span {
    /// Those of an hour that has ended, which starts at this time (Unix microseconds).
    Hour(i64),
    /// Those of this moment (Unix microseconds), in an hour that has not ended.
    Moment(i64),
}

impl Span {
    /// The rows that may share a block with one of this effective date (Unix microseconds).
    pub(super) fn of(at: i64) -> Self {
        let closed = SystemTime::now().checked_sub(CLOSED_AFTER).map_or(0, micros_of);
        let hour = hour_of(at);
        if hour.saturating_add(HOUR_MICROS) <= closed {
            Self::Hour(hour)
        } else {
            Self::Moment(at)
        }
    }
}

/// Whether rows have an internal date, so that they expire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dated {
    Yes,
    No,
}

impl Dated {
    pub(super) fn of(row: &RawDocument) -> Self {
        match row.get_datetime(SAMPLED_AT) {
            Ok(_) => Self::Yes,
            Err(_) => Self::No,
        }
    }
}

/// Rows of one VM, kind and [`Span`] that are all dated or all undated.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub(super) kind: RowKind,
    pub(super) instance: &'a InstanceId,
    pub(super) dated: Dated,
    pub(super) rows: Vec<RawDocumentBuf>,
}

/// What became of a group.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// The documents of the blocks.
    pub(super) blocks: Vec<RawDocumentBuf>,
    /// The rows that no block can hold.
    pub(super) unfit: Vec<RawDocumentBuf>,
}

impl Group<'_> {
    /// Encodes the rows in as few blocks as possible. The caller limits how many bytes the rows have, because a block must
    /// fit into a document.
    pub(super) fn pack(self, store: &RowStore, keep: Duration) -> Result<Packed, MetricsError> {
        let keep = (self.dated == Dated::Yes).then(|| self.keep(keep, store.offset()));
        store.encode(|encoder| self.encode(encoder, keep))
    }

    /// The time after the effective date of a row at which the retention of every row has passed. Retention begins with
    /// the internal date, which may be later than the effective date: `backfill-dates` takes it from the `_id`.
    fn keep(&self, keep: Duration, offset: UtcOffset) -> Duration {
        let lag = |row: &RawDocumentBuf| {
            let internal = row.get_datetime(SAMPLED_AT).ok()?.timestamp_millis();
            let effective = micros_of_date(row.get_str("create_date").ok()?, offset)?;
            Some(internal.saturating_mul(1000).saturating_sub(effective))
        };
        let lag = self.rows.iter().filter_map(lag).max().unwrap_or(0);
        let keep = i64::try_from(keep.as_micros()).unwrap_or(i64::MAX);
        Duration::from_micros(u64::try_from(keep.saturating_add(lag)).unwrap_or(0))
    }

    fn encode(self, encoder: &mut BlockEncoder, keep: Option<Duration>) -> Result<Packed, MetricsError> {
        let instance = self.instance.as_str();
        let mut packed = Packed::default();
        let mut rows = encoder.rows(self.kind, instance);
        for row in self.rows {
            if rows.len() == MAX_ROWS {
                let full = std::mem::replace(&mut rows, encoder.rows(self.kind, instance));
                packed
                    .blocks
                    .extend(encoder.encode(self.kind, instance, &full, keep)?);
            }
            if blocks::push(&mut rows, &row, None).is_ok() {
                continue;
            }
            // The row may only have other fields than a block can hold besides those of the rows before it.
            let mut alone = encoder.rows(self.kind, instance);
            if blocks::push(&mut alone, &row, None).is_err() {
                packed.unfit.push(row);
            } else {
                let before = std::mem::replace(&mut rows, alone);
                packed
                    .blocks
                    .extend(encoder.encode(self.kind, instance, &before, keep)?);
            }
        }
        packed
            .blocks
            .extend(encoder.encode(self.kind, instance, &rows, keep)?);
        Ok(packed)
    }
}

/// Returns an error if the database has refused documents of an insert.
pub(super) fn check(unstored: &[Unstored]) -> Result<(), MetricsError> {
    unstored.first().map_or(Ok(()), |unstored| {
        Err(MetricsError::Refused(format!(
            "the database refused rows: {}",
            unstored.words
        )))
    })
}
