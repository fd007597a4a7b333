//! Tests alerts with a real kernel. A process uses the CPU of a guest: the alert names it on the page, in a mail and
//! in Alertmanager, is acknowledged, and is resolved when the process ends. Processes that live shorter than the time
//! between two samples are named as well.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use testkit::{
    Alertmanager, Libvirtd, MailServer, PATIENCE, Program, Stack, eventually, no_requests, run_in_browser,
    webhooks::Receiver,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::timeout,
};
use vmwatch_api::{Role, Scope};

use super::measures::cpio;
use crate::rest::client::Api;

const GUEST: &str = "2c9e7a41-6d3b-4f18-8a52-b1d0c4e97f36";
/// Time limit from power-on until the guest is idle, and for each change of an alert. Without KVM, the guest is slow.
const BOOT: Duration = Duration::from_mins(2);
const RULE: &str = "CPU of the guest";
/// Name of the process that uses the CPU.
const CULPRIT: &str = "pg_restore";
/// Duration of the rule in seconds. It is longer than the interval of process samples.
const FOR_SECONDS: u32 = 6;
/// A program that uses the CPU until it is killed.
const BURN: &str = "#!/bin/sh\nwhile :; do :; done\n";

/// The guest's first program. It connects to the test, executes each line that it receives as a command, and is
/// replaced by the usual first program. The shell needs `/dev/null` to start anything in the background, which `/init`
/// hides later under the usual `/dev`.
fn first_program(port: u16) -> String {
    format!(
        "#!/bin/sh\n\
         PATH=/bin\n\
         busybox mkdir -p /dev\n\
         busybox mknod /dev/null c 1 3\n\
         while :; do\n\
         busybox nc 10.0.2.2 {port} </dev/null 2>/dev/null | while read word; do\n\
         case $word in\n\
         burn) /{CULPRIT} & pid=$! ;;\n\
         storm) sh -c 'while :; do sh -c :; done' & pid=$! ;;\n\
         relay) sh -c 'while :; do busybox timeout 1 /pg_dump; done' & pid=$! ;;\n\
         rest) kill $pid ;;\n\
         esac\n\
         done\n\
         busybox sleep 1\n\
         done &\n\
         exec /init\n"
    )
}

fn define(libvirtd: &Libvirtd, port: u16, settings: &[(&str, &str)]) {
    let initramfs = libvirtd.image().join("initramfs.gz");
    let mut image = cpio(&[("load", &first_program(port)), (CULPRIT, BURN), ("pg_dump", BURN)]);
    image.extend(fs::read(&initramfs).unwrap());
    let with_load = libvirtd.image().join("with-load.gz");
    fs::write(&with_load, image).unwrap();
    let domain = libvirtd.guest(GUEST, settings);
    let domain = domain
        .replace(&initramfs.display().to_string(), &with_load.display().to_string())
        .replace("<cmdline>", "<cmdline>rdinit=/load ");
    libvirtd.define(GUEST, &domain);
}

/// The connection to the guest's first program.
struct Guest(TcpStream);

impl Guest {
    async fn obey(&mut self, word: &str) {
        let line = format!("{word}\n");
        self.0.write_all(line.as_bytes()).await.unwrap();
    }
}

/// The receivers of messages.
struct Receivers {
    mail: MailServer,
    alertmanager: Alertmanager,
}

impl Receivers {
    /// Checks that both have the alert and the name of its culprit.
    async fn have_the_alert(&self) {
        let mail = self.mail.messages(1).await.remove(0);
        let text = mail["text"].as_str().unwrap().replace("=\r\n", "");
        assert!(text.contains("[FIRING]") && text.contains(CULPRIT), "{text}");
        let shown = eventually("Alertmanager has the alert", PATIENCE, async || {
            let alert = self.alertmanager.alert(RULE).await;
            alert.ok_or_else(|| "it has none".to_owned())
        })
        .await;
        let culprits = shown["annotations"]["culprits"].as_str().unwrap();
        assert!(culprits.contains(CULPRIT), "{shown}");
    }

    async fn have_the_end(&self) {
        let mail = self.mail.messages(2).await.remove(1);
        let text = mail["text"].as_str().unwrap();
        assert!(text.contains("[RESOLVED]"), "{text}");
        eventually("Alertmanager has the end", PATIENCE, async || {
            match self.alertmanager.alert(RULE).await {
                None => Ok(()),
                Some(alert) => Err(alert.to_string()),
            }
        })
        .await;
    }
}

/// Creates a channel for each receiver, and the rule that notifies them. Returns the id of the rule.
async fn add_rule(api: &Api, receivers: &Receivers) -> String {
    let server = receivers.mail.address().to_string();
    let mail = json!({
        "kind": "email", "server": server, "tls": "none", "from": "vmwatch@example.com", "to": ["ops@example.com"],
    });
    let alertmanager = json!({ "kind": "alertmanager", "url": receivers.alertmanager.url("") });
    let mut recipients = Vec::new();
    for (name, target) in [("mail", mail), ("alertmanager", alertmanager)] {
        let channel = json!({ "spec": { "name": name, "enabled": true, "target": target } });
        recipients.push(created(api, "/alert-channels", channel).await);
    }
    let threshold = json!({ "direction": "above", "limit": 80, "clear": 70 });
    let rule = json!({
        "name": RULE, "enabled": true, "for_seconds": FOR_SECONDS, "severity": "critical",
        "condition": { "kind": "measure", "measure": "cpu_util", "threshold": threshold },
        "vms": { "ids": [GUEST] }, "recipients": recipients,
    });
    created(api, "/alert-rules", rule).await
}

