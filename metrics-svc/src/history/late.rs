//! Adds late rows to rollups: rows that arrive when other rows of their five-minute time bucket may have expired.
//! MongoDB's TTL deletes rows one by one, so the rollup cannot be recomputed from the remaining rows.
//!
//! A five-minute rollup therefore stores the times of its rows. All rows of a VM have different times, so a late row is
//! added only if the rollup does not contain its time yet, and no row is counted twice.

use std::{collections::HashSet, time::Duration};

use bson::{Binary, Bson, RawBsonRef, RawDocument, spec::BinarySubtype};
use vmwatch_api::measures::VmMeasures;

use super::{History, before_now, rollups::Bucket, sums::Sums};
use crate::MetricsError;

/// Field with the row times in a stored rollup; it comes after the sums.
pub(super) const ROW_TIMES: &str = "rows";
/// Maximum number of row times in a rollup, which allows a row every tenth of a second. A rollup with more rows stores
/// no row times, and accepts no late rows once its first rows have expired.
const MAX_ROW_TIMES: usize = 3000;
/// Rows count as possibly expired this long before their retention ends, because the database expires rows by its own
/// clock and up to a minute late.
const MARGIN: Duration = Duration::from_mins(10);

/// A row of a five-minute time bucket: its time in microseconds since the start of the bucket, and its values.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowTime {
    pub(super) micros: u32,
    pub(super) values: VmMeasures<Option<f64>>,
}

/// Encodes row times as four big-endian bytes each; `None` if there are too many.
pub(super) fn encode(micros: &[u32]) -> Option<Bson> {
    (micros.len() <= MAX_ROW_TIMES).then(|| {
        Bson::Binary(Binary {
            subtype: BinarySubtype::Generic,
            bytes: micros.iter().flat_map(|micros| micros.to_be_bytes()).collect(),
        })
    })
}

/// Decodes the row times of a stored rollup; `None` if it has none.
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
    /// Whether some rows of this time bucket may have expired. The labels of its VM may have changed, so the shortest
    /// retention counts.
    pub(super) fn may_lack_rows(&self, bucket: &Bucket) -> bool {
        let keep = self.retention.shortest(self.kind);
        bucket.start_ms < before_now(keep.saturating_sub(MARGIN))
    }

    /// Adds the rows that the stored rollup lacks. Returns `false` if there is no stored rollup with row times.
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
                .replace(bucket, before.samples(), &sums, moments)
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
    fn row_times_can_be_decoded_after_encoding() {
        let micros = vec![0, 1, 10_000_000, 299_999_999];
        let stored = doc! { "n": 4_i64, ROW_TIMES: encode(&micros).unwrap() };
        let stored = RawDocumentBuf::try_from(&stored).unwrap();
        assert_eq!(decode(&stored).unwrap(), Some(micros));
        let without = RawDocumentBuf::try_from(&doc! { "n": 4_i64 }).unwrap();
        assert_eq!(decode(&without).unwrap(), None);
    }

    #[test]
    fn rollup_of_too_many_rows_has_no_row_times() {
        let moments = vec![0; MAX_ROW_TIMES + 1];
        assert!(encode(&moments[1..]).is_some() && encode(&moments).is_none());
    }
}
