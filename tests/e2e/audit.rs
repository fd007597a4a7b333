//! Tests that the audit stays complete and its size stays bounded: under floods of failed logins and refused requests,
//! for maintenance commands, and while the audit stream is full.

use std::{thread, time::Duration};

use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, Nats, PATIENCE, Program, SETUP_USER, Stack, eventually};
use vmwatch_api::{
    InstanceId, Principal, Role, Scope, Service,
    audit::{AUDIT_STREAM, AuditRecord, AuditResult, UNAUTHENTICATED_AUDIT_STREAM},
    auth::{Credentials, Login},
    lifecycle::{ActionTarget, Start},
    time::unix_millis,
    users::{UserRef, UsersRemove},
};
use vmwatch_bus::{
    Context,
    audit::{self, Audit, AuditSettings, Newest},
    provision::ensure_stream,
};
use vmwatch_service::config::Environment;

use crate::rest::client::Api;

/// Builds a test environment without metrics-svc and hypervisors, with the smallest permitted audit stream.
async fn stack() -> Stack {
    Stack::builder()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .set(Program::Auth, "VMWATCH_AUDIT_MAX_BYTES", "1MiB")
        .start()
        .await
}

/// Sends a login with a wrong password and with the given source address, as a gateway would.
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
async fn audit_records_of_failed_logins_use_at_most_a_tenth_of_the_space() {
    let stack = stack().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let eve = json!({ "name": "eve", "password": "a long one", "role": "viewer" });
    assert_eq!(admin.post("/users", eve).await.status, 201);

    // 100 failed logins from one address make ten audit records, and later one record with the number of the other 90.
    let names: Vec<_> = (0..100).map(|index| format!("user-{index}")).collect();
    // At most two logins run at a time: auth-svc refuses a login while more than one second of password hashing is
    // queued, and a login that was refused for this reason makes no audit record.
    let guesses = names.iter().map(|name| guess(&stack, name, "192.0.2.1"));
    futures::stream::iter(guesses).buffer_unordered(2).count().await;
    let of_source = |record: &AuditRecord| record.source.as_deref() == Some("192.0.2.1");
    let one_by_one = records(&stack).await.into_iter().filter(of_source).count();
    assert_eq!(one_by_one, 10);

    // The audit records of these failed logins from many addresses would need more than a tenth of the space for audit
    // records. Each login has its own user and address, because repeated failures with the same user and address are
    // throttled.
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
        .jetstream_for_tests()
        .get_stream(UNAUTHENTICATED_AUDIT_STREAM)
        .await
        .unwrap();
    let info = stream.info().await.unwrap();
    assert_eq!(info.config.max_bytes, (1 << 20) / 10);
    assert!(info.state.first_sequence > 1, "{:?}", info.state);
    assert!(info.state.bytes <= (1 << 20) / 10);

    let all = records(&stack).await;
    let kept = |action: &str, result| {
        // Only the administrator's records are counted. The record of creating the first administrator names
        // vmwatch-auth as its user.
        let same = |record: &&AuditRecord| {
            record.action == action && record.result == result && record.user == ADMIN.0
        };
        all.iter().filter(same).count()
    };
    assert_eq!(kept("auth.users.add", AuditResult::Requested), 1);
    assert_eq!(kept("auth.users.add", AuditResult::Succeeded), 1);
    assert_eq!(kept("auth.login", AuditResult::Succeeded), 1);

    eventually("the audit gauges are exported", PATIENCE, async || {
        let metrics = stack.replica(Program::Auth, 0).metrics().await;
        let exported = metrics.contains("vmwatch_audit_oldest_age_seconds{stream=\"VMWATCH_AUDIT\"}");
        exported.then_some(()).ok_or(metrics)
    })
    .await;

    // The pages together contain the records of both audit streams, in one order and without gaps.
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

    // When auth-svc stops, it writes a record with the number of failed logins that have no record of their own.
    let auth = stack.replica(Program::Auth, 0);
    auth.process.terminate(PATIENCE).await;
    let collected = records(&stack).await;
    let counted =
        |record: &AuditRecord| of_source(record) && record.detail.starts_with("90 further failed logins");
    assert!(collected.iter().any(counted), "{:?}", collected.last());
}

