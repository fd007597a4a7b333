//! Tests that must pass with the simulated cloud and with the real Keystone and Nova. They normally use the simulated
//! cloud. `./dev peer nova` starts the real services, passes their addresses in `VMWATCH_TEST_NOVA`, and runs the same
//! tests.

mod states;

use std::{collections::BTreeMap, env, fs, path::Path};

use futures::future::join_all;
use serde::Deserialize;
use testkit::{
    PATIENCE,
    cloud::{ADMIN, CREDENTIAL, Cloud, PASSWORD, USER, entry},
    eventually,
};
use vmwatch_api::{
    actions::Refusal,
    lifecycle::{ForceStop, MachineState, Reboot, RebootTarget, Stop},
    metrics::Limit,
    vms::VmQuery,
    wire::FaultKind,
};

use crate::support::{Replica, World, instance_id, operator, target};

const NOWHERE: &str = "dddddddd-9999-4999-8999-999999999999";

/// A server of the simulated cloud, in the same state as the real one of this name in deploy/peers/nova. Each test uses
/// its own servers, selected by name.
struct Simulated {
    name: &'static str,
    status: &'static str,
    task: Option<&'static str>,
    /// The state of the guest that the host reports, if it is not the usual one.
    power: Option<i64>,
}

const fn simulated(
    name: &'static str,
    status: &'static str,
    task: Option<&'static str>,
    power: Option<i64>,
) -> Simulated {
    Simulated {
        name,
        status,
        task,
        power,
    }
}

const SERVERS: [Simulated; 23] = [
    simulated("verbs", "SHUTOFF", None, None),
    simulated("credential", "SHUTOFF", None, None),
    simulated("crowd", "SHUTOFF", None, None),
    simulated("locked", "SHUTOFF", None, None),
    simulated("locked_for_admin", "SHUTOFF", None, None),
    simulated("paused", "PAUSED", None, None),
    simulated("suspended", "SUSPENDED", None, None),
    simulated("shelved", "SHELVED", None, None),
    simulated("offloaded", "SHELVED_OFFLOADED", None, None),
    simulated("rescued", "RESCUE", None, None),
    simulated("resized", "VERIFY_RESIZE", None, None),
    simulated("resized_off", "VERIFY_RESIZE", None, Some(4)),
    simulated("error", "ERROR", None, Some(1)),
    simulated("error_off", "ERROR", None, Some(4)),
    simulated("soft_deleted", "SOFT_DELETED", None, None),
    simulated("dead", "ACTIVE", None, Some(4)),
    simulated("out_of_sync", "SHUTOFF", None, Some(1)),
    simulated("resizing", "RESIZE", Some("resize_migrating"), None),
    simulated("reverting", "REVERT_RESIZE", Some("resize_reverting"), None),
    simulated("rebuilding", "REBUILD", Some("rebuilding"), None),
    simulated("password", "PASSWORD", Some("updating_password"), None),
    simulated("migrating", "MIGRATING", Some("migrating"), None),
    simulated("host_down", "ACTIVE", None, None),
];

/// A simulated or real cloud, in the format in which deploy/peers/nova describes the real cloud.
#[derive(Deserialize)]
struct Peer {
    auth_url: String,
    username: String,
    password: String,
    project: String,
    application_credential_id: String,
    application_credential_secret: String,
    admin_password: String,
    servers: BTreeMap<String, String>,
}

impl Peer {
    async fn new() -> Self {
        match env::var_os("VMWATCH_TEST_NOVA").filter(|file| !file.is_empty()) {
            Some(file) => serde_json::from_slice(&fs::read(file).unwrap()).unwrap(),
            None => Self::ours().await,
        }
    }

    async fn ours() -> Self {
        let cloud = Cloud::start(&[]).await;
        let mut servers = BTreeMap::new();
        for (number, server) in SERVERS.iter().enumerate() {
            let id = format!("aaaaaaaa-5555-4555-8555-{number:012}");
            cloud.add(&id, server.status);
            if let Some(task) = server.task {
                cloud.task(&id, task);
            }
            if let Some(power) = server.power {
                cloud.power(&id, power);
            }
            match server.name {
                "locked" | "locked_for_admin" => cloud.lock_server(&id),
                "host_down" => cloud.host(&id, "DOWN"),
                _ => {}
            }
            servers.insert(server.name.to_owned(), id);
        }
        Self {
            auth_url: format!("http://{}/identity/v3", cloud.address),
            username: USER.to_owned(),
            password: PASSWORD.to_owned(),
            project: "vms".to_owned(),
            application_credential_id: CREDENTIAL.0.to_owned(),
            application_credential_secret: CREDENTIAL.1.to_owned(),
            admin_password: ADMIN.1.to_owned(),
            servers,
        }
    }

    fn server(&self, name: &str) -> &str {
        &self.servers[name]
    }

    /// Returns an entry of `VMWATCH_HYPERVISORS` with this password.
    fn by_password(&self, folder: &Path, name: &str, password: &str) -> String {
        let file = format!(
            "auth_url = '{}'\nusername = '{}'\nproject = '{}'\n",
            self.auth_url, self.username, self.project
        );
        entry(folder, name, &file, "password_file", password)
    }

    /// Returns an entry of `VMWATCH_HYPERVISORS` with the administrator's account.
    fn by_admin(&self, folder: &Path, name: &str) -> String {
        let file = format!(
            "auth_url = '{}'\nusername = '{}'\nproject = 'admin'\nall_projects = true\n",
            self.auth_url, ADMIN.0
        );
        entry(folder, name, &file, "password_file", &self.admin_password)
    }

