//! Adds rows that arrive late, when other rows of their five-minute bucket may have expired. TTL deletes rows one by
//! one, so the bucket cannot be recomputed from its rows any more.
//!
//! A five-minute bucket therefore stores the times of its rows. Rows of one VM differ in their times, so a late row is
//! added exactly if its time is missing in the bucket, and no row is counted twice.

use std::{collections::HashSet, time::Duration};

use bson::{Binary, Bson, RawBsonRef, RawDocument, spec::BinarySubtype};
use vmwatch_api::{history::Resolution, measures::VmMeasures};

use super::{History, rollups::Bucket, sums::Sums};
use crate::MetricsError;

/// The field of the row times in a stored bucket, after the sums.
pub(super) const ROW_TIMES: &str = "rows";
/// Maximum number of row times in a bucket: one row every tenth of a second. A bucket with more rows stores none, and
/// accepts no late rows once its first rows have expired.
const MAX_ROW_TIMES: usize = 3000;
/// The database expires rows by its own clock, and up to a minute late.
const MARGIN: Duration = Duration::from_mins(10);

/// A row of a bucket: its time in microseconds since the start of the bucket, and its values.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowTime {
    pub(super) micros: u32,
    pub(super) values: VmMeasures<Option<f64>>,
}

/// Encodes row times as four big-endian bytes each.
pub(super) fn encode(micros: &[u32]) -> Option<Bson> {
    (micros.len() <= MAX_ROW_TIMES).then(|| {
        Bson::Binary(Binary {
            subtype: BinarySubtype::Generic,
            bytes: micros.iter().flat_map(|micros| micros.to_be_bytes()).collect(),
        })
    })
}

/// Decodes the row times of a stored bucket; `None` if it has none.
fn decode(sums: &RawDocument) -> Result<Option<Vec<u32>>, MetricsError> {
    let Some(RawBsonRef::Binary(stored)) = sums.get(ROW_TIMES)? else {
        return Ok(None);
    };
    let (moments, _) = stored.bytes.as_chunks::<4>();
    Ok(Some(
        moments.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect(),
    ))
}

impl History {
    /// Whether rows of this bucket may have expired.
    pub(super) fn may_lack_rows(&self, bucket: &Bucket) -> bool {
        let margin = u64::try_from(MARGIN.as_millis()).unwrap_or(u64::MAX);
        bucket.start_ms < self.kept_since(Resolution::Raw).saturating_add(margin)
    }

    /// Adds the rows that the stored bucket lacks. Returns `false` if there is no stored bucket with row times.
    pub(super) async fn add_late(&self, bucket: &Bucket, rows: &[RowTime]) -> Result<bool, MetricsError> {
        let Some(stored) = self.rollups.five_minutes(bucket).await? else {
            return Ok(false);
        };
        let stored = stored.get_document("sums")?;
        let Some(mut micros) = decode(stored)? else {
            return Ok(false);
        };
        let before = Sums::from_document(stored)?;
        let mut sums = before;
        let mut known: HashSet<u32> = micros.iter().copied().collect();
        for row in rows.iter().filter(|row| known.insert(row.micros)) {
            sums.add_values(&row.values);
            micros.push(row.micros);
        }
        if sums.samples() > before.samples() {
            let moments = encode(&micros);
            self.rollups
                .replace(bucket, before.samples(), sums, moments)
                .await?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use bson::{RawDocumentBuf, doc};

    use super::*;

    #[test]
    fn decodes_encoded_row_times() {
        let micros = vec![0, 1, 10_000_000, 299_999_999];
        let stored = doc! { "n": 4_i64, ROW_TIMES: encode(&micros).unwrap() };
        let stored = RawDocumentBuf::try_from(&stored).unwrap();
        assert_eq!(decode(&stored).unwrap(), Some(micros));
        let without = RawDocumentBuf::try_from(&doc! { "n": 4_i64 }).unwrap();
        assert_eq!(decode(&without).unwrap(), None);
    }

    #[test]
    fn omits_row_times_of_too_many_rows() {
        let moments = vec![0; MAX_ROW_TIMES + 1];
        assert!(encode(&moments[1..]).is_some() && encode(&moments).is_none());
    }
}
