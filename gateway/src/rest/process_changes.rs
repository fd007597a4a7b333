//! REST route that compares the processes of a VM at two moments.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId,
    alerts::culprits::TopMeasure,
    process_changes::{self, ChangesQuery, ProcessChangesBetween},
};

use super::{
    caller::Caller,
    extract::{PageLimit, Path, Query, page_limit},
    problem::Problem,
    range::range,
    time::Timestamp,
};
use crate::Gateway;

/// What a group of processes uses in one sample.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GroupUsage {
    /// Number of processes.
    processes: u32,
    /// CPU usage of the processes in percent of one core; may exceed 100.
    cpu_util: f64,
    /// Memory usage of the processes in percent of the VM's memory; memory that they share counts for each of them.
    mem: f64,
    /// Disk read rate of the processes in KiB/s.
    disk_read: f64,
    /// Disk write rate of the processes in KiB/s.
    disk_write: f64,
    /// Start of the process that has run longest; null if the processes have no rows of their own.
    #[schema(required)]
    started_at: Option<Timestamp>,
}

/// Processes with the same name, user, unit and container.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChangedGroup {
    /// Name of the processes.
    name: String,
    /// User of the processes; null if unknown.
    #[schema(required)]
    user: Option<String>,
    /// systemd unit of the processes; null if they belong to none, or to a scope, because the name of a scope differs
    /// in each session.
    #[schema(required)]
    unit: Option<String>,
    /// Container of the processes; null if they run in none.
    #[schema(required)]
    container: Option<String>,
    /// Usage at the first moment; null if no process of the group ran.
    #[schema(required)]
    before: Option<GroupUsage>,
    /// Usage at the second moment; null if no process of the group ran.
    #[schema(required)]
    after: Option<GroupUsage>,
    /// Number of processes that ran at both moments. If it is 0 although the group ran at both, all of its processes
    /// at the second moment were started after the first one.
    kept: u32,
}

/// Groups of processes with the same kind of change.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChangedGroups {
    /// Number of groups, including those that are not listed because of `limit`.
    total: u64,
    /// The groups with the greatest changes first.
    groups: Vec<ChangedGroup>,
}

/// A process table that was compared.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ComparedTable {
    /// Time of the sample: at or before the moment.
    at: Timestamp,
    /// Number of running processes.
    processes: u64,
    /// Time at which the VM was started; null if the table lacks its first process (pid 1).
    #[schema(required)]
    booted_at: Option<Timestamp>,
}

/// How the processes of a VM changed between two moments.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessChanges {
    /// First moment.
    from: Timestamp,
    /// Second moment.
    to: Timestamp,
    /// Process table of the first moment; null if the seven days before it have none. Then nothing is compared.
    #[schema(required)]
    before: Option<ComparedTable>,
    /// Process table of the second moment; null if the seven days before it have none.
    #[schema(required)]
    after: Option<ComparedTable>,
    /// Whether the VM was started between the two samples; null if unknown.
    #[schema(required)]
    rebooted: Option<bool>,
    /// Whether the agent reported only some of the processes. A process that it did not report may then seem to have
    /// come or gone.
    incomplete: bool,
    /// Measure by which the lists are sorted.
    by: TopMeasure,
    /// Groups that ran only at the second moment.
    came: ChangedGroups,
    /// Groups that ran only at the first moment.
    went: ChangedGroups,
    /// Groups that ran at both moments and used more at the second one, by at least 1% of a core, 0.1% of the VM's
    /// memory or 10 KiB/s of disk traffic.
    grew: ChangedGroups,
    /// Groups that did not grow and in which no process ran at both moments. Empty after a reboot, because a reboot
    /// restarts all processes.
    restarted: ChangedGroups,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ProcessChangesQuery {
    /// First moment. Default: one hour before the second one.
    from: Option<Timestamp>,
    /// Second moment. Default: now.
    to: Option<Timestamp>,
    /// Measure by which to sort the groups of each list. Default: CPU usage.
    #[serde(default)]
    #[param(value_type = Option<TopMeasure>)]
    by: TopMeasure,
    /// Maximum number of groups in each list. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
}

/// Compare the processes of a VM at two moments
///
/// Returns which processes came, went, grew and were restarted between two moments. Processes are compared in groups
/// of the same name, user, unit and container, so that they can also be compared across a reboot. The usage at a
/// moment is that of the newest sample at or before it.
#[utoipa::path(
    get, path = "/vms/{instance_id}/changes", tag = "processes", operation_id = "process_changes",
    params(("instance_id" = InstanceId, Path, description = "VM id"), ProcessChangesQuery),
    responses(
        (status = OK, body = ProcessChanges, description = "the groups that changed"),
        (status = UNPROCESSABLE_ENTITY, response = super::openapi::Contradictory),
    ),
)]
pub(super) async fn changes(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(instance_id): Path<InstanceId>,
    Query(query): Query<ProcessChangesQuery>,
) -> Result<axum::Json<ProcessChanges>, Problem> {
    let moments = range(query.from, query.to)?;
    let request = ChangesQuery {
        instance_id,
        moments,
        by: query.by,
        limit: page_limit(query.limit),
    };
    let found = caller.ask::<ProcessChangesBetween>(&gateway, &request).await?;
    Ok(axum::Json(ProcessChanges {
        from: Timestamp::of_ms(moments.from_ms()),
        to: Timestamp::of_ms(moments.to_ms()),
        before: found.before.map(ComparedTable::from),
        after: found.after.map(ComparedTable::from),
        rebooted: found.rebooted,
        incomplete: found.incomplete,
        by: query.by,
        came: found.came.into(),
        went: found.went.into(),
        grew: found.grew.into(),
        restarted: found.restarted.into(),
    }))
}

impl From<process_changes::ComparedTable> for ComparedTable {
    fn from(table: process_changes::ComparedTable) -> Self {
        Self {
            at: Timestamp::of_ms(table.at_ms),
            processes: table.processes,
            booted_at: table.booted_ms.map(Timestamp::of_ms),
        }
    }
}

impl From<process_changes::ChangedGroups> for ChangedGroups {
    fn from(list: process_changes::ChangedGroups) -> Self {
        Self {
            total: list.total,
            groups: list.groups.into_iter().map(ChangedGroup::from).collect(),
        }
    }
}

impl From<process_changes::ChangedGroup> for ChangedGroup {
    fn from(group: process_changes::ChangedGroup) -> Self {
        Self {
            name: group.name,
            user: group.user,
            unit: group.unit,
            container: group.container,
            before: group.before.map(GroupUsage::from),
            after: group.after.map(GroupUsage::from),
            kept: group.kept,
        }
    }
}

impl From<process_changes::GroupUsage> for GroupUsage {
    fn from(usage: process_changes::GroupUsage) -> Self {
        Self {
            processes: usage.processes,
            cpu_util: usage.cpu_util,
            mem: usage.mem,
            disk_read: usage.disk_read,
            disk_write: usage.disk_write,
            started_at: usage.started_ms.map(Timestamp::of_ms),
        }
    }
}
