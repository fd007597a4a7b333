//! Merges the rows of blocks and encodes them as the parts of a new generation.
//!
//! An hour with many rows is cut into slices of the order in which blocks store rows, by process. Only the rows of one
//! slice are in memory at a time, so each slice reads its sources again.

use std::{collections::HashSet, sync::Arc};

use bson::{Binary, DateTime, RawDocumentBuf, rawdoc, spec::BinarySubtype};
use vmwatch_blocks::{Block, BlockError, Encoded, Place, Rows};

use super::{
    Compaction, blocking,
    found::{Group, LIMITS, Part, Source, id_bytes},
};
use crate::MetricsError;

/// Maximum number of rows of a part. With its encoded form and its sources, a part takes less than 16 MiB in memory.
pub(super) const PART_ROWS: usize = 16_384;

/// What is merged: the parts of the current generation, and blocks that it does not contain.
#[derive(Debug, Clone)]
pub(super) struct Merge {
    pub(super) group: Group,
    pub(super) generation: i64,
    pub(super) current: Vec<Part>,
    pub(super) sources: Arc<Vec<Source>>,
}

/// A range of the order of rows, and the part of the current generation that has rows in it.
#[derive(Debug, Clone, Copy, Default)]
struct Slice {
    part: Option<usize>,
    from: Option<Place>,
    to: Option<Place>,
}

impl Merge {
    /// Number of blocks to merge.
    pub(super) fn blocks(&self) -> usize {
        self.current.len() + self.sources.len()
    }

    /// The `_id`s of the blocks to merge, as bytes.
    pub(super) fn source_ids(&self) -> HashSet<Vec<u8>> {
        let parts = self.current.iter().map(|part| part.id.clone().into_bytes());
        parts
            .chain(self.sources.iter().map(|source| id_bytes(&source.id)))
            .collect()
    }

    /// When the merged rows expire: with the last of the merged blocks.
    fn expires(&self) -> Option<DateTime> {
        let parts = self.current.iter().filter_map(|part| part.expires);
        parts
            .chain(self.sources.iter().map(|source| source.expires))
            .max()
    }

    fn document(&self, encoded: Encoded, part: usize, parts: usize) -> Option<RawDocumentBuf> {
        let millis = |micros: i64| DateTime::from_millis(micros.div_euclid(1000));
        let data = Binary {
            subtype: BinarySubtype::Generic,
            bytes: encoded.bytes,
        };
        Some(rawdoc! {
            "_id": self.group.id(self.generation, part)?,
            "instance_id": self.group.of.instance.as_str(),
            "kind": self.group.kind.name(),
            "level": 1,
            "hour": millis(self.group.of.hour),
            "from": millis(encoded.first),
            "to": millis(encoded.last),
            "rows": i32::try_from(encoded.rows).ok()?,
            "generation": self.generation,
            "part": i32::try_from(part).ok()?,
            "parts": i32::try_from(parts).ok()?,
            "expires": self.expires()?,
            "unconfirmed": true,
            "data": data,
        })
    }

    /// Reads a part of the current generation; `None` if it is unreadable or was deleted meanwhile.
    async fn read(&self, compaction: &Compaction, part: usize) -> Result<Option<Source>, MetricsError> {
        match self.current.get(part) {
            Some(part) => part.read(&compaction.store).await,
            None => Ok(None),
        }
    }

    /// Cuts the hour into slices with at most [`PART_ROWS`] rows each.
    async fn slices(&self, compaction: &Compaction) -> Result<Vec<Slice>, MetricsError> {
        let rows = self.current.iter().map(|part| part.rows);
        let rows: usize = rows.chain(self.sources.iter().map(|source| source.rows)).sum();
        if rows <= PART_ROWS && self.current.len() <= 1 {
            let part = (!self.current.is_empty()).then_some(0);
            return Ok(vec![Slice {
                part,
                ..Slice::default()
            }]);
        }
        let (instance, sources) = (self.group.of.instance.clone(), Arc::clone(&self.sources));
        let mut new = blocking(move || {
            let places = sources.iter().filter_map(|source| places(source, &instance).ok());
            let mut places: Vec<Place> = places.flatten().collect();
            places.sort_unstable();
            places
        })
        .await?;
        let mut slices = Vec::new();
        let mut last: (Option<usize>, Vec<Place>) = (None, Vec::new());
        for part in 0..self.current.len() {
            let Some(source) = self.read(compaction, part).await? else {
                continue;
            };
            let instance = self.group.of.instance.clone();
            let Ok(places) = blocking(move || places(&source, &instance)).await? else {
                continue;
            };
            if let (Some(_), Some(first)) = (last.0, places.first()) {
                let later = new.split_off(new.partition_point(|place| place < first));
                cut(
                    &mut slices,
                    last,
                    std::mem::replace(&mut new, later),
                    Some(*first),
                );
            }
            last = (Some(part), places);
        }
        cut(&mut slices, last, new, None);
        Ok(slices)
    }

