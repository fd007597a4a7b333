//! What is done for the audit in the background: records of collected failures, metrics, and the streams if they are lost.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use metrics::gauge;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    Method, Service,
    audit::{AuditRecord, AuditResult},
    auth::Login,
    time::unix_millis,
};
use vmwatch_bus::{
    Bus,
    audit::{Audit, AuditSettings, Flood},
    provision::{ProvisionError, ensure_stream},
    random_id,
};

const INTERVAL: Duration = Duration::from_secs(10);

/// Runs until shutdown, and records what was collected until then.
pub(crate) async fn run(
    bus: Bus,
    audit: Audit,
    settings: AuditSettings,
    flood: Arc<Flood>,
    shutdown: CancellationToken,
) {
    loop {
        if let Err(error) = measure(&bus, settings).await {
            warn!(%error, "the audit could not be measured");
        }
        let stopping = shutdown
            .run_until_cancelled(tokio::time::sleep(INTERVAL))
            .await
            .is_none();
        record(&audit, &flood, stopping).await;
        if stopping {
            return;
        }
    }
}

async fn record(audit: &Audit, flood: &Flood, all: bool) {
    for (source, more) in flood.take(all) {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: Login::INFO.subject.to_owned(),
            user: String::new(),
            source: Some(source),
            target: None,
            request_id: random_id(),
            operation_id: None,
            result: AuditResult::Refused,
            detail: format!("{more} more failed logins from this source within about a minute"),
        };
        audit.end(&record, &record.request_id).await;
    }
}

/// Exports how far back the audit reaches and how full it is. A stream that is gone is made again.
async fn measure(bus: &Bus, settings: AuditSettings) -> Result<(), ProvisionError> {
    for wanted in settings.streams() {
        let mut stream = ensure_stream(bus.jetstream(), Service::Auth, &wanted).await?;
        let Ok(info) = stream.info().await else { continue };
        let (name, state) = (wanted.name, &info.state);
        let oldest = SystemTime::from(state.first_timestamp);
        let age = SystemTime::now().duration_since(oldest).unwrap_or_default();
        let age = if state.messages == 0 { Duration::ZERO } else { age };
        let full = i64::try_from(state.bytes).unwrap_or(i64::MAX) >= info.config.max_bytes / 10 * 9;
        // Before their age only the size evicts records.
        let evicting = full && state.first_sequence > 1 && age < settings.keep();
        gauge!("vmwatch_audit_oldest_age_seconds", "stream" => name.clone()).set(age.as_secs_f64());
        gauge!("vmwatch_audit_evicting", "stream" => name).set(if evicting { 1.0 } else { 0.0 });
    }
    Ok(())
}
