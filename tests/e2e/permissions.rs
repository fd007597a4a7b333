//! Tests the NATS users and permissions in deploy/nats: all programs work with them, and forbidden actions are refused.

use std::{
    fs,
    time::{Duration, Instant},
};

use async_nats::ConnectOptions;
use futures::StreamExt;
use serde_json::{Value, json};
use testkit::{
    ADMIN, Libvirtd, MACHINES, Nats, PATIENCE, Program, Secrets, Stack, THIS_MACHINE, codes, eventually,
    figure,
};
use vmwatch_api::{
    Principal, Role, Scope,
    lifecycle::{State, Target},
};
use vmwatch_bus::Context;

/// NATS logs this word when it refuses an action.
const VIOLATION: &str = "Violation";

/// With the permissions of a deployment, every program and the operator's tools do all their work, and NATS refuses
/// nothing.
#[tokio::test]
async fn all_programs_work_with_deployed_nats_permissions() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 2)
        .replicas(Program::Alert, 1)
        .replicas(Program::Agent, 1)
        .with_permissions()
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = gateway.login(ADMIN.0, ADMIN.1).await;
    for (method, data) in [
        (codes::VM, json!({ "instance_id": THIS_MACHINE })),
        (codes::PROCESSES, json!({ "instance_id": THIS_MACHINE })),
        (
            codes::PROCESSES_BY_NAME,
            json!({ "instance_id": THIS_MACHINE, "proc_name": "vmwatch-agent" }),
        ),
    ] {
        eventually("the agent's rows can be read", PATIENCE, async || {
            let rows = gateway.rows(&session, method, 3, data.clone()).await;
            (!rows.is_empty())
                .then_some(())
                .ok_or("no row is stored".to_owned())
        })
        .await;
    }
    let started = gateway.start_vm(&session, MACHINES[0].0).await;
    assert_eq!(started.status(), 1, "{started:?}");

    let operator = stack.nats.connect_as("a tool", "vmwatch-operator").await;
    // A service that is ready may not have subscribed to pings yet, and a busy machine answers late, so the ping is
    // repeated.
    let all = "discovery finds the gateway, auth, lifecycle, alert and two replicas of metrics";
    eventually(all, PATIENCE, async || {
        let found = services(&operator).await;
        (found.len() == 6).then_some(()).ok_or(format!("{found:?}"))
    })
    .await;
    let admin = Context::new(PATIENCE).as_principal(Principal {
        user: "operator".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    let target = Target {
        instance_id: MACHINES[0].0.parse().unwrap(),
    };
    operator.call::<State>(&admin, &target).await.unwrap();

    let changed = stack.command(
        Program::Auth,
        &["user", "password", ADMIN.0],
        "another long password\n",
    );
    assert!(changed.contains("ended 1 sessions of admin"), "{changed}");
    eventually("the gateway refuses the ended session", PATIENCE, async || {
        let request =
            json!({ "method": codes::VM, "session_id": session, "data": { "instance_id": THIS_MACHINE } });
        let answer = gateway.post(&request).await;
        (answer.status() == 3).then_some(()).ok_or(answer.body)
    })
    .await;
    let log = stack.nats.server.log();
    assert!(!log.contains(VIOLATION), "{log}");
}

/// The measures of a running VM without an agent are stored in the stream within 30 s of its start. The VM has no
/// operating system, but its firmware uses CPU time.
#[tokio::test]
async fn lifecycle_svc_stores_hypervisor_samples_with_deployed_nats_permissions() {
    const VM: &str = "2c1f7d5e-94a8-4d62-8f0b-6a3d1e0c9b57";
    let libvirtd = Libvirtd::start().await;
    libvirtd.define(
        VM,
        &format!(
            "<domain type='qemu'><name>vm</name><uuid>{VM}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os>\
             <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>"
        ),
    );
    let hypervisor = format!("lab={}", libvirtd.uri());
    let stack = Stack::builder()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisor)
        .with_permissions()
        .start()
        .await;
    libvirtd.virsh(&["start", VM]);
    let lifecycle = stack.replica(Program::Lifecycle, 0);
    let began = Instant::now();
    eventually("two samples of the VM are stored", PATIENCE, async || {
        let metrics = lifecycle.metrics().await;
        let stored = metrics.lines().find_map(|line| {
            let series = r#"vmwatch_hypervisor_samples_total{hypervisor="lab",result="stored"} "#;
            line.strip_prefix(series)?.parse::<u64>().ok()
        });
        (stored >= Some(2)).then_some(()).ok_or(metrics)
    })
    .await;
    figure(
        "hypervisor_samples_first_rates_seconds",
        began.elapsed().as_secs_f64(),
    );
    let log = stack.nats.server.log();
    assert!(!log.contains(VIOLATION), "{log}");
}

