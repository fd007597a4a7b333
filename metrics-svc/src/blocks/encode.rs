//! Makes blocks from documents of rows.

use std::{io, time::Duration};

use bson::{Binary, DateTime, RawBsonRef, RawDocument, RawDocumentBuf, rawdoc, spec::BinarySubtype};
use vmwatch_blocks::{Encoder, RowError, Rows, Value};

use super::hour_of;
use crate::{MetricsError, documents::SAMPLED_AT, row_kind::RowKind};

/// Why no block can hold a row.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Unfit {
    /// The encoding has no place for the row.
    #[error(transparent)]
    Row(#[from] RowError),
    /// A field has a type that blocks do not have.
    #[error("a block cannot hold the field `{0}`, because of its type")]
    Type(String),
}

/// Encodes blocks of level 0.
pub(crate) struct BlockEncoder {
    encoder: Encoder,
    offset_ms: i64,
}

impl BlockEncoder {
    /// Creates an encoder for rows whose `create_date` has this UTC offset.
    pub(crate) fn new(offset_ms: i64) -> io::Result<Self> {
        Ok(Self {
            encoder: Encoder::new()?,
            offset_ms,
        })
    }

    /// An empty list of rows for [`BlockEncoder::encode`].
    pub(crate) fn rows(&self, kind: RowKind, instance: &str) -> Rows {
        Rows::new(kind.in_blocks(), instance, self.offset_ms)
    }

    /// Encodes rows of one hour as the document of a block. `keep` is the retention of rows with an internal date; `None`
    /// keeps the block until its rows have one. Returns `None` if there are no rows.
    pub(crate) fn encode(
        &mut self,
        kind: RowKind,
        instance: &str,
        rows: &Rows,
        keep: Option<Duration>,
    ) -> Result<Option<RawDocumentBuf>, MetricsError> {
        let mut encoded = self.encoder.encode(rows);
        let Some(block) = encoded.pop() else {
            return Ok(None);
        };
        if !encoded.is_empty() {
            return Err(MetricsError::Refused(
                "a block of level 0 has too many rows".to_owned(),
            ));
        }
        let millis = |micros: i64| DateTime::from_millis(micros.div_euclid(1000));
        let mut document = rawdoc! {
            "_id": Binary { subtype: BinarySubtype::Generic, bytes: rows.block_id().to_vec() },
            "instance_id": instance,
            "kind": kind.name(),
            "level": 0,
            "hour": millis(hour_of(block.first)),
            "from": millis(block.first),
            "to": millis(block.last),
            "rows": i32::try_from(block.rows).unwrap_or(i32::MAX),
        };
        if let Some(keep) = keep {
            let keep = i64::try_from(keep.as_micros()).unwrap_or(i64::MAX);
            document.append(bson::cstr!("expires"), millis(block.last.saturating_add(keep)));
        }
        let data = Binary {
            subtype: BinarySubtype::Generic,
            bytes: block.bytes,
        };
        document.append(bson::cstr!("data"), data);
        Ok(Some(document))
    }
}

/// Adds a row. `arrival` is when it arrived, in Unix microseconds; `None` if that is unknown.
pub(crate) fn push(rows: &mut Rows, row: &RawDocument, arrival: Option<i64>) -> Result<(), Unfit> {
    let (mut create_date, mut id) = ("", None);
    let mut fields = Vec::with_capacity(16);
    for element in row {
        let unreadable = |_| Unfit::Type(String::new());
        let (key, value) = element.map_err(unreadable)?;
        let value = match (key.as_str(), value) {
            ("_id", RawBsonRef::ObjectId(given)) => {
                id = Some(given.bytes());
                continue;
            }
            ("create_date", RawBsonRef::String(text)) => {
                create_date = text;
                continue;
            }
            // The block has the VM. The internal date only says whether the block expires.
            ("instance_id", RawBsonRef::String(_)) | (SAMPLED_AT, RawBsonRef::DateTime(_)) => continue,
            ("_id" | "create_date" | "instance_id", _) => return Err(Unfit::Type(key.as_str().to_owned())),
            (_, RawBsonRef::Null) => Value::Null,
            (_, RawBsonRef::Boolean(truth)) => Value::Bool(truth),
            (_, RawBsonRef::Int32(number)) => Value::Int32(number),
            (_, RawBsonRef::Int64(number)) => Value::Int64(number),
            (_, RawBsonRef::Double(number)) => Value::Double(number),
            (_, RawBsonRef::String(text)) => Value::Text(text),
            _ => return Err(Unfit::Type(key.as_str().to_owned())),
        };
        fields.push((key.as_str(), value));
    }
    if id.is_none() {
        return Err(Unfit::Type("_id".to_owned()));
    }
    Ok(rows.push(create_date, arrival, id, fields)?)
}
