//! Tests that only the `setup` commands can create and change streams and KV buckets. The credential of a running
//! service cannot.

use std::{collections::BTreeSet, process::Output};

use async_nats::{HeaderMap, jetstream::stream::Info};
use metrics_svc::ingest::dead_letter;
use testkit::{OPERATOR_USER, PATIENCE, Program, SETUP_USER, Stack, eventually};
use vmwatch_api::{
    audit::{AUDIT_STREAM, AUDIT_SUBJECT_PREFIX},
    metrics::{CONTENT_TYPE, SAMPLE_STREAM},
    sessions::SESSION_BUCKET,
};

const PERMISSIONS: &str = include_str!("../../deploy/nats/permissions.conf");
const OWNERS: [Program; 4] = [
    Program::Auth,
    Program::Metrics,
    Program::Lifecycle,
    Program::Alert,
];
/// The bus users of programs that run permanently. Their credentials could be stolen from a running process.
const RUNNING: [&str; 5] = [
    "vmwatch-gateway",
    "vmwatch-auth",
    "vmwatch-metrics",
    "vmwatch-lifecycle",
    "vmwatch-alert",
];

/// Starts NATS with users and permissions, and a database. The setup commands have run, and no vmwatch program runs.
async fn without_services() -> Stack {
    let none = [
        Program::Gateway,
        Program::Auth,
        Program::Metrics,
        Program::Lifecycle,
    ];
    let builder = none
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0));
    builder.with_permissions().start().await
}

