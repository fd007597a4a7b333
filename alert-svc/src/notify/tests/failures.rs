//! Receivers that hang, fail or lose answers, and notifiers that crash.

use std::time::Instant;

use mongodb::bson::doc;
use serde_json::json;
use testkit::{
    PATIENCE,
    webhooks::{Behaviour, Receiver},
};
use vmwatch_api::{
    alerts::{AlertState, RecordId},
    time::unix_millis,
};

use super::scene::{Scene, is_delivered, until};

async fn channel(scene: &mut Scene, name: &str) -> (Receiver, RecordId) {
    let receiver = Receiver::start().await;
    scene.allow.push(receiver.address);
    let target = json!({ "kind": "webhook", "url": receiver.url() });
    let channel = scene.add_channel(name, target, json!({})).await;
    (receiver, channel)
}

#[tokio::test]
async fn receiver_that_hangs_delays_no_other_channel() {
    let mut scene = Scene::new().await;
    let (hanging, slow) = channel(&mut scene, "hanging").await;
    let (working, fast) = channel(&mut scene, "working").await;
    hanging.behave(Behaviour::Hang);
    scene.fire("vm-1").await;
    let notifier = scene.notifier();
    until("the receiver hangs", || {
        (!hanging.received().is_empty()).then_some(())
    })
    .await;
    let begun = Instant::now();
    for vm in ["vm-2", "vm-3"] {
        scene.fire(vm).await;
        notifier.changed.notify_one();
    }
    until("the other channel sends", || {
        (working.received().len() == 3).then_some(())
    })
    .await;
    assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    scene
        .until(&fast, "all are delivered", |messages| {
            messages.iter().all(is_delivered)
        })
        .await;
    assert!(!scene.messages(&slow).await.iter().any(is_delivered));
    // The attempt ends by itself, and is recorded.
    let failed = |messages: &[vmwatch_api::alerts::channels::Message]| {
        messages
            .iter()
            .any(|message| message.attempts.iter().any(|attempt| !attempt.delivered))
    };
    let messages = scene.until(&slow, "the attempt fails", failed).await;
    let attempt = messages
        .iter()
        .find_map(|message| message.attempts.first())
        .unwrap();
    assert!(
        attempt.answer.contains("did not answer within 20 s"),
        "{attempt:?}"
    );
    let problem = scene.until_problem(&slow).await;
    assert!(problem.contains("did not answer"), "{problem}");
}

#[tokio::test]
async fn failing_receiver_gets_messages_in_order_once_it_works() {
    let mut scene = Scene::new().await;
    let (receiver, id) = channel(&mut scene, "hook").await;
    receiver.behave(Behaviour::Status(500));
    let alert = scene.fire("vm-1").await;
    let notifier = scene.notifier();
    let tried =
        |messages: &[vmwatch_api::alerts::channels::Message]| messages.iter().any(|one| one.tries > 0);
    scene.until(&id, "an attempt fails", tried).await;
    scene.resolve(&alert).await;
    notifier.changed.notify_one();
    let messages = scene
        .until(&id, "attempts are recorded", |messages| {
            messages.len() == 2 && messages.iter().any(|message| message.attempts.len() >= 2)
        })
        .await;
    assert_eq!(messages[1].tries, 0, "the end waits for the beginning");
    assert!(
        messages[0].attempts[0]
            .answer
            .starts_with("500 Internal Server Error: answer")
    );
    let problem = scene.until_problem(&id).await;
    assert!(problem.starts_with("500"), "{problem}");
    receiver.behave(Behaviour::Status(204));
    let messages = scene
        .until(&id, "both are delivered", |messages| {
            messages.iter().all(is_delivered)
        })
        .await;
    let states: Vec<_> = messages.iter().map(|message| message.alerts[0].state).collect();
    assert_eq!(states, [AlertState::Firing, AlertState::Resolved]);
    let (first, last) = (
        messages[0].delivered_ms.unwrap(),
        messages[1].delivered_ms.unwrap(),
    );
    assert!(first <= last);
    let got = receiver.received();
    let statuses = got
        .iter()
        .map(|request| request.json()["status"].as_str().unwrap().to_owned());
    let statuses: Vec<_> = statuses.collect();
    assert_eq!(statuses.last().unwrap(), "resolved");
    assert_eq!(statuses.iter().filter(|status| *status == "resolved").count(), 1);
    testkit::eventually("the problem ends", PATIENCE, async || {
        match scene.problem(&id).await {
            None => Ok(()),
            Some(problem) => Err(problem),
        }
    })
    .await;
}

