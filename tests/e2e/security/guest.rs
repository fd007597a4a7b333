//! Tests a compromised guest: everything that its agent's credential permits on NATS, with a client that writes
//! protocol lines to a plain socket and follows no rules of NATS clients.
//!
//! The guest must not affect other streams and KV buckets, the database, the memory of NATS, or the delay of other VMs'
//! samples.

#![allow(clippy::cast_precision_loss, reason = "the printed figures are small numbers")]

mod filter;
mod flood;
pub(super) mod raw;

use std::{collections::BTreeMap, fs, time::Duration};

use futures::TryStreamExt;
use testkit::{ADMIN, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    agents::STATUS_SUBJECTS,
    alerts::evaluation::EVALUATION_STREAM,
    metrics::{DEAD_LETTER_STREAM, SAMPLE_MESSAGE_BYTES, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX},
};
use vmwatch_blocks::Encoder;

use self::raw::message;
use super::callout::client::Agent;
use crate::ingest_support::{Publisher, count};

/// The VM of the compromised guest, and another one.
const GUEST: &str = "guest";
const OTHER: &str = "other";
/// The subject of the guest's own samples.
const OWN: &str = "vmwatch.v1.samples.guest";
/// The subject of the status messages of the guest's own agent.
const STATUS: &str = "vmwatch.v1.agents.guest.status";
/// A valid status message.
const VALID_STATUS: &[u8] = br#"{"version":"0.1.0","architecture":"x86_64"}"#;
/// The stream of the KV bucket with the status of agents, which the guest may change for its own VM.
const STATUS_STREAM: &str = "KV_vmwatch_agent_status";

/// Subjects that have a meaning in the services' account. The test uses each as subject and as reply subject.
const SUBJECTS: &[&str] = &[
    "$KV.vmwatch_sessions.made-up",
    // SHA-256 of "admin": the key of that user's sessions.
    "$KV.vmwatch_user_sessions.8c6976e5b5410415bde908bd4dee15dfb167a9c873fc4bb8a81f6f2ab448a918",
    "$KV.vmwatch_login_failures.user.8c6976e5b5410415bde908bd4dee15dfb167a9c873fc4bb8a81f6f2ab448a918",
    "$KV.vmwatch_join_tokens.00112233445566ff",
    "$KV.vmwatch_tokens.00112233445566ff",
    "$KV.vmwatch_agents.guest",
    "$KV.vmwatch_agent_status.guest",
    "$KV.vmwatch_operations.made-up",
    "$JS.API.STREAM.PURGE.KV_vmwatch_sessions",
    "$JS.API.STREAM.DELETE.VMWATCH_AUDIT",
    "$JS.API.STREAM.INFO.VMWATCH_SAMPLES",
    "$JS.API.CONSUMER.MSG.NEXT.VMWATCH_SAMPLES.store",
    "$JS.ACK.VMWATCH_SAMPLES.store.1.1.1.1.0",
    "$JS.FC.KV_vmwatch_sessions.x.y",
    "$SRV.PING",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.USER.INFO",
    "_R_.made-up",
    "_INBOX_vmwatch-gateway.>",
    "vmwatch.v1.audit.auth.login",
    "vmwatch.v1.auth.login",
    "vmwatch.v1.dead_letters.guest",
    "vmwatch.v1.events.sample.guest",
    "vmwatch.v1.lifecycle.start",
    "vmwatch.v1.metrics.vm.latest",
    "vmwatch.v1.samples.other",
    "vmwatch.v1.agents.other.status",
    "vmwatch.v1.agents.*.status",
    "*",
    ">",
];

/// Headers that JetStream or the NATS server interprets.
const HEADERS: &[&[(&str, &str)]] = &[
    &[],
    &[("Nats-Msg-Id", "other:2026-01-01T00:00:00.000000:0")],
    &[("Nats-Expected-Stream", SAMPLE_STREAM), ("Nats-TTL", "1s")],
    &[("Nats-Rollup", "all")],
    &[("KV-Operation", "PURGE")],
    &[("Nats-Trace-Dest", "vmwatch.v1.audit.auth.login")],
    &[
        ("Nats-Schedule", "@every 1s"),
        ("Nats-Schedule-Target", "vmwatch.v1.samples.other"),
    ],
    &[("Nats-Batch-Id", "x"), ("Nats-Batch-Sequence", "1")],
];

/// The last sequence number and the size in bytes of every stream, including the streams of KV buckets. Of the streams
/// in [`REWRITTEN`] only the number of messages is compared.
type Fingerprint = BTreeMap<String, (u64, u64)>;

/// Number of limits of a VM that a guest can be above.
const LIMITS: u64 = 6;

/// Streams whose messages lifecycle-svc replaces at regular intervals.
const REWRITTEN: [&str; 2] = ["KV_vmwatch_hypervisor_leases", "KV_vmwatch_inventory"];

