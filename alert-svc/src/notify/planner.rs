//! Makes messages of alerts that have begun to fire or were resolved.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use mongodb::bson::doc;
use tokio::time::Instant;
use vmwatch_api::alerts::{
    Alert, AlertState, RecordId,
    channels::{MessageAlert, Purpose},
    silences::Silence,
};

use super::{
    labels,
    outbox::{Draft, Outbox, state_key},
};
use crate::{
    AlertError,
    definitions::Definitions,
    store::{Store, StoredAlert, signed},
};

/// Maximum number of alerts of a pass.
const PASS: i64 = 1000;
/// Time for which an alert waits for the processes that explain it.
const CULPRIT_WAIT: Duration = Duration::from_secs(3);
/// Number of alerts that are marked as notified at the same time.
const MARKED_AT_ONCE: usize = 16;

/// The part of the definitions that decides which alerts notify which channels. If it changes, alerts that are firing are
/// considered again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Reach {
    silences: BTreeSet<RecordId>,
    recipients: BTreeMap<RecordId, Vec<RecordId>>,
    channels: BTreeSet<String>,
}

impl Reach {
    fn new(definitions: &Definitions, now_ms: u64) -> Self {
        let holding = definitions
            .silences
            .iter()
            .filter(|silence| holds(silence, now_ms));
        let rules = definitions.rules.iter();
        Self {
            silences: holding.map(|silence| silence.id.clone()).collect(),
            recipients: rules
                .map(|rule| (rule.id.clone(), rule.spec.recipients.clone()))
                .collect(),
            channels: definitions
                .channels
                .iter()
                .map(|channel| channel.id.clone())
                .collect(),
        }
    }
}

/// Makes the messages.
#[derive(Debug)]
pub(super) struct Planner {
    store: Store,
    outbox: Outbox,
    reach: Option<Reach>,
    /// When alerts that wait for their culprits were first seen.
    waiting: HashMap<String, Instant>,
}

impl Planner {
    pub(super) fn new(store: &Store, outbox: &Outbox) -> Self {
        Self {
            store: store.clone(),
            outbox: outbox.clone(),
            reach: None,
            waiting: HashMap::new(),
        }
    }

    /// Makes the messages of alerts that are not notified. Returns whether more of them wait.
    pub(super) async fn pass(&mut self, definitions: &Definitions, now_ms: u64) -> Result<bool, AlertError> {
        self.reconsider(definitions, now_ms).await?;
        let found = self
            .store
            .alerts
            .find(doc! { "unnotified": true })
            .sort(doc! { "alert.since_ms": 1 })
            .limit(PASS);
        let found: Vec<StoredAlert> = found.await?.try_collect().await?;
        let is_more = i64::try_from(found.len()).is_ok_and(|count| count == PASS);
        let ready = self.ready(found, Instant::now());
        let resolved = ready
            .iter()
            .filter(|alert| alert.alert.state == AlertState::Resolved);
        let resolved: Vec<_> = resolved.map(|alert| alert.id.clone()).collect();
        let announced = self.outbox.keys_of_alerts(&resolved).await?;
        let alerts = ready.iter().map(|stored| &stored.alert);
        for draft in drafts(alerts, definitions, &announced, now_ms) {
            self.outbox.add(&draft, now_ms).await?;
        }
        self.mark(&ready).await?;
        Ok(is_more && !ready.is_empty())
    }

    /// Marks firing alerts as not notified if a silence has ended or a recipient was added. What was announced already is not
    /// announced again.
    async fn reconsider(&mut self, definitions: &Definitions, now_ms: u64) -> Result<(), AlertError> {
        let reach = Reach::new(definitions, now_ms);
        if self.reach.as_ref() == Some(&reach) {
            return Ok(());
        }
        let firing = doc! { "open": true, "alert.state": AlertState::Firing.as_str(), "unnotified": false };
        let mark = doc! { "$set": { "unnotified": true } };
        self.store.alerts.update_many(firing, mark).await?;
        self.reach = Some(reach);
        Ok(())
    }

