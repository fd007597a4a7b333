//! Tests large and slow clouds, and what a catalogue may contain.

use std::time::Duration;

use testkit::{
    PATIENCE,
    cloud::{Cloud, PASSWORD, USER, entry},
    eventually,
};
use vmwatch_api::{lifecycle::MachineState, vms::VmQuery};

use crate::support::{Replica, World, operator};

const VM: &str = "aaaaaaaa-1111-4111-8111-111111111111";

/// Starts a replica with these lines in the settings of the cloud.
fn service(world: &World, lines: &str) -> Replica {
    let file = format!("username = '{USER}'\nproject = 'vms'\n{lines}\n");
    let hypervisors = entry(world.path(), "cloud", &file, "password_file", PASSWORD);
    let settings = [
        ("VMWATCH_HYPERVISORS", hypervisors.as_str()),
        ("VMWATCH_HYPERVISOR_TIMEOUT", "2s"),
    ];
    world.spawn("lifecycle", &settings)
}

#[tokio::test]
async fn large_pages_are_listed_within_a_time_limit_per_page() {
    let world = World::new().await;
    let ids: Vec<_> = (0..8)
        .map(|index| format!("aaaaaaaa-0000-4000-8000-00000000000{index}"))
        .collect();
    let servers: Vec<_> = ids.iter().map(|id| (id.as_str(), "ACTIVE")).collect();
    let cloud = Cloud::start(&servers).await;
    // Four pages of 10 MiB, which together take longer than the time limit of one call.
    let large = "x".repeat(5 << 20);
    for id in &ids {
        cloud.label(id, &[("large", &large)], &[]);
    }
    cloud.page_size(2);
    cloud.delay_lists(Duration::from_millis(700));
    let _service = service(&world, &format!("auth_url = 'http://{}/identity'", cloud.address));
    eventually("all servers are listed", PATIENCE, async || {
        let listed = world
            .bus
            .call::<vmwatch_api::vms::ListWithoutMeasures>(&operator(), &VmQuery::default())
            .await
            .map_err(|fault| fault.to_string())?;
        (listed.vms.len() == ids.len())
            .then_some(())
            .ok_or_else(|| format!("{listed:?}"))
    })
    .await;
}

#[tokio::test]
async fn addresses_with_and_without_version_are_accepted() {
    for (auth, compute) in [
        ("identity", "/compute"),
        ("identity/", "/compute/"),
        ("identity/v3", "/compute/v2.1"),
        ("identity/v3/", "/compute/v2.1/"),
    ] {
        let (world, cloud) = (World::new().await, Cloud::start(&[(VM, "ACTIVE")]).await);
        cloud.regions(&[("here", compute)]);
        let service = service(&world, &format!("auth_url = 'http://{}/{auth}'", cloud.address));
        service.ready().await;
        assert_eq!(
            world.state(VM).await.unwrap(),
            MachineState::Running,
            "{auth} {compute}"
        );
    }
}

#[tokio::test]
async fn cloud_with_several_regions_requires_the_setting_region() {
    let (world, cloud) = (World::new().await, Cloud::start(&[(VM, "ACTIVE")]).await);
    cloud.regions(&[
        ("north", "/compute/v2.1"),
        ("south", "/nowhere"),
        ("north", "/nowhere"),
    ]);
    let auth_url = format!("auth_url = 'http://{}/identity/v3'", cloud.address);
    for (region, said) in [
        (
            String::new(),
            "the cloud has several regions: north, south; set region in the settings of the cloud",
        ),
        (
            "region = 'west'".to_owned(),
            "no public endpoint of a compute service in the region west; its regions: north, south",
        ),
    ] {
        let service = service(&world, &format!("{auth_url}\n{region}"));
        eventually("the log names the regions", PATIENCE, async || {
            let log = service.0.log();
            log.contains(said).then_some(()).ok_or(log)
        })
        .await;
    }
    let service = service(&world, &format!("{auth_url}\nregion = 'north'"));
    service.ready().await;
    assert_eq!(world.state(VM).await.unwrap(), MachineState::Running);
}
