//! Tests an agent that is enrolled, or that enrols itself.

use std::{fs, net::SocketAddr, time::Duration};

use async_nats::jetstream::stream::{Config, RetentionPolicy};
use futures::StreamExt;
use nkeys::KeyPair;
use serde_json::{Value, json};
use testkit::{Nats, PATIENCE, Process, eventually, free_port};
use vmwatch_api::{
    agents::AgentStatus,
    metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX},
};
use vmwatch_blocks::{SAMPLE_LIMITS, decode_sample};
use vmwatch_service::health::probe;

use super::{
    Vm,
    gateway::{Answer, Certificates, FakeGateway},
};

/// A running agent with a health listener.
struct Agent {
    process: Process,
    health: SocketAddr,
}

impl Agent {
    fn start(vm: &Vm, settings: &[(&str, &str)]) -> Self {
        let health = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut spec = vm.spec("agent", &[]);
        let state = vm.state().display().to_string();
        let listen = health.to_string();
        let own = [
            ("VMWATCH_AGENT_SPOOL_DIR", state.as_str()),
            ("VMWATCH_AGENT_PROCESSES", "top:2"),
            ("VMWATCH_NATS_PING_INTERVAL", "300ms"),
            ("VMWATCH_HEALTH_LISTEN", &listen),
        ];
        let all = own.iter().chain(settings);
        spec.env
            .extend(all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let process = Process::start(spec);
        Self { process, health }
    }

    async fn is_unready_because(&self, reason: &str) {
        eventually("the agent says why it is not ready", PATIENCE, async || {
            let found = probe(self.health).err().unwrap_or_default();
            found.contains(reason).then_some(()).ok_or(found)
        })
        .await;
        assert_eq!(self.process.ended(), None);
    }

    async fn is_ready(&self) {
        eventually("the agent is ready", PATIENCE, async || probe(self.health)).await;
    }
}

/// The lines of NATS's configuration that let the holders of these keys in with the permissions of an agent. Clients without
/// credentials may do everything.
fn users(keys: &[&str]) -> String {
    let agent = |key: &&str| {
        format!(
            "{{ nkey: {key}, permissions: {{
                publish: [\"vmwatch.v1.samples.vm-1\", \"vmwatch.v1.agents.vm-1.status\"]
                subscribe: [\"_INBOX_{key}.>\"]
            }} }}"
        )
    };
    let agents: Vec<_> = keys.iter().map(agent).collect();
    format!(
        "authorization {{ users: [{{ user: test, password: test }}\n{}] }}\nno_auth_user: test",
        agents.join("\n")
    )
}

fn reconfigure(nats: &Nats, vm: &Vm, users: &str) {
    nats.configure(vm.folder.path(), "", users);
    nats.server.reload();
}

/// A key that nobody has. The server sends a nonce only if it has at least one nkey user.
fn foreign_key() -> String {
    KeyPair::new_user().public_key()
}

async fn sample_stream(nats: &Nats) -> async_nats::jetstream::stream::Stream {
    let bus = nats.connect("test").await;
    let config = Config {
        name: SAMPLE_STREAM.to_owned(),
        subjects: vec![format!("{SAMPLE_SUBJECT_PREFIX}*")],
        retention: RetentionPolicy::WorkQueue,
        ..Config::default()
    };
    bus.jetstream_for_tests().create_stream(config).await.unwrap()
}

async fn stores(stream: &async_nats::jetstream::stream::Stream, count: u64) {
    eventually("the stream receives samples", PATIENCE, async || {
        let info = stream.get_info().await.map_err(|error| error.to_string())?;
        let messages = info.state.messages;
        (messages >= count).then_some(()).ok_or(format!("{messages}"))
    })
    .await;
}

