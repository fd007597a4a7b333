//! Which messages are made: groups, silences, repeats, heartbeats and full channels.

use mongodb::bson::doc;
use serde_json::json;
use vmwatch_api::{
    alerts::{
        AlertState, RecordId,
        channels::{MAX_WAITING, Purpose},
    },
    time::unix_millis,
};

use super::scene::Scene;
use crate::{
    notify::{outbox::Outbox, planner::Planner, survey::Survey},
    store::StoredMessage,
};

/// A receiver that nothing is sent to, because no notifier runs.
fn nowhere() -> serde_json::Value {
    json!({ "kind": "webhook", "url": "http://127.0.0.1:9/" })
}

struct Makers {
    planner: Planner,
    survey: Survey,
}

impl Makers {
    fn new(scene: &Scene) -> Self {
        let outbox = Outbox::new(&scene.store);
        Self {
            planner: Planner::new(&scene.store, &outbox),
            survey: Survey::new(&scene.store, &outbox),
        }
    }

    async fn plan(&mut self, scene: &Scene) {
        let definitions = scene.definitions().await;
        self.planner.pass(&definitions, unix_millis()).await.unwrap();
    }

    /// A new survey, as after a restart, at this time.
    async fn survey(&mut self, scene: &Scene, now_ms: u64) {
        let definitions = scene.definitions().await;
        self.survey = Survey::new(&scene.store, &Outbox::new(&scene.store));
        self.survey.pass(&definitions, now_ms).await.unwrap();
    }
}

#[tokio::test]
async fn alerts_of_a_group_share_a_message_while_it_waits() {
    let mut scene = Scene::new().await;
    let grouped = json!({ "group_by": ["label:env"], "group_wait_seconds": 60 });
    let channel = scene.add_channel("grouped", nowhere(), grouped).await;
    let single = scene
        .add_channel("single", nowhere(), json!({ "group_by": ["vm"] }))
        .await;
    let mut makers = Makers::new(&scene);
    scene.fire("vm-1").await;
    scene.fire("vm-2").await;
    makers.plan(&scene).await;
    scene.fire("vm-3").await;
    let mut other = scene.alert("vm-4", unix_millis());
    other.labels.insert("env".to_owned(), "test".to_owned());
    scene.store_alert(&other).await;
    makers.plan(&scene).await;
    // A pass that repeats the work of an interrupted one makes nothing new.
    let again = doc! { "$set": { "unnotified": true } };
    scene.store.alerts.update_many(doc! {}, again).await.unwrap();
    makers.plan(&scene).await;
    let mut sizes: Vec<_> = scene
        .messages(&channel)
        .await
        .iter()
        .map(|one| one.alerts.len())
        .collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 3]);
    let messages = scene.messages(&channel).await;
    assert!(
        messages
            .iter()
            .all(|one| one.next_ms.unwrap() >= one.created_ms + 60_000)
    );
    assert_eq!(messages[0].group["label:env"], "prod");
    assert_eq!(scene.messages(&single).await.len(), 4);
    let unnotified = scene
        .store
        .alerts
        .count_documents(doc! { "unnotified": true })
        .await
        .unwrap();
    assert_eq!(unnotified, 0);
}

#[tokio::test]
async fn silenced_alert_is_announced_if_it_still_fires_when_the_silence_ends() {
    let mut scene = Scene::new().await;
    let channel = scene.add_channel("hook", nowhere(), json!({})).await;
    let silence = scene.silence("env", "prod").await;
    let mut makers = Makers::new(&scene);
    let short = scene.fire("vm-1").await;
    let long = scene.fire("vm-2").await;
    makers.plan(&scene).await;
    scene.resolve(&short).await;
    makers.plan(&scene).await;
    assert_eq!(scene.messages(&channel).await, []);
    scene
        .store
        .silences
        .delete_one(doc! { "_id": silence })
        .await
        .unwrap();
    makers.plan(&scene).await;
    let messages = scene.messages(&channel).await;
    let [message] = messages.as_slice() else {
        panic!("{messages:?}");
    };
    assert_eq!(message.alerts.len(), 1);
    assert_eq!(
        (&message.alerts[0].id, message.alerts[0].state),
        (&long.id, AlertState::Firing)
    );
    // The end of an announced alert is announced even while it is silenced.
    scene.silence("vm_name", "name-vm-2").await;
    scene.resolve(&long).await;
    makers.plan(&scene).await;
    assert_eq!(scene.messages(&channel).await.len(), 2);
}

#[tokio::test]
async fn alert_waits_a_moment_for_its_culprits() {
    let mut scene = Scene::new().await;
    let channel = scene.add_channel("hook", nowhere(), json!({})).await;
    let mut makers = Makers::new(&scene);
    let mut alert = scene.alert("vm-1", unix_millis());
    let culprits = alert.culprits.take();
    scene.store_alert(&alert).await;
    makers.plan(&scene).await;
    assert_eq!(scene.messages(&channel).await, []);
    alert.culprits = culprits;
    scene.store_alert(&alert).await;
    makers.plan(&scene).await;
    assert_eq!(scene.messages(&channel).await.len(), 1);
    let mut unexplained = scene.alert("vm-2", unix_millis());
    unexplained.culprits = None;
    scene.store_alert(&unexplained).await;
    testkit::eventually(
        "it is announced without culprits",
        testkit::PATIENCE,
        async || {
            makers.plan(&scene).await;
            let count = scene.messages(&channel).await.len();
            if count == 2 {
                Ok(())
            } else {
                Err(count.to_string())
            }
        },
    )
    .await;
}

