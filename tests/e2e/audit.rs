//! The audit holds what it promises: under a flood of failed logins, from the command line, and when it takes no record.

use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures::StreamExt;
use serde_json::{Value, json};
use testkit::{ADMIN, Nats, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Service,
    audit::{AUDIT_STREAM, AuditRecord, AuditResult, UNAUTHENTICATED_AUDIT_STREAM},
    auth::{Credentials, Login},
    time::unix_millis,
};
use vmwatch_bus::{
    Context,
    audit::{self, Audit, AuditSettings, Newest},
    provision::ensure_stream,
};
use vmwatch_service::config::Environment;

use crate::rest::client::Api;

/// Without rows and hypervisors, and with the smallest audit.
async fn stack() -> Stack {
    Stack::builder()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .set(Program::Auth, "VMWATCH_AUDIT_MAX_BYTES", "1MiB")
        .start()
        .await
}

/// A failed login, as a gateway asks for one that came from this address.
async fn guess(stack: &Stack, name: &str, source: &str) {
    let mut context = Context::new(PATIENCE);
    context.source = Some(source.to_owned());
    let credentials = Credentials {
        user_name: name.parse().unwrap(),
        password: "a guess".parse().unwrap(),
    };
    let refused = stack.bus.call::<Login>(&context, &credentials).await;
    refused.unwrap_err();
}

async fn records(stack: &Stack) -> Vec<AuditRecord> {
    audit::newest(&stack.bus, 10_000).await.unwrap()
}

#[tokio::test]
async fn a_flood_of_failed_logins_takes_a_tenth_of_the_audit_and_evicts_nothing_else() {
    let stack = stack().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let eve = json!({ "name": "eve", "password": "a long one", "role": "viewer" });
    assert_eq!(admin.post("/users", eve).await.status, 201);

    // A hundred from one address: ten records, and one with the number of the others.
    let names: Vec<_> = (0..100).map(|index| format!("user-{index}")).collect();
    // Two at a time: a login that would wait for more than a second of hashing is refused and leaves no record.
    let guesses = names.iter().map(|name| guess(&stack, name, "192.0.2.1"));
    futures::stream::iter(guesses).buffer_unordered(2).count().await;
    let of_source = |record: &AuditRecord| record.source.as_deref() == Some("192.0.2.1");
    let one_by_one = records(&stack).await.into_iter().filter(of_source).count();
    assert_eq!(one_by_one, 10);

    // From so many addresses that their records are larger than a tenth.
    // Of the same user from the same address the throttle leaves few.
    let names: Vec<_> = (0..10)
        .map(|index| format!("{index}-{}", "n".repeat(60)))
        .collect();
    for network in 0..40 {
        let source = format!("198.51.{network}.1");
        let guesses = names.iter().map(|name| guess(&stack, name, &source));
        futures::stream::iter(guesses).buffer_unordered(2).count().await;
    }
    let mut stream = stack
        .bus
        .jetstream()
        .get_stream(UNAUTHENTICATED_AUDIT_STREAM)
        .await
        .unwrap();
    let info = stream.info().await.unwrap();
    assert_eq!(info.config.max_bytes, (1 << 20) / 10);
    assert!(info.state.first_sequence > 1, "{:?}", info.state);
    assert!(info.state.bytes <= (1 << 20) / 10);

    let all = records(&stack).await;
    let kept = |action: &str, result| {
        let same = |record: &&AuditRecord| record.action == action && record.result == result;
        all.iter().filter(same).count()
    };
    assert_eq!(kept("auth.users.add", AuditResult::Requested), 1);
    assert_eq!(kept("auth.users.add", AuditResult::Succeeded), 1);
    assert_eq!(kept("auth.login", AuditResult::Succeeded), 1);

    eventually("the gauges are exported", PATIENCE, async || {
        let metrics = stack.replica(Program::Auth, 0).metrics().await;
        let exported = metrics.contains("vmwatch_audit_oldest_age_seconds{stream=\"VMWATCH_AUDIT\"}");
        exported.then_some(()).ok_or(metrics)
    })
    .await;

    // Page after page, both streams are read to their beginnings, in one order and without gaps.
    let whole = admin.read("/audit?limit=1000").await;
    assert_eq!(whole["next"], Value::Null);
    let (mut seen, mut query) = (Vec::new(), "limit=37".to_owned());
    loop {
        let page = admin.read(&format!("/audit?{query}")).await;
        seen.extend(page["records"].as_array().unwrap().clone());
        match page["next"].as_str() {
            Some(next) => query = format!("limit=37&before={next}"),
            None => break,
        }
    }
    assert_eq!(&seen, whole["records"].as_array().unwrap());
    assert_eq!(seen.len(), all.len());

    // What was collected is recorded when the service stops.
    let auth = stack.replica(Program::Auth, 0);
    auth.process.terminate(PATIENCE).await;
    let collected = records(&stack).await;
    let counted =
        |record: &AuditRecord| of_source(record) && record.detail.starts_with("90 more failed logins");
    assert!(collected.iter().any(counted), "{:?}", collected.last());
}