#[tokio::test]
async fn agent_enrols_itself_and_logs_in_with_its_key_once_nats_lets_it_in() {
    let vm = Vm::new();
    let foreign = foreign_key();
    let nats = Nats::start_configured(vm.folder.path(), "", &users(&[&foreign])).await;
    let messages = sample_stream(&nats).await;
    let bus = nats.connect("test").await;
    let mut statuses = bus
        .client_for_tests()
        .subscribe("vmwatch.v1.agents.*.status")
        .await
        .unwrap();
    let gateway = FakeGateway::start(&[
        Answer::problem(503, ""),
        Answer::Enrols(vec![nats.url().to_owned()]),
    ])
    .await;
    let token = vm.token(1);
    let settings = [
        ("VMWATCH_GATEWAY_URL", gateway.url.as_str()),
        ("VMWATCH_JOIN_TOKEN_FILE", &token),
    ];
    let agent = Agent::start(&vm, &settings);
    agent
        .is_unready_because("not enrolled: the gateway is not available")
        .await;
    // A refused login is not final, because the service that checks logins may be unreachable.
    agent
        .is_unready_because("NATS refuses the login of this agent")
        .await;

    let key = vm.record()["public_key"].as_str().unwrap().to_owned();
    reconfigure(&nats, &vm, &users(&[&foreign, &key]));
    stores(&messages, 3).await;
    agent.is_ready().await;
    let first = messages.get_raw_message(1).await.unwrap();
    assert_eq!(first.subject.as_str(), "vmwatch.v1.samples.vm-1");
    assert_eq!(
        first.headers.get("Vmwatch-Utc-Offset").unwrap().as_str(),
        "+08:00"
    );
    assert_eq!(
        decode_sample(&first.payload, SAMPLE_LIMITS)
            .unwrap()
            .instance_id
            .as_str(),
        "vm-1"
    );

    let status = tokio::time::timeout(PATIENCE, statuses.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(status.subject.as_str(), "vmwatch.v1.agents.vm-1.status");
    let status: AgentStatus = serde_json::from_slice(&status.payload).unwrap();
    assert_eq!(status.version.as_str(), env!("CARGO_PKG_VERSION"));
    assert!(status.kernel.is_some() && status.boot_id.is_some());
    // The agent announces itself on each connection.
    nats.server.kill9();
    nats.restart().await;
    let bus = nats.connect("test").await;
    let mut statuses = bus
        .client_for_tests()
        .subscribe("vmwatch.v1.agents.*.status")
        .await
        .unwrap();
    bus.client_for_tests().flush().await.unwrap();
    reconfigure(&nats, &vm, &users(&[&foreign]));
    agent
        .is_unready_because("NATS refuses the login of this agent")
        .await;
    reconfigure(&nats, &vm, &users(&[&foreign, &key]));
    tokio::time::timeout(PATIENCE, statuses.next())
        .await
        .unwrap()
        .unwrap();

    // An agent that is enrolled needs neither gateway nor token.
    fs::remove_file(token).unwrap();
    let count = gateway.requests().len();
    assert!(agent.process.terminate(PATIENCE).await.success());
    agent.process.start_again();
    agent.is_ready().await;
    assert_eq!(gateway.requests().len(), count);
    let seed = fs::read_to_string(vm.identity().join("agent.seed")).unwrap();
    let seed = seed.lines().next().unwrap();
    assert!(!agent.process.log().contains(seed), "the seed is secret");
}

#[tokio::test]
async fn agent_reports_over_websocket_with_the_certificate_authorities_of_its_enrolment() {
    let vm = Vm::new();
    let certificates = Certificates::new(false);
    let file = |name: &str, content: &str| {
        let path = vm.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let (certificate, key_file) = (
        file("nats.crt", &certificates.certificate),
        file("nats.key", &certificates.key),
    );
    let port = free_port();
    let websocket = include_str!("../../../deploy/nats/websocket.conf")
        .replace("0.0.0.0:8443", &format!("127.0.0.1:{port}"))
        .replace("/etc/vmwatch/nats-secrets/tls.crt", &certificate)
        .replace("/etc/vmwatch/nats-secrets/tls.key", &key_file);
    let url = format!("wss://127.0.0.1:{port}");
    let gateway = FakeGateway::start(&[Answer::EnrolsWith(url, certificates.ca)]).await;
    assert_eq!(vm.enrols(&gateway.url, &[]).await.0, 0);
    let key = vm.record()["public_key"].as_str().unwrap().to_owned();
    let config = format!("{}\n{websocket}", users(&[&key]));
    let nats = Nats::start_configured(vm.folder.path(), "", &config).await;
    let messages = sample_stream(&nats).await;
    let agent = Agent::start(&vm, &[]);
    stores(&messages, 3).await;
    agent.is_ready().await;
}

#[tokio::test]
async fn static_login_that_may_not_publish_the_status_publishes_samples() {
    let vm = Vm::new();
    let password = vm.folder.path().join("password");
    fs::write(&password, "secret").unwrap();
    let users = "authorization { users: [
        { user: test, password: test }
        { user: old, password: secret, permissions: {
            publish: [\"vmwatch.v1.samples.vm-1\"], subscribe: [\"_INBOX_old.>\"]
        } }
    ] }
    no_auth_user: test";
    let nats = Nats::start_configured(vm.folder.path(), "", users).await;
    let messages = sample_stream(&nats).await;
    let password = password.display().to_string();
    let settings = [
        ("VMWATCH_NATS_URL", nats.url()),
        ("VMWATCH_NATS_USER", "old"),
        ("VMWATCH_NATS_PASSWORD_FILE", &password),
        ("VMWATCH_AGENT_VM_INTERVAL", "200ms"),
        ("VMWATCH_AGENT_PROCESS_INTERVAL", "200ms"),
    ];
    let agent = Agent::start(&vm, &settings);
    stores(&messages, 5).await;
    agent.is_ready().await;
    eventually("NATS denied the status", PATIENCE, async || {
        let log = agent.process.log();
        log.to_lowercase()
            .contains("permissions violation")
            .then_some(())
            .ok_or(log)
    })
    .await;
}

/// Changes what the platform said of this VM at the enrolment, as if another VM had been enrolled.
fn enrolled_elsewhere(vm: &Vm) -> Option<()> {
    let mut record = vm.record();
    let (source, _) = record["platform"].as_str()?.split_once(':')?;
    record["platform"] = json!(format!("{source}:another-vm"));
    fs::write(vm.identity().join("enrollment.json"), record.to_string()).unwrap();
    Some(())
}

#[tokio::test]
async fn clone_publishes_nothing_and_waits_for_an_enrolment_of_its_own() {
    let vm = Vm::new();
    let nats = Nats::start_configured(vm.folder.path(), "", &users(&[&foreign_key()])).await;
    let messages = sample_stream(&nats).await;
    let gateway = FakeGateway::start(&[Answer::Enrols(vec![nats.url().to_owned()])]).await;
    assert_eq!(vm.enrols(&gateway.url, &[]).await.0, 0);
    let original = vm.record()["public_key"].clone();
    if enrolled_elsewhere(&vm).is_none() {
        eprintln!("NOT TESTED: this machine has no identity that a clone could differ in");
        return;
    }
    // The key of the original would be let in.
    let key = original.as_str().unwrap();
    reconfigure(&nats, &vm, &users(&[&foreign_key(), key]));
    let sample = format!("{:020}.sample", 0);
    fs::write(vm.state().join(&sample), "a sample of the original").unwrap();

    let agent = Agent::start(&vm, &[]);
    agent.is_unready_because("this VM is a clone").await;
    agent
        .is_unready_because("vmwatch-agent enroll --gateway URL")
        .await;
    let aside = |name: &str| {
        let names = fs::read_dir(vm.state())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let found: Vec<_> = names
            .filter(|found| found.starts_with(&format!("{name}.clone-")))
            .collect();
        assert_eq!(found.len(), 1, "{name}");
        vm.state().join(&found[0])
    };
    let text = fs::read_to_string(aside("identity").join("enrollment.json")).unwrap();
    let moved: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(moved["public_key"], original);
    assert!(aside("samples").join(&sample).exists() && !vm.state().join(&sample).exists());
    // A restart changes nothing.
    assert!(agent.process.terminate(Duration::from_secs(5)).await.success());
    agent.process.start_again();
    agent.is_unready_because("this VM is a clone").await;
    assert_eq!(messages.get_info().await.unwrap().state.last_sequence, 0);

    // Another enrolment gives the clone a key of its own; the waiting agent takes it.
    assert_eq!(vm.enrols(&gateway.url, &[]).await.0, 0);
    let own = vm.record()["public_key"].clone();
    assert_ne!(own, original);
    reconfigure(&nats, &vm, &users(&[&foreign_key(), own.as_str().unwrap()]));
    stores(&messages, 2).await;
    agent.is_ready().await;
}
