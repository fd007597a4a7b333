//! What receivers get when all is well.

use std::collections::BTreeMap;

use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;
use testkit::webhooks::{Received, Receiver};
use vmwatch_api::alerts::{
    RecordId,
    channels::{Message, Purpose},
};

use super::scene::{Scene, is_delivered, until};
use crate::{rekey, seal::Keys, store::StoredMessage};

async fn webhook(scene: &mut Scene, more: serde_json::Value) -> (Receiver, RecordId) {
    let receiver = Receiver::start().await;
    scene.allow.push(receiver.address);
    let target = json!({ "kind": "webhook", "url": receiver.url() });
    let channel = scene.add_channel("hook", target, more).await;
    (receiver, channel)
}

async fn requests(receiver: &Receiver, count: usize) -> Vec<Received> {
    until("requests arrive", || {
        Some(receiver.received()).filter(|got| got.len() >= count)
    })
    .await
}

#[tokio::test]
async fn webhook_names_vm_culprit_and_end() {
    let mut scene = Scene::new().await;
    let (receiver, channel) = webhook(&mut scene, json!({ "group_by": ["vm", "label:env"] })).await;
    let alert = scene.fire("vm-1").await;
    let notifier = scene.notifier();
    let got = requests(&receiver, 1).await;
    let json = got[0].json();
    assert_eq!(got[0].path, "/hook?x=1");
    assert_eq!(
        (&json["status"], &json["receiver"]),
        (&json!("firing"), &json!("hook"))
    );
    assert_eq!(
        json["groupLabels"],
        json!({ "instance_id": "vm-1", "env": "prod" })
    );
    let annotations = &json["alerts"][0]["annotations"];
    assert_eq!(
        annotations["summary"],
        "name-vm-1: CPU above 90 % for 5 minutes (now 97 %)"
    );
    let culprit = annotations["culprits"].as_str().unwrap();
    assert!(
        culprit.starts_with("81 % of it pg_restore (pid 4121, user postgres, unit backup.service), started "),
        "{culprit}"
    );
    let text = annotations["description"].as_str().unwrap();
    assert!(
        text.starts_with("name-vm-1: CPU above 90 %") && text.contains(culprit),
        "{text}"
    );
    scene.resolve(&alert).await;
    notifier.changed.notify_one();
    let got = requests(&receiver, 2).await;
    let end = got[1].json();
    assert_eq!(
        (&end["status"], &end["alerts"][0]["status"]),
        (&json!("resolved"), &json!("resolved"))
    );
    assert_eq!(end["alerts"][0]["fingerprint"], json["alerts"][0]["fingerprint"]);
    assert_ne!(got[0].id(), got[1].id());
    let messages = scene
        .until(&channel, "both are delivered", |messages| {
            messages.len() == 2 && messages.iter().all(is_delivered)
        })
        .await;
    let attempt = &messages[0].attempts[0];
    assert!(
        attempt.delivered && attempt.answer.starts_with("200 OK: answer"),
        "{attempt:?}"
    );
    assert_eq!((messages[0].tries, messages[0].next_ms), (1, None));
    assert_eq!(scene.problem(&channel).await, None);
}

#[tokio::test]
async fn webhook_with_secret_is_signed() {
    let mut scene = Scene::new().await;
    let receiver = Receiver::start().await;
    scene.allow.push(receiver.address);
    let target = json!({ "kind": "webhook", "url": receiver.url() });
    scene
        .add_secret_channel("hook", target, json!({}), Some("s3cret"))
        .await;
    scene.fire("vm-1").await;
    let _notifier = scene.notifier();
    let got = requests(&receiver, 1).await;
    let signature = &got[0].headers["x-vmwatch-signature"];
    let (time, digest) = signature.strip_prefix("t=").unwrap().split_once(",v1=").unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(b"s3cret").unwrap();
    mac.update(format!("{time}.{}", got[0].body).as_bytes());
    assert_eq!(digest, hex::encode(mac.finalize().into_bytes()));
}

#[tokio::test]
async fn channel_with_secret_sends_nothing_without_the_key() {
    let mut scene = Scene::new().await;
    let (open, _) = webhook(&mut scene, json!({})).await;
    let sealed = Receiver::start().await;
    scene.allow.push(sealed.address);
    let target = json!({ "kind": "webhook", "url": sealed.url() });
    let channel = scene
        .add_secret_channel("sealed", target, json!({}), Some("s3cret"))
        .await;
    scene.settings.keys = Keys::default().into();
    scene.fire("vm-1").await;
    let notifier = scene.notifier();
    requests(&open, 1).await;
    let problem = scene.until_problem(&channel).await;
    assert!(problem.contains("VMWATCH_ALERT_KEY_FILE"), "{problem}");
    let waiting = scene
        .until(&channel, "the message waits", |messages| messages.len() == 1)
        .await;
    assert_eq!((waiting[0].tries, sealed.received().len()), (0, 0));
    notifier.stop().await;
    // With a new first key, `rekey` seals the secret again, and the message is sent.
    let keys: Keys = format!("{}\n{}", "ab".repeat(32), super::scene::KEY)
        .parse()
        .unwrap();
    let rekeyed = rekey::run(&scene.store, &keys).await.unwrap();
    assert_eq!((rekeyed.sealed, rekeyed.current, rekeyed.failed.len()), (1, 0, 0));
    assert_eq!(rekey::run(&scene.store, &keys).await.unwrap().current, 1);
    scene.settings.keys = std::sync::Arc::new("ab".repeat(32).parse().unwrap());
    let _notifier = scene.notifier();
    requests(&sealed, 1).await;
}

#[tokio::test]
async fn failing_template_falls_back_to_the_default_text() {
    let mut scene = Scene::new().await;
    let template = "{% for alert in alerts %}{{ alert.vm }} {{ alert.nothing }}{% endfor %}";
    let (receiver, channel) = webhook(&mut scene, json!({ "template": template })).await;
    scene.fire("vm-1").await;
    let _notifier = scene.notifier();
    let got = requests(&receiver, 1).await;
    let text = got[0].json()["alerts"][0]["annotations"]["description"].to_string();
    assert!(text.contains("pg_restore"), "{text}");
    scene
        .until(&channel, "it is delivered", |messages| {
            messages.iter().all(is_delivered)
        })
        .await;
    let problem = scene.until_problem(&channel).await;
    assert!(problem.contains("the template fails in line 1"), "{problem}");
}

#[tokio::test]
async fn test_message_says_that_it_is_one() {
    let mut scene = Scene::new().await;
    let (receiver, channel) = webhook(&mut scene, json!({})).await;
    let message = Message {
        id: RecordId::from_parts(&["test"]),
        channel_id: channel.clone(),
        purpose: Purpose::Test,
        group: BTreeMap::new(),
        alerts: Vec::new(),
        created_ms: 1,
        next_ms: Some(1),
        delivered_ms: None,
        tries: 0,
        attempts: Vec::new(),
    };
    let stored = StoredMessage {
        id: message.id.to_string(),
        message: message.clone(),
        due_ms: Some(1),
        keys: Vec::new(),
        revision: 0,
        claimed: false,
        skipped: false,
    };
    scene.store.messages.insert_one(stored).await.unwrap();
    let _notifier = scene.notifier();
    let got = requests(&receiver, 1).await;
    assert_eq!(got[0].id(), message.id.as_str());
    let json = got[0].json();
    assert_eq!(json["alerts"][0]["labels"]["alertname"], "VmwatchTest");
    assert!(
        json["alerts"][0]["annotations"]["description"]
            .as_str()
            .unwrap()
            .contains("test message")
    );
}
