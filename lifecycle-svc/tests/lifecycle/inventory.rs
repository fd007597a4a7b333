//! Tests the list of VMs: one replica polls each hypervisor, all replicas answer from the inventory.

use std::time::{Duration, Instant};

use async_nats::{HeaderMap, header::NATS_MESSAGE_TTL, jetstream};
use testkit::{
    PATIENCE,
    cloud::{At, Cloud},
    eventually, figure,
};
use vmwatch_api::{
    inventory::{INVENTORY_BUCKET, InventoryHypervisor, InventoryKey, InventoryVm},
    lifecycle::{MachineState, Stop},
    time::unix_millis,
    vms::{ListWithoutMeasures, VmPage, VmQuery},
};

use crate::support::{LEASE, Replica, World, instance_id, operator, target, within};

const ONE: &str = "aaaaaaaa-1111-4111-8111-111111111111";
const TWO: &str = "bbbbbbbb-2222-4222-8222-222222222222";
const OTHER: &str = "cccccccc-3333-4333-8333-333333333333";
const INTERVAL: &str = "300ms";

/// Starts a replica with these hypervisors and this interval of polling.
async fn replica(world: &World, name: &str, hypervisors: &str, interval: &str) -> Replica {
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors),
        ("VMWATCH_STATE_INTERVAL", interval),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "2s"),
    ];
    world.replica(name, &settings).await
}

async fn list(world: &World) -> VmPage {
    world.vms(&operator(), &VmQuery::default()).await
}

/// Waits until the list has these VMs in these states, and these hypervisors are silent.
///
/// NATS can still send a request to a replica that was killed a moment ago, so each attempt has a short deadline.
async fn listed(world: &World, vms: &[(&str, MachineState)], silent: &[&str]) {
    eventually("the list is as expected", PATIENCE, async || {
        let list = world
            .bus
            .call::<ListWithoutMeasures>(&within(Duration::from_secs(2)), &VmQuery::default())
            .await
            .map_err(|fault| fault.to_string())?;
        let found = list.vms.iter();
        let found: Vec<_> = found
            .filter_map(|vm| Some((vm.instance_id.as_str(), vm.state?)))
            .collect();
        let parts = list.hypervisors.iter();
        let outdated: Vec<_> = parts
            .filter(|part| !part.reachable || part.late)
            .map(|part| part.name.as_str())
            .collect();
        let same = found == vms && outdated == silent;
        same.then_some(()).ok_or_else(|| format!("{list:?}"))
    })
    .await;
}

/// Waits until the VMs of the cloud have been listed `count` more times.
async fn lists_again(cloud: &Cloud, count: usize) {
    let before = cloud.lists();
    eventually("the cloud is listed again", PATIENCE, async || {
        let lists = cloud.lists() - before;
        (lists >= count)
            .then_some(())
            .ok_or_else(|| format!("listed {lists} times"))
    })
    .await;
}

async fn last_sequence(world: &World) -> u64 {
    let stream = format!("KV_{INVENTORY_BUCKET}");
    let info = world.bus.stream_info(&stream, PATIENCE).await.unwrap();
    info.state.last_sequence
}

async fn polls(replica: &Replica, hypervisor: &str) -> bool {
    let metrics = replica.get("/metrics").await.unwrap();
    let line = format!("vmwatch_hypervisor_polled{{hypervisor=\"{hypervisor}\"}} 1");
    metrics.lines().any(|found| found == line)
}

#[tokio::test]
async fn one_of_three_replicas_polls_and_another_takes_over() {
    let world = World::new().await;
    let (alone, shared) = (
        Cloud::start(&[(OTHER, "ACTIVE")]).await,
        Cloud::start(&[(ONE, "ACTIVE")]).await,
    );
    let _alone = replica(&world, "alone", &alone.entry(world.path(), "alone"), INTERVAL).await;
    let entry = shared.entry(world.path(), "shared");
    let mut replicas = Vec::new();
    for name in ["a", "b", "c"] {
        replicas.push(replica(&world, name, &entry, INTERVAL).await);
    }
    let before = (alone.lists(), shared.lists());
    lists_again(&alone, 30).await;
    let counts = (alone.lists() - before.0, shared.lists() - before.1);
    let ratio = shared_ratio(counts);
    figure("hypervisor_calls_3_replicas_over_1", ratio);
    // If each of the three replicas polled the hypervisor, the ratio would be 3.
    assert!(ratio < 1.5, "{counts:?}");

    let mut holder = None;
    for (index, replica) in replicas.iter().enumerate() {
        if polls(replica, "shared").await {
            assert_eq!(holder.replace(index), None, "two replicas poll one hypervisor");
        }
    }
    let holder = replicas.remove(holder.expect("no replica polls"));
    holder.0.kill9();
    let killed = Instant::now();
    shared.settle(ONE, "SHUTOFF");
    let all = [(ONE, MachineState::ShutOff), (OTHER, MachineState::Running)];
    listed(&world, &all, &[]).await;
    figure("hypervisor_takeover_ms", killed.elapsed().as_secs_f64() * 1e3);

    // A replica that stops releases its lease, so that the next one need not wait until it expires.
    let index = usize::from(!polls(&replicas[0], "shared").await);
    let stopped = replicas.remove(index).0.terminate(PATIENCE).await;
    assert!(stopped.success(), "{stopped}");
    let stopped = Instant::now();
    lists_again(&shared, 1).await;
    let took = stopped.elapsed();
    assert!(took < LEASE * 5, "{took:?}");
}

