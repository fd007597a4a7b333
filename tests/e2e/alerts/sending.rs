//! Tests that no message is lost if alert-svc is killed at any step of sending, and that its heartbeat ends with it.

use mongodb::bson::{Document, doc};
use serde_json::{Value, json};
use testkit::{
    Alertmanager, MongoProxy, PATIENCE, Program, Stack, eventually,
    webhooks::{Behaviour, Received, Receiver},
};
use vmwatch_api::{
    Principal, Role, Scope,
    alerts::{
        RecordId,
        channels::{ChannelsCreate, NewChannel},
        rules::{RuleSpec, RulesCreate},
    },
    time::unix_millis,
};
use vmwatch_bus::Context;
use vmwatch_store::MONGODB_URI;

use super::engine_support::{CPU, builder, cpu, publish, rule_is_evaluated, start};

const MESSAGES: &str = "alert_messages";
const ALLOW: &str = "VMWATCH_ALERT_ALLOW";

/// A step of sending a message, at which alert-svc is killed.
struct Step {
    /// The command on the messages that does not reach the database, and a text that only this command contains; `None`
    /// if the receiver determines the step.
    held: Option<(&'static str, &'static str)>,
    behaviour: Behaviour,
    /// Number of requests that the receiver reads.
    requests: usize,
}

/// The steps. The message is sent again only if the receiver may have got it. The last step of sending is the first
/// here, because it may follow after a message counts as delivered, and would be taken for that of the next message.
const STEPS: [(&str, Step); 6] = [
    (
        "messages that wait for this one are released",
        Step {
            held: Some(("update", "$or")),
            behaviour: Behaviour::Status(200),
            requests: 1,
        },
    ),
    (
        "the message is stored",
        Step {
            held: Some(("insert", "keys")),
            behaviour: Behaviour::Status(200),
            requests: 1,
        },
    ),
    (
        "the message is claimed",
        Step {
            held: Some(("findAndModify", "message.tries")),
            behaviour: Behaviour::Status(200),
            requests: 1,
        },
    ),
    (
        "the receiver reads the request",
        Step {
            held: None,
            behaviour: Behaviour::Ignore,
            requests: 1,
        },
    ),
    (
        "the receiver answers",
        Step {
            held: None,
            behaviour: Behaviour::Hang,
            requests: 2,
        },
    ),
    (
        "the answer is recorded",
        Step {
            held: Some(("update", "message.delivered_ms")),
            behaviour: Behaviour::Status(200),
            requests: 2,
        },
    ),
];

fn administrator() -> Context {
    Context::new(PATIENCE).as_principal(Principal {
        user: "ann".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    })
}

async fn add_channel(stack: &Stack, target: Value, more: Value) -> RecordId {
    let mut spec = json!({ "name": "ops", "enabled": true, "target": target });
    spec.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let channel: NewChannel = serde_json::from_value(json!({ "spec": spec })).unwrap();
    let channel = stack.bus.call::<ChannelsCreate>(&administrator(), &channel).await;
    channel.unwrap().id
}

/// Creates a rule about the CPU that notifies the channel, and waits until it is evaluated.
async fn add_rule(stack: &Stack, channel: &RecordId) {
    let condition: Value = serde_json::from_str(CPU).unwrap();
    let spec = json!({
        "name": "busy", "enabled": true, "condition": condition, "for_seconds": 0, "severity": "warning",
        "recipients": [channel],
    });
    let spec: RuleSpec = serde_json::from_value(spec).unwrap();
    let rule = stack.bus.call::<RulesCreate>(&administrator(), &spec).await;
    rule_is_evaluated(stack, &rule.unwrap().id).await;
}

/// The requests about a VM in which its alert has this status.
fn requests(receiver: &Receiver, vm: &str, status: &str) -> Vec<Received> {
    let is_about = |request: &Received| {
        let json = request.json();
        let alert = &json["alerts"][0];
        alert["labels"]["instance_id"] == vm && alert["status"] == status
    };
    let mut requests = receiver.received();
    requests.retain(is_about);
    requests
}

/// Waits until alert-svc has reached the step.
async fn reached(step: &Step, proxy: &MongoProxy, receiver: &Receiver, vm: &str) {
    if step.held.is_some() {
        return proxy.holds().await;
    }
    eventually("the receiver has the connection", PATIENCE, async || {
        let read = requests(receiver, vm, "firing").len();
        let has_it = match step.behaviour {
            Behaviour::Ignore => receiver.ignored() > 0,
            _ => read > 0,
        };
        has_it.then_some(()).ok_or_else(|| "not yet".to_owned())
    })
    .await;
}