#[tokio::test]
async fn the_command_line_is_in_the_audit_and_no_user_changes_while_it_takes_no_record() {
    let stack = stack().await;
    stack.command(Program::Auth, &["user", "add", "bob"], "a long one\n");
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let by_command: Vec<_> = records(&stack)
        .await
        .into_iter()
        .filter(|record| record.user == "vmwatch-auth")
        .collect();
    let results: Vec<_> = by_command.iter().map(|record| record.result).collect();
    assert_eq!(results, [AuditResult::Requested, AuditResult::Succeeded]);
    for record in &by_command {
        assert_eq!(
            (record.action.as_str(), record.target.as_deref()),
            ("auth.users.add", Some("bob"))
        );
        let source = record.source.as_deref().unwrap();
        assert!(source.starts_with("command line of uid "), "{source}");
    }

    let jetstream = stack.bus.jetstream();
    let stream = jetstream.get_stream(AUDIT_STREAM).await.unwrap();
    let open = stream.cached_info().config.clone();
    let full = Config {
        max_bytes: 1,
        discard: DiscardPolicy::New,
        ..open.clone()
    };
    jetstream.update_stream(&full).await.unwrap();
    let eve = json!({ "name": "eve", "password": "a long one", "role": "viewer" });
    let refused = admin.post("/users", eve.clone()).await;
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(
        refused.body.contains("could not be recorded in the audit"),
        "{refused:?}"
    );
    let removal = stack.try_command("vmwatch-auth", Program::Auth, &["user", "remove", "bob"], "", &[]);
    assert!(!removal.status.success());
    assert_eq!(admin.get("/users/eve").await.status, 404);
    assert_eq!(admin.get("/users/bob").await.status, 200);

    let optional = [("VMWATCH_AUDIT_REQUIRED".to_owned(), "false".to_owned())];
    let removal = stack.try_command(
        "vmwatch-auth",
        Program::Auth,
        &["user", "remove", "bob"],
        "",
        &optional,
    );
    assert!(removal.status.success());
    assert_eq!(admin.get("/users/bob").await.status, 404);

    jetstream.update_stream(&open).await.unwrap();
    assert_eq!(admin.post("/users", eve).await.status, 201);
}

/// A reader knows the numbers of the records when it opens the streams. It does not wait for those that expire meanwhile.
#[tokio::test]
async fn reading_ends_at_once_when_the_records_have_expired() {
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let bus = nats.connect("reader").await;
    let settings = AuditSettings::read(&Environment::of([])).unwrap();
    for mut stream in settings.streams() {
        stream.max_age = Duration::from_secs(1);
        stream.duplicate_window = Duration::from_secs(1);
        ensure_stream(bus.jetstream(), Service::Auth, &stream)
            .await
            .unwrap();
    }
    let audit = Audit::new(&bus, true);
    for number in 0..3 {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: "auth.users.add".to_owned(),
            user: "admin".to_owned(),
            source: None,
            target: None,
            request_id: number.to_string(),
            operation_id: None,
            result: AuditResult::Succeeded,
            detail: String::new(),
        };
        audit.append(&record, &record.request_id).await.unwrap();
    }
    let mut from_the_end = Newest::open(&bus, None).await.unwrap();
    let mut from_a_moment = Newest::open(&bus, None).await.unwrap();
    eventually("the records expire", PATIENCE, async || {
        let mut stream = audit.stream(AUDIT_STREAM).await.unwrap();
        let left = stream.info().await.unwrap().state.messages;
        (left == 0).then_some(()).ok_or(format!("{left} records"))
    })
    .await;
    assert!(from_the_end.next(10).await.unwrap().is_none());
    from_a_moment.end_at(unix_millis()).await.unwrap();
    assert!(from_a_moment.next(10).await.unwrap().is_none());
}
