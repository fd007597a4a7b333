//! The history of a VM, aggregated for a chart, as JSON or CSV.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Method as _,
    history::{self, Resolution, TimeRange, VmBucket, VmHistory, VmHistoryQuery, VmSeries},
    measures::{Measure, VM_MEASURES, VmMeasures},
    wire::{Fault, FaultKind},
};

use super::{
    caller::Caller,
    extract::{Path, Query},
    measures::stats_schema,
    problem::Problem,
    range::{PointCount, points, range},
    time::Timestamp,
};
use crate::Gateway;

/// Minimum, average and maximum of a measure in a bucket.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Stat {
    /// Minimum.
    min: f64,
    /// Average of all samples.
    avg: f64,
    /// Maximum.
    max: f64,
}

impl From<history::Stat> for Stat {
    fn from(history::Stat { min, avg, max }: history::Stat) -> Self {
        Self { min, avg, max }
    }
}

/// An interval of the history of a VM. A measure is null if no sample of the bucket contains it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Bucket {
    /// Start of the bucket.
    at: Timestamp,
    /// Number of samples in the bucket.
    count: u64,
    #[serde(flatten)]
    #[schema(schema_with = stats_schema)]
    stats: VmMeasures<Option<Stat>>,
}

/// The history of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Series {
    /// Start of the range.
    from: Timestamp,
    /// End of the range.
    to: Timestamp,
    /// Length of each bucket in milliseconds; 0 if there are no buckets.
    step_ms: u64,
    /// The data the buckets were computed from: raw samples or rollups.
    resolution: Resolution,
    /// In chronological order. Buckets without samples are omitted. Buckets are aligned to multiples of their length,
    /// so the first may start before the range.
    buckets: Vec<Bucket>,
}

/// The format of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Format {
    /// JSON.
    Json,
    /// Comma-separated values with a header line (RFC 4180).
    Csv,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SamplesQuery {
    /// Start of the range. Default: one hour before the end.
    from: Option<Timestamp>,
    /// End of the range. Default: now.
    to: Option<Timestamp>,
    /// Maximum number of buckets. Default: 300.
    #[param(inline)]
    points: Option<PointCount>,
    /// Format of the answer. Default: chosen by the `Accept` header.
    format: Option<Format>,
}