/// Returns the names of the services that answer a ping, as `nats micro ping` does.
async fn services(bus: &vmwatch_bus::Bus) -> Vec<String> {
    let client = bus.client_for_tests();
    let inbox = client.new_inbox();
    let mut replies = client.subscribe(inbox.clone()).await.unwrap();
    client
        .publish_with_reply("$SRV.PING", inbox, "".into())
        .await
        .unwrap();
    let mut names = Vec::new();
    while let Ok(Some(reply)) = tokio::time::timeout(Duration::from_secs(1), replies.next()).await {
        let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
        names.push(reply["name"].as_str().unwrap().to_owned());
    }
    names
}

/// A bus user, a subject, and what the user tries with it: `None` publishes, `Some` subscribes in the named queue group
/// (an empty name means no group). `security/callout.rs` tests agents.
const FORBIDDEN: &[(&str, &str, Option<&str>)] = &[
    // Only the gateway may publish requests, and alert-svc may publish some that only read.
    ("vmwatch-auth", "vmwatch.v1.metrics.vm.latest", None),
    ("vmwatch-metrics", "vmwatch.v1.lifecycle.start", None),
    ("vmwatch-lifecycle", "vmwatch.v1.auth.login", None),
    ("vmwatch-operator", "vmwatch.v1.auth.login", None),
    ("vmwatch-operator", "vmwatch.v1.metrics.vm.latest", None),
    ("vmwatch-alert", "vmwatch.v1.auth.login", None),
    ("vmwatch-alert", "vmwatch.v1.lifecycle.stop", None),
    ("vmwatch-alert", "vmwatch.v1.lifecycle.labels.set", None),
    ("vmwatch-alert", "vmwatch.v1.metrics.rows.export", None),
    ("vmwatch-operator", "vmwatch.v1.alert.channels.list", None),
    ("vmwatch-metrics", "vmwatch.v1.alert.rules.create", None),
    // Only metrics-svc may publish evaluation records, and only alert-svc may read them. It can neither change nor delete them,
    // and not read samples.
    ("vmwatch-alert", "vmwatch.v1.evaluation.vm-1", None),
    ("vmwatch-gateway", "vmwatch.v1.evaluation.vm-1", None),
    ("vmwatch-alert", "vmwatch.v1.samples.vm-1", None),
    (
        "vmwatch-metrics",
        "$JS.API.CONSUMER.MSG.NEXT.VMWATCH_EVALUATION.evaluate",
        None,
    ),
    ("vmwatch-alert", "$JS.API.STREAM.PURGE.VMWATCH_EVALUATION", None),
    (
        "vmwatch-alert",
        "$JS.API.CONSUMER.MSG.NEXT.VMWATCH_SAMPLES.store",
        None,
    ),
    // Only alert-svc may write the lease and the watched process names.
    ("vmwatch-metrics", "$KV.vmwatch_watched_names.names", None),
    ("vmwatch-gateway", "$KV.vmwatch_alert_lease.x", None),
    ("vmwatch-alert", "$KV.vmwatch_labels.vm-1", None),
    ("vmwatch-alert", "$JS.API.DIRECT.GET.KV_vmwatch_sessions", None),
    // Only an agent may publish samples. An operator may publish dead letters again.
    ("vmwatch-gateway", "vmwatch.v1.samples.vm-1", None),
    ("vmwatch-metrics", "vmwatch.v1.samples.vm-1", None),
    // Only lifecycle-svc may publish what hypervisors measure.
    ("vmwatch-gateway", "vmwatch.v1.hypervisor_samples.vm-1", None),
    ("vmwatch-auth", "vmwatch.v1.hypervisor_samples.vm-1", None),
    ("vmwatch-metrics", "vmwatch.v1.hypervisor_samples.vm-1", None),
    ("vmwatch-operator", "vmwatch.v1.hypervisor_samples.vm-1", None),
    ("vmwatch-setup", "vmwatch.v1.hypervisor_samples.vm-1", None),
    ("vmwatch-lifecycle", "vmwatch.v1.samples.vm-1", None),
    // Only a service may subscribe to its subjects, and only in its own queue group. Any other subscriber could read
    // passwords.
    ("vmwatch-gateway", "vmwatch.v1.auth.login", Some("")),
    ("vmwatch-auth", "vmwatch.v1.auth.login", Some("")),
    ("vmwatch-metrics", "vmwatch.v1.auth.login", Some("vmwatch-auth")),
    (
        "vmwatch-lifecycle",
        "vmwatch.v1.metrics.>",
        Some("vmwatch-metrics"),
    ),
    (
        "vmwatch-operator",
        "vmwatch.v1.lifecycle.>",
        Some("vmwatch-lifecycle"),
    ),
    ("vmwatch-operator", ">", Some("")),
    // Each bus user has its own inbox, to which other users cannot publish.
    ("vmwatch-operator", "_INBOX_vmwatch-gateway.>", Some("")),
    ("vmwatch-metrics", "_INBOX.>", Some("")),
    ("vmwatch-gateway", "_INBOX_vmwatch-auth.>", Some("")),
    ("vmwatch-metrics", "_INBOX_vmwatch-gateway.made-up", None),
    ("vmwatch-operator", "_INBOX_vmwatch-gateway.made-up", None),
    // Only auth-svc may write sessions, and only gateways may read them.
    ("vmwatch-gateway", "$KV.vmwatch_sessions.made-up", None),
    // The gateway may find programs, and answers only for itself.
    ("vmwatch-gateway", "$SRV.STATS", None),
    ("vmwatch-gateway", "$SRV.PING.vmwatch-auth", Some("")),
    (
        "vmwatch-gateway",
        "$JS.API.STREAM.PURGE.KV_vmwatch_sessions",
        None,
    ),
    ("vmwatch-metrics", "$KV.vmwatch_sessions.>", Some("")),
    ("vmwatch-metrics", "$JS.API.DIRECT.GET.KV_vmwatch_sessions", None),
    (
        "vmwatch-operator",
        "$JS.API.STREAM.MSG.GET.KV_vmwatch_sessions",
        None,
    ),
    (
        "vmwatch-operator",
        "$JS.API.CONSUMER.CREATE.KV_vmwatch_sessions.spy",
        None,
    ),
    // Only auth-svc may write API tokens, and only gateways may read them.
    ("vmwatch-gateway", "$KV.vmwatch_tokens.made-up", None),
    ("vmwatch-gateway", "$JS.API.STREAM.PURGE.KV_vmwatch_tokens", None),
    ("vmwatch-metrics", "$JS.API.DIRECT.GET.KV_vmwatch_tokens", None),
    ("vmwatch-operator", "$KV.vmwatch_tokens.made-up", None),
    ("vmwatch-setup", "$KV.vmwatch_tokens.made-up", None),
    // Only auth-svc may read and write join tokens and agents.
    ("vmwatch-gateway", "$KV.vmwatch_agents.vm-1", None),
    (
        "vmwatch-gateway",
        "$JS.API.DIRECT.GET.KV_vmwatch_join_tokens",
        None,
    ),
    ("vmwatch-operator", "$KV.vmwatch_agents.vm-1", None),
    ("vmwatch-setup", "$KV.vmwatch_agents.vm-1", None),
    ("vmwatch-auth", "$JS.API.STREAM.PURGE.KV_vmwatch_agents", None),
    // Only lifecycle-svc may write the VMs of hypervisors and the labels, which metrics-svc follows.
    ("vmwatch-metrics", "$KV.vmwatch_inventory.made-up", None),
    ("vmwatch-metrics", "$KV.vmwatch_labels.made-up", None),
    (
        "vmwatch-metrics",
        "$JS.API.STREAM.PURGE.KV_vmwatch_inventory",
        None,
    ),
    ("vmwatch-metrics", "$JS.API.STREAM.CREATE.KV_vmwatch_labels", None),
    ("vmwatch-metrics", "$JS.API.STREAM.PURGE.VMWATCH_EVENTS", None),
    (
        "vmwatch-gateway",
        "$JS.API.CONSUMER.CREATE.KV_vmwatch_inventory",
        None,
    ),
    // Only metrics-svc may write the status of agents.
    ("vmwatch-gateway", "$KV.vmwatch_agent_status.vm-1", None),
    // Only metrics-svc may publish evaluation records, and only alert-svc may write the watched process names.
    ("vmwatch-gateway", "vmwatch.v1.evaluation.vm-1", None),
    ("vmwatch-lifecycle", "vmwatch.v1.evaluation.vm-1", None),
    ("vmwatch-operator", "vmwatch.v1.evaluation.vm-1", None),
    ("vmwatch-setup", "vmwatch.v1.evaluation.vm-1", None),
    ("vmwatch-metrics", "$KV.vmwatch_watched_names.names", None),
    (
        "vmwatch-metrics",
        "$JS.API.STREAM.CREATE.KV_vmwatch_watched_names",
        None,
    ),
    ("vmwatch-metrics", "$JS.API.STREAM.PURGE.VMWATCH_EVALUATION", None),
    // Only lifecycle-svc may write labels, and only metrics-svc may report that a VM was removed.
    ("vmwatch-gateway", "$KV.vmwatch_labels.vm-1", None),
    ("vmwatch-operator", "$KV.vmwatch_labels.vm-1", None),
    ("vmwatch-lifecycle", "vmwatch.v1.events.removed.vm-1", None),
    // No running program and no operator can delete or change audit records.
    ("vmwatch-auth", "$JS.API.STREAM.DELETE.VMWATCH_AUDIT", None),
    ("vmwatch-lifecycle", "$JS.API.STREAM.PURGE.VMWATCH_AUDIT", None),
    ("vmwatch-auth", "vmwatch.v1.audit.lifecycle.start", None),
    ("vmwatch-operator", "vmwatch.v1.audit.auth.login", None),
    ("vmwatch-operator", "$JS.API.STREAM.DELETE.VMWATCH_SAMPLES", None),
    // The `setup` commands change streams, but neither read nor write their messages, and send no requests.
    ("vmwatch-setup", "vmwatch.v1.auth.login", None),
    ("vmwatch-setup", "vmwatch.v1.lifecycle.start", None),
    ("vmwatch-setup", "vmwatch.v1.samples.vm-1", None),
    ("vmwatch-setup", "vmwatch.v1.dead_letters.vm-1", None),
    ("vmwatch-setup", "vmwatch.v1.audit.auth.login", None),
    ("vmwatch-setup", "$KV.vmwatch_users.made-up", None),
    ("vmwatch-setup", "$KV.vmwatch_sessions.made-up", None),
    (
        "vmwatch-setup",
        "$JS.API.STREAM.MSG.GET.KV_vmwatch_sessions",
        None,
    ),
    ("vmwatch-setup", "$JS.API.DIRECT.GET.KV_vmwatch_users", None),
    (
        "vmwatch-setup",
        "$JS.API.CONSUMER.CREATE.KV_vmwatch_sessions.spy",
        None,
    ),
    (
        "vmwatch-setup",
        "$JS.API.CONSUMER.MSG.NEXT.VMWATCH_SAMPLES.store",
        None,
    ),
    ("vmwatch-setup", "$JS.API.STREAM.PURGE.VMWATCH_AUDIT", None),
    ("vmwatch-setup", "$JS.API.STREAM.DELETE.KV_vmwatch_users", None),
    (
        "vmwatch-setup",
        "$JS.API.STREAM.MSG.DELETE.VMWATCH_DEAD_LETTERS",
        None,
    ),
    ("vmwatch-setup", "vmwatch.v1.auth.login", Some("vmwatch-auth")),
    ("vmwatch-setup", "vmwatch.v1.events.>", Some("")),
    ("vmwatch-setup", "_INBOX_vmwatch-gateway.>", Some("")),
];

