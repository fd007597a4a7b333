//! Alertmanager as a receiver: alerts are posted to its API and repeated while they are firing.

use std::time::Duration;

use http::{HeaderValue, header};
use vmwatch_api::alerts::channels::{Purpose, ReceiverUrl, Template};

use super::{
    SendError, Sender,
    http::post,
    webhook::{BodyAlert, message_id, of_alert, of_vmwatch, rfc3339},
};
use crate::notify::{content::Content, outbox::millis};

/// Interval at which alerts that are firing are posted again.
pub(crate) const REFRESH: Duration = Duration::from_mins(1);
/// Time after which Alertmanager resolves an alert that is not posted again: four intervals, as Prometheus has it.
const EXPIRES: Duration = Duration::from_mins(4);
/// Time after which a test alert ends.
const TEST_ENDS: Duration = Duration::from_mins(1);
const PATH: &str = "/api/v2/alerts";

/// Posts the alerts of a message to an Alertmanager.
pub(crate) async fn send(
    sender: &Sender,
    url: &ReceiverUrl,
    token: Option<&str>,
    content: &Content,
    template: Option<&Template>,
    heartbeat: Option<Duration>,
) -> Result<String, SendError> {
    let invalid = |error: String| SendError::Invalid(error);
    let alerts = alerts(content, template, heartbeat);
    let json = serde_json::to_vec(&alerts).map_err(|error| invalid(error.to_string()))?;
    let mut headers = vec![message_id(&content.message.id)?];
    if let Some(token) = token {
        let bearer = HeaderValue::from_str(&format!("Bearer {token}"));
        let mut bearer = bearer.map_err(|_| invalid("the token is not a valid header".to_owned()))?;
        bearer.set_sensitive(true);
        headers.push((header::AUTHORIZATION, bearer));
    }
    let url = format!("{}{PATH}", url.as_str().trim_end_matches('/'));
    post(sender, &url, headers, json).await
}

fn alerts(content: &Content, template: Option<&Template>, heartbeat: Option<Duration>) -> Vec<BodyAlert> {
    let now = content.now_ms;
    let mut alerts: Vec<_> = match content.message.purpose {
        Purpose::Change | Purpose::Repeat => {
            let each = content.alerts.iter().map(|alert| {
                // Alertmanager takes an alert for resolved only if its end has passed, and refuses one that ends before it
                // starts. The clock of the VM, from which both times come, may be ahead.
                let end = alert.resolved_ms.map(|end| end.min(now));
                let start = alert.fired_ms.min(end.unwrap_or(now).saturating_sub(1));
                let ends_at = end.unwrap_or_else(|| now.saturating_add(millis(EXPIRES)));
                BodyAlert {
                    starts_at: rfc3339(start),
                    ends_at: rfc3339(ends_at),
                    ..of_alert(content, alert, template)
                }
            });
            each.collect()
        }
        Purpose::Test => vec![ending(of_vmwatch(content), now, TEST_ENDS)],
        Purpose::Heartbeat => {
            let interval = heartbeat.unwrap_or(REFRESH);
            vec![ending(of_vmwatch(content), now, interval.saturating_mul(3))]
        }
    };
    for alert in &mut alerts {
        alert.status = None;
        alert.fingerprint = None;
    }
    alerts
}

fn ending(alert: BodyAlert, now_ms: u64, after: Duration) -> BodyAlert {
    BodyAlert {
        ends_at: rfc3339(now_ms.saturating_add(millis(after))),
        ..alert
    }
}