    /// Returns an entry of `VMWATCH_HYPERVISORS` with this secret of the application credential.
    fn by_credential(&self, folder: &Path, name: &str, secret: &str) -> String {
        let file = format!(
            "auth_url = '{}'\napplication_credential_id = '{}'\n",
            self.auth_url, self.application_credential_id
        );
        entry(folder, name, &file, "application_credential_secret_file", secret)
    }
}

/// Starts a cloud, a NATS server, and a replica that has logged in to the cloud with the password.
async fn scene() -> (World, Peer, Replica) {
    let (world, peer) = (World::new().await, Peer::new().await);
    let hypervisors = peer.by_password(world.path(), "cloud", &peer.password);
    let service = world
        .replica("lifecycle", &[("VMWATCH_HYPERVISORS", &hypervisors)])
        .await;
    (world, peer, service)
}

#[tokio::test]
async fn nova_server_can_be_started_stopped_and_rebooted() {
    let (world, peer, service) = scene().await;
    let vm = peer.server("verbs");
    let state = async || world.state(vm).await.unwrap();
    let start = async || world.start(&operator(), vm).await.unwrap();
    assert_eq!(state().await, MachineState::ShutOff);
    assert_eq!(start().await, MachineState::Running);
    assert_eq!(state().await, MachineState::Running);
    assert_eq!(start().await, MachineState::Running, "the VM runs already");
    for hard in [false, true] {
        let reboot = RebootTarget {
            instance_id: instance_id(vm),
            hard,
            hypervisor: None,
        };
        let rebooted = world.bus.call::<Reboot>(&operator(), &reboot).await.unwrap();
        assert_eq!(rebooted.state, MachineState::Running);
    }
    let stopped = world.bus.call::<Stop>(&operator(), &target(vm)).await.unwrap();
    assert_eq!(stopped.state, MachineState::ShutOff);
    assert_eq!(start().await, MachineState::Running);
    let stopped = world
        .bus
        .call::<ForceStop>(&operator(), &target(vm))
        .await
        .unwrap();
    assert_eq!(stopped.state, MachineState::ShutOff);
    assert_eq!(state().await, MachineState::ShutOff);

    let fault = world.start(&operator(), NOWHERE).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::NotFound, "{fault}");
    assert!(!service.0.log().contains(&peer.password));
}

#[tokio::test]
async fn application_credential_can_list_and_start_nova_servers() {
    let (world, peer) = (World::new().await, Peer::new().await);
    let secret = &peer.application_credential_secret;
    let hypervisors = peer.by_credential(world.path(), "cloud", secret);
    let service = world
        .replica("lifecycle", &[("VMWATCH_HYPERVISORS", &hypervisors)])
        .await;
    let all = VmQuery {
        limit: Limit::new(1000).unwrap(),
        ..VmQuery::default()
    };
    let list = world.vms(&operator(), &all).await;
    let mut listed: Vec<_> = list.vms.iter().map(|vm| vm.instance_id.as_str()).collect();
    listed.sort_unstable();
    // Nova does not list deleted servers.
    let mut expected: Vec<_> = peer.servers.values().map(String::as_str).collect();
    expected.retain(|id| *id != peer.server("soft_deleted"));
    expected.sort_unstable();
    assert_eq!(listed, expected);
    assert!(
        list.vms
            .iter()
            .all(|vm| vm.hypervisor.as_deref() == Some("cloud"))
    );

    let vm = peer.server("credential");
    assert_eq!(world.start(&operator(), vm).await.unwrap(), MachineState::Running);
    world.bus.call::<Stop>(&operator(), &target(vm)).await.unwrap();
    assert!(!service.0.log().contains(secret));
}

#[tokio::test]
async fn wrong_cloud_credentials_are_reported_without_the_secret() {
    let (world, peer) = (World::new().await, Peer::new().await);
    let entries = [
        peer.by_password(world.path(), "password", "hunter2"),
        peer.by_credential(world.path(), "credential", "hunter2"),
    ];
    for (name, hypervisors) in ["by-password", "by-credential"].into_iter().zip(entries) {
        let service = world.spawn(name, &[("VMWATCH_HYPERVISORS", &hypervisors)]);
        eventually(
            "the service reports that it is not ready",
            PATIENCE,
            async || match service.readiness().await {
                Err(reason) if reason.contains("no hypervisor answers") => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )
        .await;
        let fault = world.refused_start(&operator(), peer.server("verbs")).await;
        assert_eq!(fault.kind, FaultKind::Backend, "{fault}");
        assert!(!service.0.log().contains("hunter2"));
        service.0.kill9();
    }
}

/// Twenty callers read the server's state before one of them has started it. Nova answers 409 to the other start
/// actions, and yet all callers succeed.
#[tokio::test]
async fn concurrent_starts_of_one_nova_server_all_succeed() {
    let (world, peer, _service) = scene().await;
    let vm = peer.server("crowd");
    let contexts: Vec<_> = (0..20).map(|_| operator()).collect();
    let started = join_all(contexts.iter().map(|context| world.start(context, vm))).await;
    for state in started {
        assert_eq!(state.unwrap(), MachineState::Running);
    }
    world.bus.call::<Stop>(&operator(), &target(vm)).await.unwrap();
}

#[tokio::test]
async fn action_on_locked_nova_server_is_refused() {
    let (world, peer, _service) = scene().await;
    let vm = peer.server("locked");
    let fault = world.start(&operator(), vm).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Conflict, "{fault}");
    assert_eq!(fault.message, Refusal::Locked.text());
    assert_eq!(world.state(vm).await.unwrap(), MachineState::ShutOff);
}
