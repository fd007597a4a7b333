//! Writes the changes of alerts to the database, retries until they are written, and only then acknowledges the records
//! that caused them.
//!
//! Each write names the state that it changes, so writing again after a restart changes nothing. A user or another
//! replica may change an alert at the same time.

mod documents;

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Message};
use futures::{StreamExt, stream};
use metrics::{counter, histogram};
use mongodb::{
    bson::{Document, doc, serialize_to_bson},
    options::ReturnDocument,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::alerts::{Alert, AlertState};
use vmwatch_bus::Bus;

use self::documents::{by_condition, condition, fire, open, with_state};
use super::{
    machine::ConditionKey,
    operations::{Operations, explaining},
};
use crate::{
    AlertError,
    events::Events,
    known_vms::VmFacts,
    lease::Freshness,
    store::{Store, StoredAlert, is_duplicate, signed},
};

/// Number of alerts that are written at the same time.
const AT_ONCE: usize = 16;
/// Pauses between attempts while the database does not accept writes.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// Interval at which it is checked whether the lease is held again.
const LEASE_PAUSE: Duration = Duration::from_millis(50);

/// A change of an alert.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    /// Store a new alert.
    Begin(Box<Alert>),
    Fire {
        value: Option<f64>,
        /// What is known of the VM at this time.
        facts: Box<VmFacts>,
    },
    Refresh {
        value: Option<f64>,
    },
    Resolve {
        value: Option<f64>,
        /// When the condition was last known to hold; `None` if it only is no longer evaluated.
        held_ms: Option<u64>,
    },
    /// Delete a pending alert.
    Withdraw,
}

/// A change of the open alert of a condition.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Write {
    pub(super) key: ConditionKey,
    pub(super) at_ms: u64,
    pub(super) change: Change,
}

/// Changes to be written, then a message to be acknowledged with all before it.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) writes: Vec<Write>,
    pub(super) acknowledges: Option<Message>,
    /// Position of the newest record that these changes belong to.
    pub(super) sequence: u64,
}

/// Writes changes of alerts.
pub(super) struct Writer {
    pub(super) bus: Bus,
    pub(super) freshness: Freshness,
    pub(super) store: Store,
    pub(super) events: Events,
    pub(super) operations: Arc<Operations>,
    /// Notified when alerts have changed.
    pub(super) changed: Arc<Notify>,
    /// Position of the newest record whose changes are stored.
    pub(super) written: watch::Sender<u64>,
    /// Conditions whose alert is not open in the database.
    pub(super) lost: mpsc::Sender<ConditionKey>,
}

impl Writer {
    /// Writes until the lease is lost. JetStream redelivers records that were not acknowledged by then.
    pub(super) async fn run(self, mut queue: mpsc::Receiver<Work>, term: CancellationToken) {
        let writing = async {
            while let Some(work) = queue.recv().await {
                self.write_all(work.writes).await;
                self.written.send_replace(work.sequence);
                if let Some(message) = work.acknowledges
                    && let Err(error) = message.ack_with(AckKind::Ack).await
                {
                    warn!(%error, "acknowledging evaluation records failed; they will be redelivered");
                }
            }
        };
        term.run_until_cancelled(writing).await;
    }

