//! The table of states: which calls Nova refuses, and which actions lifecycle-svc allows.

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use testkit::cloud::ADMIN;
use vmwatch_api::{
    actions::{Refusal, VmAction},
    lifecycle::{ForceStop, MachineState, State, Stop},
    wire::FaultKind,
};

use super::{Peer, scene};
use crate::support::{World, operator, target};

/// A client of Nova itself, to compare what Nova allows with what lifecycle-svc says.
struct Direct {
    client: Client<HttpConnector, Full<Bytes>>,
    token: String,
    compute: String,
}

impl Peer {
    async fn direct(&self) -> Direct {
        Direct::new(&self.auth_url, &self.username, &self.password, &self.project).await
    }
}

impl Direct {
    async fn new(auth_url: &str, name: &str, password: &str, project: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let domain = json!({"name": "Default"});
        let user = json!({"name": name, "password": password, "domain": domain});
        let login = json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": project, "domain": domain}},
        }});
        let request = Request::post(format!("{auth_url}/auth/tokens"))
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

fn calls() -> [Value; 4] {
    let reboot = |kind: &str| json!({"reboot": {"type": kind}});
    let [start, stop] = [json!({"os-start": null}), json!({"os-stop": null})];
    [start, stop, reboot("SOFT"), reboot("HARD")]
}

/// Checks that Nova refuses these calls for the server.
async fn assert_refused(nova: &Direct, vm: &str, calls: &[&Value]) {
    for call in calls {
        let (answered, body) = nova.ask("POST", &format!("{vm}/action"), call).await;
        assert_eq!(answered, StatusCode::CONFLICT, "{call}: {body}");
    }
}

/// A server, the status that Nova reports, the calls that Nova refuses, and the state and the actions that lifecycle-svc
/// shows.
type Case<'a> = (
    &'static str,
    &'static str,
    &'a [&'a Value],
    MachineState,
    &'a [VmAction],
);

/// The account is not an administrator's, so it does not see that the host of `host_down` is down.
#[tokio::test]
async fn actions_are_refused_in_the_states_in_which_nova_refuses_them() {
    use MachineState as Is;
    let (world, peer, _service) = scene().await;
    let nova = peer.direct().await;
    let [start, stop, soft, hard] = &calls();
    let all = [start, stop, soft, hard];
    let restart = [VmAction::Start];
    let off = [VmAction::ForceStop];
    let powered = [VmAction::Stop, VmAction::Reset, VmAction::ForceStop];
    let running = [
        VmAction::Stop,
        VmAction::Reboot,
        VmAction::Reset,
        VmAction::ForceStop,
    ];
    let cases: [Case<'_>; 18] = [
        ("paused", "PAUSED", &[start, stop, soft], Is::Paused, &restart),
        (
            "suspended",
            "SUSPENDED",
            &[start, stop, soft],
            Is::Suspended,
            &restart,
        ),
        ("shelved", "SHELVED", &all, Is::ShutOff, &restart),
        ("offloaded", "SHELVED_OFFLOADED", &all, Is::ShutOff, &restart),
        ("rescued", "RESCUE", &all, Is::Unknown, &[]),
        ("resized", "VERIFY_RESIZE", &all, Is::Running, &[]),
        ("resized_off", "VERIFY_RESIZE", &all, Is::ShutOff, &[]),
        ("resizing", "RESIZE", &all, Is::Unknown, &[]),
        ("reverting", "REVERT_RESIZE", &all, Is::Unknown, &[]),
        ("rebuilding", "REBUILD", &all, Is::Unknown, &[]),
        ("password", "PASSWORD", &all, Is::Running, &[]),
        ("migrating", "MIGRATING", &all, Is::Running, &[]),
        ("error", "ERROR", &[start, soft], Is::Running, &powered),
        ("error_off", "ERROR", &[start, soft], Is::Crashed, &off),
        ("dead", "ACTIVE", &[start], Is::Crashed, &off),
        ("out_of_sync", "SHUTOFF", &[soft], Is::Unknown, &[]),
        ("locked", "SHUTOFF", &all, Is::ShutOff, &[]),
        ("host_down", "ACTIVE", &[start], Is::Running, &running),
    ];
    for (name, status, refused, state, allowed) in cases {
        let vm = peer.server(name);
        let (_, shown) = nova.ask("GET", vm, &Value::Null).await;
        assert_eq!(shown["server"]["status"], status, "{name}");
        assert_eq!(shown["server"]["locked"], name == "locked", "{name}");
        assert_refused(&nova, vm, refused).await;
        let machine = world.bus.call::<State>(&operator(), &target(vm)).await.unwrap();
        assert_eq!(machine.state, state, "{name}: {machine:?}");
        assert_eq!(machine.allowed_actions, allowed, "{name}: {machine:?}");
    }
    check_allowed_actions(&world, &peer).await;
    check_refused_stops(&world, &peer).await;
}

