//! A database with rules, channels and alerts, and notifiers that run on it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mongodb::bson::doc;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{Database, PATIENCE, eventually};
use tokio::{sync::Notify, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    alerts::{Alert, AlertState, RecordId, channels::Message},
    time::unix_millis,
};
use vmwatch_service::config::Environment;

use crate::{
    definitions::{self, Definitions, DefinitionsHandle},
    notify::{
        self, Delivery,
        addresses::Addresses,
        outbox::Outbox,
        settings::{AddressSettings, NotifySettings},
        states,
    },
    seal::Keys,
    store::{Store, StoredAlert, StoredChannel, StoredRule, signed},
};

pub(super) const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

pub(super) struct Scene {
    pub(super) folder: TempDir,
    _database: Database,
    pub(super) store: Store,
    pub(super) settings: NotifySettings,
    /// Receivers on loopback that the notifier may connect to.
    pub(super) allow: Vec<SocketAddr>,
    rule: RecordId,
    recipients: Vec<String>,
}

/// A running notifier. It is stopped when it is dropped.
pub(super) struct Notifier {
    pub(super) changed: Arc<Notify>,
    shutdown: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Notifier {
    /// Ends the notifier as a crash would: at once, in the middle of what it does.
    pub(super) fn crash(mut self) {
        self.task.take().unwrap().abort();
    }

    pub(super) async fn stop(mut self) {
        self.shutdown.cancel();
        self.task.take().unwrap().await.unwrap();
    }
}

impl Scene {
    pub(super) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::start(folder.path()).await;
        let store = Store::new(&database.handle());
        let mut settings = NotifySettings::read(&Environment::from_variables([])).unwrap();
        settings.keys = Arc::new(KEY.parse().unwrap());
        Outbox::new(&store).prepare().await.unwrap();
        Self {
            folder,
            _database: database,
            store,
            settings,
            allow: Vec::new(),
            rule: RecordId::from_parts(&["rule"]),
            recipients: Vec::new(),
        }
    }

    /// Adds a channel that the rule of all alerts notifies.
    pub(super) async fn add_channel(&mut self, name: &str, target: Value, more: Value) -> RecordId {
        self.add_secret_channel(name, target, more, None).await
    }

    pub(super) async fn add_secret_channel(
        &mut self,
        name: &str,
        target: Value,
        more: Value,
        secret: Option<&str>,
    ) -> RecordId {
        let id = RecordId::from_parts(&["channel", name]);
        let mut spec = json!({ "name": name, "enabled": true, "target": target });
        let more = more.as_object().cloned().unwrap_or_default();
        spec.as_object_mut().unwrap().extend(more);
        let spec: vmwatch_api::alerts::channels::ChannelSpec = serde_json::from_value(spec).unwrap();
        let keys: Keys = KEY.parse().unwrap();
        let secret = secret.map(|secret| keys.seal(&id, &spec.target, secret).unwrap());
        let channel = StoredChannel {
            id: id.to_string(),
            revision: 1,
            spec,
            secret,
            changed_by: "ann".to_owned(),
            changed_ms: 1,
        };
        self.store.channels.insert_one(channel).await.unwrap();
        self.recipients.push(id.to_string());
        self.write_rule().await;
        id
    }

    async fn write_rule(&self) {
        let spec = json!({
            "name": "CPU high", "enabled": true, "for_seconds": 300, "severity": "critical",
            "condition": condition(), "recipients": self.recipients,
        });
        let rule = StoredRule {
            id: self.rule.to_string(),
            revision: 1,
            spec: serde_json::from_value(spec).unwrap(),
            changed_by: "ann".to_owned(),
            changed_ms: 1,
            removed: false,
            problem: None,
        };
        let same = doc! { "_id": self.rule.as_str() };
        self.store
            .rules
            .replace_one(same, rule)
            .upsert(true)
            .await
            .unwrap();
    }

    /// Silences alerts with this label, from now on.
    pub(super) async fn silence(&self, key: &str, value: &str) -> String {
        let id = RecordId::from_parts(&["silence", key, value]).to_string();
        let now = unix_millis();
        let silence = json!({
            "matchers": { key: value },
            "range": { "from_ms": now - 1000, "to_ms": now + 3_600_000 },
        });
        let stored = crate::store::StoredSilence {
            id: id.clone(),
            silence: serde_json::from_value(silence).unwrap(),
            created_by: "ann".to_owned(),
            created_ms: signed(now),
            until_ms: signed(now + 3_600_000),
        };
        self.store.silences.insert_one(stored).await.unwrap();
        id
    }

