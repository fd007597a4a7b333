//! Rows that come when the first rows of their five minutes may be gone: TTL deletes them one by one, so that the bucket
//! cannot be read again whole.
//!
//! A bucket of five minutes therefore holds the moments of the rows that are in it. A row is told from every other of its VM
//! by its date, so that what is stored of a bucket and what is left of its rows can be put together without counting any
//! row twice: the rows whose moments are missing are added.

use std::{collections::HashSet, time::Duration};

use bson::{Binary, Bson, RawBsonRef, RawDocument, spec::BinarySubtype};
use vmwatch_api::history::Resolution;

use super::{
    History,
    rollups::Bucket,
    sums::{MEASURES, Sums},
};
use crate::MetricsError;

/// Where the moments are in a stored sum, behind the sums themselves.
pub(super) const MOMENTS: &str = "rows";
/// The most moments that a bucket holds: a row each tenth of a second. One of more rows holds none, and takes no late row
/// once its first rows are gone.
const MOST_MOMENTS: usize = 3000;
/// The database deletes by its own clock, and up to a minute late.
const MARGIN: Duration = Duration::from_mins(10);

/// A row of a bucket: its moment in microseconds from the start of the bucket, and its values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) micros: u32,
    pub(super) values: [Option<f64>; MEASURES.len()],
}

/// The moments of a bucket as they are stored: four bytes each, the most significant first.
pub(super) fn encoded(micros: &[u32]) -> Option<Bson> {
    (micros.len() <= MOST_MOMENTS).then(|| {
        Bson::Binary(Binary {
            subtype: BinarySubtype::Generic,
            bytes: micros.iter().flat_map(|micros| micros.to_be_bytes()).collect(),
        })
    })
}

/// The moments of a stored sum; `None` where it holds none.
fn decoded(sums: &RawDocument) -> Result<Option<Vec<u32>>, MetricsError> {
    let Some(RawBsonRef::Binary(stored)) = sums.get(MOMENTS)? else {
        return Ok(None);
    };
    let (moments, _) = stored.bytes.as_chunks::<4>();
    Ok(Some(
        moments.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect(),
    ))
}

impl History {
    /// Whether rows of these five minutes may be gone by their age.
    pub(super) fn may_lack_rows(&self, bucket: &Bucket) -> bool {
        let margin = u64::try_from(MARGIN.as_millis()).unwrap_or(u64::MAX);
        bucket.start_ms < self.kept_since(Resolution::Raw).saturating_add(margin)
    }

    /// Adds the rows that the stored bucket lacks; `false` where none is stored that says what is in it.
    pub(super) async fn add_late(&self, bucket: &Bucket, rows: &[Moment]) -> Result<bool, MetricsError> {
        let Some(stored) = self.rollups.five_minutes(bucket).await? else {
            return Ok(false);
        };
        let stored = stored.get_document("sums")?;
        let Some(mut micros) = decoded(stored)? else {
            return Ok(false);
        };
        let before = Sums::of(stored)?;
        let mut sums = before;
        let mut known: HashSet<u32> = micros.iter().copied().collect();
        for row in rows.iter().filter(|row| known.insert(row.micros)) {
            sums.add_values(&row.values);
            micros.push(row.micros);
        }
        if sums.samples() > before.samples() {
            let moments = encoded(&micros);
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
    fn reads_back_the_moments_of_a_bucket() {
        let micros = vec![0, 1, 10_000_000, 299_999_999];
        let stored = doc! { "n": 4_i64, MOMENTS: encoded(&micros).unwrap() };
        let stored = RawDocumentBuf::try_from(&stored).unwrap();
        assert_eq!(decoded(&stored).unwrap(), Some(micros));
        let without = RawDocumentBuf::try_from(&doc! { "n": 4_i64 }).unwrap();
        assert_eq!(decoded(&without).unwrap(), None);
    }

    #[test]
    fn holds_no_moments_of_too_many_rows() {
        let moments = vec![0; MOST_MOMENTS + 1];
        assert!(encoded(&moments[1..]).is_some() && encoded(&moments).is_none());
    }
}
