//! A VM's past, reduced to a chart; as JSON or CSV.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use shared::{
    api::{
        InstanceId, Method as _,
        history::{self, Resolution, TimeRange, VmBucket, VmHistory, VmHistoryQuery, VmSeries},
    },
    wire::{Fault, FaultKind},
};
use utoipa::{IntoParams, ToSchema};

use super::{
    caller::Caller,
    extract::{Path, Query},
    problem::Problem,
    range::{PointCount, points, range},
    time::Timestamp,
};
use crate::Gateway;

/// The least, the mean and the greatest value of a bucket.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Stat {
    /// The least.
    min: f64,
    /// The mean of all samples.
    avg: f64,
    /// The greatest.
    max: f64,
}

impl From<history::Stat> for Stat {
    fn from(history::Stat { min, avg, max }: history::Stat) -> Self {
        Self { min, avg, max }
    }
}

/// A bucket of a VM's past. A measure is null where no sample of the bucket has it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Bucket {
    /// Its beginning.
    at: Timestamp,
    /// How many samples it is made of.
    count: u64,
    /// Busy share of all cores, 0 to 100.
    #[schema(required)]
    cpu_util: Option<Stat>,
    /// Share of memory in use, percent.
    #[schema(required)]
    mem: Option<Stat>,
    /// Read rate of all whole disks, KiB/s.
    #[schema(required)]
    disk_read: Option<Stat>,
    /// Write rate of all whole disks, KiB/s.
    #[schema(required)]
    disk_write: Option<Stat>,
    /// Receive rate, KiB/s.
    #[schema(required)]
    net_incoming: Option<Stat>,
    /// Transmit rate, KiB/s.
    #[schema(required)]
    net_outgoing: Option<Stat>,
    /// Number of processes.
    #[schema(required)]
    proc: Option<Stat>,
}

/// A VM's past.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Series {
    /// The beginning of the range.
    from: Timestamp,
    /// The end of the range.
    to: Timestamp,
    /// How long each bucket is, in milliseconds; 0 where there is none.
    step_ms: u64,
    /// What it was read from: the samples themselves, or rollups of them.
    resolution: Resolution,
    /// In the order of time. Buckets without a sample are left out; the first may begin before the range does, since
    /// buckets lie on whole multiples of their length.
    buckets: Vec<Bucket>,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Format {
    /// JSON.
    Json,
    /// Comma-separated values with a heading, by RFC 4180.
    Csv,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SamplesQuery {
    /// The beginning; an hour before the end unless given.
    from: Option<Timestamp>,
    /// The end; now unless given.
    to: Option<Timestamp>,
    /// At most how many buckets; 300 unless given.
    #[param(inline)]
    points: Option<PointCount>,
    /// How the answer is written; by `Accept` unless given.
    format: Option<Format>,
}

/// Read a VM's past
///
/// Reduced to at most `points` buckets with the least, the mean and the greatest value of each, from the samples or
/// rollups of them: as fine as the points can show, so that a year costs what a day does. A VM that has no sample
/// there has no buckets, whether it exists or not.
#[utoipa::path(
    get, path = "/vms/{instance_id}/samples", tag = "vms", operation_id = "vm_samples",
    params(("instance_id" = InstanceId, Path, description = "the VM's id"), SamplesQuery),
    responses(
        (status = OK, description = "the VM's past",
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
    let asked = VmHistoryQuery {
        instance_id,
        range,
        points: points(query.points),
        after_ms: None,
    };
    let series = read_all(&gateway, &caller, asked).await?;
    Ok(match query.format.unwrap_or_else(|| preferred(&headers)) {
        Format::Json => axum::Json(Series::new(range, series)).into_response(),
        Format::Csv => ([(header::CONTENT_TYPE, "text/csv")], csv(&series)).into_response(),
    })
}

/// Reads all pages of a history, which together have at most as many buckets as were asked for.
async fn read_all(gateway: &Gateway, caller: &Caller, mut asked: VmHistoryQuery) -> Result<VmSeries, Fault> {
    let context = caller.context(gateway, VmHistory::INFO.kind);
    // One permit for all pages: they are one read.
    let _permit = gateway.admission.enter(&VmHistory::INFO, &context).await?;
    let mut all: VmSeries = gateway.bus.call::<VmHistory>(&context, &asked).await?;
    while all.more {
        asked.after_ms = all.buckets.last().map(|bucket| bucket.at_ms);
        let page = gateway.bus.call::<VmHistory>(&context, &asked).await?;
        check_steps(all.step_ms, page.step_ms)?;
        all.more = page.more && !page.buckets.is_empty();
        all.buckets.extend(page.buckets);
    }
    Ok(all)
}

/// Refuses pages whose buckets differ in length: between them the rows fell out of retention, so that the second was read
/// from rollups.
pub(super) fn check_steps(first_ms: u64, next_ms: u64) -> Result<(), Fault> {
    // A page without buckets has no length.
    if next_ms == first_ms || next_ms == 0 {
        return Ok(());
    }
    let text = "the history changed while it was read; try again shortly";
    Err(Fault::new(FaultKind::Unavailable, text))
}

/// CSV where `Accept` names it before JSON.
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
            cpu_util: bucket.cpu_util.map(Stat::from),
            mem: bucket.mem.map(Stat::from),
            disk_read: bucket.disk_read.map(Stat::from),
            disk_write: bucket.disk_write.map(Stat::from),
            net_incoming: bucket.net_incoming.map(Stat::from),
            net_outgoing: bucket.net_outgoing.map(Stat::from),
            proc: bucket.proc.map(Stat::from),
        }
    }
}

const MEASURES: [&str; 7] = [
    "cpu_util",
    "mem",
    "disk_read",
    "disk_write",
    "net_incoming",
    "net_outgoing",
    "proc",
];

/// A line a bucket; what is null in JSON is empty. Nothing in it needs quoting.
fn csv(series: &VmSeries) -> String {
    let mut out = String::from("at,count");
    // Writing to a String cannot fail.
    for measure in MEASURES {
        let _ = write!(out, ",{measure}_min,{measure}_avg,{measure}_max");
    }
    for bucket in &series.buckets {
        let _ = write!(out, "\r\n{},{}", Timestamp::of_ms(bucket.at_ms), bucket.count);
        for stat in [
            bucket.cpu_util,
            bucket.mem,
            bucket.disk_read,
            bucket.disk_write,
            bucket.net_incoming,
            bucket.net_outgoing,
            bucket.proc,
        ] {
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
    fn csv_has_a_heading_and_a_line_a_bucket() {
        let bucket = VmBucket {
            at_ms: 1_483_277_880_000,
            count: 2,
            cpu_util: Some([0.0, 1.5, 3.0].into()),
            ..VmBucket::default()
        };
        let series = VmSeries {
            buckets: vec![bucket],
            ..VmSeries::default()
        };
        let text = csv(&series);
        let lines: Vec<_> = text.split("\r\n").collect();
        let [heading, line, ""] = lines[..] else {
            panic!("{text}")
        };
        assert!(heading.starts_with("at,count,cpu_util_min,cpu_util_avg,cpu_util_max,mem_min"));
        assert_eq!(
            line,
            format!("2017-01-01T13:38:00.000Z,2,0,1.5,3{}", ",".repeat(18))
        );
        assert_eq!(heading.split(',').count(), line.split(',').count());
    }

    #[test]
    fn the_first_type_that_is_known_counts() {
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