    /// Stores a firing alert of a VM that began five minutes ago, with culprits.
    pub(super) async fn fire(&self, vm: &str) -> Alert {
        let alert = self.alert(vm, unix_millis());
        self.store_alert(&alert).await;
        alert
    }

    pub(super) async fn store_alert(&self, alert: &Alert) {
        let stored = StoredAlert {
            id: alert.id.to_string(),
            alert: alert.clone(),
            open: alert.state != AlertState::Resolved,
            unnotified: true,
        };
        let same = doc! { "_id": alert.id.as_str() };
        self.store
            .alerts
            .replace_one(same, stored)
            .upsert(true)
            .await
            .unwrap();
    }

    pub(super) fn alert(&self, vm: &str, fired_ms: u64) -> Alert {
        let since_ms = fired_ms - 300_000;
        serde_json::from_value(json!({
            "id": RecordId::from_parts(&[vm, &since_ms.to_string()]),
            "rule_id": self.rule, "rule_name": "CPU high", "severity": "critical",
            "condition": condition(), "instance_id": vm, "vm_name": format!("name-{vm}"), "hypervisor": "lab",
            "labels": { "env": "prod", "hv/os": "linux" }, "state": "firing", "value": 97.0,
            "since_ms": since_ms, "fired_ms": fired_ms, "revision": 1,
            "culprits": {
                "from_ms": since_ms, "to_ms": fired_ms, "processes": [{
                    "name": "pg_restore", "pid": 4121, "started_ms": since_ms, "amount": 243.0, "share": 0.81,
                    "owner": { "user": "postgres", "unit": "backup.service" },
                }],
            },
        }))
        .unwrap()
    }

    /// Resolves an alert, as the engine does.
    pub(super) async fn resolve(&self, alert: &Alert) {
        let alert = Alert {
            state: AlertState::Resolved,
            resolved_ms: Some(unix_millis()),
            revision: alert.revision + 1,
            ..alert.clone()
        };
        self.store_alert(&alert).await;
    }

    pub(super) async fn definitions(&self) -> Definitions {
        definitions::read(&self.store).await.unwrap()
    }

    pub(super) fn notifier(&self) -> Notifier {
        let (changed, shutdown) = (Arc::new(Notify::new()), CancellationToken::new());
        let definitions: DefinitionsHandle = definitions::follow(self.store.clone(), shutdown.clone());
        let addresses = Addresses::new(AddressSettings {
            allow: self.allow.clone(),
            ..AddressSettings::default()
        });
        let delivery = Delivery::new(&self.settings, Arc::new(addresses)).unwrap();
        let task = tokio::spawn(notify::run(
            Arc::new(delivery),
            self.store.clone(),
            definitions,
            Arc::clone(&changed),
            shutdown.clone(),
        ));
        Notifier {
            changed,
            shutdown,
            task: Some(task),
        }
    }

    pub(super) async fn messages(&self, channel: &RecordId) -> Vec<Message> {
        let mut found = self
            .store
            .messages
            .find(doc! { "message.channel_id": channel.as_str() })
            .sort(doc! { "message.created_ms": 1 })
            .await
            .unwrap();
        let mut messages = Vec::new();
        while found.advance().await.unwrap() {
            messages.push(found.deserialize_current().unwrap().message);
        }
        messages
    }

    pub(super) async fn problem(&self, channel: &RecordId) -> Option<String> {
        states::problems(&self.store)
            .await
            .unwrap()
            .remove(channel.as_str())
    }

    /// Waits until a channel has a problem.
    pub(super) async fn until_problem(&self, channel: &RecordId) -> String {
        eventually("the problem is shown", PATIENCE, async || {
            self.problem(channel).await.ok_or_else(|| "none yet".to_owned())
        })
        .await
    }

    /// Waits until the messages of a channel fulfil a condition.
    pub(super) async fn until(
        &self,
        channel: &RecordId,
        what: &str,
        holds: impl Fn(&[Message]) -> bool,
    ) -> Vec<Message> {
        eventually(what, PATIENCE, async || {
            let messages = self.messages(channel).await;
            if holds(&messages) {
                Ok(messages)
            } else {
                Err(format!("{messages:#?}"))
            }
        })
        .await
    }
}

/// Waits for a condition on something other than messages.
pub(super) async fn until<T>(what: &str, probe: impl Fn() -> Option<T>) -> T {
    let limit = PATIENCE + Duration::from_secs(30);
    eventually(what, limit, async || probe().ok_or_else(|| "not yet".to_owned())).await
}

pub(super) fn is_delivered(message: &Message) -> bool {
    message.delivered_ms.is_some()
}

fn condition() -> Value {
    json!({ "kind": "measure", "measure": "cpu_util", "threshold": { "direction": "above", "limit": 90.0 } })
}
