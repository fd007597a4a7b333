//! Webhooks: the JSON that Alertmanager sends, version 4, with a signature.

use std::collections::BTreeMap;

use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderName, HeaderValue};
use jiff::Timestamp;
use serde::Serialize;
use sha2::Sha256;
use vmwatch_api::alerts::{
    RecordId,
    channels::{Purpose, ReceiverUrl, Template},
};

use super::{SendError, Sender, http::post};
use crate::notify::{
    content::{AlertContent, Content},
    labels, template,
};

/// The end of an alert that is firing, as Alertmanager writes it.
const NO_END: &str = "0001-01-01T00:00:00Z";

/// The body of a webhook, with the names and the order of Alertmanager's fields.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Body {
    receiver: String,
    status: &'static str,
    alerts: Vec<BodyAlert>,
    group_labels: BTreeMap<String, String>,
    common_labels: BTreeMap<String, String>,
    common_annotations: BTreeMap<String, String>,
    #[serde(rename = "externalURL")]
    external_url: String,
    version: &'static str,
    group_key: String,
    truncated_alerts: u64,
}

/// An alert in a webhook, and in a request to Alertmanager except for `status` and `fingerprint`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BodyAlert {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) status: Option<&'static str>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) starts_at: String,
    pub(super) ends_at: String,
    #[serde(rename = "generatorURL")]
    pub(super) generator_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fingerprint: Option<String>,
}

/// Posts a message to a webhook: Alertmanager's JSON, or the JSON object that the template makes.
pub(crate) async fn send(
    sender: &Sender,
    url: &ReceiverUrl,
    secret: Option<&str>,
    content: &Content,
    template: Option<&Template>,
) -> Result<String, SendError> {
    let own = template.and_then(|template| template::body(template, content));
    let json = match own {
        Some(Ok(body)) => Ok(body.into_bytes()),
        // Without the template, because it makes no text either.
        Some(Err(_)) => serde_json::to_vec(&body(content, None)),
        None => serde_json::to_vec(&body(content, template)),
    };
    let json = json.map_err(|error| SendError::Invalid(error.to_string()))?;
    let mut headers = vec![message_id(&content.message.id)?];
    if let Some(secret) = secret {
        let signature = signature(secret, content.now_ms / 1000, &json);
        let value =
            HeaderValue::from_str(&signature).map_err(|error| SendError::Invalid(error.to_string()))?;
        headers.push((HeaderName::from_static("x-vmwatch-signature"), value));
    }
    post(sender, url.as_str(), headers, json).await
}

/// The header with the id of a message, by which a receiver recognizes a duplicate.
pub(super) fn message_id(id: &RecordId) -> Result<(HeaderName, HeaderValue), SendError> {
    let value = HeaderValue::from_str(id.as_str()).map_err(|error| SendError::Invalid(error.to_string()))?;
    Ok((HeaderName::from_static("x-vmwatch-message-id"), value))
}

/// The signature of a body that was sent at this time: `t=<unix seconds>,v1=<hex HMAC-SHA256 of "t.body">`.
fn signature(secret: &str, seconds: u64, body: &[u8]) -> String {
    // HMAC accepts keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else {
        return String::new();
    };
    mac.update(format!("{seconds}.").as_bytes());
    mac.update(body);
    format!("t={seconds},v1={}", hex::encode(mac.finalize().into_bytes()))
}

fn body(content: &Content, template: Option<&Template>) -> Body {
    let alerts: Vec<_> = match content.message.purpose {
        Purpose::Change | Purpose::Repeat => content
            .alerts
            .iter()
            .map(|alert| of_alert(content, alert, template))
            .collect(),
        Purpose::Test | Purpose::Heartbeat => vec![of_vmwatch(content)],
    };
    let group_labels = labels::plain_group(&content.message.group);
    let pairs: Vec<_> = group_labels
        .iter()
        .map(|(name, value)| format!("{name}={value:?}"))
        .collect();
    Body {
        receiver: content.channel.clone(),
        status: content.status(),
        group_key: format!("{{}}:{{{}}}", pairs.join(", ")),
        common_labels: common(alerts.iter().map(|alert| &alert.labels)),
        common_annotations: common(alerts.iter().map(|alert| &alert.annotations)),
        alerts,
        group_labels,
        external_url: content.public_url.clone(),
        version: "4",
        truncated_alerts: 0,
    }
}

