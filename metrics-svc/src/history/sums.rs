//! Aggregates the rows of a VM over a time bucket. All aggregation of VM rows is in this module.

use bson::{Bson, Document, RawBsonRef, RawDocument, bson, doc};
use vmwatch_api::{
    history::{Stat, VmBucket},
    measures::VmMeasures,
};

use crate::{
    MetricsError,
    vm_row::{VmRow, number},
};

/// Field with the number of samples. It must come first in a stored rollup (see [`super::rollups`]).
const SAMPLES: &str = "n";

/// Aggregate of one measure: count, total, minimum and maximum.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Sum {
    count: u64,
    total: f64,
    min: f64,
    max: f64,
}

impl Sum {
    /// Adds a value to the aggregate.
    pub(crate) fn add(&mut self, value: f64) {
        self.merge(&Self {
            count: 1,
            total: value,
            min: value,
            max: value,
        });
    }

    fn merge(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        if self.count == 0 {
            *self = *other;
            return;
        }
        self.count += other.count;
        self.total += other.total;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Converts the aggregate to minimum, average and maximum; `None` without values.
    pub(crate) fn stat(&self) -> Option<Stat> {
        #[expect(clippy::cast_precision_loss, reason = "2^53 samples are never reached")]
        let mean = self.total / self.count as f64;
        (self.count > 0).then(|| Stat {
            min: self.min,
            avg: (mean * 1000.0).round() / 1000.0,
            max: self.max,
        })
    }
}

/// Aggregates of all measures of a VM's rows over a time bucket.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Sums {
    samples: u64,
    measures: VmMeasures<Sum>,
}

impl Sums {
    /// Number of rows that were aggregated.
    pub(crate) const fn samples(&self) -> u64 {
        self.samples
    }

    /// Adds a row to the aggregates.
    pub(crate) fn add(&mut self, row: &VmRow<'_>) {
        self.add_values(&row.values);
    }

    /// Adds the values of a row to the aggregates.
    pub(crate) fn add_values(&mut self, values: &VmMeasures<Option<f64>>) {
        self.samples += 1;
        for (sum, value) in self.measures.each_mut().zip(*values) {
            if let Some(value) = value {
                sum.add(value);
            }
        }
    }

    /// Merges the aggregates of further rows into these aggregates.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.samples += other.samples;
        for (sum, other) in self.measures.each_mut().zip(other.measures) {
            sum.merge(&other);
        }
    }

    /// The stored form of the aggregates: `{n: samples, cpu_util: [count, total, min, max], …}`. Measures
    /// without values are left out.
    pub(crate) fn document(&self) -> Document {
        let mut document = doc! { SAMPLES: stored(self.samples) };
        for (measure, sum) in self.measures.described().filter(|(_, sum)| sum.count > 0) {
            document.insert(
                measure.name,
                bson!([stored(sum.count), sum.total, sum.min, sum.max]),
            );
        }
        document
    }

    /// Decodes the aggregates of a stored rollup.
    pub(crate) fn from_document(document: &RawDocument) -> Result<Self, MetricsError> {
        let mut sums = Self::default();
        for element in document {
            let (key, value) = element?;
            match (key.as_str(), value) {
                (SAMPLES, value) => sums.samples = count(value),
                (key, RawBsonRef::Array(array)) => {
                    let Some(slot) = sums.measures.get_mut(key) else {
                        continue;
                    };
                    let mut parts = [RawBsonRef::Null; 4];
                    for (part, value) in parts.iter_mut().zip(array) {
                        *part = value?;
                    }
                    let [number_of, total, min, max] = parts;
                    if let (Some(total), Some(min), Some(max)) = (number(total), number(min), number(max)) {
                        *slot = Sum {
                            count: count(number_of),
                            total,
                            min,
                            max,
                        };
                    }
                }
                _ => {}
            }
        }
        Ok(sums)
    }

    /// Converts the aggregates to a time bucket of an answer.
    pub(crate) fn bucket(&self, at_ms: u64) -> VmBucket {
        VmBucket {
            at_ms,
            count: self.samples,
            stats: self.measures.map(|sum| sum.stat()),
        }
    }
}

fn stored(count: u64) -> Bson {
    Bson::Int64(i64::try_from(count).unwrap_or(i64::MAX))
}

fn count(value: RawBsonRef<'_>) -> u64 {
    let count = match value {
        RawBsonRef::Int64(count) => count,
        RawBsonRef::Int32(count) => i64::from(count),
        _ => 0,
    };
    u64::try_from(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use bson::{RawDocumentBuf, rawdoc};

    use super::*;

    fn row(cpu: f64, proc: i32) -> RawDocumentBuf {
        rawdoc! { "create_date": "2017-01-01T21:37:59", "cpu_util": cpu, "mem": f64::NAN, "proc": proc, "disk_read": 7_i64 }
    }

    fn sums(rows: &[RawDocumentBuf]) -> Sums {
        let mut sums = Sums::default();
        for row in rows {
            sums.add(&VmRow::from_document(row).unwrap());
        }
        sums
    }

    #[test]
    fn minimum_average_and_maximum_are_computed_from_finite_numbers() {
        let bucket = sums(&[row(1.0, 90), row(0.0, 91), row(1.0, 92)]).bucket(5);
        assert_eq!((bucket.at_ms, bucket.count), (5, 3));
        assert_eq!(
            bucket.stats.cpu_util,
            Some(Stat {
                min: 0.0,
                avg: 0.667,
                max: 1.0
            })
        );
        assert_eq!(
            bucket.stats.proc,
            Some(Stat {
                min: 90.0,
                avg: 91.0,
                max: 92.0
            })
        );
        assert_eq!(
            bucket.stats.disk_read,
            Some(Stat {
                min: 7.0,
                avg: 7.0,
                max: 7.0
            })
        );
        assert_eq!((bucket.stats.mem, bucket.stats.net_incoming), (None, None));
    }

    #[test]
    fn merging_stored_aggregates_gives_the_aggregate_of_all_rows() {
        let rows: Vec<_> = (0..10).map(|at| row(f64::from(at) * 0.25, at)).collect();
        let through_the_store = |sums: Sums| {
            let stored = RawDocumentBuf::try_from(&sums.document()).unwrap();
            Sums::from_document(&stored).unwrap()
        };
        let mut parts = through_the_store(sums(&rows[..3]));
        parts.merge(&through_the_store(Sums::default()));
        parts.merge(&through_the_store(sums(&rows[3..])));
        assert_eq!(parts, sums(&rows));
        assert_eq!(parts.samples(), 10);
    }

    #[test]
    fn stored_aggregate_has_number_of_samples_and_the_measures_with_values() {
        let document = sums(&[row(1.0, 1)]).document();
        let (first, value) = document.iter().next().unwrap();
        assert_eq!((first.as_str(), value), (SAMPLES, &Bson::Int64(1)));
        let keys: Vec<_> = document.keys().map(String::as_str).collect();
        assert_eq!(keys, [SAMPLES, "cpu_util", "disk_read", "proc"]);
    }
}