#[tokio::test]
async fn firing_alerts_are_repeated_once_each_interval_until_acknowledged() {
    let mut scene = Scene::new().await;
    let channel = scene
        .add_channel("hook", nowhere(), json!({ "repeat_seconds": 600 }))
        .await;
    let mut makers = Makers::new(&scene);
    let fired_ms = unix_millis();
    let mut alert = scene.alert("vm-1", fired_ms);
    scene.store_alert(&alert).await;
    makers.plan(&scene).await;
    let repeats = async |scene: &Scene| {
        let messages = scene.messages(&channel).await;
        messages
            .iter()
            .filter(|message| message.purpose == Purpose::Repeat)
            .count()
    };
    makers.survey(&scene, fired_ms + 599_000).await;
    assert_eq!(repeats(&scene).await, 0);
    for _ in 0..2 {
        makers.survey(&scene, fired_ms + 610_000).await;
        assert_eq!(repeats(&scene).await, 1);
    }
    makers.survey(&scene, fired_ms + 1_210_000).await;
    assert_eq!(repeats(&scene).await, 2);
    alert.state = AlertState::Acknowledged;
    alert.revision += 1;
    scene.store_alert(&alert).await;
    makers.plan(&scene).await;
    makers.survey(&scene, fired_ms + 1_810_000).await;
    assert_eq!(repeats(&scene).await, 2);
}

#[tokio::test]
async fn alertmanager_gets_known_alerts_again_even_if_acknowledged_or_silenced() {
    let mut scene = Scene::new().await;
    let target = json!({ "kind": "alertmanager", "url": "http://127.0.0.1:9" });
    let channel = scene.add_channel("am", target, json!({})).await;
    let mut makers = Makers::new(&scene);
    let mut alert = scene.fire("vm-1").await;
    makers.plan(&scene).await;
    scene.silence("env", "prod").await;
    alert.state = AlertState::Acknowledged;
    alert.revision += 1;
    scene.store_alert(&alert).await;
    scene.fire("vm-2").await;
    makers.plan(&scene).await;
    let now = unix_millis();
    for passed in [0, 1_000, 60_000, 120_000] {
        makers.survey(&scene, now + passed).await;
    }
    let messages = scene.messages(&channel).await;
    let repeats: Vec<_> = messages
        .iter()
        .filter(|one| one.purpose == Purpose::Repeat)
        .collect();
    assert_eq!(repeats.len(), 1, "a newer refresh replaces one that waits");
    assert_eq!(repeats[0].alerts.len(), 1, "the silenced alert is not known");
    assert_eq!(repeats[0].alerts[0].id, alert.id);
}

#[tokio::test]
async fn newer_heartbeat_replaces_one_that_waits() {
    let mut scene = Scene::new().await;
    let channel = scene
        .add_channel("hook", nowhere(), json!({ "heartbeat_seconds": 10 }))
        .await;
    let mut makers = Makers::new(&scene);
    let now = unix_millis();
    for passed in [0, 10_000, 20_000, 20_000] {
        makers.survey(&scene, now + passed).await;
    }
    let messages = scene.messages(&channel).await;
    assert_eq!(messages.len(), 1);
    assert_eq!(
        (messages[0].purpose, messages[0].created_ms),
        (Purpose::Heartbeat, now + 20_000)
    );
}

#[tokio::test]
async fn alerts_of_a_full_channel_join_waiting_messages() {
    let mut scene = Scene::new().await;
    let channel = scene
        .add_channel("hook", nowhere(), json!({ "group_by": ["vm"] }))
        .await;
    let mut makers = Makers::new(&scene);
    scene.fire("vm-1").await;
    makers.plan(&scene).await;
    let template = scene.store.messages.find_one(doc! {}).await.unwrap().unwrap();
    let filler = (1..MAX_WAITING).map(|number| {
        let mut message: StoredMessage = template.clone();
        let id = RecordId::from_parts(&["filler", &number.to_string()]);
        message.id = id.to_string();
        message.message.id = id;
        message.message.created_ms -= 1000;
        message.message.alerts[0].id = RecordId::from_parts(&["other", &number.to_string()]);
        message
            .message
            .group
            .insert("vm".to_owned(), format!("other-{number}"));
        message.keys = vec![format!("filler/{number}")];
        message
    });
    scene.store.messages.insert_many(filler).await.unwrap();
    let second = scene.alert("vm-1", unix_millis() + 5000);
    scene.store_alert(&second).await;
    scene.fire("vm-unknown").await;
    makers.plan(&scene).await;
    let messages = scene.messages(&channel).await;
    assert_eq!(messages.len(), MAX_WAITING);
    let joined: Vec<_> = messages
        .iter()
        .filter(|message| message.alerts.len() > 1)
        .collect();
    let [joined] = joined.as_slice() else {
        panic!("{joined:?}");
    };
    assert_eq!(joined.alerts.len(), 3);
    assert!(joined.alerts.iter().any(|alert| alert.id == second.id));
    assert_eq!(
        joined.group.get("vm"),
        None,
        "the alerts no longer have a VM in common"
    );
}
