//! Debian's Alertmanager and a mail server as receivers.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Map, Value, json};
use testkit::{
    Alertmanager, MailServer, PATIENCE, eventually,
    webhooks::{Received, Receiver},
};

use super::scene::{Scene, is_delivered, until};

async fn received(receiver: &Receiver, count: usize) -> Vec<Received> {
    until("requests arrive", || {
        Some(receiver.received()).filter(|all| all.len() >= count)
    })
    .await
}

/// The keys of a JSON text and of all objects in it, in their order, with the types of their values.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(entries) => {
            let entries = entries.iter().map(|(key, value)| (key.clone(), shape(value)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.iter().map(shape).collect()),
        Value::String(_) => json!("text"),
        Value::Number(_) => json!("number"),
        other => other.clone(),
    }
}

/// The names of the keys in the order in which the text has them, outside of labels and annotations.
fn order(json: &str) -> Vec<&str> {
    let names = [
        "receiver",
        "status",
        "alerts",
        "labels",
        "annotations",
        "startsAt",
        "endsAt",
        "generatorURL",
        "fingerprint",
        "groupLabels",
        "commonLabels",
        "commonAnnotations",
        "externalURL",
        "version",
        "groupKey",
        "truncatedAlerts",
    ];
    let mut found: Vec<_> = names
        .iter()
        .filter_map(|name| json.find(&format!("\"{name}\":")).map(|at| (at, *name)))
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, name)| name).collect()
}

#[tokio::test]
async fn webhook_has_the_json_that_alertmanager_sends() {
    let mut scene = Scene::new().await;
    let (own, theirs) = (Receiver::start().await, Receiver::start().await);
    let alertmanager = Alertmanager::start(scene.folder.path(), &theirs.url()).await;
    scene.allow.extend([own.address, alertmanager.address]);
    "http://vmwatch.test".clone_into(&mut scene.settings.public_url);
    let webhook = json!({ "kind": "webhook", "url": own.url() });
    scene
        .add_channel("hook", webhook, json!({ "group_by": ["vm", "label:env"] }))
        .await;
    let target = json!({ "kind": "alertmanager", "url": alertmanager.url("") });
    let channel = scene.add_channel("am", target, json!({})).await;
    let alert = scene.fire("vm-1").await;
    let notifier = scene.notifier();
    for (count, status) in [(1, "firing"), (2, "resolved")] {
        let (own, theirs) = (received(&own, count).await, received(&theirs, count).await);
        let (own, theirs) = (&own[count - 1], &theirs[count - 1]);
        let (mut ours, mut expected) = (own.json(), theirs.json());
        assert_eq!(ours["status"], status);
        assert_eq!(order(&own.body), order(&theirs.body));
        assert_eq!(shape(&ours), shape(&expected));
        // These identify the sender and its idea of an alert's identity.
        for json in [&mut ours, &mut expected] {
            json["externalURL"] = Value::Null;
            json["groupKey"] = Value::Null;
            json["alerts"][0]["fingerprint"] = Value::Null;
        }
        if status == "firing" {
            assert_eq!(ours, expected);
            scene.resolve(&alert).await;
            notifier.changed.notify_one();
        }
    }
    scene
        .until(&channel, "all are delivered", |messages| {
            messages.iter().all(is_delivered)
        })
        .await;
}

#[tokio::test]
async fn alertmanager_shows_the_alert_until_it_is_resolved() {
    let mut scene = Scene::new().await;
    let hook = Receiver::start().await;
    let alertmanager = Alertmanager::start(scene.folder.path(), &hook.url()).await;
    scene.allow.push(alertmanager.address);
    let target = json!({ "kind": "alertmanager", "url": alertmanager.url("/") });
    scene
        .add_channel("am", target, json!({ "heartbeat_seconds": 10 }))
        .await;
    let alert = scene.fire("vm-1").await;
    let notifier = scene.notifier();
    let wait_for = async |name: &str| {
        eventually("the alert is shown", PATIENCE, async || {
            let shown = alertmanager.alert(name).await;
            shown.ok_or_else(|| name.to_owned())
        })
        .await
    };
    let shown = wait_for("CPU high").await;
    assert_eq!(shown["labels"]["instance_id"], "vm-1");
    assert!(
        shown["annotations"]["culprits"]
            .as_str()
            .unwrap()
            .contains("pg_restore"),
        "{shown}"
    );
    wait_for("VmwatchHeartbeat").await;
    scene.resolve(&alert).await;
    notifier.changed.notify_one();
    eventually(
        "the alert is no longer shown",
        PATIENCE,
        async || match alertmanager.alert("CPU high").await {
            None => Ok(()),
            Some(alert) => Err(alert.to_string()),
        },
    )
    .await;
    until("Alertmanager reports the end", || {
        let resolved = hook
            .received()
            .iter()
            .any(|request| request.json()["status"] == "resolved");
        resolved.then_some(())
    })
    .await;
}

/// Writes the certificate of `localhost` and its key into the folder. Returns their authority.
fn certify(folder: &Path) -> CertificateDer<'static> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let own = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&own, &issuer).unwrap();
    fs::write(folder.join("cert.pem"), certificate.pem()).unwrap();
    fs::write(folder.join("key.pem"), own.serialize_pem()).unwrap();
    CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()
}

