//! REST routes for the processes of a VM: the process table at a moment, the history of processes, and process starts
//! and ends.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Method as _,
    metrics::{CpuSeconds, ShortLived},
    processes::{
        self, Order, ProcessBucket, ProcessEventKind, ProcessEvents, ProcessEventsQuery, ProcessHistory,
        ProcessHistoryQuery, ProcessName, ProcessRowKind, ProcessSelector, ProcessSort, ProcessesAt,
        ProcessesAtQuery,
    },
    wire::Fault,
};

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

type Pid = Number<0, { u32::MAX as u64 }>;

/// A process, as recorded in one sample, or several processes together.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Process {
    /// Whether the row describes one process, or sums up processes without rows of their own: those with the same name
    /// and user that started and ended between two samples, or all that the agent is not configured to report, named
    /// `other processes`. If such processes are estimated, the name of a sum is that of their parent.
    kind: ProcessRowKind,
    /// Number of processes that the row describes; null if unknown.
    #[schema(required)]
    processes: Option<u32>,
    /// Name of the process, without arguments: the kernel's name or, if the kernel truncated it to 15 bytes, the base
    /// name of the program.
    name: String,
    /// Process id (pid); null for a sum.
    #[schema(required)]
    pid: Option<u32>,
    /// CPU usage of the process in percent of one core; may exceed 100.
    cpu_util: f64,
    /// Memory usage of the process in percent of the VM's memory; may exceed 100 if the process has mapped memory several
    /// times.
    mem: f64,
    /// Disk read rate of the process in KiB/s.
    disk_read: f64,
    /// Disk write rate of the process in KiB/s.
    disk_write: f64,
    /// Time at which the process started; null for a sum.
    #[schema(required)]
    started_at: Option<Timestamp>,
    /// Time at which the process was found to have ended; null while it runs. An ended process appears only in the
    /// first process table after its end.
    #[schema(required)]
    ended_at: Option<Timestamp>,
    /// CPU time of the process since the previous sample of processes in seconds, not rounded; null if unknown.
    #[schema(required)]
    cpu_seconds: Option<f64>,
    /// Exit code of an ended process, 128 plus the number of the signal if a signal ended it; null if unknown.
    #[schema(required)]
    exit_code: Option<u32>,
    /// User of the process: the name, or the number if the VM's list of users does not have it; null if unknown.
    #[schema(required)]
    user: Option<String>,
    /// Pid of the parent process, 0 if it has none; null if unknown.
    #[schema(required)]
    parent_pid: Option<u32>,
    /// systemd unit of the process, such as `nginx.service`; null if it belongs to none.
    #[schema(required)]
    unit: Option<String>,
    /// Name of the container of the process, or the first digits of its id; null if it runs in none.
    #[schema(required)]
    container: Option<String>,
    /// Command line of the process without secrets; null unless the agent is configured to report it.
    #[schema(required)]
    command_line: Option<String>,
    /// Whether unit and container are those of an ancestor, because the process ended before it could be sampled.
    owner_inherited: bool,
}

/// All processes of a VM at one moment.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessTable {
    /// Time of the sample: at or before the requested moment. Null if no process table is stored.
    #[schema(required)]
    at: Option<Timestamp>,
    /// Total number of processes in the table, on all pages.
    total: u64,
    /// CPU time of the VM since the previous sample of processes; null if unknown.
    #[schema(required)]
    vm_cpu: Option<CpuSeconds>,
    /// CPU time of all processes in the table since the previous sample of processes in seconds, on all pages. Divided by
    /// the sum of the times in `vm_cpu`, this is the part of the VM's CPU time that the processes explain.
    cpu_seconds: f64,
    /// How the agent measures processes that start and end between two samples: `recorded` if the kernel reports each
    /// of them; `estimated` if it does not, or if records were lost, so that the CPU time of the others is estimated from that
    /// of their parents; null if unknown.
    #[schema(required)]
    short_lived: Option<ShortLived>,
    /// Processes, sorted as requested and then by pid.
    processes: Vec<Process>,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<TableCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TableQuery {
    /// Moment for which to return the process table. Default: now.
    at: Option<Timestamp>,
    /// Value by which to sort the processes. Default: CPU usage.
    #[serde(default)]
    #[param(value_type = Option<ProcessSort>)]
    sort: ProcessSort,
    /// Sort order. Default: ascending for names and pids, descending otherwise.
    order: Option<Order>,
    /// Return only processes with exactly this name.
    name: Option<ProcessName>,
    /// Maximum number of processes in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page; requires the same `sort`, `order` and `name`. The cursor determines the
    /// moment, so `at` is ignored.
    cursor: Option<TableCursor>,
}