#[tokio::test]
async fn user_changes_are_audited_and_fail_while_the_audit_is_full() {
    let stack = stack().await;
    stack.command(Program::Auth, &["user", "add", "bob"], "a long one\n");
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let by_command: Vec<_> = records(&stack)
        .await
        .into_iter()
        .filter(|record| record.user == "vmwatch-auth" && record.target.as_deref() == Some("bob"))
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

    let jetstream = stack.bus.jetstream_for_tests();
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

/// When an audit reader opens the streams, it determines their last sequence numbers. If records up to these numbers
/// expire before the reader reads them, it must not wait for them.
#[tokio::test]
async fn audit_reader_does_not_wait_for_expired_records() {
    let folder = tempfile::tempdir().unwrap();
    let nats = Nats::start(folder.path()).await;
    let bus = nats.connect("reader").await;
    let settings = AuditSettings::read(&Environment::from_variables([])).unwrap();
    for mut stream in settings.streams() {
        stream.max_age = Duration::from_secs(1);
        stream.duplicate_window = Duration::from_secs(1);
        ensure_stream(&bus, Service::Auth, &stream).await.unwrap();
    }
    let audit = Audit::new(&bus, true);
    for number in 0..3 {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: "auth.users.add".to_owned(),
            user: "admin".to_owned(),
            api_token: None,
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
    eventually("all audit records have expired", PATIENCE, async || {
        let left = bus
            .stream_info(AUDIT_STREAM, PATIENCE)
            .await
            .unwrap()
            .state
            .messages;
        (left == 0)
            .then_some(())
            .ok_or(format!("{left} audit records are left"))
    })
    .await;
    assert!(from_the_end.next(10).await.unwrap().is_none());
    from_a_moment.end_at(unix_millis()).await.unwrap();
    assert!(from_a_moment.next(10).await.unwrap().is_none());
}

/// Returns the action, target, result and details of each audit record of this user, oldest first.
async fn of_user(stack: &Stack, user: &str) -> Vec<(String, Option<String>, AuditResult, String)> {
    let mut all = records(stack).await;
    all.sort_by_key(|record| record.at_ms);
    let own = all.into_iter().filter(|record| record.user == user);
    own.map(|record| (record.action, record.target, record.result, record.detail))
        .collect()
}

/// Maintenance commands such as `vmwatch-metrics load` are audited. Here they run with the bus permissions of a
/// deployment: `setup` with the credentials of the setup user, each other command with those of its service.
#[tokio::test]
async fn audit_records_maintenance_commands_and_the_first_administrator() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Lifecycle, 0)
        .with_permissions()
        .start()
        .await;
    eventually("the first administrator is audited", PATIENCE, async || {
        let made = of_user(&stack, "vmwatch-auth").await;
        let of_admin = |result| {
            let admin = Some(ADMIN.0.to_owned());
            made.contains(&("auth.users.add".to_owned(), admin, result, String::new()))
        };
        let both = of_admin(AuditResult::Requested) && of_admin(AuditResult::Succeeded);
        both.then_some(()).ok_or(format!("{made:?}"))
    })
    .await;

    let row = r#"{"instance_id":"vm-1","create_date":"2026-01-01T21:37:59.001065","proc":95}"#;
    stack.command(Program::Metrics, &["load", "-"], &format!("{row}\n"));
    stack.command(Program::Metrics, &["rebuild"], "");
    stack.command(Program::Metrics, &["compact-flat", "--delete-after", "0s"], "");
    stack.command(Program::Metrics, &["backfill-dates", "--dry-run"], "");
    stack.command(Program::Metrics, &["backfill-dates"], "");
    let changed = [("VMWATCH_STREAM_MAX_AGE".to_owned(), "20h".to_owned())];
    let setup = stack.try_command(SETUP_USER, Program::Metrics, &["setup"], "", &changed);
    assert!(setup.status.success(), "{setup:?}");
    let again = stack.try_command(SETUP_USER, Program::Metrics, &["setup"], "", &changed);
    assert!(again.status.success(), "{again:?}");

    needs_the_bus(&stack);

    let records = of_user(&stack, "vmwatch-metrics").await;
    let results: Vec<_> = records
        .iter()
        .map(|(action, _, result, _)| (action.as_str(), *result))
        // The test environment has already run the setup of each service.
        .skip_while(|(action, _)| *action == "metrics.setup")
        .collect();
    assert_eq!(
        results,
        [
            ("metrics.load", AuditResult::Requested),
            ("metrics.load", AuditResult::Succeeded),
            ("metrics.rebuild", AuditResult::Requested),
            ("metrics.rebuild", AuditResult::Succeeded),
            ("metrics.compact_flat", AuditResult::Requested),
            ("metrics.compact_flat", AuditResult::Succeeded),
            ("metrics.backfill_dates", AuditResult::Requested),
            ("metrics.backfill_dates", AuditResult::Succeeded),
            ("metrics.setup", AuditResult::Succeeded),
        ],
        "{records:?}"
    );
    let detail = &records.last().unwrap().3;
    assert!(detail.contains("VMWATCH_SAMPLES: changed: max_age"), "{detail}");
}