async fn check_allowed_actions(world: &World, peer: &Peer) {
    for name in ["paused", "suspended", "shelved", "offloaded"] {
        let started = world.start(&operator(), peer.server(name)).await;
        assert_eq!(started.unwrap(), MachineState::Running, "{name}");
    }
    for name in ["error", "error_off", "dead"] {
        let vm = target(peer.server(name));
        let stopped = world.bus.call::<ForceStop>(&operator(), &vm).await.unwrap();
        assert_eq!(stopped.state, MachineState::ShutOff, "{name}");
        let started = world.start(&operator(), peer.server(name)).await;
        assert_eq!(started.unwrap(), MachineState::Running, "{name}");
    }
}

async fn check_refused_stops(world: &World, peer: &Peer) {
    for (name, reason) in [
        ("rescued", Refusal::Rescue),
        ("resized", Refusal::ResizeUnconfirmed),
        ("reverting", Refusal::Busy),
        ("password", Refusal::Busy),
        ("out_of_sync", Refusal::OutOfSync),
    ] {
        let vm = target(peer.server(name));
        let stopped = world.bus.call::<Stop>(&operator(), &vm).await;
        assert_eq!(stopped.unwrap_err().message, reason.text(), "{name}");
    }
}

/// Nova keeps a deleted server for some time, shows it and refuses all calls, but does not list it.
#[tokio::test]
async fn deleted_nova_server_is_not_found() {
    let (world, peer, _service) = scene().await;
    let vm = peer.server("soft_deleted");
    let nova = peer.direct().await;
    let (_, shown) = nova.ask("GET", vm, &Value::Null).await;
    assert_eq!(shown["server"]["status"], "SOFT_DELETED");
    assert_refused(&nova, vm, &calls().each_ref()).await;
    for fault in [
        world.state(vm).await.unwrap_err(),
        world.start(&operator(), vm).await.unwrap_err(),
    ] {
        assert_eq!(fault.kind, FaultKind::NotFound, "{fault}");
    }
}

/// Nova accepts an administrator's actions on a locked server; lifecycle-svc refuses them with any account. An
/// administrator also sees which host is down.
#[tokio::test]
async fn administrator_account_respects_locks_and_sees_hosts() {
    let (world, peer) = (World::new().await, Peer::new().await);
    let hypervisors = peer.by_admin(world.path(), "cloud");
    let _service = world
        .replica("lifecycle", &[("VMWATCH_HYPERVISORS", &hypervisors)])
        .await;
    let nova = Direct::new(&peer.auth_url, ADMIN.0, &peer.admin_password, "admin").await;

    let locked = peer.server("locked_for_admin");
    let fault = world.start(&operator(), locked).await.unwrap_err();
    assert_eq!(fault.message, Refusal::Locked.text());
    assert_eq!(world.state(locked).await.unwrap(), MachineState::ShutOff);
    let [start, ..] = calls();
    let (answered, body) = nova.ask("POST", &format!("{locked}/action"), &start).await;
    assert_eq!(answered, StatusCode::ACCEPTED, "{body}");
    let machine = world
        .bus
        .call::<State>(&operator(), &target(locked))
        .await
        .unwrap();
    assert_eq!(machine.state, MachineState::Running);
    assert_eq!(machine.allowed_actions, [], "{machine:?}");

    let down = peer.server("host_down");
    let (_, shown) = nova.ask("GET", down, &Value::Null).await;
    assert_eq!(shown["server"]["host_status"], "DOWN", "{shown}");
    let machine = world.bus.call::<State>(&operator(), &target(down)).await.unwrap();
    assert_eq!(machine.state, MachineState::Unknown);
    let mut reasons = machine.refused_actions.values();
    assert!(reasons.all(|reason| *reason == Refusal::HostDown), "{machine:?}");
}
