//! Tests the logins of enrolled agents at NATS, which auth-svc decides (auth callout), and the end of their connections,
//! with the configuration in deploy/nats.

pub(super) mod client;
mod fleet;
mod stale;

use std::{
    fs,
    time::{Duration, Instant},
};

use async_nats::ConnectOptions;
use futures::{StreamExt, future::join_all};
use nkeys::KeyPair;
use serde_json::{Value, json};
use testkit::{Nats, PATIENCE, Program, Secrets, Stack, StackBuilder, eventually, figure};
use vmwatch_api::{
    agents::status_subject,
    metrics::{SAMPLE_MESSAGE_BYTES, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX},
};

use self::client::{Agent, login, make_bucket, remove, revoke, signature};
use super::guest::raw::{Raw, message};

const REFUSED: &str = "Authorization Violation";

/// Subjects that an enrolled agent may neither publish nor subscribe to.
const FORBIDDEN: &[&str] = &[
    "vmwatch.v1.samples.other",
    "vmwatch.v1.agents.other.status",
    "vmwatch.v1.samples.*",
    "vmwatch.v1.samples.>",
    "vmwatch.v1.dead_letters.one",
    "vmwatch.v1.auth.login",
    "vmwatch.v1.lifecycle.start",
    "vmwatch.v1.metrics.vm.latest",
    "$JS.API.INFO",
    "$JS.API.STREAM.INFO.VMWATCH_SAMPLES",
    "$JS.API.STREAM.PURGE.VMWATCH_AUDIT",
    "$KV.vmwatch_agents.one",
    "$KV.vmwatch_agent_status.one",
    "$SYS.REQ.USER.AUTH",
    "$SYS.REQ.SERVER.PING.CONNZ",
    "$SYS.>",
    "_INBOX.x",
    "_INBOX_UAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.>",
    "_INBOX_vmwatch-auth.>",
    "*",
    ">",
];

fn builder() -> StackBuilder {
    Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .with_permissions()
}

async fn start() -> Stack {
    let stack = builder().start().await;
    make_bucket(&stack).await;
    stack
}

/// Publishes a sample, and waits until JetStream has stored it.
async fn publishes(agent: &mut Agent) {
    let inbox = agent.inbox("ack");
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}{}", agent.vm);
    agent.raw.send(format!("SUB {inbox} 1\r\n").as_bytes()).await;
    agent.raw.send(&message(&subject, Some(&inbox), &[], b"{}")).await;
    let stored = format!(r#""stream":"{SAMPLE_STREAM}""#);
    let output = agent.raw.settle_until(&stored).await;
    assert!(output.contains(&stored), "{output}");
}

