//! Writes audit records of operations: one for the request, before anything is done, and one for the result; or only
//! one if the action is refused.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;
use tracing::warn;
use vmwatch_api::{
    Service,
    audit::{AuditRecord, AuditResult},
    lifecycle::{Operation, OperationState, Target},
    time::unix_millis,
    wire::FaultKind,
};
use vmwatch_bus::{
    audit::{Audit, AuditError, Refusals, lost},
    serve::Refused,
};

use super::record::Record;

/// Number of attempts to write the audit record of an operation's end, and the pause after the first attempt; each
/// later pause is twice as long.
const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub(super) struct Trail {
    audit: Audit,
    refusals: Arc<Refusals>,
}

impl Trail {
    pub(super) fn new(audit: Audit) -> Self {
        let refusals = Arc::new(Refusals::new(audit.clone(), Service::Lifecycle));
        Self { audit, refusals }
    }

    /// Writes the audit record of a requested operation. If this fails, the operation must not be carried out.
    pub(super) async fn begin(&self, record: &Record) -> Result<(), AuditError> {
        let audited = audit_record(record, AuditResult::Requested, String::new());
        let once = message_id(&record.operation, AuditResult::Requested);
        self.audit.begin(&audited, &once).await
    }

    /// Writes the audit record of an operation's end.
    pub(super) async fn end(&self, record: &Record) {
        let operation = &record.operation;
        let result = match operation.state {
            OperationState::Requested | OperationState::Running | OperationState::Unknown => {
                AuditResult::Requested
            }
            OperationState::Succeeded => AuditResult::Succeeded,
            OperationState::Failed => AuditResult::Failed,
            OperationState::TimedOut => AuditResult::TimedOut,
            OperationState::OutcomeUnknown => AuditResult::OutcomeUnknown,
        };
        let detail = operation
            .history
            .last()
            .map(|event| event.text.clone())
            .unwrap_or_default();
        let audited = audit_record(record, result, detail);
        let mut failed = None;
        for attempt in 0..TRIES {
            match self.audit.append(&audited, &message_id(operation, result)).await {
                Ok(()) => return,
                Err(error) => {
                    warn!(operation = %operation.id, attempt, %error, "writing the audit record of an operation's end failed; retrying");
                    failed = Some(error);
                }
            }
            sleep(FIRST_PAUSE * 2_u32.pow(attempt)).await;
        }
        if let Some(error) = failed {
            lost(&audited, &error);
        }
    }

    /// Returns the counts of refused requests that are not in the audit log yet.
    pub(super) fn refusals(&self) -> &Arc<Refusals> {
        &self.refusals
    }

    /// Writes the audit record of an action that was refused because of the user's role or scope, and therefore did not
    /// begin.
    pub(super) async fn refused(&self, refused: &Refused) {
        let target: Option<Target> = serde_json::from_slice(&refused.body).ok();
        let context = &refused.context;
        let detail = match refused.fault.kind {
            FaultKind::NotFound => "the user may not see this VM",
            _ => refused.fault.message.as_str(),
        };
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: refused.method.subject.to_owned(),
            user: context.user().to_owned(),
            api_token: context.api_token.clone(),
            source: context.source.clone(),
            target: target.map(|target| target.instance_id.to_string()),
            request_id: context.request_id.clone(),
            operation_id: None,
            result: AuditResult::Refused,
            detail: detail.to_owned(),
        };
        let once = format!("{}.refused", context.request_id);
        self.refusals.record(&record, &once).await;
    }
}

/// Message id by which JetStream discards duplicates, so that each result of an operation appears once in the audit
/// log.
fn message_id(operation: &Operation, result: AuditResult) -> String {
    format!("{}.{result}", operation.id)
}

/// Creates the audit record of an operation, with the bus method that requested the operation as the audited action.
fn audit_record(record: &Record, result: AuditResult, detail: String) -> AuditRecord {
    let operation = &record.operation;
    let action = match record.method.as_str() {
        // A record of an earlier version does not name its method; those versions had one method per verb.
        "" => format!("lifecycle.{}", operation.verb),
        method => method.to_owned(),
    };
    AuditRecord {
        at_ms: unix_millis(),
        action,
        user: operation.user.clone(),
        api_token: record.api_token.clone(),
        source: operation.source.clone(),
        target: Some(operation.instance_id.to_string()),
        request_id: operation.request_id.clone(),
        operation_id: Some(operation.id.clone()),
        result,
        detail,
    }
}