/// Read the process table of a VM at a moment
///
/// Returns the newest process table of the seven days up to the moment. Reading an old table costs no more than reading
/// a recent one. A page may hold fewer processes than `limit` without being the last.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes", tag = "processes", operation_id = "processes_at",
    params(("instance_id" = InstanceId, Path, description = "VM id"), TableQuery),
    responses((status = OK, body = ProcessTable, description = "the process table")),
)]
pub(super) async fn table(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<TableQuery>,
) -> Result<axum::Json<ProcessTable>, Problem> {
    let request = ProcessesAtQuery {
        instance_id,
        at_ms: query.at.map(Timestamp::as_ms),
        sort: query.sort,
        order: query.order,
        name: query.name,
        limit: page_limit(query.limit),
        after: query.cursor.map(|cursor| cursor.0),
    };
    let table = caller.ask::<ProcessesAt>(&gateway, &request).await?;
    Ok(axum::Json(ProcessTable {
        at: table.at_ms.map(Timestamp::of_ms),
        total: table.total,
        vm_cpu: table.vm_cpu,
        cpu_seconds: table.cpu_seconds,
        short_lived: table.short_lived,
        processes: table.processes.into_iter().map(Process::from).collect(),
        next: table.next.map(TableCursor),
    }))
}

impl From<processes::ProcessRow> for Process {
    fn from(row: processes::ProcessRow) -> Self {
        let is_process = row.kind == ProcessRowKind::Process;
        Self {
            kind: row.kind,
            processes: if is_process { Some(1) } else { row.processes },
            name: row.name,
            pid: is_process.then_some(row.pid),
            cpu_util: row.cpu_util,
            mem: row.mem,
            disk_read: row.disk_read,
            disk_write: row.disk_write,
            started_at: is_process.then(|| Timestamp::of_ms(row.started_ms)),
            ended_at: row.ended_ms.map(Timestamp::of_ms),
            cpu_seconds: row.cpu_seconds,
            exit_code: row.exit_code,
            user: row.owner.user,
            parent_pid: row.owner.parent_pid,
            unit: row.owner.unit,
            container: row.owner.container,
            command_line: row.owner.command_line,
            owner_inherited: row.owner.inherited,
        }
    }
}

/// Aggregated usage of the selected processes in a time bucket.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessPoint {
    /// Start of the time bucket.
    at: Timestamp,
    /// Number of samples in the time bucket; a sample covers all processes at one moment.
    count: u64,
    /// Number of running processes among the selected ones.
    processes: Stat,
    /// Total CPU usage of the selected processes in percent of one core.
    cpu_util: Stat,
    /// Total memory usage of the selected processes in percent of the VM's memory; memory that processes share counts
    /// for each of them.
    mem: Stat,
    /// Total disk read rate of the selected processes in KiB/s.
    disk_read: Stat,
    /// Total disk write rate of the selected processes in KiB/s.
    disk_write: Stat,
}

/// History of the selected processes of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessSeries {
    /// Start of the time range.
    from: Timestamp,
    /// End of the time range.
    to: Timestamp,
    /// Length of each time bucket in milliseconds; 0 if the list of time buckets is empty.
    step_ms: u64,
    /// Time buckets in chronological order. A time bucket in which none of the selected processes ran is omitted.
    buckets: Vec<ProcessPoint>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct HistoryQuery {
    /// Select processes with exactly this name. `name` or `pid` is required; with both, only processes that match both
    /// are selected.
    name: Option<ProcessName>,
    /// Select processes with this pid.
    #[param(inline)]
    pid: Option<Pid>,
    /// Start of the time range. Default: one hour before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Maximum number of time buckets in the answer. Default: 300.
    #[param(inline)]
    points: Option<PointCount>,
}