/// Read the history of a VM
///
/// Returns at most `points` buckets with the minimum, average and maximum of each measure, computed from raw samples or
/// from rollups, whichever suits the bucket length; a year costs no more than a day. The list of buckets is empty if
/// there are no samples in the range, even if the VM does not exist.
#[utoipa::path(
    get, path = "/vms/{instance_id}/samples", tag = "vms", operation_id = "vm_samples",
    params(("instance_id" = InstanceId, Path, description = "VM id"), SamplesQuery),
    responses(
        (status = OK, description = "the history of the VM",
         content((Series = "application/json"), (String = "text/csv"))),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn samples(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<SamplesQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let range = range(query.from, query.to)?;
    let history = VmHistoryQuery {
        instance_id,
        range,
        points: points(query.points),
        after_ms: None,
    };
    let series = read_all(&gateway, &caller, history).await?;
    Ok(match query.format.unwrap_or_else(|| preferred(&headers)) {
        Format::Json => axum::Json(Series::new(range, series)).into_response(),
        Format::Csv => ([(header::CONTENT_TYPE, "text/csv")], csv(&series)).into_response(),
    })
}

/// Reads all pages of a history; together they hold at most the requested number of buckets.
async fn read_all(gateway: &Gateway, caller: &Caller, mut query: VmHistoryQuery) -> Result<VmSeries, Fault> {
    let context = caller.context(gateway, VmHistory::INFO.kind);
    // One permit covers all pages of the read.
    let _permit = gateway.admission.enter(&VmHistory::INFO, &context).await?;
    let mut all: VmSeries = gateway.bus.call::<VmHistory>(&context, &query).await?;
    while all.more {
        query.after_ms = all.buckets.last().map(|bucket| bucket.at_ms);
        let page = gateway.bus.call::<VmHistory>(&context, &query).await?;
        check_steps(all.step_ms, page.step_ms)?;
        all.more = page.more && !page.buckets.is_empty();
        all.buckets.extend(page.buckets);
    }
    Ok(all)
}

/// Rejects pages with different bucket lengths: rows expired between the reads, so the second page came from rollups.
pub(super) fn check_steps(first_ms: u64, next_ms: u64) -> Result<(), Fault> {
    // The length is 0 on a page without buckets.
    if next_ms == first_ms || next_ms == 0 {
        return Ok(());
    }
    let text = "the history changed while it was being read; try again";
    Err(Fault::new(FaultKind::Unavailable, text))
}

/// CSV if the `Accept` header lists it before JSON.
fn preferred(headers: &HeaderMap) -> Format {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let types = accept.split(',').filter_map(|range| range.split(';').next());
    let mut known = types.filter_map(|essence| match essence.trim() {
        "text/csv" => Some(Format::Csv),
        "application/json" => Some(Format::Json),
        _ => None,
    });
    known.next().unwrap_or(Format::Json)
}

impl Series {
    fn new(range: TimeRange, series: VmSeries) -> Self {
        Self {
            from: Timestamp::of_ms(range.from_ms()),
            to: Timestamp::of_ms(range.to_ms()),
            step_ms: series.step_ms,
            resolution: series.resolution,
            buckets: series.buckets.into_iter().map(Bucket::from).collect(),
        }
    }
}

impl From<VmBucket> for Bucket {
    fn from(bucket: VmBucket) -> Self {
        Self {
            at: Timestamp::of_ms(bucket.at_ms),
            count: bucket.count,
            stats: bucket.stats.map(|stat| stat.map(Stat::from)),
        }
    }
}

/// Writes one line per bucket; null values are empty. No value needs quoting.
fn csv(series: &VmSeries) -> String {
    let mut out = String::from("at,count");
    // Writing to a String cannot fail.
    for Measure { name, .. } in VM_MEASURES.into_array() {
        let _ = write!(out, ",{name}_min,{name}_avg,{name}_max");
    }
    for bucket in &series.buckets {
        let _ = write!(out, "\r\n{},{}", Timestamp::of_ms(bucket.at_ms), bucket.count);
        for stat in bucket.stats.into_array() {
            let _ = match stat {
                Some(history::Stat { min, avg, max }) => write!(out, ",{min},{avg},{max}"),
                None => write!(out, ",,,"),
            };
        }
    }
    out.push_str("\r\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_csv_with_a_header_and_one_line_per_bucket() {
        let bucket = VmBucket {
            at_ms: 1_483_277_880_000,
            count: 2,
            stats: VmMeasures {
                cpu_util: Some([0.0, 1.5, 3.0].into()),
                ..VmMeasures::default()
            },
        };
        let series = VmSeries {
            buckets: vec![bucket],
            ..VmSeries::default()
        };
        let text = csv(&series);
        let lines: Vec<_> = text.split("\r\n").collect();
        let [header, line, ""] = lines[..] else {
            panic!("{text}")
        };
        assert!(header.starts_with("at,count,cpu_util_min,cpu_util_avg,cpu_util_max,mem_min"));
        assert_eq!(
            line,
            format!("2017-01-01T13:38:00.000Z,2,0,1.5,3{}", ",".repeat(18))
        );
        assert_eq!(header.split(',').count(), line.split(',').count());
    }

    #[test]
    fn prefers_the_first_known_media_type() {
        for (accept, format) in [
            ("", Format::Json),
            ("*/*", Format::Json),
            ("text/csv", Format::Csv),
            ("text/html, text/csv;q=0.9, application/json", Format::Csv),
            ("application/json, text/csv", Format::Json),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            assert_eq!(preferred(&headers), format, "{accept}");
        }
    }
}
