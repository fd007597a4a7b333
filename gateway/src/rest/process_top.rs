//! REST route for the processes of a VM that used the most of a resource over a time range.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    alerts::culprits::{self, MAX_TOP, TopMeasure, TopQuery},
    processes::{ProcessName, ProcessRowKind},
};

use super::{
    caller::Caller,
    extract::{Number, Path, Query},
    problem::Problem,
    range::range,
    time::Timestamp,
};
use crate::Gateway;

/// Number of processes in the answer if the request does not state it.
const USUAL: u16 = 10;

type TopLimit = Number<1, { MAX_TOP as u64 }>;

/// What a process used in a time range, or several processes together.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TopProcess {
    /// Whether this is one process, or a sum of processes without rows of their own, as in the process table.
    kind: ProcessRowKind,
    /// Greatest number of processes in one sample; null if unknown.
    #[schema(required)]
    processes: Option<u32>,
    /// Name of the process in its newest sample.
    name: String,
    /// Process id (pid); null for a sum.
    #[schema(required)]
    pid: Option<u32>,
    /// Time at which the process started; null for a sum.
    #[schema(required)]
    started_at: Option<Timestamp>,
    /// Time at which the process was found to have ended; null if it did not end in the time range.
    #[schema(required)]
    ended_at: Option<Timestamp>,
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
    /// What the process used in the time range: CPU time in seconds, the mean of its memory in percent of the VM's memory,
    /// or KiB read from and written to disks.
    amount: f64,
    /// The part of the VM's amount that is this process's, 0 to 1; for memory, the mean part of the VM's memory. Null if
    /// the VM's amount is unknown.
    #[schema(required)]
    share: Option<f64>,
}

/// The processes of a VM that used the most of a resource.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TopProcesses {
    /// Start of the time range.
    from: Timestamp,
    /// End of the time range.
    to: Timestamp,
    /// The resource that the processes are compared by.
    by: TopMeasure,
    /// Number of process samples in the time range.
    samples: u64,
    /// What the whole VM used, in the unit of `amount`; null if unknown.
    #[schema(required)]
    total: Option<f64>,
    /// Processes, those with the greatest amount first. A process that used nothing is listed only if the request names
    /// it.
    processes: Vec<TopProcess>,
    /// Whether the time range had more rows than one request may read, so that only its end is included.
    partial: bool,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TopProcessesQuery {
    /// Start of the time range, which is at most one day long. Default: one hour before its end.
    from: Option<Timestamp>,
    /// End of the time range. Default: now.
    to: Option<Timestamp>,
    /// Resource by which to compare the processes. Default: CPU time.
    #[serde(default)]
    #[param(value_type = Option<TopMeasure>)]
    by: TopMeasure,
    /// Return only processes with exactly this name.
    name: Option<ProcessName>,
    /// Maximum number of processes in the answer. Default: 10.
    #[param(inline)]
    limit: Option<TopLimit>,
}

/// Read which processes used the most
///
/// Adds up what each process of a VM used in a time range: CPU time, memory, or disk traffic. A sample counts if it was
/// taken in the time range, with the whole time since the previous sample.
#[utoipa::path(
    get, path = "/vms/{instance_id}/processes/top", tag = "processes", operation_id = "process_top",
    params(("instance_id" = InstanceId, Path, description = "VM id"), TopProcessesQuery),
    responses(
        (status = OK, body = TopProcesses, description = "the processes with the greatest amounts"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn top(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<TopProcessesQuery>,
) -> Result<axum::Json<TopProcesses>, Problem> {
    let range = range(query.from, query.to)?;
    let limit = query.limit.and_then(|limit| u16::try_from(limit.get()).ok());
    let mut request = TopQuery::new(instance_id, range, query.by, limit.unwrap_or(USUAL))
        .map_err(|rule| Problem::contradictory(format!("query: {rule}")))?;
    request.name = query.name;
    let found = caller.ask::<culprits::ProcessTop>(&gateway, &request).await?;
    Ok(axum::Json(TopProcesses {
        from: Timestamp::of_ms(range.from_ms()),
        to: Timestamp::of_ms(range.to_ms()),
        by: query.by,
        samples: found.samples,
        total: found.total,
        processes: found.processes.into_iter().map(TopProcess::from).collect(),
        partial: found.partial,
    }))
}

impl From<culprits::TopProcess> for TopProcess {
    fn from(process: culprits::TopProcess) -> Self {
        let is_process = process.kind == ProcessRowKind::Process;
        Self {
            kind: process.kind,
            processes: if is_process { Some(1) } else { process.processes },
            name: process.name,
            pid: is_process.then_some(process.pid),
            started_at: is_process.then(|| Timestamp::of_ms(process.started_ms)),
            ended_at: process.ended_ms.map(Timestamp::of_ms),
            exit_code: process.exit_code,
            user: process.owner.user,
            parent_pid: process.owner.parent_pid,
            unit: process.owner.unit,
            container: process.owner.container,
            command_line: process.owner.command_line,
            owner_inherited: process.owner.inherited,
            amount: process.amount,
            share: process.share,
        }
    }
}