/// The value of a counter of auth-svc with this label.
async fn counted(stack: &Stack, counter: &str, label: &str) -> u64 {
    let metrics = stack.replica(Program::Auth, 0).metrics().await;
    let start = format!("{counter}{{reason=\"{label}\"}} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&start));
    value.map_or(0, |value| value.parse().unwrap())
}

async fn refused_because(stack: &Stack, reason: &str) -> u64 {
    counted(stack, "vmwatch_callout_refused_total", reason).await
}

#[tokio::test]
async fn enrolled_agent_may_only_publish_its_samples_and_status() {
    let stack = start().await;
    let mut agent = Agent::enrolled(&stack, "one").await;
    agent.log_in(stack.nats.url()).await;
    publishes(&mut agent).await;

    let client = stack.bus.client_for_tests();
    let status = status_subject(&"one".parse().unwrap());
    let mut statuses = client.subscribe(status.clone()).await.unwrap();
    stack.bus.settled().await;
    agent.raw.send(&message(&status, None, &[], b"{}")).await;
    let received = tokio::time::timeout(PATIENCE, statuses.next()).await;
    assert_eq!(received.unwrap().unwrap().subject.as_str(), status);

    for subject in FORBIDDEN {
        agent.raw.send(format!("SUB {subject} 7\r\n").as_bytes()).await;
        agent.raw.send(&message(subject, None, &[], b"{}")).await;
        let output = agent.raw.settle().await;
        for what in ["Publish", "Subscription"] {
            let violation = format!("Permissions Violation for {what} to \"{subject}\"");
            assert!(output.contains(&violation), "{subject}: {output}");
        }
    }
    // Reply subjects are not checked, but stay in the agents' account.
    agent
        .raw
        .send(&message(&status, Some("vmwatch.v1.auth.login"), &[], b"{}"))
        .await;
    assert!(!agent.raw.settle().await.contains("Violation"));

    for subscription in 2..6 {
        let inbox = agent.inbox("more");
        agent
            .raw
            .send(format!("SUB {inbox} {subscription}\r\n").as_bytes())
            .await;
    }
    assert!(
        !agent.raw.settle().await.contains("-ERR"),
        "five subscriptions are allowed"
    );
    let inbox = agent.inbox("sixth");
    agent.raw.send(format!("SUB {inbox} 6\r\n").as_bytes()).await;
    assert!(
        agent
            .raw
            .settle()
            .await
            .contains("maximum subscriptions exceeded")
    );
    let large = vec![b'x'; SAMPLE_MESSAGE_BYTES + 1];
    agent
        .raw
        .send(&message("vmwatch.v1.samples.one", None, &[], &large))
        .await;
    assert!(agent.raw.settle().await.contains("Maximum Payload Violation"));
}

#[tokio::test]
async fn only_the_owner_of_a_valid_key_can_log_in_without_password() {
    let stack = start().await;
    let mut agent = Agent::enrolled(&stack, "one").await;
    let (unknown, key) = (KeyPair::new_user(), agent.key.clone());
    let refused = async |reason: &str, options: &dyn Fn(&str) -> Value| {
        let before = refused_because(&stack, reason).await;
        let mut raw = Raw::open(stack.nats.url()).await;
        let output = login(&mut raw, options).await;
        assert!(
            output.contains(REFUSED) && !output.contains("PONG"),
            "{reason}: {output}"
        );
        let after = refused_because(&stack, reason).await;
        assert_eq!(after, before + 1, "{reason}");
    };
    let nkey = agent.key.public_key();
    let with = |name: &str, value: &str, nonce: &str| {
        let mut options = json!({ "nkey": nkey, "sig": signature(&key, nonce) });
        options[name] = value.into();
        options
    };
    refused("unsigned", &|_| json!({})).await;
    refused("unsigned", &|_| json!({ "nkey": nkey })).await;
    refused("unsigned", &|nonce| json!({ "sig": signature(&key, nonce) })).await;
    refused("signature", &|nonce| {
        with("sig", &signature(&unknown, nonce), nonce)
    })
    .await;
    let mut other = Raw::open(stack.nats.url()).await;
    let nonce_of_other = client::nonce(&mut other).await;
    refused("signature", &|nonce| {
        with("sig", &signature(&key, &nonce_of_other), nonce)
    })
    .await;
    refused("signature", &|nonce| with("nkey", &unknown.public_key(), nonce)).await;
    for name in ["user", "pass", "auth_token"] {
        refused("other_credential", &|nonce| with(name, &nkey, nonce)).await;
    }
    refused("other_credential", &|_| json!({ "user": "one", "pass": "guess" })).await;
    refused("other_credential", &|_| json!({ "auth_token": "guess" })).await;
    let own = |key: &KeyPair, nonce: &str| json!({ "nkey": key.public_key(), "sig": signature(key, nonce) });
    refused("unknown", &|nonce| own(&unknown, nonce)).await;
    let revoked = Agent::enrolled(&stack, "two").await;
    revoke(&stack, "two", &revoked.key).await;
    refused("unknown", &|nonce| own(&revoked.key, nonce)).await;

    // Wrong passwords of the services' users do not reach auth-svc.
    let before = refused_because(&stack, "other_credential").await;
    let mut raw = Raw::open(stack.nats.url()).await;
    let output = login(
        &mut raw,
        &|_| json!({ "user": "vmwatch-gateway", "pass": "guess" }),
    )
    .await;
    assert!(output.contains(REFUSED), "{output}");
    assert_eq!(refused_because(&stack, "other_credential").await, before);
    for user in ["vmwatch-gateway", "vmwatch-operator"] {
        stack.nats.connect_as("a test", user).await;
    }
    agent.log_in(stack.nats.url()).await;
    publishes(&mut agent).await;
}

/// The key with which auth-svc logs in to the system account permits only what the callout and revocations need.
#[tokio::test]
async fn key_of_auth_svc_cannot_control_nats() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = Secrets::make(folder.path());
    let seed = fs::read_to_string(secrets.callout_file("nkey-seed")).unwrap();
    let key = KeyPair::from_seed(seed.trim()).unwrap();
    let nats = Nats::start_with(folder.path(), Some(secrets)).await;
    let mut raw = Raw::open(nats.url()).await;
    let options = |nonce: &str| json!({ "nkey": key.public_key(), "sig": signature(&key, nonce) });
    let output = login(&mut raw, &options).await;
    assert!(output.contains("PONG"), "{output}");
    for subject in [
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.SERVER.PING.SUBSZ",
        "$SYS.REQ.SERVER.made-up.RELOAD",
        "$SYS.REQ.SERVER.made-up.LDM",
        "$SYS.REQ.ACCOUNT.AGENTS.CONNZ",
        "$SYS.REQ.USER.AUTH",
        "vmwatch.v1.auth.login",
    ] {
        raw.send(&message(subject, None, &[], b"{}")).await;
        let violation = format!("Permissions Violation for Publish to \"{subject}\"");
        let output = raw.settle().await;
        assert!(output.contains(&violation), "{output}");
    }
    for subject in [
        "$SYS.>",
        "$SYS.REQ.USER.AUTH",
        "$SYS.REQ.USER.AUTH other",
        "_INBOX.>",
        ">",
    ] {
        raw.send(format!("SUB {subject} 1\r\n").as_bytes()).await;
        let output = raw.settle().await;
        assert!(
            output.contains("Permissions Violation for Subscription"),
            "{subject}: {output}"
        );
    }
}

