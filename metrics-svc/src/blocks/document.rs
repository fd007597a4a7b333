//! The document of a stored block.

use std::ops::Range;

use bson::{RawBsonRef, RawDocument};

use super::hour_of;

/// A block as it is stored. Its times are effective dates in Unix microseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredBlock<'a> {
    /// The document's `_id`.
    pub(crate) id: RawBsonRef<'a>,
    /// The first microsecond of the millisecond of the earliest row.
    pub(crate) from: i64,
    /// The last microsecond of the millisecond of the latest row.
    pub(crate) to: i64,
    /// The encoded rows.
    pub(crate) data: &'a [u8],
    pub(crate) expires: Expires,
}

/// When something that was made from rows expires; the greatest value counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Expires {
    /// There are no rows.
    #[default]
    NoRows,
    /// At this time, Unix milliseconds.
    At(i64),
    /// Never, because a row has no internal date.
    Never,
}

impl<'a> StoredBlock<'a> {
    /// Decodes the document; `None` if a field is missing or has another type.
    pub(crate) fn from_document(document: &'a RawDocument) -> Option<Self> {
        let millis = |key| Some(document.get_datetime(key).ok()?.timestamp_millis());
        Some(Self {
            id: document.get("_id").ok()??,
            from: millis("from")?.saturating_mul(1000),
            to: millis("to")?.saturating_mul(1000).saturating_add(999),
            data: document.get_binary("data").ok()?.bytes,
            expires: document
                .get_datetime("expires")
                .map_or(Expires::Never, |at| Expires::At(at.timestamp_millis())),
        })
    }

    /// Whether no row is in this time range.
    pub(crate) const fn is_outside(&self, time: &Range<i64>) -> bool {
        self.to < time.start || self.from >= time.end
    }

    /// Start of the hour that contains all rows.
    pub(crate) const fn hour(&self) -> i64 {
        hour_of(self.from)
    }
}
