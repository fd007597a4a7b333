//! Tests the state of vmwatch itself, as administrators read it.

use serde_json::{Value, json};
use testkit::{
    PATIENCE, Program,
    cloud::{At, Cloud},
    eventually,
};
use vmwatch_api::{
    Role, Scope,
    status::{NoticeKind, Status, StatusPart},
    time::unix_millis,
};

use super::client::{Api, report, stack};
use crate::history_support::{publish_by_clock, sample};

async fn read(api: &Api) -> Status {
    serde_json::from_value(api.read("/status").await).unwrap()
}

/// Waits until the status is as wanted.
async fn until(api: &Api, what: &str, is_wanted: impl Fn(&Status) -> bool) -> Status {
    eventually(what, PATIENCE, async || {
        let status = read(api).await;
        let is_so = is_wanted(&status);
        is_so
            .then_some(status.clone())
            .ok_or_else(|| format!("{status:?}"))
    })
    .await
}

/// The notices of a kind, without those about the disk of the machine that runs the test.
fn notices(status: &Status, kind: NoticeKind) -> Vec<(StatusPart, &str)> {
    let all = status.notices.iter();
    let of_kind = all.filter(|notice| notice.kind == kind && notice.part != StatusPart::Disk);
    of_kind
        .map(|notice| (notice.part, notice.detail.as_str()))
        .collect()
}

#[tokio::test]
async fn administrators_see_programs_samples_and_compaction() {
    let stack = stack()
        .replicas(Program::Metrics, 2)
        .replicas(Program::Alert, 1)
        .set(Program::Metrics, "VMWATCH_COMPACTION_INTERVAL", "200ms")
        .start()
        .await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    report(&stack, &admin, &[("vm-1", 12.0)]).await;
    let counts = |status: &Status| -> Vec<usize> {
        let programs = status.programs.iter().flatten();
        programs.map(|program| program.replicas.len()).collect()
    };
    let status = until(&admin, "all programs answer", |status| {
        counts(status) == [1, 1, 2, 1, 1] && status.compaction.is_some()
    })
    .await;
    for program in status.programs.iter().flatten() {
        let mut replicas = program.replicas.iter();
        assert!(replicas.all(|replica| replica.version == env!("CARGO_PKG_VERSION")));
    }
    assert_eq!(notices(&status, NoticeKind::Attention), [], "{status:?}");
    assert_eq!(notices(&status, NoticeKind::Unavailable), [], "{status:?}");
    let samples = status.samples.unwrap();
    assert!(
        samples.max_bytes > 0 && samples.dead_letters == Some(0),
        "{samples:?}"
    );
    let agents = status.agents.unwrap();
    assert_eq!((agents.reporting, agents.silent), (1, 0));
    let hypervisors = status.hypervisors.unwrap();
    assert!(hypervisors.iter().all(|hypervisor| hypervisor.reachable) && !hypervisors.is_empty());

    for role in [Role::Viewer, Role::Operator] {
        let other = Api::with(&stack, role, Scope::All).await;
        other.get("/status").await.problem(403, "forbidden");
    }

    stack.replica(Program::Alert, 0).process.kill9();
    let without = until(&admin, "alert-svc is missing", |status| {
        counts(status) == [1, 1, 2, 1, 0]
    })
    .await;
    assert_eq!(
        notices(&without, NoticeKind::Attention),
        [(StatusPart::Programs, "no replica of vmwatch-alert answers")]
    );

    // Without metrics-svc, the other parts are still answered, and lifecycle-svc lists the hypervisors.
    for replica in 0..2 {
        stack.replica(Program::Metrics, replica).process.kill9();
    }
    let without = until(&admin, "metrics-svc is missing", |status| {
        counts(status) == [1, 1, 0, 1, 0] && status.agents.is_none()
    })
    .await;
    assert!(without.samples.is_none() && without.compaction.is_none());
    assert!(!without.hypervisors.as_ref().unwrap().is_empty(), "{without:?}");
    let parts: Vec<_> = notices(&without, NoticeKind::Unavailable)
        .into_iter()
        .map(|(part, _)| part)
        .collect();
    assert_eq!(
        parts,
        [StatusPart::Samples, StatusPart::Compaction, StatusPart::Agents]
    );
}

#[tokio::test]
async fn status_names_unreachable_hypervisors_and_vms_with_a_wrong_clock() {
    let folder = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(&[]).await;
    let hypervisors = format!("{},lab=test:///default", cloud.entry(folder.path(), "attic"));
    let stack = stack()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisors)
        .set(Program::Lifecycle, "VMWATCH_HYPERVISOR_TIMEOUT", "1s")
        .start()
        .await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    cloud.hold(At::List);
    let status = until(&admin, "the hypervisor is unreachable", |status| {
        let mut hypervisors = status.hypervisors.iter().flatten();
        hypervisors.any(|hypervisor| hypervisor.name == "attic" && !hypervisor.reachable)
    })
    .await;
    let hypervisors = status.hypervisors.as_deref().unwrap();
    assert_eq!((hypervisors.len(), hypervisors[0].name.as_str()), (2, "attic"));
    assert!(
        notices(&status, NoticeKind::Attention).contains(&(StatusPart::Hypervisors, "unreachable: attic")),
        "{status:?}"
    );

    let status = eventually("the wrong clock is counted", PATIENCE, async || {
        let sample = sample("vm-behind", unix_millis() - 1000, "+00:00", 5.0);
        publish_by_clock(&stack, &sample, -60_000).await;
        let status: Value = admin.read("/status").await;
        let group = &status["agents"]["wrong_clock"];
        let is_counted = *group == json!({ "count": 1, "vms": ["vm-behind"] });
        is_counted
            .then(|| status.clone())
            .ok_or_else(|| status.to_string())
    })
    .await;
    let expected =
        json!({ "part": "agents", "kind": "attention", "detail": "1 VM with a wrong clock or UTC offset" });
    assert!(
        status["notices"].as_array().unwrap().contains(&expected),
        "{status}"
    );

    // An administrator of some VMs sees the agents of these VMs.
    let scope = Scope::Only(vec!["vm-other".parse().unwrap()]);
    let limited = read(&Api::with(&stack, Role::Admin, scope).await).await;
    assert_eq!(limited.agents.unwrap().wrong_clock.count, 0);
    assert_eq!(limited.hypervisors, Some(Vec::new()));
}
