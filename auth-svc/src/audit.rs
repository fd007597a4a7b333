//! Writes audit records of logins and user management, and reads the audit for administrators.

use std::time::Duration;

use vmwatch_api::{
    MethodInfo, PageRoom, Principal, Role, Scope, Service,
    audit::{AuditFilter, AuditPage, AuditRecord, AuditResult},
    time::unix_millis,
};
use vmwatch_bus::{
    Bus, Context,
    audit::{Audit, Newest},
};
use vmwatch_service::cli;

use crate::AuthError;

/// Number of audit records read per request to the NATS server.
const WINDOW: u64 = 500;
/// Maximum number of audit records examined for one page; examining them takes about 100 ms.
const MOST_LOOKED_AT: u64 = 10_000;
/// Maximum difference between an audit record's own timestamp and the time at which NATS stored it, including clock
/// differences between replicas.
const SLACK: Duration = Duration::from_mins(1);
/// Time limit of a change that auth-svc makes on its own, without a request from a client.
const OWN_DEADLINE: Duration = Duration::from_secs(5);

/// The contents of an audit record, except those that come from the request's context.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) action: MethodInfo,
    pub(crate) user: &'a str,
    pub(crate) target: Option<&'a str>,
    pub(crate) result: AuditResult,
    pub(crate) detail: String,
    /// A key for deduplication: if several audit records with the same key arrive within two minutes, only the first is
    /// stored. If this is `None`, the id of the request is the key.
    pub(crate) once: Option<String>,
}

impl Entry<'_> {
    pub(crate) fn record(&self, context: &Context) -> (AuditRecord, String) {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: self.action.subject.to_owned(),
            user: self.user.to_owned(),
            api_token: context.api_token.clone(),
            source: context.source.clone(),
            target: self.target.map(str::to_owned),
            request_id: context.request_id.clone(),
            operation_id: None,
            result: self.result,
            detail: self.detail.clone(),
        };
        let once = self.once.as_ref().unwrap_or(&context.request_id);
        (record, format!("{once}.{}", self.result))
    }
}

/// The context of a change that no request caused: a change by the command line or at the first start.
pub(crate) fn own_context() -> Context {
    let mut context = Context::new(OWN_DEADLINE).as_principal(Principal {
        user: Service::Auth.name().to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    context.source = Some(cli::invoker());
    context
}

/// Appends the audit record of a completed action. If appending fails, the failure is only counted and logged, because
/// the action has already taken effect.
pub(crate) async fn append(audit: &Audit, context: &Context, entry: Entry<'_>) {
    let (record, once) = entry.record(context);
    audit.end(&record, &once).await;
}

/// Makes a change and writes two audit records, one before the change and one after it with the result. If the audit is
/// required and the first record cannot be appended, the change is not made.
pub(crate) async fn announced<T>(
    audit: &Audit,
    context: &Context,
    action: MethodInfo,
    target: &str,
    change: impl Future<Output = Result<T, AuthError>>,
) -> Result<T, AuthError> {
    announced_with(audit, context, action, (target, ""), change).await
}

/// Like [`announced`], with a target and a detail of the change for both audit records.
pub(crate) async fn announced_with<T>(
    audit: &Audit,
    context: &Context,
    action: MethodInfo,
    (target, detail): (&str, &str),
    change: impl Future<Output = Result<T, AuthError>>,
) -> Result<T, AuthError> {
    let entry = |result, detail| Entry {
        action,
        user: context.user(),
        target: Some(target),
        result,
        detail,
        once: None,
    };
    let (record, once) = entry(AuditResult::Requested, detail.to_owned()).record(context);
    audit.begin(&record, &once).await.map_err(AuthError::NotAudited)?;
    let outcome = change.await;
    let (result, detail) = match &outcome {
        Ok(_) => (AuditResult::Succeeded, detail.to_owned()),
        Err(error) if detail.is_empty() => (error.audit_result(), error.to_string()),
        Err(error) => (error.audit_result(), format!("{detail}: {error}")),
    };
    append(audit, context, entry(result, detail)).await;
    outcome
}

/// Reads a page of audit records, newest first. The number of examined records is bounded.
pub(crate) async fn list(bus: &Bus, filter: &AuditFilter) -> Result<AuditPage, AuthError> {
    let mut page = AuditPage::default();
    let slack = u64::try_from(SLACK.as_millis()).unwrap_or(u64::MAX);
    let mut newest = Newest::open(bus, filter.before).await?;
    if let (None, Some(to)) = (filter.before, filter.to_ms) {
        newest.end_at(to.saturating_add(slack)).await?;
    }
    let mut room = PageRoom::new(usize::from(filter.limit.get()));
    for _ in 0..MOST_LOOKED_AT {
        let position = newest.cursor();
        let Some(record) = newest.next(WINDOW).await? else {
            return Ok(page);
        };
        let is_older = |from| record.at_ms.saturating_add(slack) < from;
        if filter.from_ms.is_some_and(is_older) {
            return Ok(page);
        }
        if !filter.allows(&record) {
            continue;
        }
        if !room.take_item(&record) {
            page.next = Some(position);
            return Ok(page);
        }
        page.records.push(record);
        if room.items() == 0 {
            break;
        }
    }
    page.next = Some(newest.cursor());
    Ok(page)
}
