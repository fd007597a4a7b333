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

/// Number of records read per request.
const WINDOW: u64 = 500;
/// Maximum number of records examined for a page, which takes about 100 ms.
const MOST_LOOKED_AT: u64 = 10_000;
/// Records are stored within this time of their own timestamp, including clock differences between replicas.
const SLACK: Duration = Duration::from_mins(1);
/// Deadline of a change that this program makes without a request.
const OWN_DEADLINE: Duration = Duration::from_secs(5);

/// The contents of an audit record, without the context of the request.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) action: MethodInfo,
    pub(crate) user: &'a str,
    pub(crate) target: Option<&'a str>,
    pub(crate) result: AuditResult,
    pub(crate) detail: String,
    /// Of entries with the same key within two minutes, only the first is stored. The default is the request's key.
    pub(crate) once: Option<String>,
}

impl Entry<'_> {
    pub(crate) fn record(&self, context: &Context) -> (AuditRecord, String) {
        let record = AuditRecord {
            at_ms: unix_millis(),
            action: self.action.subject.to_owned(),
            user: self.user.to_owned(),
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

/// The context of a change without a request: by the command line, or at the first start.
pub(crate) fn own_context() -> Context {
    let mut context = Context::new(OWN_DEADLINE).as_principal(Principal {
        user: Service::Auth.name().to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    context.source = Some(cli::invoker());
    context
}

/// Appends an entry about a completed action. A failure is counted and logged only, because the action has already
/// taken effect.
pub(crate) async fn append(audit: &Audit, context: &Context, entry: Entry<'_>) {
    let (record, once) = entry.record(context);
    audit.end(&record, &once).await;
}

/// Makes a change and records it in the audit, both before the change and after it with the outcome. If the audit is
/// required and the first record cannot be appended, the change is not made.
pub(crate) async fn announced<T>(
    audit: &Audit,
    context: &Context,
    action: MethodInfo,
    target: &str,
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
    let (record, once) = entry(AuditResult::Requested, String::new()).record(context);
    audit.begin(&record, &once).await.map_err(AuthError::NotAudited)?;
    let outcome = change.await;
    let (result, detail) = match &outcome {
        Ok(_) => (AuditResult::Succeeded, String::new()),
        Err(error) => (error.audit_result(), error.to_string()),
    };
    append(audit, context, entry(result, detail)).await;
    outcome
}

/// Reads a page, newest first, and examines a bounded number of records.
pub(crate) async fn list(bus: &Bus, filter: &AuditFilter) -> Result<AuditPage, AuthError> {
    let mut page = AuditPage::default();
    let slack = u64::try_from(SLACK.as_millis()).unwrap_or(u64::MAX);
    let mut newest = Newest::open(bus, filter.before).await?;
    if let (None, Some(to)) = (filter.before, filter.to_ms) {
        newest.end_at(to.saturating_add(slack)).await?;
    }
    let mut room = PageRoom::new(usize::from(filter.limit.get()));
    for _ in 0..MOST_LOOKED_AT {
        let place = newest.cursor();
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
            page.next = Some(place);
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