fn shared_ratio((alone, shared): (usize, usize)) -> f64 {
    let count = |count: usize| f64::from(u32::try_from(count).unwrap());
    count(shared) / count(alone)
}

#[tokio::test]
async fn hung_hypervisor_keeps_its_last_known_vms_and_delays_no_list() {
    let world = World::new().await;
    let (hung, healthy) = (
        Cloud::start(&[(ONE, "ACTIVE")]).await,
        Cloud::start(&[(OTHER, "SHUTOFF")]).await,
    );
    let hypervisors = [
        hung.entry(world.path(), "hung"),
        healthy.entry(world.path(), "healthy"),
    ];
    let service = replica(&world, "lifecycle", &hypervisors.join(","), INTERVAL).await;
    let (running, off) = (MachineState::Running, MachineState::ShutOff);
    listed(&world, &[(ONE, running), (OTHER, off)], &[]).await;

    hung.hold(At::List);
    listed(&world, &[(ONE, running), (OTHER, off)], &["hung"]).await;
    eventually("the metrics name the silent hypervisor", PATIENCE, async || {
        let metrics = service.get("/metrics").await?;
        let is_set = |name: &str, value: u8| {
            let line = format!("vmwatch_hypervisor_silent{{hypervisor=\"{name}\"}} {value}");
            metrics.lines().any(|found| found == line)
        };
        (is_set("hung", 1) && is_set("healthy", 0))
            .then_some(())
            .ok_or_else(|| metrics.clone())
    })
    .await;
    let held = hung.held(At::List);
    let (mut slowest, lists) = (Duration::ZERO, healthy.lists());
    for _ in 0..100 {
        let began = Instant::now();
        assert_eq!(list(&world).await.vms.len(), 2);
        slowest = slowest.max(began.elapsed());
    }
    figure(
        "list_beside_hung_hypervisor_slowest_ms",
        slowest.as_secs_f64() * 1e3,
    );
    // Lists are answered from memory: if each of them queried the hypervisors, there would be a hundred queries.
    assert!(healthy.lists() - lists < 50, "{} -> {}", lists, healthy.lists());
    healthy.settle(OTHER, "ACTIVE");
    listed(&world, &[(ONE, running), (OTHER, running)], &["hung"]).await;
    // A query for the list of VMs that hangs ends at the time limit; until then no second query is sent.
    let again = hung.held(At::List) - held;
    assert!(again <= 5, "{again}");

    hung.settle(ONE, "SHUTOFF");
    hung.release(At::List);
    listed(&world, &[(ONE, off), (OTHER, running)], &[]).await;
}

#[tokio::test]
async fn inventory_stores_only_changes_and_is_updated_after_each_operation() {
    let world = World::new().await;
    let cloud = Cloud::start(&[(ONE, "SHUTOFF"), (TWO, "ACTIVE")]).await;
    let entry = cloud.entry(world.path(), "cloud");
    let first = replica(&world, "first", &entry, INTERVAL).await;
    let (running, off) = (MachineState::Running, MachineState::ShutOff);
    listed(&world, &[(ONE, off), (TWO, running)], &[]).await;
    let before = last_sequence(&world).await;
    lists_again(&cloud, 5).await;
    assert_eq!(last_sequence(&world).await, before, "nothing has changed");

    cloud.settle(ONE, "ACTIVE");
    listed(&world, &[(ONE, running), (TWO, running)], &[]).await;
    cloud.remove(TWO);
    listed(&world, &[(ONE, running)], &[]).await;
    lists_again(&cloud, 3).await;
    assert_eq!(last_sequence(&world).await, before + 2);

    // The interval is an hour, so only the end of an operation causes its VMs to be listed again, whichever replica
    // carries out the operation.
    first.0.kill9();
    cloud.settle(ONE, "SHUTOFF");
    let _seldom = [
        replica(&world, "second", &entry, "1h").await,
        replica(&world, "third", &entry, "1h").await,
    ];
    listed(&world, &[(ONE, off)], &[]).await;
    for _ in 0..3 {
        world.start(&operator(), ONE).await.unwrap();
        listed(&world, &[(ONE, running)], &[]).await;
        world.bus.call::<Stop>(&operator(), &target(ONE)).await.unwrap();
        listed(&world, &[(ONE, off)], &[]).await;
    }
}