#[tokio::test]
async fn lost_answer_causes_a_duplicate_with_the_same_id() {
    let mut scene = Scene::new().await;
    let (receiver, id) = channel(&mut scene, "hook").await;
    receiver.behave(Behaviour::Drop);
    scene.fire("vm-1").await;
    let _notifier = scene.notifier();
    until("the answer is lost", || {
        (!receiver.received().is_empty()).then_some(())
    })
    .await;
    receiver.behave(Behaviour::Status(200));
    scene
        .until(&id, "it is delivered", |messages| {
            messages.iter().all(is_delivered)
        })
        .await;
    let got = receiver.received();
    assert!(got.len() >= 2);
    assert!(got.iter().all(|request| request.id() == got[0].id()));
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let mut scene = Scene::new().await;
    let (receiver, id) = channel(&mut scene, "hook").await;
    let other = Receiver::start().await;
    scene.allow.push(other.address);
    receiver.behave(Behaviour::Redirect(other.address.port()));
    scene.fire("vm-1").await;
    let _notifier = scene.notifier();
    let messages = scene
        .until(&id, "an attempt fails", |messages| {
            messages.iter().any(|one| !one.attempts.is_empty())
        })
        .await;
    let attempt = &messages[0].attempts[0];
    assert!(
        !attempt.delivered && attempt.answer.contains("redirects are not followed"),
        "{attempt:?}"
    );
    assert_eq!(other.received().len(), 0);
}

#[tokio::test]
async fn refused_address_is_shown_and_never_connected_to() {
    let mut scene = Scene::new().await;
    let (receiver, id) = channel(&mut scene, "hook").await;
    scene.allow.clear();
    scene.fire("vm-1").await;
    let _notifier = scene.notifier();
    let messages = scene
        .until(&id, "an attempt fails", |messages| {
            messages.iter().any(|one| !one.attempts.is_empty())
        })
        .await;
    assert!(
        messages[0].attempts[0].answer.contains("loopback"),
        "{messages:?}"
    );
    assert_eq!(receiver.received().len(), 0);
}

#[tokio::test]
async fn crash_during_an_attempt_loses_nothing() {
    let mut scene = Scene::new().await;
    let (receiver, id) = channel(&mut scene, "hook").await;
    receiver.behave(Behaviour::Hang);
    let alert = scene.fire("vm-1").await;
    let notifier = scene.notifier();
    until("an attempt is in progress", || {
        (!receiver.received().is_empty()).then_some(())
    })
    .await;
    notifier.crash();
    scene.resolve(&alert).await;
    receiver.behave(Behaviour::Status(200));
    // The claim of the crashed notifier ends after a while; here it has ended.
    let due = doc! { "$set": { "due_ms": i64::try_from(unix_millis()).unwrap() } };
    scene
        .store
        .messages
        .update_many(doc! { "due_ms": { "$exists": true } }, due)
        .await
        .unwrap();
    let _notifier = scene.notifier();
    scene
        .until(&id, "both are delivered", |messages| {
            messages.len() == 2 && messages.iter().all(is_delivered)
        })
        .await;
    let got = receiver.received();
    let ids: Vec<_> = got.iter().map(|request| request.id().to_owned()).collect();
    assert_eq!(ids.len(), 3, "the interrupted message is sent again");
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[1], ids[2]);
}

#[tokio::test]
async fn two_notifiers_send_each_message_once() {
    let mut scene = Scene::new().await;
    let (receiver, id) = channel(&mut scene, "hook").await;
    let mut alerts = Vec::new();
    for number in 0..20 {
        alerts.push(scene.fire(&format!("vm-{number}")).await);
    }
    let notifiers = [scene.notifier(), scene.notifier()];
    for alert in &alerts {
        scene.resolve(alert).await;
        for notifier in &notifiers {
            notifier.changed.notify_one();
        }
    }
    scene
        .until(&id, "all ends are delivered", |messages| {
            let reported = messages.iter().flat_map(|message| &message.alerts);
            let ended = reported
                .filter(|alert| alert.state == AlertState::Resolved)
                .count();
            ended == alerts.len() && messages.iter().all(is_delivered)
        })
        .await;
    let mut seen = std::collections::BTreeMap::new();
    for message in scene.messages(&id).await {
        for alert in message.alerts {
            *seen.entry((alert.id, alert.state.as_str())).or_insert(0) += 1;
        }
    }
    assert!(seen.values().all(|count| *count == 1), "{seen:?}");
    let got = receiver.received();
    let ids: std::collections::BTreeSet<_> = got.iter().map(|request| request.id().to_owned()).collect();
    assert_eq!(ids.len(), got.len());
}