async fn fingerprint(stack: &Stack) -> Fingerprint {
    let streams = stack.bus.jetstream_for_tests().streams();
    let streams: Vec<_> = streams.try_collect().await.unwrap();
    let of_one = |info: async_nats::jetstream::stream::Info| {
        let state = info.state;
        let compared = if REWRITTEN.contains(&info.config.name.as_str()) {
            (state.messages, 0)
        } else {
            (state.last_sequence, state.bytes)
        };
        (info.config.name, compared)
    };
    // The guest may change the stream of samples, and each stored sample part adds an evaluation record. Dead letters and the
    // guest's status are checked separately.
    let of_guest = [
        SAMPLE_STREAM,
        EVALUATION_STREAM,
        DEAD_LETTER_STREAM,
        STATUS_STREAM,
    ];
    let of_others = |name: &str| !of_guest.contains(&name);
    streams
        .into_iter()
        .map(of_one)
        .filter(|(name, _)| of_others(name))
        .collect()
}

async fn messages(stack: &Stack, stream: &str) -> u64 {
    let stream = stack.bus.jetstream_for_tests().get_stream(stream).await;
    stream.unwrap().cached_info().state.messages
}

/// Subscribes to the subjects, publishes to them, and sends the guest's own messages with them as reply subjects and with every
/// header.
async fn attack(guest: &mut Agent, subjects: &[&str]) -> String {
    let inbox = guest.inbox("x");
    for subject in subjects {
        let subscriptions = format!("SUB {subject} 1\r\nSUB {subject} queue 2\r\n");
        guest.raw.send(subscriptions.as_bytes()).await;
        guest.raw.send(&message(subject, Some(&inbox), &[], b"{}")).await;
        for headers in HEADERS {
            for own in [
                message(OWN, Some(subject), headers, b"{}"),
                message(STATUS, Some(subject), headers, b"{}"),
                // Only the first of these changes the stored status.
                message(STATUS, Some(subject), headers, VALID_STATUS),
            ] {
                guest.raw.send(&own).await;
            }
        }
    }
    guest.raw.settle().await
}

