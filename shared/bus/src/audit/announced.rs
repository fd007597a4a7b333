//! Changes with two audit records: one before the change and one with its result.

use std::fmt;

use vmwatch_api::{
    MethodInfo,
    audit::{AuditRecord, AuditResult},
    time::unix_millis,
    wire::{Fault, FaultKind},
};

use super::{Audit, AuditError};
use crate::Context;

impl Audit {
    /// Makes a change that a method requests, with an audit record before it and another one with its result after it.
    /// `target` is the id of the VM or record that changes, and `detail` describes the change. If the audit is required
    /// and the first record cannot be written, the change is not made.
    pub async fn announced<T, E>(
        &self,
        context: &Context,
        method: &MethodInfo,
        target: impl fmt::Display,
        detail: String,
        change: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E>
    where
        E: fmt::Display + From<AuditError>,
    {
        let mut record = AuditRecord {
            at_ms: unix_millis(),
            action: method.subject.to_owned(),
            user: context.user().to_owned(),
            api_token: context.api_token.clone(),
            source: context.source.clone(),
            target: Some(target.to_string()),
            request_id: context.request_id.clone(),
            operation_id: None,
            result: AuditResult::Requested,
            detail,
        };
        let once = |result| format!("{}.{result}", context.request_id);
        self.begin(&record, &once(record.result)).await?;
        let outcome = change.await;
        record.at_ms = unix_millis();
        record.result = AuditResult::Succeeded;
        if let Err(error) = &outcome {
            record.result = AuditResult::Failed;
            record.detail = error.to_string();
        }
        self.end(&record, &once(record.result)).await;
        outcome
    }
}

impl From<AuditError> for Fault {
    fn from(error: AuditError) -> Self {
        Self::new(
            FaultKind::Unavailable,
            "the action could not be recorded in the audit, so it was not carried out; try again shortly",
        )
        .caused_by(error)
    }
}