fn setup(stack: &Stack, program: Program, more: &[&str], settings: &[(&str, &str)]) -> Output {
    let settings: Vec<_> = settings
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let args = [&["setup"], more].concat();
    stack.try_command(SETUP_USER, program, &args, "", &settings)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn info(stack: &Stack, stream: &str) -> Info {
    let found = stack.bus.jetstream_for_tests().get_stream(stream).await.unwrap();
    found.cached_info().clone()
}

#[tokio::test]
async fn setup_command_is_repeatable_and_refuses_to_delete_data() {
    let stack = without_services().await;
    for program in OWNERS {
        let output = setup(&stack, program, &[], &[]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let printed = text(&output.stdout);
        let left = |line: &str| line.ends_with(": left as it was");
        assert!(
            printed.lines().count() > 0 && printed.lines().all(left),
            "{printed}"
        );
    }

    let grown = setup(&stack, Program::Auth, &[], &[("VMWATCH_AUDIT_KEEP", "400d")]);
    let printed = text(&grown.stdout);
    assert!(
        printed.contains("VMWATCH_AUDIT: changed: max_age 31536000000000000 -> 34560000000000000"),
        "{printed}{}",
        text(&grown.stderr)
    );

    // Two records of 600 KB exceed 1 MiB, the minimum of `VMWATCH_AUDIT_MAX_BYTES`.
    let jetstream = stack.bus.jetstream_for_tests();
    for _ in 0..2 {
        let subject = format!("{AUDIT_SUBJECT_PREFIX}test");
        let published = jetstream.publish(subject, "x".repeat(600_000).into()).await;
        published.unwrap().await.unwrap();
    }
    let before = info(&stack, AUDIT_STREAM).await;
    let small = [("VMWATCH_AUDIT_MAX_BYTES", "1MiB"), ("VMWATCH_SESSION_TTL", "1h")];
    let refused = setup(&stack, Program::Auth, &[], &small);
    let said = text(&refused.stderr);
    assert!(!refused.status.success(), "{}", text(&refused.stdout));
    for part in [
        "nothing was changed",
        "--allow-data-loss",
        "VMWATCH_AUDIT: the stream holds",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let after = info(&stack, AUDIT_STREAM).await;
    assert_eq!(after.config, before.config);
    assert_eq!(
        after.state.messages,
        before.state.messages + 1,
        "the refused setup is recorded in the audit"
    );
    let sessions = format!("KV_{SESSION_BUCKET}");
    assert_eq!(
        info(&stack, &sessions).await.config.max_age.as_secs(),
        12 * 3600,
        "the refused setup must change no stream or bucket"
    );

    let allowed = setup(&stack, Program::Auth, &["--allow-data-loss"], &small);
    assert!(allowed.status.success(), "{}", text(&allowed.stderr));
    let first = info(&stack, AUDIT_STREAM).await.state.first_sequence;
    assert!(first > before.state.first_sequence, "{first}");
    assert_eq!(info(&stack, &sessions).await.config.max_age.as_secs(), 3600);
}

/// A deployment that was set up before hypervisors were measured gets their subject by `setup`.
#[tokio::test]
async fn setup_command_adds_the_subject_of_hypervisors() {
    let stack = without_services().await;
    let mut before = info(&stack, SAMPLE_STREAM).await.config;
    before.subjects = vec!["vmwatch.v1.samples.*".to_owned()];
    let jetstream = stack.bus.jetstream_for_tests();
    jetstream.update_stream(&before).await.unwrap();
    let output = setup(&stack, Program::Metrics, &[], &[]);
    let printed = text(&output.stdout);
    assert!(
        printed.contains("VMWATCH_SAMPLES: changed: subjects"),
        "{printed}{}",
        text(&output.stderr)
    );
    let after = info(&stack, SAMPLE_STREAM).await.config;
    assert_eq!(
        after.subjects,
        ["vmwatch.v1.samples.*", "vmwatch.v1.hypervisor_samples.*"]
    );
}

/// Returns the streams that the setup users may update, as listed in deploy/nats/permissions.conf.
fn streams() -> BTreeSet<&'static str> {
    let quoted = PERMISSIONS.split('"').skip(1).step_by(2);
    quoted
        .filter_map(|subject| subject.strip_prefix("$JS.API.STREAM.UPDATE."))
        .collect()
}

#[test]
fn only_setup_users_may_change_streams() {
    let mut set = "";
    let mut allowed = Vec::new();
    for line in PERMISSIONS.lines().filter(|line| !line.starts_with('#')) {
        if let Some(name) = line.strip_suffix(": {") {
            set = name;
        }
        let subjects = line.split('"').skip(1).step_by(2);
        let changing = subjects.filter(|subject| {
            let verb = subject.strip_prefix("$JS.API.STREAM.").unwrap_or_default();
            let reads = ["INFO.", "CREATE.", "MSG.GET.", "NAMES", "LIST"];
            let api = subject.starts_with("$JS.API.STREAM.") || subject.starts_with("$JS.API.>");
            api && !reads.iter().any(|read| verb.starts_with(read))
        });
        allowed.extend(changing.map(|subject| (set, subject)));
    }
    assert!(streams().len() >= 8, "{:?}", streams());
    let others: Vec<_> = allowed.iter().filter(|(set, _)| *set != "SETUP").collect();
    assert_eq!(
        others,
        [&("OPERATOR", "$JS.API.STREAM.MSG.DELETE.VMWATCH_DEAD_LETTERS")]
    );
    let of_setup = allowed.iter().filter(|(set, _)| *set == "SETUP");
    for (_, subject) in of_setup {
        assert!(subject.starts_with("$JS.API.STREAM.UPDATE."), "{subject}");
    }
}

#[tokio::test]
async fn credentials_of_services_cannot_change_streams() {
    let stack = without_services().await;
    let verbs = ["UPDATE", "PURGE", "DELETE", "MSG.DELETE", "RESTORE", "SNAPSHOT"];
    let mut expected = Vec::new();
    // A client that closes its connection loses the messages that it has not sent yet, so the clients are kept until
    // the end.
    let mut connections = Vec::new();
    for user in RUNNING {
        let bus = stack.nats.connect_as("an attack", user).await;
        for stream in streams() {
            for verb in verbs {
                let subject = format!("$JS.API.STREAM.{verb}.{stream}");
                bus.client_for_tests()
                    .publish(subject.clone(), "{}".into())
                    .await
                    .unwrap();
                expected.push((user.to_owned(), format!(r#"Subject "{subject}""#)));
            }
        }
        bus.client_for_tests().flush().await.unwrap();
        connections.push(bus);
    }
    eventually("NATS refuses every attempt", PATIENCE, async || {
        let log = stack.nats.server.log();
        let violations: Vec<_> = log
            .lines()
            .filter(|line| line.contains("Publish Violation"))
            .collect();
        let missing = expected.iter().find(|(user, subject)| {
            let refused = |line: &&str| line.contains(user.as_str()) && line.contains(subject.as_str());
            !violations.iter().any(refused)
        });
        missing.map_or(Ok(()), |missing| Err(format!("NATS did not refuse {missing:?}")))
    })
    .await;
    for stream in streams() {
        // The stream still exists.
        info(&stack, stream).await;
    }
}

/// NATS refuses rollup headers in KV buckets. A message with such a header would delete the history of a key or of the
/// whole bucket, with only the permission to write one key.
#[tokio::test]
async fn kv_buckets_refuse_rollup_headers() {
    let stack = without_services().await;
    let buckets = [
        ("vmwatch-auth", "vmwatch_sessions"),
        ("vmwatch-auth", "vmwatch_users"),
        ("vmwatch-auth", "vmwatch_user_sessions"),
        ("vmwatch-auth", "vmwatch_login_failures"),
        ("vmwatch-auth", "vmwatch_join_tokens"),
        ("vmwatch-auth", "vmwatch_agents"),
        ("vmwatch-auth", "vmwatch_tokens"),
        ("vmwatch-lifecycle", "vmwatch_operations"),
        ("vmwatch-lifecycle", "vmwatch_inventory"),
        ("vmwatch-lifecycle", "vmwatch_hypervisor_leases"),
        ("vmwatch-lifecycle", "vmwatch_labels"),
        ("vmwatch-metrics", "vmwatch_agent_status"),
        ("vmwatch-alert", "vmwatch_alert_lease"),
        ("vmwatch-alert", "vmwatch_watched_names"),
    ];
    for (user, bucket) in buckets {
        let bus = stack.nats.connect_as("an attack", user).await;
        let write = async |key: &str, headers: HeaderMap| {
            let subject = format!("$KV.{bucket}.{key}");
            let published = bus
                .jetstream_for_tests()
                .publish_with_headers(subject, headers, "x".into())
                .await;
            published.unwrap().await
        };
        write("one", HeaderMap::new()).await.unwrap();
        for scope in ["all", "sub"] {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Rollup", scope);
            let error = write("two", headers).await.unwrap_err();
            assert!(format!("{error:?}").contains("rollup"), "{error:?}");
        }
        assert_eq!(info(&stack, &format!("KV_{bucket}")).await.state.messages, 1);
    }
}

#[tokio::test]
async fn operator_with_nats_credential_can_list_replay_and_discard_dead_letters() {
    let stack = without_services().await;
    for turn in 0..2 {
        let mut headers = HeaderMap::new();
        headers.insert(dead_letter::SUBJECT, "vmwatch.v1.samples.vm-1");
        headers.insert(CONTENT_TYPE, "a type");
        let subject = "vmwatch.v1.dead_letters.vm-1";
        let body = format!("sample {turn}").into();
        let published = stack
            .bus
            .jetstream_for_tests()
            .publish_with_headers(subject, headers, body);
        published.await.unwrap().await.unwrap();
    }
    let operator = |args: &[&str]| {
        let args = [&["dead-letters"], args].concat();
        stack.command_as(OPERATOR_USER, Program::Metrics, &args, "")
    };
    assert_eq!(operator(&["list", "--json"]).lines().count(), 2);

    assert_eq!(operator(&["replay", "1"]), "replayed 1 samples\n");
    let samples = stack
        .bus
        .jetstream_for_tests()
        .get_stream("VMWATCH_SAMPLES")
        .await
        .unwrap();
    let sample = samples
        .get_last_raw_message_by_subject("vmwatch.v1.samples.vm-1")
        .await
        .unwrap();
    assert_eq!(sample.payload, "sample 0");
    assert_eq!(sample.headers.get(CONTENT_TYPE).unwrap().as_str(), "a type");

    assert_eq!(operator(&["discard", "--all"]), "discarded 1 samples\n");
    // Only lifecycle-svc may publish samples of hypervisors, so that their dead letters cannot be replayed.
    let mut headers = HeaderMap::new();
    headers.insert(dead_letter::SUBJECT, "vmwatch.v1.hypervisor_samples.vm-1");
    let jetstream = stack.bus.jetstream_for_tests();
    let published = jetstream.publish_with_headers("vmwatch.v1.dead_letters.vm-1", headers, "{}".into());
    published.await.unwrap().await.unwrap();
    assert_eq!(operator(&["replay", "--all"]), "replayed 0 samples\n");
    assert_eq!(operator(&["discard", "--all"]), "discarded 1 samples\n");
    assert_eq!(info(&stack, "VMWATCH_DEAD_LETTERS").await.state.messages, 0);
    assert!(!stack.nats.server.log().contains("Violation"));
}