fn mail(host: &str, server: &MailServer, tls: &str, more: &Value) -> Value {
    let mut target = json!({
        "kind": "email", "server": format!("{host}:{}", server.port), "tls": tls,
        "from": "vmwatch@example.com", "to": ["ops@example.com", "dev@example.com"],
    });
    target
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    target
}

#[tokio::test]
async fn mail_is_encrypted_authenticated_and_names_the_culprit() {
    let mut scene = Scene::new().await;
    scene.settings.authorities = vec![certify(scene.folder.path())];
    let [cert, key] =
        ["cert.pem", "key.pem"].map(|name| scene.folder.path().join(name).display().to_string());
    let tls = ["--certificate", &cert, "--key", &key];
    let login = ["--user", "vmwatch", "--password", "s3cret"];
    let starttls = MailServer::start(
        scene.folder.path(),
        "starttls",
        &[tls.as_slice(), &login].concat(),
    )
    .await;
    let wrapped = MailServer::start(scene.folder.path(), "tls", &tls).await;
    for server in [&starttls, &wrapped] {
        // The name `localhost` may have both addresses.
        scene.allow.push(server.address());
        scene
            .allow
            .push((std::net::Ipv6Addr::LOCALHOST, server.port).into());
    }
    let target = mail("localhost", &starttls, "starttls", &json!({ "user": "vmwatch" }));
    scene
        .add_secret_channel("starttls", target, json!({}), Some("s3cret"))
        .await;
    scene
        .add_channel(
            "wrapped",
            mail("localhost", &wrapped, "tls", &json!({})),
            json!({}),
        )
        .await;
    let alert = scene.fire("vm-1").await;
    let notifier = scene.notifier();
    let message = starttls.messages(1).await.remove(0);
    assert_eq!(
        (&message["tls"], &message["user"]),
        (&json!(true), &json!("vmwatch"))
    );
    assert_eq!(message["from"], "vmwatch@example.com");
    assert_eq!(message["to"], json!(["ops@example.com", "dev@example.com"]));
    let text = message["text"].as_str().unwrap();
    assert!(
        text.contains("Subject: [FIRING] name-vm-1: CPU above 90 % for 5 minutes (now 97 %)"),
        "{text}"
    );
    let id = &scene
        .messages(&vmwatch_api::alerts::RecordId::from_parts(&[
            "channel", "starttls",
        ]))
        .await[0]
        .id;
    assert!(
        text.contains(&format!("Message-ID: <{id}@example.com>")),
        "{text}"
    );
    let body = text.replace("=\r\n", "");
    assert!(
        body.contains("81 % of it pg_restore (pid 4121, user postgres, unit backup.service), started "),
        "{text}"
    );
    assert_eq!(wrapped.messages(1).await[0]["tls"], json!(true));
    scene.resolve(&alert).await;
    notifier.changed.notify_one();
    let end = starttls.messages(2).await.remove(1)["text"].to_string();
    assert!(
        end.contains("Subject: [RESOLVED] name-vm-1: CPU above 90 % no longer"),
        "{end}"
    );
}

#[tokio::test]
async fn problems_of_mail_servers_are_shown() {
    let mut scene = Scene::new().await;
    // The authority of the certificate is not known to the notifier.
    certify(scene.folder.path());
    let [cert, key] =
        ["cert.pem", "key.pem"].map(|name| scene.folder.path().join(name).display().to_string());
    let unknown = MailServer::start(
        scene.folder.path(),
        "starttls",
        &["--certificate", &cert, "--key", &key],
    )
    .await;
    let plain = MailServer::start(scene.folder.path(), "none", &[]).await;
    for server in [&unknown, &plain] {
        scene.allow.push(server.address());
        scene
            .allow
            .push((std::net::Ipv6Addr::LOCALHOST, server.port).into());
    }
    let untrusted = mail("localhost", &unknown, "starttls", &json!({}));
    let untrusted = scene.add_channel("untrusted", untrusted, json!({})).await;
    let downgraded = mail("127.0.0.1", &plain, "starttls", &json!({}));
    let downgraded = scene.add_channel("downgraded", downgraded, json!({})).await;
    let refused = mail(
        "127.0.0.1",
        &plain,
        "none",
        &json!({ "to": ["refused@example.com"] }),
    );
    let refused = scene.add_channel("refused", refused, json!({})).await;
    let working = mail("127.0.0.1", &plain, "none", &json!({}));
    let working = scene.add_channel("working", working, json!({})).await;
    scene.fire("vm-1").await;
    let _notifier = scene.notifier();
    for (channel, expected) in [
        (&untrusted, "certificate"),
        (&downgraded, "STARTTLS is not supported"),
        (&refused, "550"),
    ] {
        let problem = scene.until_problem(channel).await;
        assert!(problem.contains(expected), "{expected}: {problem}");
    }
    scene
        .until(&working, "the mail is delivered", |messages| {
            messages.iter().all(is_delivered)
        })
        .await;
    assert_eq!(plain.messages(1).await.len(), 1);
}
