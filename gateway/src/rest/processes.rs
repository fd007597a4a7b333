//! The processes of a VM: at any moment that is stored, over time, and as they come and go.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use shared::{
    api::{
        InstanceId, Method as _,
        processes::{
            self, Order, ProcessBucket, ProcessEventKind, ProcessEvents, ProcessEventsQuery, ProcessHistory,
            ProcessHistoryQuery, ProcessName, ProcessSelector, ProcessSort, ProcessesAt, ProcessesAtQuery,
        },
    },
    wire::Fault,
};
use utoipa::{IntoParams, ToSchema};

use super::{
    caller::Caller,
    cursors::{EventCursor, TableCursor},
    extract::{Number, PageLimit, Path, Query, page_limit},
    problem::Problem,
    range::{PointCount, points, range},
    samples::{Stat, check_steps},
    time::Timestamp,
};
use crate::Gateway;

/// A process id.
type Pid = Number<0, { u32::MAX as u64 }>;

/// A process as one sample saw it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Process {
    /// Its name: the kernel's short one, without arguments.
    name: String,
    /// Its id.
    pid: u32,
    /// Share of one core, percent; may pass 100.
    cpu_util: f64,
    /// Share of the VM's memory, percent.
    mem: f64,
    /// Read rate, KiB/s.
    disk_read: f64,
    /// Write rate, KiB/s.
    disk_write: f64,
    /// When it started.
    started_at: Timestamp,
    /// When it was seen to have ended; null while it runs. An ended process is in one table, the first after its end.
    #[schema(required)]
    ended_at: Option<Timestamp>,
}

/// The process table of a moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessTable {
    /// When it was sampled: at the moment asked for, or the last time before; null where there is no table.
    #[schema(required)]
    at: Option<Timestamp>,
    /// How many processes it has, before the limit.
    total: u64,
    /// The processes, sorted; ties by pid.
    processes: Vec<Process>,
    /// What `cursor` is for the next page; null on the last.
    #[schema(required)]
    next: Option<TableCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TableQuery {
    /// The moment; now unless given.
    at: Option<Timestamp>,
    /// Sorted by what; by CPU unless given.
    #[serde(default)]
    #[param(value_type = Option<ProcessSort>)]
    sort: ProcessSort,
    /// Which way; the greatest consumers first, and names and pids from their beginning, unless given.
    order: Option<Order>,
    /// Only processes of exactly this name.
    name: Option<ProcessName>,
    /// At most how many; 100 unless given.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// `next` of the page before, with the same sort, order and name. It names the moment, whatever `at` says.
    cursor: Option<TableCursor>,
}

/// Read the process table of a moment
///
/// Of the newest sample at or before the moment, at most seven days before. The cost is that of one sample, however
/// far back the moment. A page may hold fewer processes than `limit` and still not be the last.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes", tag = "processes", operation_id = "processes_at",
    params(("instance_id" = InstanceId, Path, description = "the VM's id"), TableQuery),
    responses((status = OK, body = ProcessTable, description = "the process table")),
)]
pub(super) async fn table(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<TableQuery>,
) -> Result<axum::Json<ProcessTable>, Problem> {
    let asked = ProcessesAtQuery {
        instance_id,
        at_ms: query.at.map(Timestamp::as_ms),
        sort: query.sort,
        order: query.order,
        name: query.name,
        limit: page_limit(query.limit),
        after: query.cursor.map(|place| place.0),
    };
    let table = caller.ask::<ProcessesAt>(&gateway, &asked).await?;
    Ok(axum::Json(ProcessTable {
        at: table.at_ms.map(Timestamp::of_ms),
        total: table.total,
        processes: table.processes.into_iter().map(Process::from).collect(),
        next: table.next.map(TableCursor),
    }))
}

impl From<processes::ProcessRow> for Process {
    fn from(row: processes::ProcessRow) -> Self {
        Self {
            name: row.name,
            pid: row.pid,
            cpu_util: row.cpu_util,
            mem: row.mem,
            disk_read: row.disk_read,
            disk_write: row.disk_write,
            started_at: Timestamp::of_ms(row.started_ms),
            ended_at: row.ended_ms.map(Timestamp::of_ms),
        }
    }
}

/// A bucket of the past of some processes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessPoint {
    /// Its beginning.
    at: Timestamp,
    /// How many samples it is made of: moments, not rows.
    count: u64,
    /// How many of the processes ran.
    processes: Stat,
    /// Their CPU together, percent of one core.
    cpu_util: Stat,
    /// Their memory together, percent of the VM's; memory that they share counts for each.
    mem: Stat,
    /// Their read rate together, KiB/s.
    disk_read: Stat,
    /// Their write rate together, KiB/s.
    disk_write: Stat,
}

/// The past of some processes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessSeries {
    /// The beginning of the range.
    from: Timestamp,
    /// The end of the range.
    to: Timestamp,
    /// How long each bucket is, in milliseconds; 0 where there is none.
    step_ms: u64,
    /// In the order of time. Buckets in which none of the processes was seen are left out.
    buckets: Vec<ProcessPoint>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct HistoryQuery {
    /// The processes of exactly this name. A name or a pid is needed; with both, of the name that had the pid.
    name: Option<ProcessName>,
    /// The processes that had this pid.
    #[param(inline)]
    pid: Option<Pid>,
    /// The beginning; an hour before the end unless given.
    from: Option<Timestamp>,
    /// The end; now unless given.
    to: Option<Timestamp>,
    /// At most how many buckets; 300 unless given.
    #[param(inline)]
    points: Option<PointCount>,
}

