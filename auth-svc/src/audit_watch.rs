//! Background task for the audit: it records the counts of failed logins and refused enrolments, publishes metrics, and
//! recreates lost audit streams.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use metrics::gauge;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    Method, MethodInfo, Service,
    audit::{AuditRecord, AuditResult},
    auth::Login,
    enrollment::AgentsEnroll,
    time::unix_millis,
};
use vmwatch_bus::{
    Bus,
    audit::{Audit, AuditSettings, Flood},
    provision::{ProvisionError, ensure_stream},
    random_id,
};

const INTERVAL: Duration = Duration::from_secs(10);
/// Period in which a user may request this many API tokens from one replica: twice the number that a user may have.
pub(crate) const API_TOKEN_PERIOD: Duration = Duration::from_mins(10);
const API_TOKENS: u32 = 200;

/// Counts what would otherwise fill the audit: failed logins and refused enrolments by client address, and requests to
/// create API tokens by user.
pub(crate) struct Floods {
    pub(crate) logins: Flood,
    pub(crate) enrollments: Flood,
    /// Requests beyond the limit are refused.
    pub(crate) api_tokens: Flood,
}

impl Floods {
    pub(crate) fn new(period: Duration, one_by_one: u32) -> Self {
        Self {
            logins: Flood::new(period, one_by_one),
            enrollments: Flood::new(period, one_by_one),
            api_tokens: Flood::new(API_TOKEN_PERIOD, API_TOKENS),
        }
    }
}

/// Runs until shutdown, then records what was counted so far.
pub(crate) async fn run(
    bus: Bus,
    audit: Audit,
    settings: AuditSettings,
    floods: Arc<Floods>,
    shutdown: CancellationToken,
) {
    loop {
        if let Err(error) = measure(&bus, settings).await {
            warn!(%error, "reading the state of the audit streams failed");
        }
        let stopping = shutdown
            .run_until_cancelled(tokio::time::sleep(INTERVAL))
            .await
            .is_none();
        record(&audit, &floods.logins, Login::INFO, "failed logins", stopping).await;
        let enrollments = &floods.enrollments;
        record(
            &audit,
            enrollments,
            AgentsEnroll::INFO,
            "refused enrolments",
            stopping,
        )
        .await;
        // Only ends the periods: the audit records of the refused requests are written when they are refused.
        drop(floods.api_tokens.take(stopping));
        if stopping {
            return;
        }
    }
}

async fn record(audit: &Audit, flood: &Flood, action: MethodInfo, what: &str, all: bool) {
    for (source, more) in flood.take(all) {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: action.subject.to_owned(),
            user: String::new(),
            api_token: None,
            source: Some(source),
            target: None,
            request_id: random_id(),
            operation_id: None,
            result: AuditResult::Refused,
            detail: format!("{more} further {what} from this source in about a minute"),
        };
        audit.end(&record, &record.request_id).await;
    }
}

/// Publishes metrics of the audit streams (age of the oldest record, whether records are evicted early) and creates
/// missing streams.
async fn measure(bus: &Bus, settings: AuditSettings) -> Result<(), ProvisionError> {
    for wanted in settings.streams() {
        let info = ensure_stream(bus, Service::Auth, &wanted).await?;
        let (name, state) = (wanted.name, &info.state);
        let oldest = SystemTime::from(state.first_timestamp);
        let age = SystemTime::now().duration_since(oldest).unwrap_or_default();
        let age = if state.messages == 0 { Duration::ZERO } else { age };
        let full = i64::try_from(state.bytes).unwrap_or(i64::MAX) >= info.config.max_bytes / 10 * 9;
        // Records that are evicted before they reach the maximum age are evicted because of the stream's size limit.
        let evicting = full && state.first_sequence > 1 && age < settings.keep();
        gauge!("vmwatch_audit_oldest_age_seconds", "stream" => name.clone()).set(age.as_secs_f64());
        gauge!("vmwatch_audit_evicting", "stream" => name).set(if evicting { 1.0 } else { 0.0 });
    }
    Ok(())
}
