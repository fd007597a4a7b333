//! Tests the state of vmwatch itself, as administrators read it.

use mongodb::bson::{Document, doc};
use serde_json::{Value, json};
use testkit::{
    MongoProxy, PATIENCE, Program,
    cloud::{At, Cloud},
    eventually,
};
use vmwatch_api::{
    Role, Scope,
    status::{DatabaseDisk, NoticeKind, Status, StatusPart},
    time::unix_millis,
};
use vmwatch_store::MONGODB_URI;

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
    // A replica that has just started may not know of the agent and the hypervisors yet.
    let status = until(&admin, "all programs answer and all is well", |status| {
        let is_reachable = status
            .hypervisors
            .as_deref()
            .is_some_and(|all| !all.is_empty() && all.iter().all(|hypervisor| hypervisor.reachable));
        let agents = status.agents.as_ref();
        counts(status) == [1, 1, 2, 1, 1]
            && status.compaction.is_some()
            && is_reachable
            && agents.is_some_and(|agents| (agents.reporting, agents.silent) == (1, 0))
            && notices(status, NoticeKind::Attention).is_empty()
            && notices(status, NoticeKind::Unavailable).is_empty()
    })
    .await;
    for program in status.programs.iter().flatten() {
        let mut replicas = program.replicas.iter();
        assert!(replicas.all(|replica| replica.version == env!("CARGO_PKG_VERSION")));
    }
    let samples = status.samples.unwrap();
    assert!(
        samples.max_bytes > 0 && samples.dead_letters == Some(0),
        "{samples:?}"
    );

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

/// The sizes are those of the file system with the database of this test. The stand-in for MongoDB does not report them, so a
/// proxy does.
#[tokio::test]
async fn status_shows_how_full_the_disk_of_the_database_is_and_how_it_grows() {
    const DAY_MS: u64 = 86_400_000;
    const MIB: u64 = 1 << 20;
    let mib = |bytes: u64| u32::try_from(bytes / MIB).unwrap();
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let disk = rustix::fs::statvfs(stack.folder()).unwrap();
    let size = disk.f_blocks * disk.f_frsize / MIB * MIB;
    let used = size - disk.f_bfree * disk.f_frsize / MIB * MIB;
    // Unless the disk is nearly empty, it will be full in ten days.
    let growth = ((size - used) / 10).min(used / 3);
    let before = i64::try_from(used - 2 * growth).unwrap();
    let now = unix_millis();
    let points = |at_ms: u64, used: i64| {
        let at_ms = i64::try_from(at_ms).unwrap();
        doc! { "_id": "disk_usage", "newest_ms": at_ms, "points": [at_ms, used] }
    };
    let measurements = stack.database.handle().collection::<Document>("vm_samples_state");
    let stored = measurements.replace_one(doc! { "_id": "disk_usage" }, points(now - 2 * DAY_MS, before));
    stored.upsert(true).await.unwrap();

    let proxy = MongoProxy::start(stack.database.uri(), "blocks").await;
    proxy.report_disk(mib(used), mib(size));
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    let again = async || {
        metrics.process.kill9();
        metrics.restart().await;
    };
    again().await;
    let has = |disk: DatabaseDisk, used: u64| (disk.used_bytes, disk.size_bytes) == (used, size);
    let status = until(&admin, "the disk is measured", |status| {
        status.disk.is_some_and(|disk| has(disk, used))
    })
    .await;
    let disk = status.disk.unwrap();
    let measured = u64::try_from(disk.bytes_per_day.unwrap()).unwrap();
    // The growth was computed over two days and the duration of this test.
    assert!(
        measured <= growth && measured > growth / 100 * 98,
        "{disk:?}, grown by {growth}"
    );
    let days = (size - used) / measured;
    assert_eq!(disk.days_left, Some(days));
    let of_disk = |status: &Status| -> Vec<String> {
        let notices = status
            .notices
            .iter()
            .filter(|notice| notice.part == StatusPart::Disk);
        notices.map(|notice| notice.detail.clone()).collect()
    };
    let soon = format!("the disk of the database is full in {days} days at its present growth");
    let expected = if days < 14 { vec![soon] } else { Vec::new() };
    assert_eq!(of_disk(&status), expected);
    // The measurement was stored next to the one of two days ago, so all replicas know the growth.
    let stored = measurements
        .find_one(doc! { "_id": "disk_usage" })
        .await
        .unwrap()
        .unwrap();
    let numbers = stored.get_array("points").unwrap();
    assert_eq!(
        (numbers.len(), numbers[3].as_i64()),
        (4, i64::try_from(used).ok())
    );

    // A disk that is nearly full but does not grow.
    let nearly = size / 100 * 96 / MIB * MIB;
    proxy.report_disk(mib(nearly), mib(size));
    let steady = points(now - DAY_MS, i64::try_from(nearly).unwrap());
    measurements
        .replace_one(doc! { "_id": "disk_usage" }, steady)
        .await
        .unwrap();
    again().await;
    let status = until(&admin, "the disk is measured again", |status| {
        status.disk.is_some_and(|disk| has(disk, nearly))
    })
    .await;
    let disk = status.disk.unwrap();
    assert_eq!((disk.bytes_per_day, disk.days_left), (Some(0), None));
    assert_eq!(
        of_disk(&status),
        [format!(
            "the disk of the database is {} % full",
            nearly * 100 / size
        )]
    );
}