/// Read the history of processes
///
/// Selects processes by name, by pid, or by both. The usage of all selected processes is summed per sample. Each time
/// bucket holds the minimum, average and maximum of these sums.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes/history", tag = "processes", operation_id = "process_history",
    params(("instance_id" = InstanceId, Path, description = "VM id"), HistoryQuery),
    responses(
        (status = OK, body = ProcessSeries, description = "the history of the processes"),
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
    let request = ProcessHistoryQuery {
        instance_id,
        process: process.ok_or_else(|| Problem::contradictory("query: name or pid is required"))?,
        range: range(query.from, query.to)?,
        points: points(query.points),
        after_ms: None,
    };
    let range = request.range;
    let series = read_all(&gateway, &caller, request).await?;
    Ok(axum::Json(ProcessSeries {
        from: Timestamp::of_ms(range.from_ms()),
        to: Timestamp::of_ms(range.to_ms()),
        step_ms: series.step_ms,
        buckets: series.buckets.into_iter().map(ProcessPoint::from).collect(),
    }))
}

/// Reads all pages of the history of processes; together they hold at most the requested number of time buckets.
async fn read_all(
    gateway: &Gateway,
    caller: &Caller,
    mut query: ProcessHistoryQuery,
) -> Result<processes::ProcessSeries, Fault> {
    let context = caller.context(gateway, ProcessHistory::INFO.kind);
    // One permit covers the reading of all pages.
    let _permit = gateway.admission.enter(&ProcessHistory::INFO, &context).await?;
    let mut all = gateway.bus.call::<ProcessHistory>(&context, &query).await?;
    while all.next.is_some() {
        query.after_ms = all.next;
        let page = gateway.bus.call::<ProcessHistory>(&context, &query).await?;
        check_steps(all.step_ms, page.step_ms)?;
        all.next = page.next;
        all.buckets.extend(page.buckets);
    }
    if all.buckets.is_empty() {
        all.step_ms = 0;
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

/// Start or end of a process.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessEvent {
    /// Time at which the process started or ended.
    at: Timestamp,
    /// Whether the process started or ended.
    kind: ProcessEventKind,
    /// Name of the process.
    name: String,
    /// Process id (pid).
    pid: u32,
    /// Time at which the process started.
    started_at: Timestamp,
}

/// A page of starts and ends of processes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessEventList {
    /// Starts and ends of processes, newest first.
    events: Vec<ProcessEvent>,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<EventCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Start of the time range. Default: one hour before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Maximum number of starts and ends in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page; requires the same time range.
    cursor: Option<EventCursor>,
}

/// List starts and ends of processes
///
/// Starts and ends are derived from samples: a process that started and ended between two samples is listed only if it has
/// a row of its own, which depends on the number of such processes and on whether the kernel reports them. A page
/// may have few starts and ends or none without being the last.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes/events", tag = "processes", operation_id = "process_events",
    params(("instance_id" = InstanceId, Path, description = "VM id"), EventsQuery),
    responses(
        (status = OK, body = ProcessEventList, description = "starts and ends of processes, newest first"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn events(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<EventsQuery>,
) -> Result<axum::Json<ProcessEventList>, Problem> {
    let request = ProcessEventsQuery {
        instance_id,
        range: range(query.from, query.to)?,
        limit: page_limit(query.limit),
        before: query.cursor.map(|cursor| cursor.0),
    };
    let page = caller.ask::<ProcessEvents>(&gateway, &request).await?;
    Ok(axum::Json(ProcessEventList {
        events: page.events.into_iter().map(ProcessEvent::from).collect(),
        next: page.next.map(EventCursor),
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
