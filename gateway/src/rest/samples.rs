//! REST route for the history of a VM's measures, aggregated for a chart, as JSON or CSV.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Method,
    history::{
        self, Resolution, TimeRange, VmBucket, VmHistory, VmHistoryQuery, VmHypervisorHistory, VmSeries,
    },
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

/// Minimum, average and maximum of a measure in a time bucket.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Stat {
    /// Minimum of all samples in the time bucket.
    min: f64,
    /// Average of all samples in the time bucket.
    avg: f64,
    /// Maximum of all samples in the time bucket.
    max: f64,
}

impl From<history::Stat> for Stat {
    fn from(history::Stat { min, avg, max }: history::Stat) -> Self {
        Self { min, avg, max }
    }
}

/// Aggregated samples of a VM in a time bucket. A measure is null if no sample of the time bucket contains it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Bucket {
    /// Start of the time bucket.
    at: Timestamp,
    /// Number of samples in the time bucket.
    count: u64,
    #[serde(flatten)]
    #[schema(schema_with = stats_schema)]
    stats: VmMeasures<Option<Stat>>,
}

/// History of a VM's measures.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Series {
    /// Start of the time range.
    from: Timestamp,
    /// End of the time range.
    to: Timestamp,
    /// Length of each time bucket in milliseconds; 0 if the list of time buckets is empty.
    step_ms: u64,
    /// Data from which the time buckets were computed: raw samples or rollups.
    resolution: Resolution,
    /// Time buckets in chronological order; those without samples are omitted. They are aligned to multiples of their
    /// length, so the first one may start before the requested range.
    buckets: Vec<Bucket>,
}

/// Format in which the history of a VM is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Format {
    /// The answer is a JSON document.
    Json,
    /// The answer has comma-separated values with a header line (RFC 4180).
    Csv,
}

/// Source of the samples of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Source {
    /// The agent in the VM.
    #[default]
    Agent,
    /// The hypervisor, which knows only some of the measures. The others are null.
    Hypervisor,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SamplesQuery {
    /// Source of the samples: the agent of the VM or its hypervisor. Default: the agent.
    #[serde(default)]
    #[param(value_type = Option<Source>)]
    source: Source,
    /// Start of the time range. Default: one hour before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Maximum number of time buckets in the answer. Default: 300.
    #[param(inline)]
    points: Option<PointCount>,
    /// Format of the answer. Default: determined by the `Accept` header.
    format: Option<Format>,
}

/// Read the history of a VM
///
/// Returns at most `points` time buckets with the minimum, average and maximum of each measure, as the agent of the VM or
/// its hypervisor measured it. They are computed from raw samples or from rollups, whichever suits their length; a year
/// costs no more than a day. If there are no samples in the range, or if the VM does not exist, the list of time buckets is
/// empty.
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
    let series = match query.source {
        Source::Agent => read_all::<VmHistory>(&gateway, &caller, history).await?,
        Source::Hypervisor => read_all::<VmHypervisorHistory>(&gateway, &caller, history).await?,
    };
    Ok(match query.format.unwrap_or_else(|| preferred(&headers)) {
        Format::Json => axum::Json(Series::new(range, series)).into_response(),
        Format::Csv => ([(header::CONTENT_TYPE, "text/csv")], csv(&series)).into_response(),
    })
}

/// Reads all pages of the history of a VM; together they hold at most the requested number of time buckets.
async fn read_all<M: Method<Params = VmHistoryQuery, Reply = VmSeries>>(
    gateway: &Gateway,
    caller: &Caller,
    mut query: VmHistoryQuery,
) -> Result<VmSeries, Fault> {
    let context = caller.context(gateway, M::INFO.kind);
    // One permit covers the reading of all pages.
    let _permit = gateway.admission.enter(&M::INFO, &context).await?;
    let mut all: VmSeries = gateway.bus.call::<M>(&context, &query).await?;
    while all.next.is_some() {
        query.after_ms = all.next;
        let page = gateway.bus.call::<M>(&context, &query).await?;
        check_steps(all.step_ms, page.step_ms)?;
        all.next = page.next;
        all.buckets.extend(page.buckets);
    }
    if all.buckets.is_empty() {
        all.step_ms = 0;
    }
    Ok(all)
}

/// Returns an error if two pages have different bucket lengths. This happens if rows expired between the two reads, so
/// that the second page was computed from rollups.
pub(super) fn check_steps(first_ms: u64, next_ms: u64) -> Result<(), Fault> {
    // A page without time buckets states a bucket length of 0, which is not a difference.
    if next_ms == first_ms || next_ms == 0 {
        return Ok(());
    }
    let text = "the history changed while it was being read; try again";
    Err(Fault::new(FaultKind::Unavailable, text))
}

/// Chooses CSV if the `Accept` header lists it before JSON.
fn preferred(headers: &HeaderMap) -> Format {
    let known = accepted(headers, |essence| match essence {
        "text/csv" => Some(Format::Csv),
        "application/json" => Some(Format::Json),
        _ => None,
    });
    known.unwrap_or(Format::Json)
}

/// The format of the first media type in the `Accept` header for which there is one.
pub(super) fn accepted<T>(headers: &HeaderMap, format: impl Fn(&str) -> Option<T>) -> Option<T> {
    let accept = headers.get(header::ACCEPT)?.to_str().ok()?;
    let mut types = accept.split(',').filter_map(|range| range.split(';').next());
    types.find_map(|essence| format(essence.trim()))
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

/// Writes the history as CSV, with one line per time bucket. Null values are empty; no value needs quoting.
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
    fn csv_has_a_header_and_one_line_per_time_bucket() {
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
            format!("2017-01-01T13:38:00.000Z,2,0,1.5,3{}", ",".repeat(39))
        );
        assert_eq!(header.split(',').count(), line.split(',').count());
    }

    #[test]
    fn answer_format_is_first_known_media_type_of_accept_header() {
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