async fn created(api: &Api, path: &str, body: Value) -> String {
    let reply = api.post(path, body).await;
    assert_eq!(reply.status, 201, "{path}: {reply:?}");
    reply.json()["id"].as_str().unwrap().to_owned()
}

/// The alerts of the rule in this state, newest first.
async fn alerts(api: &Api, rule: &str, state: &str) -> Vec<Value> {
    let list = api.read(&format!("/alerts?rule_id={rule}&state={state}")).await;
    list["alerts"].as_array().unwrap().clone()
}

/// The names of the processes that explain an alert; `None` if they were not found yet.
fn culprits(alert: &Value) -> Option<Vec<&str>> {
    let processes = alert["culprits"]["processes"].as_array()?.iter();
    processes.map(|process| process["name"].as_str()).collect()
}

/// Runs a workload until an alert fires and names this process, and waits until the alert is resolved.
async fn workload_is_named(guest: &mut Guest, api: &Api, rule: &str, workload: &str, process: &str) {
    guest.obey(workload).await;
    let alert = eventually("an alert with culprits fires", BOOT, async || {
        let alert = alerts(api, rule, "firing").await.into_iter().next();
        let is_complete = |alert: &Value| culprits(alert).is_some();
        alert.filter(is_complete).ok_or_else(|| "none does".to_owned())
    })
    .await;
    let names = culprits(&alert).unwrap();
    assert!(names.contains(&process), "{workload}: {alert:#}");
    guest.obey("rest").await;
    eventually("no alert fires", BOOT, async || {
        let firing = alerts(api, rule, "firing").await;
        let ended = firing.is_empty();
        ended.then_some(()).ok_or_else(|| format!("{firing:?}"))
    })
    .await;
}

#[tokio::test]
async fn alerts_name_the_processes_that_use_the_cpu_of_a_guest() {
    let folder = tempfile::tempdir().unwrap();
    let hook = Receiver::start().await;
    let receivers = Receivers {
        mail: MailServer::start(folder.path(), "none", &[]).await,
        alertmanager: Alertmanager::start(folder.path(), &hook.url()).await,
    };
    let allowed = format!("{},{}", receivers.mail.address(), receivers.alertmanager.address);
    let libvirtd = Libvirtd::start().await;
    let hypervisor = format!("lab={}", libvirtd.uri());
    let stack = Stack::builder()
        .replicas(Program::Alert, 1)
        .set(Program::Alert, "VMWATCH_ALERT_ALLOW", &allowed)
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &hypervisor)
        .start()
        .await;
    // QEMU's user network maps 10.0.2.2 to this machine's loopback address.
    let bus = stack.nats.url().replace("127.0.0.1", "10.0.2.2");
    let settings = [
        ("NATS_URL", &*bus),
        ("AGENT_VM_INTERVAL", "1s"),
        ("AGENT_PROCESS_INTERVAL", "3s"),
        ("AGENT_SHORT_LIVED_ROWS", "0"),
    ];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    define(&libvirtd, listener.local_addr().unwrap().port(), &settings);
    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    libvirtd.virsh(&["start", GUEST]);
    let connected = timeout(BOOT, listener.accept()).await;
    let (guest, _) = connected.expect("the guest connects").unwrap();
    let mut guest = Guest(guest);
    // The rule must not fire because the guest boots.
    eventually("the guest has process rows and is idle", BOOT, async || {
        let table = api.get(&format!("/vms/{GUEST}/processes")).await;
        let vm = api.get(&format!("/vms/{GUEST}")).await;
        let has_rows = table.status == 200 && table.json()["at"].is_string();
        let cpu = vm.json()["sample"]["cpu_util"].as_f64();
        let is_idle = cpu.is_some_and(|cpu| cpu < 50.0);
        (has_rows && is_idle)
            .then_some(())
            .ok_or_else(|| format!("{cpu:?}; {}", libvirtd.console(GUEST)))
    })
    .await;
    let rule = add_rule(&api, &receivers).await;

    let environment = [
        ("VMWATCH_PAGE_VM", GUEST),
        ("VMWATCH_PAGE_PROCESS", CULPRIT),
        ("VMWATCH_PAGE_RULE", RULE),
    ];
    run_in_browser(&stack, "guest-alert", &environment, async |demand| {
        match demand {
            "burn" | "rest" => guest.obey(demand).await,
            "notified" => receivers.have_the_alert().await,
            "ended" => receivers.have_the_end().await,
            other => return no_requests(other).await,
        }
        "done".to_owned()
    })
    .await;

    workload_is_named(&mut guest, &api, &rule, "storm", "sh").await;
    workload_is_named(&mut guest, &api, &rule, "relay", "pg_dump").await;
    let all = alerts(&api, &rule, "resolved").await;
    assert!(all.len() >= 3, "{all:#?}");
    for alert in &all {
        let names = culprits(alert).unwrap_or_default();
        assert!(!names.is_empty(), "{alert:#}");
    }
}