    /// Merges and encodes the rows of a slice. Returns `None` if there are none, and an error if they need several blocks.
    async fn encode(&self, compaction: &Compaction, slice: Slice) -> Result<Option<Encoded>, MetricsError> {
        let part = match slice.part {
            Some(part) => self.read(compaction, part).await?,
            None => None,
        };
        let (group, sources) = (self.group.clone(), Arc::clone(&self.sources));
        let offset = compaction.store.offset().as_millis();
        let mut encoder = compaction.encoder()?;
        let (encoder, mut blocks) = blocking(move || {
            let mut rows = Rows::new(group.kind.in_blocks(), &group.of.instance, offset);
            for source in part.iter().chain(sources.iter()) {
                if let Err(error) = push(&mut rows, source, slice) {
                    source.note_unreadable(&group, error);
                }
            }
            let blocks = encoder.encode(&rows);
            (encoder, blocks)
        })
        .await?;
        compaction.keep(encoder);
        if blocks.len() > 1 {
            return Err(MetricsError::Refused(
                "too many rows of a process have the same date".to_owned(),
            ));
        }
        Ok(blocks.pop())
    }

    /// Inserts the parts of the new generation. Returns their number, or `None` if another replica has inserted this
    /// generation.
    pub(super) async fn insert(&self, compaction: &Compaction) -> Result<Option<Merged>, MetricsError> {
        let slices = self.slices(compaction).await?;
        let mut merged = Merged {
            parts: slices.len(),
            rows: 0,
        };
        for (number, slice) in slices.iter().enumerate() {
            let Some(encoded) = self.encode(compaction, *slice).await? else {
                return Ok(None);
            };
            merged.rows += encoded.rows;
            let Some(document) = self.document(encoded, number, slices.len()) else {
                return Ok(None);
            };
            if !compaction.insert(&document).await? {
                return Ok(None);
            }
        }
        Ok(Some(merged))
    }
}

/// A generation that was inserted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merged {
    pub(super) parts: usize,
    pub(super) rows: usize,
}

/// Adds the slices of a part of the current generation, with the new rows in its range. Each range begins where the one
/// before it ends.
fn cut(
    slices: &mut Vec<Slice>,
    (part, mut places): (Option<usize>, Vec<Place>),
    new: Vec<Place>,
    end: Option<Place>,
) {
    places.extend(new);
    places.sort_unstable();
    places.dedup();
    for at in Place::cuts(&places, PART_ROWS).into_iter().map(Some).chain([end]) {
        let from = slices.last().and_then(|slice: &Slice| slice.to);
        slices.push(Slice { part, from, to: at });
    }
}

/// The places of a block's rows, sorted.
fn places(source: &Source, instance: &str) -> Result<Vec<Place>, BlockError> {
    let mut block = Block::open(&source.data, LIMITS)?;
    let ids = block.ids(instance)?;
    let mut places: Vec<Place> = (0..block.len()).map(|row| ids.place(row)).collect();
    places.sort_unstable();
    Ok(places)
}

fn push(rows: &mut Rows, source: &Source, slice: Slice) -> Result<(), BlockError> {
    let mut block = Block::open(&source.data, LIMITS)?;
    match (slice.from, slice.to) {
        (None, None) => rows.push_block_within(&mut block, ..),
        (None, Some(to)) => rows.push_block_within(&mut block, ..to),
        (Some(from), None) => rows.push_block_within(&mut block, from..),
        (Some(from), Some(to)) => rows.push_block_within(&mut block, from..to),
    }
}
