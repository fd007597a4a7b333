//! What a message says: its alerts, prepared for templates and for the JSON of receivers.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
};

use futures::TryStreamExt;
use mongodb::bson::doc;
use serde::Serialize;
use vmwatch_api::{
    alerts::{
        Alert, AlertState,
        channels::{Message, MessageAlert, Purpose},
    },
    time::UtcOffset,
};

use super::{labels, words};
use crate::{AlertError, store::Store};

/// An alert in the state that a message reports, as templates see it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct AlertContent {
    pub(super) id: String,
    /// `firing` or `resolved`.
    pub(super) status: &'static str,
    /// The VM's name, or its id if the name is unknown; empty if the alert is about the deployment.
    pub(super) vm: String,
    pub(super) rule: String,
    pub(super) severity: &'static str,
    /// The condition, such as `CPU above 90 %`.
    pub(super) condition: String,
    /// The newest value, such as `97 %`.
    pub(super) value: Option<String>,
    /// For how long the condition has held, or held, such as `5 minutes`.
    pub(super) duration: Option<String>,
    pub(super) subject: String,
    /// One line with VM, condition, duration and value.
    pub(super) summary: String,
    /// What explains the condition, one line each.
    pub(super) culprits: Vec<String>,
    pub(super) acknowledged_by: Option<String>,
    /// The operation that ended the condition, and its user.
    pub(super) ended_by: Option<String>,
    /// The address of the VM's page; empty if the URL of the gateway is not set.
    pub(super) link: String,
    /// The labels of the alert, as silences match them.
    pub(super) labels: BTreeMap<String, String>,
    #[serde(skip)]
    pub(super) fired_ms: u64,
    #[serde(skip)]
    pub(super) resolved_ms: Option<u64>,
    /// Labels whose names every receiver accepts; they identify the alert at receivers.
    #[serde(skip)]
    pub(super) plain_labels: BTreeMap<String, String>,
}

/// A message with its alerts.
#[derive(Debug, Clone)]
pub(super) struct Content {
    pub(super) message: Message,
    /// Name of the channel.
    pub(super) channel: String,
    pub(super) alerts: Vec<AlertContent>,
    pub(super) now_ms: u64,
    /// URL of the gateway; empty if unknown.
    pub(super) public_url: String,
}

impl Content {
    /// Whether nothing is left to send, because the alerts of the message no longer exist.
    pub(super) fn is_void(&self) -> bool {
        self.alerts.is_empty() && matches!(self.message.purpose, Purpose::Change | Purpose::Repeat)
    }

    /// `firing` if an alert of the message is firing, else `resolved`.
    pub(super) fn status(&self) -> &'static str {
        let is_resolved =
            !self.alerts.is_empty() && self.alerts.iter().all(|alert| alert.status == "resolved");
        if is_resolved { "resolved" } else { "firing" }
    }

    /// One line that describes the message.
    pub(super) fn subject(&self) -> String {
        let firing = self
            .alerts
            .iter()
            .filter(|alert| alert.status == "firing")
            .count();
        let resolved = self.alerts.len().saturating_sub(firing);
        match (self.message.purpose, self.alerts.as_slice()) {
            (Purpose::Test, _) => "[TEST] vmwatch test message".to_owned(),
            (Purpose::Heartbeat, _) => "[HEARTBEAT] vmwatch works".to_owned(),
            (_, [only]) => format!("[{}] {}", only.status.to_uppercase(), only.summary),
            _ if resolved == 0 => format!("[FIRING] {firing} alerts{}", self.shared()),
            _ if firing == 0 => format!("[RESOLVED] {resolved} alerts{}", self.shared()),
            _ => format!(
                "[FIRING] {firing} alerts firing, {resolved} resolved{}",
                self.shared()
            ),
        }
    }

    /// The values that the alerts have in common, as the end of a subject.
    fn shared(&self) -> String {
        let values: Vec<_> = self
            .message
            .group
            .values()
            .filter(|value| !value.is_empty())
            .collect();
        let mut text = String::new();
        for value in values {
            text += if text.is_empty() { ": " } else { ", " };
            text += value;
        }
        text
    }
}

/// Reads the alerts of a message and prepares them.
pub(super) async fn read(
    store: &Store,
    message: &Message,
    channel: &str,
    view: View<'_>,
) -> Result<Content, AlertError> {
    let ids: Vec<_> = message.alerts.iter().map(|alert| alert.id.as_str()).collect();
    let mut found = HashMap::new();
    if !ids.is_empty() {
        let mut alerts = store.alerts.find(doc! { "_id": { "$in": ids } }).await?;
        while let Some(stored) = alerts.try_next().await? {
            found.insert(stored.id, stored.alert);
        }
    }
    let alerts = message.alerts.iter().filter_map(|reported| {
        let alert = found.get(reported.id.as_str())?;
        Some(prepare(alert, reported, view))
    });
    Ok(Content {
        alerts: alerts.collect(),
        message: message.clone(),
        channel: channel.to_owned(),
        now_ms: view.now_ms,
        public_url: view.public_url.to_owned(),
    })
}

/// How times and links are shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) now_ms: u64,
    pub(super) utc_offset: UtcOffset,
    pub(super) public_url: &'a str,
}

pub(super) fn prepare(alert: &Alert, reported: &MessageAlert, view: View<'_>) -> AlertContent {
    let is_resolved = reported.state == AlertState::Resolved;
    let resolved_ms = alert.resolved_ms.filter(|_| is_resolved);
    let until_ms = resolved_ms.unwrap_or(view.now_ms);
    let duration = words::duration(until_ms.saturating_sub(alert.since_ms));
    let id = alert.instance_id.as_ref().map(ToString::to_string);
    let link = match &id {
        Some(id) if !view.public_url.is_empty() => format!("{}/vms/{id}", view.public_url),
        _ => view.public_url.to_owned(),
    };
    let mut content = AlertContent {
        id: alert.id.to_string(),
        status: if is_resolved { "resolved" } else { "firing" },
        vm: alert.vm_name.clone().or(id).unwrap_or_default(),
        rule: alert.rule_name.to_string(),
        severity: alert.severity.as_str(),
        condition: words::condition(alert),
        value: words::value(alert),
        duration,
        subject: alert.subject.clone(),
        summary: String::new(),
        culprits: alert
            .culprits
            .as_ref()
            .map(|culprits| words::culprits(culprits, view.now_ms, view.utc_offset))
            .unwrap_or_default(),
        acknowledged_by: alert.acknowledged_by.clone(),
        ended_by: alert
            .ended_by
            .as_ref()
            .filter(|_| is_resolved)
            .map(|ended| format!("{} by {}", ended.action, ended.user)),
        link,
        labels: labels::all(alert),
        fired_ms: alert.fired_ms.unwrap_or(alert.since_ms),
        resolved_ms,
        plain_labels: labels::plain(alert),
    };
    content.summary = summary(&content);
    content
}

/// Such as `db-1: CPU above 90 % for 5 minutes (now 97 %)`.
fn summary(content: &AlertContent) -> String {
    let mut text = String::new();
    if !content.vm.is_empty() {
        let _ = write!(text, "{}: ", content.vm);
    }
    text += &content.condition;
    if content.status == "resolved" {
        text += " no longer";
        if let Some(duration) = &content.duration {
            let _ = write!(text, ", held for {duration}");
        }
        return text;
    }
    if let Some(duration) = &content.duration {
        let _ = write!(text, " for {duration}");
    }
    if let Some(value) = &content.value {
        let _ = write!(text, " (now {value})");
    }
    text
}