#[tokio::test]
async fn a_key_that_becomes_invalid_loses_its_connections() {
    let stack = start().await;
    let mut untouched = Agent::enrolled(&stack, "untouched").await;
    untouched.log_in(stack.nats.url()).await;
    for way in ["revoked", "replaced", "removed"] {
        let mut agent = Agent::enrolled(&stack, way).await;
        agent.log_in(stack.nats.url()).await;
        publishes(&mut agent).await;
        match way {
            "revoked" => revoke(&stack, way, &agent.key).await,
            "replaced" => {
                stack.enrol(way).await;
            }
            _ => remove(&stack, way).await,
        }
        agent.raw.closed().await;
        let output = agent.try_log_in(stack.nats.url()).await;
        assert!(output.contains(REFUSED), "{way}: {output}");
    }
    let ended = counted(&stack, "vmwatch_callout_connections_ended_total", "revoked").await;
    assert!(ended >= 3, "{ended}");
    publishes(&mut untouched).await;
}

#[tokio::test]
async fn revocation_ends_connections_on_all_servers_of_a_cluster() {
    let stack = builder()
        .replicas(Program::Auth, 2)
        .with_nats_cluster(3)
        .start()
        .await;
    make_bucket(&stack).await;
    let urls = stack.nats.urls();
    let mut agents = Vec::new();
    for (index, url) in urls.iter().enumerate() {
        let vm = format!("vm-{index}");
        let mut first = Agent::enrolled(&stack, &vm).await;
        first.log_in(url).await;
        let mut second = first.cloned(&stack).await;
        second.log_in(urls[(index + 1) % urls.len()]).await;
        agents.extend([first, second]);
    }
    // The target is one second; a busy machine may take longer.
    let revocations = agents.chunks_mut(2).map(async |pair| {
        let began = Instant::now();
        revoke(&stack, &pair[0].vm, &pair[0].key).await;
        join_all(pair.iter_mut().map(|agent| agent.raw.closed())).await;
        began.elapsed()
    });
    let longest = join_all(revocations).await.into_iter().max().unwrap();
    figure(
        "callout_revocation_on_three_servers_ms",
        longest.as_secs_f64() * 1e3,
    );
    for (index, url) in urls.iter().enumerate() {
        let output = agents[2 * index].try_log_in(url).await;
        assert!(output.contains(REFUSED), "{output}");
    }
}

#[tokio::test]
async fn auth_svc_with_callout_stops_with_and_without_nats() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    let [first, second] = [0, 1].map(|index| &stack.replica(Program::Auth, index).process);
    assert!(first.terminate(PATIENCE).await.success());
    stack.nats.server.kill9();
    assert!(second.terminate(PATIENCE).await.success());
}

#[tokio::test]
async fn third_connection_of_a_key_ends_the_oldest() {
    let stack = start().await;
    let mut first = Agent::enrolled(&stack, "one").await;
    first.log_in(stack.nats.url()).await;
    let mut others = Vec::new();
    for _ in 0..2 {
        let mut next = first.cloned(&stack).await;
        next.log_in(stack.nats.url()).await;
        others.push(next);
    }
    first.raw.closed().await;
    for agent in &mut others {
        publishes(agent).await;
    }
}

#[tokio::test]
async fn agents_stay_connected_while_auth_svc_is_down() {
    let stack = start().await;
    let mut connected = Agent::enrolled(&stack, "connected").await;
    let mut revoked = Agent::enrolled(&stack, "revoked").await;
    let mut new = Agent::enrolled(&stack, "new").await;
    connected.log_in(stack.nats.url()).await;
    revoked.log_in(stack.nats.url()).await;

    let auth = stack.replica(Program::Auth, 0);
    auth.process.kill9();
    publishes(&mut connected).await;
    let output = new.try_log_in(stack.nats.url()).await;
    assert!(
        !output.contains("PONG"),
        "nobody has decided on this login: {output}"
    );
    revoke(&stack, "revoked", &revoked.key).await;
    // The client of a real agent retries until it is let in.
    let options = ConnectOptions::new()
        .nkey(new.key.seed().unwrap())
        .retry_on_initial_connect()
        .reconnect_delay_callback(|_| Duration::from_millis(100));
    let waiting = options.connect(stack.nats.url()).await.unwrap();

    auth.restart().await;
    eventually("the new agent connects", PATIENCE, async || {
        let state = waiting.connection_state();
        let is_connected = state == async_nats::connection::State::Connected;
        is_connected.then_some(()).ok_or(format!("{state}"))
    })
    .await;
    revoked.raw.closed().await;
    publishes(&mut connected).await;
}