/// The guest publishes with every subject, reply subject and header. The services' account, other VMs' samples and status and
/// the administrator's login must not be affected, and the guest's own samples and status must still be accepted.
#[tokio::test]
async fn guest_can_publish_only_its_own_samples_and_status() {
    // Samples of hypervisors would also be published as live events.
    let stack = Stack::builder()
        .with_permissions()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISOR_SAMPLE_INTERVAL", "1h")
        .start()
        .await;
    // The state of the streams is recorded after this login and these enrolments, because they write to KV buckets.
    stack.gateway(0).login(ADMIN.0, ADMIN.1).await;
    let inbox_of_other = Agent::enrolled(&stack, OTHER).await.inbox(">");
    let mut guest = Agent::logged_in(&stack, GUEST).await;
    let before = fingerprint(&stack).await;
    assert!(
        before.keys().any(|name| name == "KV_vmwatch_user_sessions"),
        "{before:?}"
    );

    let subjects = [SUBJECTS, &[inbox_of_other.as_str()]].concat();
    let output = attack(&mut guest, &subjects).await;
    assert!(output.contains("Permissions Violation for Publish"), "{output}");
    assert!(
        output.contains("Permissions Violation for Subscription"),
        "{output}"
    );
    assert!(
        !output.contains("MSG "),
        "no message may be delivered to the guest: {output}"
    );

    // When the sample that is published last is stored, all messages above have been processed.
    let mut own = Publisher::new(&stack, GUEST, 1);
    own.publish().await;
    let inbox = guest.inbox("x");
    guest.raw.send(format!("SUB {inbox} 3\r\n").as_bytes()).await;
    guest.raw.send(&message(OWN, Some(&inbox), &[], b"{}")).await;
    let output = guest
        .raw
        .settle_until(&format!(r#""stream":"{SAMPLE_STREAM}""#))
        .await;
    assert!(
        output.contains(&inbox),
        "the acknowledgement of the last sample is missing: {output}"
    );
    let inbox = guest.inbox("status");
    guest.raw.send(format!("SUB {inbox} 4\r\n").as_bytes()).await;
    eventually(
        "the guest's status is stored and acknowledged",
        PATIENCE,
        async || {
            let status = message(STATUS, Some(&inbox), &[], VALID_STATUS);
            guest.raw.send(&status).await;
            let output = guest.raw.settle().await;
            output.contains(&inbox).then_some(()).ok_or(output)
        },
    )
    .await;
    assert_eq!(
        messages(&stack, STATUS_STREAM).await,
        1,
        "only the guest's own status is stored"
    );
    eventually("the guest's sample is stored", PATIENCE, async || {
        let rows = count(&stack.database).await?;
        (rows == 2).then_some(()).ok_or(format!("{rows} rows are stored"))
    })
    .await;
    let mut after = fingerprint(&stack).await;
    // The rows of the guest's sample are published as two live events, and each limit that the guest is above as one. The
    // sample has one evaluation record, or two if it was published twice.
    let mut before = before;
    for (stream, most) in [("VMWATCH_EVENTS", 2 + LIMITS), (EVALUATION_STREAM, 2)] {
        // metrics-svc creates the stream of evaluation records in the background.
        let last = |of: &mut Fingerprint| of.remove(stream).map_or(0, |found| found.0);
        assert!(last(&mut after) <= last(&mut before) + most, "{stream}");
    }
    assert_eq!(after, before);
    assert!(
        messages(&stack, DEAD_LETTER_STREAM).await <= 1,
        "a VM gets at most one dead letter per minute"
    );
    stack.gateway(0).login(ADMIN.0, ADMIN.1).await;
}

/// NATS deduplicates message ids per stream. A guest that uses the id of another VM's next message must not suppress
/// that message.
#[tokio::test]
async fn guest_cannot_suppress_other_vms_samples_by_their_message_ids() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Lifecycle, 0)
        .with_permissions()
        .start()
        .await;
    let mut other = Publisher::new(&stack, OTHER, 1);
    let sample = other.sample();
    let parts = agent::split(sample.clone(), &mut Encoder::new().unwrap()).unwrap();
    let mut guest = Agent::logged_in(&stack, GUEST).await;
    guest
        .raw
        .send(&message(OWN, None, &[("Nats-Msg-Id", &parts[0].id)], b"{}"))
        .await;
    guest.raw.settle().await;
    other.send(&sample).await.unwrap();
    eventually("the other VM's sample is stored", PATIENCE, async || {
        let rows = count(&stack.database).await?;
        (rows == 2).then_some(()).ok_or(format!("{rows} rows are stored"))
    })
    .await;

    // Message ids of 60 KB could fill the memory of NATS. The server remembers only those of stored messages, of which a
    // VM has few, and only for the stream's duplicate window.
    let before = resident(&stack);
    let id = "x".repeat(60_000);
    for _ in 0..20 {
        guest.log_in(stack.nats.url()).await;
        let messages: Vec<u8> = (0..200)
            .flat_map(|number| message(OWN, None, &[("Nats-Msg-Id", &format!("{number}{id}"))], b"{}"))
            .collect();
        guest.raw.send(&messages).await;
        guest.raw.settle().await;
    }
    for subject in [OWN, STATUS] {
        guest.log_in(stack.nats.url()).await;
        guest
            .raw
            .send(&message(subject, None, &[], &vec![b'x'; SAMPLE_MESSAGE_BYTES]))
            .await;
        assert!(
            !guest.raw.settle().await.contains("Violation"),
            "a sample part of the maximum size is accepted"
        );
        guest
            .raw
            .send(&message(
                subject,
                None,
                &[],
                &vec![b'x'; SAMPLE_MESSAGE_BYTES + 1],
            ))
            .await;
        assert!(guest.raw.settle().await.contains("Maximum Payload Violation"));
    }
    guest.log_in(stack.nats.url()).await;
    for subscription in 0..20 {
        let inbox = guest.inbox(&subscription.to_string());
        let subscribes = format!("SUB {inbox} {subscription}\r\n");
        guest.raw.send(subscribes.as_bytes()).await;
    }
    assert!(
        guest
            .raw
            .settle()
            .await
            .contains("maximum subscriptions exceeded")
    );
    let grown = resident(&stack).saturating_sub(before);
    testkit::figure(
        "hostile_guest_4000_ids_of_60_kb_nats_growth_mib",
        grown as f64 / 1024.0,
    );
    assert!(grown < 256 << 10, "the memory of NATS grew by {grown} KiB");
}

/// The limits of the agents' account in accounts.conf agree with the limits in the programs and in nats.conf.
#[test]
fn nats_limits_of_agents_match_the_programs() {
    let accounts = include_str!("../../../deploy/nats/accounts.conf");
    let server = include_str!("../../../deploy/nats/nats.conf");
    let number = |text: &str, name: &str| -> usize {
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!("{name}: ")));
        line.unwrap_or_else(|| panic!("{name} is not configured"))
            .parse()
            .unwrap()
    };
    assert_eq!(number(accounts, "max_payload"), SAMPLE_MESSAGE_BYTES);
    assert_eq!(
        number(accounts, "max_connections"),
        number(server, "max_connections") - 1000
    );
    for subject in [&format!("{SAMPLE_SUBJECT_PREFIX}*"), STATUS_SUBJECTS] {
        assert!(accounts.contains(&format!("subject: \"{subject}\"")));
    }
}

/// Returns the resident memory of NATS in KiB.
fn resident(stack: &Stack) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", stack.nats.server.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Returns the duration of each attack.
fn attack_lasts() -> Duration {
    if std::env::var_os("VMWATCH_TEST_SOAK").is_some() {
        Duration::from_secs(20)
    } else {
        Duration::from_secs(4)
    }
}
