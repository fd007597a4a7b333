//! REST route that finds the VMs in which a process ran.

use std::{sync::Arc, time::Duration};

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    history::TimeRange,
    process_search::{self, ProcessMatch, ProcessSearch, ProcessSearchQuery},
    processes::ProcessName,
};

use super::{
    caller::Caller,
    extract::{PageLimit, Query, page_limit},
    problem::Problem,
    time::Timestamp,
    vms::{Degraded, degraded},
};
use crate::Gateway;

/// Default length of the time range.
const USUAL: Duration = Duration::from_hours(7 * 24);

/// A VM in which processes with the name ran.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmThatRan {
    /// Id of the VM.
    instance_id: InstanceId,
    /// Name of the VM on its hypervisor; null if no hypervisor is known to have the VM.
    #[schema(required)]
    name: Option<String>,
    /// Names of the processes, sorted; at most 10.
    process_names: Vec<String>,
    /// Time at which one of the processes was first seen. If one was also seen earlier on the same day (UTC), before the
    /// time range, this is the start of an hour.
    first_at: Timestamp,
    /// Time at which one of the processes was last seen. If one was also seen later on the same day (UTC), after the time
    /// range, this is the end of an hour.
    last_at: Timestamp,
    /// Number of hours (UTC) in which one of the processes was seen.
    hours: u32,
    /// Greatest number of processes with one of the names in one sample, on the days (UTC) that the time range touches.
    max_processes: u32,
    /// Greatest CPU usage of one of the processes on these days, in percent of one core.
    max_cpu_util: f64,
    /// Greatest memory usage of one of the processes on these days, in percent of the VM's memory.
    max_mem: f64,
}

/// A page of the VMs in which processes with the name ran.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessSearchResult {
    /// Start of the time range, which is extended to whole hours (UTC).
    from: Timestamp,
    /// End of the time range.
    to: Timestamp,
    /// VMs, sorted by id.
    vms: Vec<VmThatRan>,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<InstanceId>,
    /// All samples that were stored before this time are included, usually all but those of the last seconds. Null while
    /// older samples are still being read.
    #[schema(required)]
    complete_to: Option<Timestamp>,
    /// VMs whose processes had too many different names to search all of them; usually empty.
    unsearched: Vec<InstanceId>,
    /// Sources of data that are unavailable, and what is missing; usually empty.
    degraded: Vec<Degraded>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SearchQuery {
    /// Name of the processes. The kernel cuts names after 15 bytes, so a longer name also finds its first 15 bytes.
    name: ProcessName,
    /// Whether the name of a process must equal `name` or begin with it; a prefix has at least 3 characters. Default:
    /// exact.
    #[serde(default, rename = "match")]
    #[param(value_type = Option<ProcessMatch>)]
    matching: ProcessMatch,
    /// Start of the time range, at most 400 days before its end. Default: seven days before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Maximum number of VMs in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page; requires the same `name`, `match` and time range.
    cursor: Option<InstanceId>,
}

/// Find the VMs in which a process ran
///
/// Answers from the process names that are kept for each VM and day, so the number of samples does not matter. A page
/// may hold fewer VMs than `limit` without being the last.
#[utoipa::path(
    get, path = "/processes", tag = "processes", operation_id = "process_search", params(SearchQuery),
    responses(
        (status = OK, body = ProcessSearchResult, description = "a page of VMs"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn search(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<SearchQuery>,
) -> Result<axum::Json<ProcessSearchResult>, Problem> {
    let to = query.to.unwrap_or_else(Timestamp::now).as_ms();
    let usual = u64::try_from(USUAL.as_millis()).unwrap_or(u64::MAX);
    let from = query.from.map_or(to.saturating_sub(usual), Timestamp::as_ms);
    let range =
        TimeRange::new(from, to).ok_or_else(|| Problem::contradictory("query: from must be before to"))?;
    let mut request = ProcessSearchQuery::new(query.name, query.matching, range)
        .map_err(|rule| Problem::contradictory(format!("query: {rule}")))?;
    request.limit = page_limit(query.limit);
    request.after = query.cursor;
    let page = caller.ask::<ProcessSearch>(&gateway, &request).await?;
    Ok(axum::Json(ProcessSearchResult {
        from: Timestamp::of_ms(page.from_ms),
        to: Timestamp::of_ms(page.to_ms),
        vms: page.vms.into_iter().map(VmThatRan::from).collect(),
        next: page.next,
        complete_to: page.complete_to_ms.map(Timestamp::of_ms),
        unsearched: page.unsearched,
        degraded: degraded(None, &page.stale),
    }))
}

impl From<process_search::VmThatRan> for VmThatRan {
    fn from(vm: process_search::VmThatRan) -> Self {
        Self {
            instance_id: vm.instance_id,
            name: vm.vm_name,
            process_names: vm.names,
            first_at: Timestamp::of_ms(vm.first_ms),
            last_at: Timestamp::of_ms(vm.last_ms),
            hours: vm.hours,
            max_processes: vm.processes,
            max_cpu_util: vm.cpu_util,
            max_mem: vm.mem,
        }
    }
}