#[tokio::test]
async fn nats_permissions_refuse_forbidden_actions() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = Secrets::make(folder.path());
    let nats = Nats::start_with(folder.path(), Some(secrets)).await;
    for (user, subject, queue) in FORBIDDEN {
        let bus = nats.connect_as("a test", user).await;
        let client = bus.client_for_tests();
        let (what, _subscription) = match *queue {
            None => {
                client.publish(*subject, "{}".into()).await.unwrap();
                ("Publish", None)
            }
            Some("") => ("Subscription", Some(client.subscribe(*subject).await.unwrap())),
            Some(queue) => {
                let subscription = client.queue_subscribe(*subject, queue.to_owned()).await;
                ("Subscription", Some(subscription.unwrap()))
            }
        };
        client.flush().await.unwrap();
        eventually(&format!("{user} is refused {subject}"), PATIENCE, async || {
            let said = [
                format!("{what} {VIOLATION}"),
                (*user).to_owned(),
                format!(r#"Subject "{subject}""#),
            ];
            let log = nats.server.log();
            let refused = log
                .lines()
                .any(|line| said.iter().all(|part| line.contains(part)));
            refused.then_some(()).ok_or(log)
        })
        .await;
    }
}

#[tokio::test]
async fn nats_refuses_wrong_and_former_passwords() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = Secrets::make(folder.path());
    let of_other = secrets.password("vmwatch-metrics");
    let nats = Nats::start_with(folder.path(), Some(secrets)).await;
    let refused = async |options: ConnectOptions| {
        let error = options.connect(nats.url()).await.unwrap_err();
        assert!(error.to_string().contains("authorization violation"), "{error}");
    };
    // Logins of unknown users are decided by auth-svc, see security/callout.rs.
    for (user, password) in [
        ("vmwatch-gateway", ""),
        ("vmwatch-gateway", "guess"),
        ("vmwatch-gateway", of_other.as_str()),
    ] {
        refused(ConnectOptions::new().user_and_password(user.to_owned(), password.to_owned())).await;
    }

    // Changes a password by the steps in docs/operations.md.
    let secrets = nats.secrets().unwrap();
    let with =
        |password: String| ConnectOptions::new().user_and_password("vmwatch-gateway".to_owned(), password);
    let former = secrets.password("vmwatch-gateway");
    fs::remove_file(secrets.password_file("vmwatch-gateway")).unwrap();
    secrets.renew(&[]);
    nats.server.reload();
    eventually("the new password is accepted", PATIENCE, async || {
        let connected = with(secrets.password("vmwatch-gateway"))
            .connect(nats.url())
            .await;
        connected.map(drop).map_err(|error| error.to_string())
    })
    .await;
    // While NATS reloads, it may pass the login on to auth-svc, which does not run here.
    eventually("the former password is refused", PATIENCE, async || {
        let error = with(former.clone())
            .connect(nats.url())
            .await
            .unwrap_err()
            .to_string();
        if error.contains("authorization violation") {
            Ok(())
        } else {
            Err(error)
        }
    })
    .await;
}
