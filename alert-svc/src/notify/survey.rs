//! Makes the messages that depend on time: repeats of alerts that are still firing, and heartbeats.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use futures::TryStreamExt;
use mongodb::bson::doc;
use tokio::time::Instant;
use vmwatch_api::alerts::{
    Alert, AlertState, RecordId,
    channels::{ChannelTarget, MessageAlert, Purpose},
};

use super::{
    labels,
    outbox::{Draft, Outbox, millis, state_key},
    planner::{is_silenced, recipients, reported},
    send::alertmanager::REFRESH,
};
use crate::{
    AlertError,
    definitions::Definitions,
    store::{Store, StoredChannel},
};

/// Interval at which the alerts that are firing are read.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time for which replaced messages, such as delivered heartbeats, are kept.
const REPLACED_KEPT_MS: u64 = 3_600_000;

type Group = BTreeMap<String, String>;

/// Makes repeats and heartbeats.
#[derive(Debug)]
pub(super) struct Survey {
    store: Store,
    outbox: Outbox,
    last: Option<Instant>,
    /// The newest heartbeat and refresh of each channel, by its key without the number of its interval.
    slots: HashMap<String, u64>,
    /// The repeats of the groups that have alerts, so that they are not looked up again in each pass.
    repeated: HashSet<String>,
}

/// The alerts of a channel that are firing.
#[derive(Debug, Default)]
struct Firing {
    /// By group: those that are repeated, with the time at which they began to fire.
    groups: BTreeMap<Group, Vec<(u64, MessageAlert)>>,
    /// Those that an Alertmanager must get regularly, if it got them before.
    refreshed: Vec<MessageAlert>,
}

impl Survey {
    pub(super) fn new(store: &Store, outbox: &Outbox) -> Self {
        Self {
            store: store.clone(),
            outbox: outbox.clone(),
            last: None,
            slots: HashMap::new(),
            repeated: HashSet::new(),
        }
    }

    /// Makes the messages that are due.
    pub(super) async fn pass(&mut self, definitions: &Definitions, now_ms: u64) -> Result<(), AlertError> {
        let enabled = definitions.channels.iter().filter(|channel| channel.spec.enabled);
        let channels: Vec<_> = enabled
            .filter_map(|channel| Some((channel.id.parse().ok()?, channel)))
            .collect();
        for (id, channel) in &channels {
            self.heartbeat(id, channel, now_ms).await?;
        }
        let surveyed: Vec<_> = channels
            .into_iter()
            .filter(|(_, channel)| needs_survey(channel))
            .collect();
        let is_recent = self.last.is_some_and(|last| last.elapsed() < INTERVAL);
        if surveyed.is_empty() || is_recent {
            return Ok(());
        }
        let firing = self.firing(&surveyed, definitions, now_ms).await?;
        let mut repeated = HashSet::new();
        for ((id, channel), firing) in surveyed.iter().zip(firing) {
            if is_alertmanager(channel) {
                self.refresh(id, firing.refreshed, now_ms).await?;
            } else if let Some(seconds) = channel.spec.repeat_seconds {
                let interval_ms = u64::from(seconds) * 1000;
                self.repeat(id, interval_ms, firing.groups, now_ms, &mut repeated)
                    .await?;
            }
        }
        self.repeated = repeated;
        self.last = Some(Instant::now());
        Ok(())
    }

    /// Reads the alerts that are firing, for each of the channels.
    async fn firing(
        &self,
        channels: &[(RecordId, &StoredChannel)],
        definitions: &Definitions,
        now_ms: u64,
    ) -> Result<Vec<Firing>, AlertError> {
        let mut all: Vec<Firing> = channels.iter().map(|_| Firing::default()).collect();
        let active = [AlertState::Firing.as_str(), AlertState::Acknowledged.as_str()];
        let mut alerts = self
            .store
            .alerts
            .find(doc! { "open": true, "alert.state": { "$in": active } })
            .projection(doc! { "alert.culprits": 0 })
            .await?;
        while let Some(stored) = alerts.try_next().await? {
            let alert = &stored.alert;
            let recipients = recipients(alert, definitions);
            let is_repeated = alert.state == AlertState::Firing && !is_silenced(alert, definitions, now_ms);
            for ((id, channel), firing) in channels.iter().zip(&mut all) {
                if recipients.contains(id) {
                    firing.add(alert, channel, is_repeated);
                }
            }
        }
        Ok(all)
    }

