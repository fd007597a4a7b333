//! Tests that must pass with the simulated cloud and with the real Keystone and Nova. They normally use the simulated
//! cloud. `./dev peer nova` starts the real services, passes their addresses in `VMWATCH_TEST_NOVA`, and runs the same
//! tests.

use std::{collections::BTreeMap, env, fs, path::Path};

use bytes::Bytes;
use futures::future::join_all;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;
use serde_json::{Value, json};
use testkit::{
    PATIENCE,
    cloud::{CREDENTIAL, Cloud, PASSWORD, USER, entry},
    eventually,
};
use vmwatch_api::{
    actions::{Refusal, VmAction},
    lifecycle::{ForceStop, MachineState, Reboot, RebootTarget, State, Stop},
    vms::VmQuery,
    wire::FaultKind,
};

use crate::support::{Replica, World, instance_id, operator, target};

const NOWHERE: &str = "dddddddd-9999-4999-8999-999999999999";
/// The servers of the simulated cloud: name, id and status. Each test uses its own servers, selected by name. The server
/// `locked` is locked, and the guest of the server `error` runs.
const SERVERS: [(&str, &str, &str); 10] = [
    ("verbs", "aaaaaaaa-1111-4111-8111-111111111111", "SHUTOFF"),
    ("credential", "bbbbbbbb-2222-4222-8222-222222222222", "SHUTOFF"),
    ("crowd", "cccccccc-3333-4333-8333-333333333333", "SHUTOFF"),
    ("locked", "eeeeeeee-4444-4444-8444-444444444444", "SHUTOFF"),
    ("paused", "aaaaaaaa-5555-4555-8555-555555555555", "PAUSED"),
    ("suspended", "bbbbbbbb-5555-4555-8555-555555555555", "SUSPENDED"),
    (
        "shelved",
        "cccccccc-5555-4555-8555-555555555555",
        "SHELVED_OFFLOADED",
    ),
    ("rescued", "dddddddd-5555-4555-8555-555555555555", "RESCUE"),
    ("resized", "eeeeeeee-5555-4555-8555-555555555555", "VERIFY_RESIZE"),
    ("error", "ffffffff-5555-4555-8555-555555555555", "ERROR"),
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
        let cloud = Cloud::start(&SERVERS.map(|(_, id, status)| (id, status))).await;
        for (name, id, _) in SERVERS {
            match name {
                "locked" => cloud.lock_server(id),
                "error" => cloud.power(id, 1),
                _ => {}
            }
        }
        Self {
            auth_url: format!("http://{}/identity/v3", cloud.address),
            username: USER.to_owned(),
            password: PASSWORD.to_owned(),
            project: "vms".to_owned(),
            application_credential_id: CREDENTIAL.0.to_owned(),
            application_credential_secret: CREDENTIAL.1.to_owned(),
            servers: SERVERS
                .map(|(name, id, _)| (name.to_owned(), id.to_owned()))
                .into(),
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
    let list = world.vms(&operator(), &VmQuery::default()).await;
    let mut listed: Vec<_> = list.vms.iter().map(|vm| vm.instance_id.as_str()).collect();
    listed.sort_unstable();
    let mut expected: Vec<_> = peer.servers.values().map(String::as_str).collect();
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

/// A client of Nova itself, to compare what Nova allows with what lifecycle-svc says.
struct Direct {
    client: Client<HttpConnector, Full<Bytes>>,
    token: String,
    compute: String,
}

impl Direct {
    async fn new(peer: &Peer) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let domain = json!({"name": "Default"});
        let user = json!({"name": peer.username, "password": peer.password, "domain": domain});
        let login = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": peer.project, "domain": domain}},
        }});
        let request = Request::post(format!("{}/auth/tokens", peer.auth_url))
            .header("content-type", "application/json")
            .body(Full::from(login.to_string()))
            .unwrap();
        let answer = client.request(request).await.unwrap();
        let token = answer.headers()["x-subject-token"].to_str().unwrap().to_owned();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        let mut services = body["token"]["catalog"].as_array().unwrap().iter();
        let nova = services.find(|service| service["type"] == "compute").unwrap();
        let mut endpoints = nova["endpoints"].as_array().unwrap().iter();
        let public = endpoints
            .find(|endpoint| endpoint["interface"] == "public")
            .unwrap();
        let compute = public["url"].as_str().unwrap().trim_end_matches('/').to_owned();
        Self {
            client,
            token,
            compute,
        }
    }

    /// Sends a request about a server; returns status and body of the answer.
    async fn ask(&self, method: &str, path: &str, body: &Value) -> (StatusCode, Value) {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}/servers/{path}", self.compute))
            .header("x-auth-token", &self.token)
            .header("content-type", "application/json")
            .header("openstack-api-version", "compute 2.26")
            .body(Full::from(if body.is_null() {
                String::new()
            } else {
                body.to_string()
            }))
            .unwrap();
        let answer = self.client.request(request).await.unwrap();
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }
}