/// While NATS is unreachable, commands that change rows refuse to run unless `VMWATCH_AUDIT_REQUIRED` is false. Their
/// error and their help name this setting.
fn needs_the_bus(stack: &Stack) {
    let run = |args: &[&str], settings: &[(&str, &str)]| {
        let pair = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        let settings: Vec<_> = settings.iter().map(pair).collect();
        stack.try_command("vmwatch-metrics", Program::Metrics, args, "", &settings)
    };
    let no_bus = ("VMWATCH_NATS_URL", "nats://127.0.0.1:1");
    let optional = ("VMWATCH_AUDIT_REQUIRED", "false");
    // The commands run in parallel, because each waits five seconds for NATS.
    thread::scope(|scope| {
        for args in [
            &["load", "-"][..],
            &["rebuild"],
            &["compact-flat"],
            &["backfill-dates"],
        ] {
            scope.spawn(move || {
                let refused = run(args, &[no_bus]);
                assert!(!refused.status.success(), "{refused:?}");
                for output in [refused.stderr, run(&[args[0], "--help"], &[]).stdout] {
                    let said = String::from_utf8_lossy(&output);
                    assert!(said.contains("VMWATCH_AUDIT_REQUIRED=false"), "{args:?}: {said}");
                }
            });
        }
        scope.spawn(move || {
            let done = run(&["backfill-dates"], &[no_bus, optional]);
            assert!(done.status.success(), "{done:?}");
        });
    });
}

#[tokio::test]
async fn refused_requests_of_one_user_make_a_bounded_number_of_audit_records() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Metrics, 0)
        .start()
        .await;
    let context = |user: &str| {
        Context::new(PATIENCE).as_principal(Principal {
            user: user.to_owned(),
            role: Role::Viewer,
            scope: Scope::All,
        })
    };
    for _ in 0..150 {
        let target = ActionTarget::from("vm-1".parse::<InstanceId>().unwrap());
        stack
            .bus
            .call::<Start>(&context("eve"), &target)
            .await
            .unwrap_err();
        let name = UserRef {
            name: ADMIN.0.parse().unwrap(),
        };
        let refused = stack.bus.call::<UsersRemove>(&context("eve"), &name).await;
        refused.unwrap_err();
    }
    let target = ActionTarget::from("vm-1".parse::<InstanceId>().unwrap());
    stack
        .bus
        .call::<Start>(&context("bob"), &target)
        .await
        .unwrap_err();

    // When a service stops, it writes a record with the number of refused requests that have no record of their own.
    for program in [Program::Lifecycle, Program::Auth] {
        stack.replica(program, 0).process.terminate(PATIENCE).await;
    }
    let of_eve = of_user(&stack, "eve").await;
    for (action, counted) in [
        ("lifecycle.start", "lifecycle.refused"),
        ("auth.users.remove", "auth.refused"),
    ] {
        let of = |wanted: &str| -> Vec<_> { of_eve.iter().filter(|record| record.0 == wanted).collect() };
        assert_eq!(of(action).len(), 100, "{action}");
        let [more] = of(counted)[..] else {
            panic!("{counted}: {of_eve:?}")
        };
        assert!(more.3.starts_with("50 further refused requests"), "{more:?}");
    }
    assert_eq!(of_eve.len(), 202);
    assert_eq!(
        of_user(&stack, "bob").await.len(),
        1,
        "each refused request of another user is still recorded"
    );
}

/// Every user may end its own sessions, revoke its own tokens and change its own password.
#[tokio::test]
async fn refused_requests_that_every_user_may_send_make_a_bounded_number_of_audit_records() {
    let stack = stack().await;
    stack.command(Program::Auth, &["user", "add", "eve"], "a long one\n");
    let eve = Api::of(stack.gateway(0)).log_in("eve", "a long one").await;
    for _ in 0..50 {
        let token = eve.delete("/tokens/0000000000000000").await;
        token.problem(404, "not_found");
        let session = eve.delete(&format!("/sessions/{}", "0".repeat(32))).await;
        session.problem(404, "not_found");
        let password = json!({ "password": "another one" });
        let password = eve.send(Method::PUT, "/users/admin/password", password).await;
        password.problem(403, "forbidden");
    }
    stack.replica(Program::Auth, 0).process.terminate(PATIENCE).await;
    let of_eve = of_user(&stack, "eve").await;
    let results = |wanted| of_eve.iter().filter(|record| record.2 == wanted).count();
    assert_eq!(
        (results(AuditResult::Refused), results(AuditResult::Requested)),
        (101, 0),
        "{of_eve:?}"
    );
    let (action, _, _, detail) = of_eve.last().unwrap();
    assert!(
        action == "auth.refused" && detail.starts_with("50 further refused requests"),
        "{action}: {detail}"
    );
}