    /// Writes all changes; changes of one condition in their order. Retries without limit.
    async fn write_all(&self, writes: Vec<Write>) {
        if writes.is_empty() {
            return;
        }
        let began = Instant::now();
        let mut left = by_condition(writes);
        let mut pause = FIRST_PAUSE;
        loop {
            self.lease_is_held().await;
            let attempts = stream::iter(left).map(async |writes| self.write_in_order(writes).await);
            let unwritten: Vec<_> = attempts.buffer_unordered(AT_ONCE).collect().await;
            left = unwritten
                .into_iter()
                .filter(|writes| !writes.is_empty())
                .collect();
            self.changed.notify_waiters();
            if left.is_empty() {
                break;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        histogram!("vmwatch_alert_write_seconds").record(began.elapsed().as_secs_f64());
    }

    /// Waits until the lease is certainly held, for example after this process was frozen; if another replica has it,
    /// this task ends meanwhile. While NATS is unreachable, no replica can take the lease.
    async fn lease_is_held(&self) {
        while !self.freshness.is_fresh() && self.bus.is_connected() {
            tokio::time::sleep(LEASE_PAUSE).await;
        }
    }

    /// Writes changes of one condition until one fails, and returns those that were not written.
    async fn write_in_order(&self, writes: Vec<Write>) -> Vec<Write> {
        for (index, write) in writes.iter().enumerate() {
            if let Err(error) = self.write(write).await {
                counter!("vmwatch_alert_writes_failed_total").increment(1);
                warn!(%error, rule = %write.key.rule, "writing an alert failed; retrying");
                return writes.get(index..).unwrap_or_default().to_vec();
            }
        }
        Vec::new()
    }

    async fn write(&self, write: &Write) -> Result<(), AlertError> {
        let changed = match &write.change {
            Change::Begin(alert) => return self.insert(alert).await,
            Change::Withdraw => {
                let filter = with_state(&write.key, &[AlertState::Pending]);
                let deleted = self.store.alerts.find_one_and_delete(filter).await?;
                deleted.map(|mut stored| {
                    stored.alert.state = AlertState::Resolved;
                    stored.alert.resolved_ms = Some(write.at_ms);
                    stored.alert.revision += 1;
                    stored.alert
                })
            }
            Change::Refresh { value } => {
                let filter = with_state(&write.key, &[AlertState::Firing, AlertState::Acknowledged]);
                let set = doc! { "$set": { "alert.value": *value } };
                let found = self.store.alerts.update_one(filter, set).await?;
                if found.matched_count == 0 {
                    self.note_lost(write).await?;
                }
                return Ok(());
            }
            Change::Fire { value, facts } => {
                let filter = with_state(&write.key, &[AlertState::Pending]);
                self.update(filter, fire(write.at_ms, *value, facts)?).await?
            }
            Change::Resolve { value, held_ms } => self.resolve(write, *value, *held_ms).await?,
        };
        match changed {
            Some(alert) => {
                counter!("vmwatch_alert_changes_total", "state" => alert.state.as_str()).increment(1);
                self.events.publish(&alert).await;
            }
            None => self.note_lost(write).await?,
        }
        Ok(())
    }

    /// Stores a new alert, unless the condition has an open alert or this alert was stored before.
    async fn insert(&self, alert: &Alert) -> Result<(), AlertError> {
        let key = ConditionKey {
            rule: alert.rule_id.clone(),
            vm: alert.instance_id.clone(),
            subject: alert.subject.clone(),
        };
        if self.store.alerts.find_one(open(&key)).await?.is_some() {
            return Ok(());
        }
        let stored = StoredAlert {
            id: alert.id.to_string(),
            alert: alert.clone(),
            open: true,
            unnotified: alert.state.is_active(),
        };
        match self.store.alerts.insert_one(stored).await {
            Ok(_) => {}
            Err(error) if is_duplicate(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        counter!("vmwatch_alert_changes_total", "state" => alert.state.as_str()).increment(1);
        self.events.publish(alert).await;
        Ok(())
    }

    async fn resolve(
        &self,
        write: &Write,
        value: Option<f64>,
        held_ms: Option<u64>,
    ) -> Result<Option<Alert>, AlertError> {
        let filter = with_state(&write.key, &[AlertState::Firing, AlertState::Acknowledged]);
        let Some(stored) = self.store.alerts.find_one(filter.clone()).await? else {
            return Ok(None);
        };
        let mut set = doc! {
            "alert.state": AlertState::Resolved.as_str(),
            "alert.resolved_ms": signed(write.at_ms),
            "open": false,
            "unnotified": true,
        };
        if let Some(value) = value {
            set.insert("alert.value", value);
        }
        if let Some(held_ms) = held_ms
            && let Some(vm) = &write.key.vm
        {
            let operations = self.operations.newest_of_all().await;
            let ended_by = explaining(&operations, vm, &stored.alert, held_ms);
            if let Some(ended_by) = ended_by {
                set.insert(
                    "alert.ended_by",
                    serialize_to_bson(&ended_by).map_err(mongodb::error::Error::from)?,
                );
            }
        }
        self.update(filter, set).await
    }

    /// Changes an alert and counts its revision up. Returns the alert after the change, or `None` if there is none.
    async fn update(&self, filter: Document, set: Document) -> Result<Option<Alert>, AlertError> {
        let change = doc! { "$set": set, "$inc": { "alert.revision": 1_i64 } };
        let changed = self
            .store
            .alerts
            .find_one_and_update(filter, change)
            .return_document(ReturnDocument::After);
        Ok(changed.await?.map(|stored| stored.alert))
    }

    /// Reports that a condition has no open alert, unless the change was made before: the record that caused it is
    /// evaluated again.
    async fn note_lost(&self, write: &Write) -> Result<(), AlertError> {
        let mut later = condition(&write.key);
        later.insert("alert.resolved_ms", doc! { "$gte": signed(write.at_ms) });
        let ends = matches!(write.change, Change::Resolve { .. } | Change::Withdraw);
        if ends || self.store.alerts.find_one(later).await?.is_some() {
            return Ok(());
        }
        warn!(rule = %write.key.rule, "the alert of a condition that holds is no longer open; it begins again");
        if self.lost.try_send(write.key.clone()).is_err() {
            counter!("vmwatch_alerts_lost_total").increment(1);
        }
        Ok(())
    }
}
