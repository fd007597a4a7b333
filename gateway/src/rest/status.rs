//! REST route with which administrators read the state of vmwatch itself.

mod notices;

use std::sync::Arc;

use axum::extract::State;
use tracing::debug;
use vmwatch_api::{
    Access, Role, Service,
    metrics::Limit,
    status::{
        HypervisorStatus, MetricsState, MetricsStatus, Notice, NoticeKind, ProgramStatus, ReplicaStatus,
        Status, StatusPart, StatusQuery,
    },
    time::unix_millis,
    vms::{HypervisorPart, List, ListWithoutMeasures, Stale, VmPage, VmQuery},
    wire::Fault,
};
use vmwatch_bus::{
    discovery::{DiscoveryError, Found},
    serve::check_role,
};

use super::{
    caller::Caller,
    extract::{NoParameters, Query},
    problem::Problem,
    vms,
};
use crate::{Gateway, NAME};

/// The programs of which at least one replica must run.
const PROGRAMS: [&str; 5] = [
    NAME,
    Service::Auth.name(),
    Service::Metrics.name(),
    Service::Lifecycle.name(),
    Service::Alert.name(),
];

/// Read the state of vmwatch
///
/// Waiting samples, compaction, the disk of the database, the running programs with their versions, agents and hypervisors.
/// `notices` lists what needs attention. A part that is unavailable is null, and has a notice. The answer takes at least half a
/// second, because programs have that time to report themselves.
#[utoipa::path(
    get, path = "/status", tag = "status", operation_id = "get_status",
    responses((status = OK, body = Status, description = "the state of vmwatch")),
)]
pub(super) async fn read(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<Status>, Problem> {
    check_role(Access::Role(Role::Admin), Some(caller.principal()))?;
    let first = VmQuery {
        limit: Limit::ONE,
        ..VmQuery::default()
    };
    let (found, metrics, vms) = tokio::join!(
        gateway.bus.discover(),
        caller.ask::<MetricsStatus>(&gateway, &StatusQuery {}),
        vms::ask::<List, ListWithoutMeasures>(&gateway, &caller, &first),
    );
    let vms = vms.map(|(page, _)| page);
    Ok(axum::Json(status(found, metrics, vms, unix_millis())))
}

/// Joins the answers. A part without an answer is absent, and has a notice.
fn status(
    found: Result<Vec<Found>, DiscoveryError>,
    metrics: Result<MetricsState, Fault>,
    vms: Result<VmPage, Fault>,
    now_ms: u64,
) -> Status {
    let mut notices = Vec::new();
    let mut missing = |part, detail: &str| {
        notices.push(Notice {
            part,
            kind: NoticeKind::Unavailable,
            detail: detail.to_owned(),
        });
    };
    let programs = found.map(|found| programs(&found)).inspect_err(|error| {
        debug!(%error, "finding the running programs failed");
        missing(StatusPart::Programs, "the running programs cannot be asked");
    });
    let (samples, compaction, disk, agents) = match metrics {
        Ok(state) => {
            if state.samples.is_none() {
                missing(StatusPart::Samples, "the stream of samples cannot be read");
            }
            (state.samples, state.compaction, state.disk, Some(state.agents))
        }
        Err(fault) => {
            for part in [
                StatusPart::Samples,
                StatusPart::Compaction,
                StatusPart::Disk,
                StatusPart::Agents,
            ] {
                missing(part, &fault.message);
            }
            (None, None, None, None)
        }
    };
    let hypervisors = vms.map(|page| {
        for stale in &page.stale {
            let detail = "it cannot be followed at the moment; the last known state is shown";
            match stale {
                Stale::Inventory => missing(StatusPart::Hypervisors, detail),
                Stale::Samples => missing(StatusPart::Agents, detail),
                Stale::Labels | Stale::Unknown => {}
            }
        }
        let hypervisors = page.hypervisors.into_iter();
        hypervisors.map(|part| hypervisor(part, now_ms)).collect()
    });
    let hypervisors = hypervisors.inspect_err(|fault| missing(StatusPart::Hypervisors, &fault.message));
    let mut status = Status {
        notices,
        programs: programs.ok(),
        samples,
        compaction,
        disk,
        agents,
        hypervisors: hypervisors.ok(),
    };
    let attention = notices::of(&status);
    status.notices.extend(attention);
    status
}

/// Groups the replicas by program; a program without replicas is listed too.
fn programs(found: &[Found]) -> Vec<ProgramStatus> {
    let program = |name: &&'static str| ProgramStatus {
        name: (*name).to_owned(),
        replicas: found
            .iter()
            .filter(|replica| replica.name == **name)
            .map(|replica| ReplicaStatus {
                id: replica.id.clone(),
                version: replica.version.clone(),
            })
            .collect(),
    };
    PROGRAMS.iter().map(program).collect()
}

fn hypervisor(part: HypervisorPart, now_ms: u64) -> HypervisorStatus {
    HypervisorStatus {
        name: part.name,
        reachable: part.reachable,
        late: part.late,
        listed_ago_ms: part.listed_at_ms.map(|at| now_ms.saturating_sub(at)),
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::wire::FaultKind;

    use super::*;

    #[test]
    fn parts_without_an_answer_are_absent_with_a_notice() {
        let fault = || Fault::new(FaultKind::Unavailable, "no vmwatch-metrics answers");
        let none = status(
            Err(DiscoveryError::NotConnected),
            Err(fault()),
            Err(fault()),
            1_000,
        );
        let parts: Vec<_> = none.notices.iter().map(|notice| notice.part).collect();
        let expected = [
            StatusPart::Programs,
            StatusPart::Samples,
            StatusPart::Compaction,
            StatusPart::Disk,
            StatusPart::Agents,
            StatusPart::Hypervisors,
        ];
        assert_eq!(parts, expected);
        let is_missing = |notice: &Notice| notice.kind == NoticeKind::Unavailable;
        assert!(none.notices.iter().all(is_missing));
        assert!(none.programs.is_none() && none.agents.is_none() && none.hypervisors.is_none());
    }

    #[test]
    fn replicas_are_grouped_by_program() {
        let found = |name: &str, version: &str| Found {
            name: name.to_owned(),
            version: version.to_owned(),
            id: "x".to_owned(),
        };
        let programs = programs(&[
            found("vmwatch-auth", "1.0.0"),
            found("vmwatch-auth", "1.1.0"),
            found("another-service", "3.0.0"),
        ]);
        let counts: Vec<_> = programs
            .iter()
            .map(|program| (program.name.as_str(), program.replicas.len()))
            .collect();
        let expected = [
            ("vmwatch-gateway", 0),
            ("vmwatch-auth", 2),
            ("vmwatch-metrics", 0),
            ("vmwatch-lifecycle", 0),
            ("vmwatch-alert", 0),
        ];
        assert_eq!(counts, expected);
    }
}