pub(super) fn of_alert(content: &Content, alert: &AlertContent, template: Option<&Template>) -> BodyAlert {
    let text = template::render(template, content, std::slice::from_ref(alert)).text;
    let mut annotations = BTreeMap::from([
        ("summary".to_owned(), alert.summary.clone()),
        ("description".to_owned(), text),
    ]);
    if let Some(value) = &alert.value {
        annotations.insert("value".to_owned(), value.clone());
    }
    if !alert.culprits.is_empty() {
        annotations.insert("culprits".to_owned(), alert.culprits.join("\n"));
    }
    BodyAlert {
        status: Some(alert.status),
        fingerprint: Some(fingerprint(&alert.plain_labels)),
        labels: alert.plain_labels.clone(),
        annotations,
        starts_at: rfc3339(alert.fired_ms),
        ends_at: alert.resolved_ms.map_or_else(|| NO_END.to_owned(), rfc3339),
        generator_url: alert.link.clone(),
    }
}

/// The alert that stands for a test or a heartbeat.
pub(super) fn of_vmwatch(content: &Content) -> BodyAlert {
    let name = match content.message.purpose {
        Purpose::Heartbeat => "VmwatchHeartbeat",
        _ => "VmwatchTest",
    };
    let labels = [("alertname", name), ("severity", "none")];
    let labels: BTreeMap<_, _> = labels
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let text = template::render(None, content, &[]).text;
    BodyAlert {
        status: Some("firing"),
        fingerprint: Some(fingerprint(&labels)),
        labels,
        annotations: BTreeMap::from([
            ("summary".to_owned(), content.subject()),
            ("description".to_owned(), text),
        ]),
        starts_at: rfc3339(content.message.created_ms),
        ends_at: NO_END.to_owned(),
        generator_url: content.public_url.clone(),
    }
}

/// The entries that all maps have in common.
fn common<'a>(mut maps: impl Iterator<Item = &'a BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let mut common = maps.next().cloned().unwrap_or_default();
    for map in maps {
        common.retain(|key, value| map.get(key) == Some(value));
    }
    common
}

/// Identifies an alert by its labels: 16 hex digits.
fn fingerprint(labels: &BTreeMap<String, String>) -> String {
    let parts: Vec<_> = labels
        .iter()
        .flat_map(|(name, value)| [name.as_str(), value.as_str()])
        .collect();
    let mut digits = RecordId::from_parts(&parts).to_string();
    digits.truncate(16);
    digits
}

pub(super) fn rfc3339(millis: u64) -> String {
    let moment = i64::try_from(millis)
        .ok()
        .and_then(|millis| Timestamp::from_millisecond(millis).ok());
    moment.unwrap_or(Timestamp::MAX).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signature_is_the_documented_hmac() {
        // Computed with `printf '1483277879.{}' | openssl dgst -sha256 -hmac s3cret`.
        assert_eq!(
            signature("s3cret", 1_483_277_879, b"{}"),
            concat!(
                "t=1483277879,v1=",
                "c4d94fc4a2f248de48a4a5eb9b9e3dc377e5679ba5f829d5d4d1f19bd785bf99"
            )
        );
    }

    #[test]
    fn times_have_the_form_of_alertmanager() {
        assert_eq!(rfc3339(1_483_277_879_001), "2017-01-01T13:37:59.001Z");
        assert_eq!(rfc3339(1_483_277_879_000), "2017-01-01T13:37:59Z");
    }

    #[test]
    fn fingerprint_depends_only_on_labels() {
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        assert_eq!(fingerprint(&labels), fingerprint(&labels.clone()));
        assert_ne!(fingerprint(&labels), fingerprint(&BTreeMap::new()));
        assert_eq!(fingerprint(&labels).len(), 16);
    }
}