/// Ends the claims of the killed process, which would otherwise end after 40 seconds.
async fn end_claims(stack: &Stack) {
    let messages = stack.database.handle().collection::<Document>(MESSAGES);
    let now = i64::try_from(unix_millis()).unwrap();
    let due = doc! { "$set": { "due_ms": now, "message.next_ms": now } };
    messages.update_many(doc! { "claimed": true }, due).await.unwrap();
}

/// Waits until there are this many messages and all of them are delivered.
async fn all_delivered(stack: &Stack, count: u64) {
    let messages = stack.database.handle().collection::<Document>(MESSAGES);
    eventually("all messages are delivered", PATIENCE, async || {
        let all = messages.count_documents(doc! {}).await;
        let delivered = messages.count_documents(doc! { "message.delivered_ms": { "$gt": 0_i64 } });
        match (all, delivered.await) {
            (Ok(all), Ok(delivered)) if (all, delivered) == (count, count) => Ok(()),
            other => Err(format!("{other:?} of {count}")),
        }
    })
    .await;
}

#[tokio::test]
async fn no_message_is_lost_and_only_a_lost_answer_makes_a_duplicate() {
    let receiver = Receiver::start().await;
    let allowed = receiver.address.to_string();
    let stack = start(builder().set(Program::Alert, ALLOW, &allowed)).await;
    let proxy = MongoProxy::start(stack.database.uri(), MESSAGES).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.set(MONGODB_URI.name, proxy.uri());
    alert_svc.process.kill9();
    alert_svc.restart().await;
    let target = json!({ "kind": "webhook", "url": receiver.url() });
    let channel = add_channel(&stack, target, json!({ "group_by": ["vm"] })).await;
    add_rule(&stack, &channel).await;
    let vm = |index: usize| format!("vm-{index}");
    for (index, (what, step)) in STEPS.iter().enumerate() {
        println!("killed before {what}");
        receiver.behave(step.behaviour);
        if let Some((command, text)) = step.held {
            proxy.hold_with(command, text);
        }
        publish(&stack, &cpu(&vm(index), unix_millis(), 95.0)).await;
        reached(step, &proxy, &receiver, &vm(index)).await;
        alert_svc.process.kill9();
        proxy.drop_held();
        receiver.behave(Behaviour::Status(200));
        end_claims(&stack).await;
        alert_svc.restart().await;
        all_delivered(&stack, index as u64 + 1).await;
    }
    for index in 0..STEPS.len() {
        publish(&stack, &cpu(&vm(index), unix_millis(), 10.0)).await;
    }
    all_delivered(&stack, 2 * STEPS.len() as u64).await;
    for (index, (what, step)) in STEPS.iter().enumerate() {
        let firing = requests(&receiver, &vm(index), "firing");
        assert_eq!(firing.len(), step.requests, "{what}: {firing:#?}");
        assert!(
            firing.iter().all(|request| request.id() == firing[0].id()),
            "{what}"
        );
        assert_eq!(requests(&receiver, &vm(index), "resolved").len(), 1, "{what}");
    }
}

#[tokio::test]
async fn heartbeat_ends_while_alert_svc_is_down() {
    let folder = tempfile::tempdir().unwrap();
    let hook = Receiver::start().await;
    let alertmanager = Alertmanager::start(folder.path(), &hook.url()).await;
    let allowed = alertmanager.address.to_string();
    let stack = start(builder().set(Program::Alert, ALLOW, &allowed)).await;
    let target = json!({ "kind": "alertmanager", "url": alertmanager.url("") });
    add_channel(&stack, target, json!({ "heartbeat_seconds": 10 })).await;
    // Alertmanager resolves the alert thirty seconds after the last heartbeat.
    let heartbeat = async |is_shown: bool| {
        eventually("the heartbeat begins or ends", 2 * PATIENCE, async || {
            let shown = alertmanager.alert("VmwatchHeartbeat").await;
            (shown.is_some() == is_shown)
                .then_some(())
                .ok_or_else(|| format!("{shown:?}"))
        })
        .await;
    };
    heartbeat(true).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    heartbeat(false).await;
    alert_svc.restart().await;
    heartbeat(true).await;
}
