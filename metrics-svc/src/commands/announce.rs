//! Audit records of administrator commands that change stored data.

use std::time::Duration;

use vmwatch_api::{
    Service,
    audit::{AuditRecord, AuditResult},
    time::unix_millis,
};
use vmwatch_bus::{Bus, audit::Audit, random_id};
use vmwatch_service::cli;

use crate::{MetricsError, config::MetricsSettings};

/// How long a command waits for a connection to the bus, which it needs for its audit records.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Connects a command to the bus for its audit records. Returns `None` if the bus is unreachable and the audit is not
/// required.
pub(super) async fn connect(settings: &MetricsSettings) -> Result<Option<Bus>, MetricsError> {
    let name = format!("{}-commands", Service::Metrics.name());
    match Bus::connect_within(&name, &settings.bus, CONNECT_LIMIT).await {
        Ok(bus) => Ok(Some(bus)),
        Err(error) if settings.audit_required => Err(MetricsError::Refused(format!(
            "{error}: the audit record of the command could not be written, so nothing was done; \
             VMWATCH_AUDIT_REQUIRED=false does it without"
        ))),
        Err(error) => {
            eprintln!("the audit record of the command could not be written: {error}");
            Ok(None)
        }
    }
}

/// Runs a command, with an audit record before it and another one with its outcome after it. The command returns a
/// description of its outcome.
pub(super) async fn announced(
    audit: Option<&Audit>,
    action: &str,
    detail: String,
    act: impl Future<Output = Result<String, MetricsError>>,
) -> Result<String, MetricsError> {
    let Some(audit) = audit else { return act.await };
    let mut record = AuditRecord {
        at_ms: unix_millis(),
        action: action.to_owned(),
        user: Service::Metrics.name().to_owned(),
        api_token: None,
        source: Some(cli::invoker()),
        target: None,
        request_id: random_id(),
        operation_id: None,
        result: AuditResult::Requested,
        detail,
    };
    let once = record.request_id.clone();
    audit.begin(&record, &once).await?;
    let outcome = act.await;
    record.at_ms = unix_millis();
    (record.result, record.detail) = match &outcome {
        Ok(done) => (AuditResult::Succeeded, done.clone()),
        Err(error) => (AuditResult::Failed, error.to_string()),
    };
    audit.end(&record, &format!("{once}.end")).await;
    outcome
}