    /// Sends all alerts that an Alertmanager knows to it again, which would otherwise resolve them.
    async fn refresh(
        &mut self,
        channel: &RecordId,
        alerts: Vec<MessageAlert>,
        now_ms: u64,
    ) -> Result<(), AlertError> {
        let keys: Vec<_> = alerts.iter().map(|alert| state_key(channel, alert)).collect();
        let known = self.outbox.announced(&keys).await?;
        let known = alerts
            .into_iter()
            .zip(keys)
            .filter(|(_, key)| known.contains(key));
        let alerts: Vec<_> = known.map(|(alert, _)| alert).collect();
        if alerts.is_empty() {
            return Ok(());
        }
        self.slot(channel, Purpose::Repeat, alerts, millis(REFRESH), now_ms)
            .await
    }

    async fn heartbeat(
        &mut self,
        id: &RecordId,
        channel: &StoredChannel,
        now_ms: u64,
    ) -> Result<(), AlertError> {
        let Some(seconds) = channel.spec.heartbeat_seconds else {
            return Ok(());
        };
        let interval_ms = u64::from(seconds) * 1000;
        self.slot(id, Purpose::Heartbeat, Vec::new(), interval_ms, now_ms)
            .await
    }

    /// Makes the message of this interval, if it is missing. It replaces older ones that wait.
    async fn slot(
        &mut self,
        channel: &RecordId,
        purpose: Purpose,
        alerts: Vec<MessageAlert>,
        interval_ms: u64,
        now_ms: u64,
    ) -> Result<(), AlertError> {
        let slot = now_ms / interval_ms.max(1);
        let name = format!("{channel}/{purpose:?}");
        if self.slots.get(&name) == Some(&slot) {
            return Ok(());
        }
        let kept_ms = now_ms.saturating_sub(REPLACED_KEPT_MS);
        self.outbox
            .replace_older(channel, purpose, now_ms, kept_ms)
            .await?;
        let draft = Draft {
            channel: channel.clone(),
            purpose,
            group: Group::new(),
            alerts,
            key: Some(format!("{name}/{slot}")),
            due_ms: now_ms,
        };
        self.outbox.add(&draft, now_ms).await?;
        self.slots.insert(name, slot);
        Ok(())
    }

    /// Repeats the groups whose interval has passed. Intervals are counted from the time at which the oldest alert of the group
    /// began to fire, so that all replicas make the same message.
    async fn repeat(
        &self,
        channel: &RecordId,
        interval_ms: u64,
        groups: BTreeMap<Group, Vec<(u64, MessageAlert)>>,
        now_ms: u64,
        repeated: &mut HashSet<String>,
    ) -> Result<(), AlertError> {
        for (group, alerts) in groups {
            let Some((began_ms, oldest)) = alerts.iter().min_by_key(|(fired_ms, _)| *fired_ms) else {
                continue;
            };
            let passed = now_ms.saturating_sub(*began_ms) / interval_ms.max(1);
            let parts: Vec<_> = group
                .iter()
                .flat_map(|(key, value)| [key.as_str(), value])
                .collect();
            let name = RecordId::from_parts(&parts);
            let key = format!("{channel}/repeat/{name}/{began_ms}/{passed}");
            if passed > 0 && !self.repeated.contains(&key) {
                // After a silence the group may have been announced a moment ago.
                let last_ms = self.outbox.last_made(channel, &oldest.id).await?.unwrap_or(0);
                if now_ms.saturating_sub(last_ms) > interval_ms / 2 {
                    let draft = Draft {
                        channel: channel.clone(),
                        purpose: Purpose::Repeat,
                        group,
                        alerts: alerts.into_iter().map(|(_, alert)| alert).collect(),
                        key: Some(key.clone()),
                        due_ms: now_ms,
                    };
                    self.outbox.add(&draft, now_ms).await?;
                }
            }
            repeated.insert(key);
        }
        Ok(())
    }
}

impl Firing {
    fn add(&mut self, alert: &Alert, channel: &StoredChannel, is_repeated: bool) {
        let reported = reported(alert, AlertState::Firing);
        if is_alertmanager(channel) {
            self.refreshed.push(reported);
        } else if is_repeated && channel.spec.repeat_seconds.is_some() {
            let group = labels::group(alert, &channel.spec.group_by);
            let fired_ms = alert.fired_ms.unwrap_or(alert.since_ms);
            self.groups.entry(group).or_default().push((fired_ms, reported));
        }
    }
}

const fn is_alertmanager(channel: &StoredChannel) -> bool {
    matches!(channel.spec.target, ChannelTarget::Alertmanager { .. })
}

const fn needs_survey(channel: &StoredChannel) -> bool {
    is_alertmanager(channel) || channel.spec.repeat_seconds.is_some()
}
