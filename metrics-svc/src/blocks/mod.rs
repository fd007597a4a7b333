//! Blocks in the database: each holds the rows of one VM and one kind within one hour (UTC), encoded by `vmwatch-blocks`.
//!
//! ```text
//! blocks  { _id: hash of the rows' `_id`s, instance_id: "vm-1", kind: "process", level: 0, hour, from, to, rows: 100,
//!           expires, ahead, data }
//!         { _id: "process/vm-1/2026-11-27T03:00:00Z/0000000001/00000", instance_id: "vm-1", kind: "process", level: 1,
//!           hour, from, to, rows: 6000, generation: 1, part: 0, parts: 1, expires, unconfirmed, data }
//! ```
//!
//! Ingestion writes blocks of level 0, one per part of a sample and kind. The same rows always make a block with the same
//! `_id`, so a block that is written again is a duplicate key. A row, however, may be in several blocks: a block is no
//! identity, and readers drop rows with the same `_id`. [`crate::compaction`] merges the blocks of an hour into blocks of
//! level 1, and finds these hours in a queue ([`HourQueue`]).
//!
//! A block with rows of more than one date is written only for an hour that has ended [`CLOSED_AFTER`] ago. In later
//! hours each block therefore begins and ends at one moment, so that a reader of the newest rows can stop early.

mod document;
mod encode;
mod hours;

use std::time::Duration;

use bson::{Document, RawDocumentBuf, doc};
use mongodb::{Collection, IndexModel, options::IndexOptions};

pub(crate) use self::{
    document::{Expires, StoredBlock},
    encode::{BlockEncoder, push},
    hours::{HourQueue, QueuedHour, VmHour},
};
use crate::MetricsError;

/// Field of a block whose rows were far ahead of their arrival: kind, VM and `create_date` of the rows.
pub(crate) const AHEAD: &str = "ahead";
/// An hour in microseconds.
pub(crate) const HOUR_MICROS: i64 = 3_600_000_000;
/// Time after the end of an hour from which on its rows may be written in blocks with several dates.
pub(crate) const CLOSED_AFTER: Duration = Duration::from_mins(5);
/// Time after the end of an hour from which on readers expect blocks with several dates. It is shorter than
/// [`CLOSED_AFTER`] by more than the clocks of writers and readers may differ.
pub(crate) const EXPECTED_CLOSED_AFTER: Duration = Duration::from_mins(4);

/// Start of the hour (UTC) that contains a time, both in Unix microseconds.
pub(crate) const fn hour_of(micros: i64) -> i64 {
    micros.saturating_sub(micros.rem_euclid(HOUR_MICROS))
}

/// Creates the indexes of the collection of blocks.
pub(crate) async fn prepare(blocks: &Collection<RawDocumentBuf>) -> Result<(), MetricsError> {
    let index =
        |keys: Document, options: IndexOptions| IndexModel::builder().keys(keys).options(options).build();
    let by_time = IndexOptions::builder()
        .name("instance_kind_from".to_owned())
        .build();
    // MongoDB deletes a block at the time in its field `expires`.
    let retention = IndexOptions::builder()
        .name("expires".to_owned())
        .expire_after(Duration::ZERO)
        .build();
    let keys = doc! { "instance_id": 1, "kind": 1, "from": 1 };
    // Nearly all blocks lack this field, and a sparse index has no entries for them.
    let ahead = IndexOptions::builder()
        .name(AHEAD.to_owned())
        .sparse(true)
        .build();
    blocks
        .create_indexes([
            index(keys, by_time),
            index(doc! { "expires": 1 }, retention),
            index(doc! { AHEAD: 1 }, ahead),
        ])
        .await?;
    Ok(())
}