/// A suspended replica that is resumed believes that it still holds its lease, although another replica has taken it.
#[tokio::test]
async fn replica_that_lost_its_lease_while_suspended_writes_nothing() {
    let world = World::new().await;
    let cloud = Cloud::start(&[(ONE, "SHUTOFF")]).await;
    let entry = cloud.entry(world.path(), "cloud");
    let replicas = [
        replica(&world, "a", &entry, INTERVAL).await,
        replica(&world, "b", &entry, INTERVAL).await,
    ];
    let before = last_sequence(&world).await;
    let written = async |count: u64| {
        eventually("the change is written", PATIENCE, async || {
            let writes = last_sequence(&world).await - before;
            (writes == count)
                .then_some(())
                .ok_or_else(|| format!("{writes} writes"))
        })
        .await;
    };
    let first = &replicas[usize::from(!polls(&replicas[0], "cloud").await)];
    first.0.pause();
    cloud.settle(ONE, "ACTIVE");
    written(1).await;
    first.0.resume();
    lists_again(&cloud, 10).await;
    written(1).await;
    cloud.settle(ONE, "SHUTOFF");
    written(2).await;
    lists_again(&cloud, 10).await;
    written(2).await;
    let mut polling = 0;
    for replica in &replicas {
        polling += u32::from(polls(replica, "cloud").await);
    }
    assert_eq!(polling, 1);
}

#[tokio::test]
async fn rolled_back_inventory_is_refilled_and_former_hypervisors_are_removed() {
    let world = World::new().await;
    let cloud = Cloud::start(&[(ONE, "ACTIVE")]).await;
    let (well, _, errors) = world.command(&["setup"]);
    assert!(well, "{errors}");
    let put = async |key: InventoryKey<'_>, value: Vec<u8>| {
        let subject = format!("$KV.{INVENTORY_BUCKET}.{key}");
        let stored = world
            .bus
            .publish_stored(subject, HeaderMap::new(), value.into(), PATIENCE);
        stored.await.unwrap();
    };
    let vm = InventoryVm {
        name: "ghost".to_owned(),
        state: MachineState::Running,
        labels: [].into(),
        refused: [].into(),
        changed_at_ms: 1,
    };
    let vm = serde_json::to_vec(&vm).unwrap();
    let hypervisor = InventoryHypervisor {
        reachable: true,
        late: false,
        listed_at_ms: Some(unix_millis()),
        interval_ms: 5000,
        keep_ms: None,
    };
    put(InventoryKey::Vm("former", instance_id(OTHER)), vm.clone()).await;
    put(
        InventoryKey::Hypervisor("former"),
        serde_json::to_vec(&hypervisor).unwrap(),
    )
    .await;
    put(InventoryKey::Vm("cloud", instance_id(TWO)), vm.clone()).await;

    let entry = cloud.entry(world.path(), "cloud");
    let _service = replica(&world, "lifecycle", &entry, INTERVAL).await;
    let all = [(ONE, MachineState::Running)];
    listed(&world, &all, &[]).await;

    // The delete markers of removed VMs have an expiry time.
    let client = async_nats::connect(world.nats.url()).await.unwrap();
    let jetstream = jetstream::new(client);
    let bucket = format!("KV_{INVENTORY_BUCKET}");
    let stream = jetstream.get_stream(&bucket).await.unwrap();
    for key in [
        InventoryKey::Vm("former", instance_id(OTHER)),
        InventoryKey::Vm("cloud", instance_id(TWO)),
    ] {
        let subject = format!("$KV.{INVENTORY_BUCKET}.{key}");
        let marker = stream.get_last_raw_message_by_subject(&subject).await.unwrap();
        assert!(marker.headers.get(NATS_MESSAGE_TTL).is_some(), "{marker:?}");
    }

    // The bucket is replaced by one with older contents.
    let config = stream.cached_info().config.clone();
    jetstream.delete_stream(&bucket).await.unwrap();
    // The service may have created the bucket again before the test does.
    let _ = jetstream.create_stream(config).await;
    put(InventoryKey::Vm("cloud", instance_id(TWO)), vm).await;
    cloud.add(OTHER, "SHUTOFF");
    let all = [(ONE, MachineState::Running), (OTHER, MachineState::ShutOff)];
    listed(&world, &all, &[]).await;
}