    /// The alerts that need not wait for their culprits.
    fn ready(&mut self, found: Vec<StoredAlert>, now: Instant) -> Vec<StoredAlert> {
        let mut waiting = HashMap::new();
        let ready = found.into_iter().filter(|stored| {
            let alert = &stored.alert;
            if alert.culprits.is_some() || alert.instance_id.is_none() || !alert.state.is_active() {
                return true;
            }
            let since = self.waiting.get(&stored.id).copied().unwrap_or(now);
            let is_ready = now.duration_since(since) >= CULPRIT_WAIT;
            waiting.insert(stored.id.clone(), since);
            is_ready
        });
        let ready = ready.collect();
        self.waiting = waiting;
        ready
    }

    /// Marks alerts as notified, unless they have changed.
    async fn mark(&self, alerts: &[StoredAlert]) -> Result<(), AlertError> {
        let unchanged: Vec<_> = alerts
            .iter()
            .map(|stored| doc! { "_id": &stored.id, "alert.revision": signed(stored.alert.revision) })
            .collect();
        let marks = stream::iter(unchanged).map(|unchanged| {
            let alerts = self.store.alerts.clone();
            let mark = doc! { "$set": { "unnotified": false } };
            async move { alerts.update_one(unchanged, mark).await }
        });
        marks
            .buffer_unordered(MARKED_AT_ONCE)
            .try_collect::<Vec<_>>()
            .await?;
        Ok(())
    }
}

/// Whether a silence holds now.
pub(super) const fn holds(silence: &Silence, now_ms: u64) -> bool {
    let range = silence.silence.range;
    range.from_ms() <= now_ms && now_ms < range.to_ms()
}

/// Whether a silence that holds now matches the alert.
pub(super) fn is_silenced(alert: &Alert, definitions: &Definitions, now_ms: u64) -> bool {
    let mut holding = definitions
        .silences
        .iter()
        .filter(|silence| holds(silence, now_ms))
        .peekable();
    if holding.peek().is_none() {
        return false;
    }
    let labels = labels::all(alert);
    holding.any(|silence| silence.silence.matchers.matches(&labels))
}

/// The channels that the rule of an alert names as recipients.
pub(super) fn recipients<'a>(alert: &Alert, definitions: &'a Definitions) -> &'a [RecordId] {
    let rule = definitions.rules.iter().find(|rule| rule.id == alert.rule_id);
    rule.map_or(&[], |rule| rule.spec.recipients.as_slice())
}

/// The messages of alerts, one for each channel and group. `announced` has the keys of messages with resolved alerts.
fn drafts<'a>(
    alerts: impl Iterator<Item = &'a Alert>,
    definitions: &Definitions,
    announced: &HashSet<String>,
    now_ms: u64,
) -> Vec<Draft> {
    let mut drafts: BTreeMap<(String, BTreeMap<String, String>), Draft> = BTreeMap::new();
    for alert in alerts {
        let is_silenced = is_silenced(alert, definitions, now_ms);
        let recipients = recipients(alert, definitions);
        for channel in &definitions.channels {
            let Ok(id) = channel.id.parse::<RecordId>() else {
                continue;
            };
            let firing = reported(alert, AlertState::Firing);
            let is_wanted = recipients.contains(&id) && !is_silenced;
            let state = match alert.state {
                // A channel that was notified of an alert is notified of its end.
                AlertState::Resolved if is_wanted || announced.contains(&state_key(&id, &firing)) => {
                    AlertState::Resolved
                }
                AlertState::Firing | AlertState::Acknowledged if is_wanted => AlertState::Firing,
                _ => continue,
            };
            let group = labels::group(alert, &channel.spec.group_by);
            let wait_ms = u64::from(channel.spec.group_wait_seconds) * 1000;
            let draft = drafts
                .entry((channel.id.clone(), group.clone()))
                .or_insert_with(|| Draft {
                    channel: id,
                    purpose: Purpose::Change,
                    group,
                    alerts: Vec::new(),
                    key: None,
                    due_ms: now_ms.saturating_add(wait_ms),
                });
            draft.alerts.push(reported(alert, state));
        }
    }
    drafts.into_values().collect()
}

/// An alert in a message, in this state.
pub(super) fn reported(alert: &Alert, state: AlertState) -> MessageAlert {
    MessageAlert {
        id: alert.id.clone(),
        state,
    }
}