/// Read the past of some processes
///
/// Of all of a name together, or of one by its pid: what they used at each sample, summed, and of these sums the least,
/// the mean and the greatest in each bucket.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes/history", tag = "processes", operation_id = "process_history",
    params(("instance_id" = InstanceId, Path, description = "the VM's id"), HistoryQuery),
    responses(
        (status = OK, body = ProcessSeries, description = "their past"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn history(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<HistoryQuery>,
) -> Result<axum::Json<ProcessSeries>, Problem> {
    let process = ProcessSelector::new(
        query.name,
        query.pid.and_then(|pid| u32::try_from(pid.get()).ok()),
    );
    let asked = ProcessHistoryQuery {
        instance_id,
        process: process.ok_or_else(|| Problem::contradictory("query: name or pid is needed"))?,
        range: range(query.from, query.to)?,
        points: points(query.points),
        after_ms: None,
    };
    let range = asked.range;
    let series = read_all(&gateway, &caller, asked).await?;
    Ok(axum::Json(ProcessSeries {
        from: Timestamp::of_ms(range.from_ms()),
        to: Timestamp::of_ms(range.to_ms()),
        step_ms: series.step_ms,
        buckets: series.buckets.into_iter().map(ProcessPoint::from).collect(),
    }))
}

/// Reads all pages of a history, which together have at most as many buckets as were asked for.
async fn read_all(
    gateway: &Gateway,
    caller: &Caller,
    mut asked: ProcessHistoryQuery,
) -> Result<processes::ProcessSeries, Fault> {
    let context = caller.context(gateway, ProcessHistory::INFO.kind);
    // One permit for all pages: they are one read.
    let _permit = gateway.admission.enter(&ProcessHistory::INFO, &context).await?;
    let mut all = gateway.bus.call::<ProcessHistory>(&context, &asked).await?;
    while all.more {
        asked.after_ms = all.buckets.last().map(|bucket| bucket.at_ms);
        let page = gateway.bus.call::<ProcessHistory>(&context, &asked).await?;
        check_steps(all.step_ms, page.step_ms)?;
        all.more = page.more && !page.buckets.is_empty();
        all.buckets.extend(page.buckets);
    }
    Ok(all)
}

impl From<ProcessBucket> for ProcessPoint {
    fn from(bucket: ProcessBucket) -> Self {
        Self {
            at: Timestamp::of_ms(bucket.at_ms),
            count: bucket.count,
            processes: bucket.processes.into(),
            cpu_util: bucket.cpu_util.into(),
            mem: bucket.mem.into(),
            disk_read: bucket.disk_read.into(),
            disk_write: bucket.disk_write.into(),
        }
    }
}

/// A start or an end of a process.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessEvent {
    /// When.
    at: Timestamp,
    /// What.
    kind: ProcessEventKind,
    /// The name of the process.
    name: String,
    /// Its id.
    pid: u32,
    /// When it started.
    started_at: Timestamp,
}

/// Starts and ends of processes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessEventList {
    /// The newest first.
    events: Vec<ProcessEvent>,
    /// What `cursor` is for the next page; null on the last.
    #[schema(required)]
    next: Option<EventCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// The beginning; an hour before the end unless given.
    from: Option<Timestamp>,
    /// The end; now unless given.
    to: Option<Timestamp>,
    /// At most how many, the newest; 100 unless given.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// `next` of the page before, with the same range.
    cursor: Option<EventCursor>,
}

/// Read starts and ends of processes
///
/// As the samples show them: a process that lived between two samples was never seen.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes/events", tag = "processes", operation_id = "process_events",
    params(("instance_id" = InstanceId, Path, description = "the VM's id"), EventsQuery),
    responses(
        (status = OK, body = ProcessEventList, description = "starts and ends, the newest first"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn events(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<EventsQuery>,
) -> Result<axum::Json<ProcessEventList>, Problem> {
    let asked = ProcessEventsQuery {
        instance_id,
        range: range(query.from, query.to)?,
        limit: page_limit(query.limit),
        before: query.cursor.map(|place| place.0),
    };
    let page = caller.ask::<ProcessEvents>(&gateway, &asked).await?;
    let last = page.events.last().filter(|_| page.more);
    let next = last.map(|last| EventCursor(last.place()));
    Ok(axum::Json(ProcessEventList {
        events: page.events.into_iter().map(ProcessEvent::from).collect(),
        next,
    }))
}

impl From<processes::ProcessEvent> for ProcessEvent {
    fn from(event: processes::ProcessEvent) -> Self {
        Self {
            at: Timestamp::of_ms(event.at_ms),
            kind: event.kind,
            name: event.name,
            pid: event.pid,
            started_at: Timestamp::of_ms(event.started_ms),
        }
    }
}