/// For each state: the status that Nova reports, the calls that it refuses, and the actions that lifecycle-svc allows.
#[tokio::test]
async fn actions_are_refused_in_the_states_in_which_nova_refuses_them() {
    let (world, peer, _service) = scene().await;
    let nova = Direct::new(&peer).await;
    let (start, stop) = (json!({"os-start": null}), json!({"os-stop": null}));
    let reboot = |kind: &str| json!({"reboot": {"type": kind}});
    let (soft, hard) = (reboot("SOFT"), reboot("HARD"));
    let all = [&start, &stop, &soft, &hard];
    let restart = [VmAction::Start];
    let powered = [VmAction::Stop, VmAction::Reset, VmAction::ForceStop];
    let cases: [(&str, &str, &[&Value], &[VmAction]); 7] = [
        ("paused", "PAUSED", &[&start, &stop, &soft], &restart),
        ("suspended", "SUSPENDED", &[&start, &stop, &soft], &restart),
        ("shelved", "SHELVED_OFFLOADED", &all, &restart),
        ("rescued", "RESCUE", &all, &[]),
        ("resized", "VERIFY_RESIZE", &all, &[]),
        ("error", "ERROR", &[&start, &soft], &powered),
        ("locked", "SHUTOFF", &[&start], &[]),
    ];
    for (name, status, refused, allowed) in cases {
        let vm = peer.server(name);
        let (_, shown) = nova.ask("GET", vm, &Value::Null).await;
        assert_eq!(shown["server"]["status"], status, "{name}");
        assert_eq!(shown["server"]["locked"], name == "locked", "{name}");
        for call in refused {
            let (answered, body) = nova.ask("POST", &format!("{vm}/action"), call).await;
            assert_eq!(answered, StatusCode::CONFLICT, "{name} {call}: {body}");
        }
        let machine = world.bus.call::<State>(&operator(), &target(vm)).await.unwrap();
        assert_eq!(machine.allowed_actions, allowed, "{name}: {machine:?}");
    }
    for name in ["paused", "suspended", "shelved"] {
        let started = world.start(&operator(), peer.server(name)).await;
        assert_eq!(started.unwrap(), MachineState::Running, "{name}");
    }
    for (name, reason) in [
        ("rescued", Refusal::Rescue),
        ("resized", Refusal::ResizeUnconfirmed),
    ] {
        let stopped = world
            .bus
            .call::<Stop>(&operator(), &target(peer.server(name)))
            .await;
        assert_eq!(stopped.unwrap_err().message, reason.text(), "{name}");
    }
    let error = target(peer.server("error"));
    let stopped = world.bus.call::<ForceStop>(&operator(), &error).await.unwrap();
    assert_eq!(stopped.state, MachineState::ShutOff);
    assert_eq!(
        world.start(&operator(), peer.server("error")).await.unwrap(),
        MachineState::Running
    );
}
