//! The audit of logins and of what is done with users, and the whole audit for administrators.

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

/// Records read at once.
const WINDOW: u64 = 500;
/// Records looked at for one page: some 100 ms of work.
const MOST_LOOKED_AT: u64 = 10_000;
/// Records are appended within seconds of the moment that they name, by whichever replica's clock.
const SLACK: Duration = Duration::from_mins(1);
/// Deadline of a change that this program makes without a request.
const OWN_DEADLINE: Duration = Duration::from_secs(5);

/// What is to be put on record.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) action: MethodInfo,
    pub(crate) user: &'a str,
    pub(crate) target: Option<&'a str>,
    pub(crate) result: AuditResult,
    pub(crate) detail: String,
    /// Of entries with the same, only the first of two minutes is kept; that of the request, unless given.
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

/// The context of a change that this program makes without a request: by its command line, or at its first start.
pub(crate) fn own_context() -> Context {
    let mut context = Context::new(OWN_DEADLINE).as_principal(Principal {
        user: Service::Auth.name().to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    context.source = Some(cli::invoker());
    context
}

/// Appends an entry about what has happened. If it can't be appended it is counted and logged: a login succeeds without
/// the audit, and what was done is done.
pub(crate) async fn append(audit: &Audit, context: &Context, entry: Entry<'_>) {
    let (record, once) = entry.record(context);
    audit.end(&record, &once).await;
}

/// Makes a change that the audit announces before, and whose outcome it records after. If the audit is required and can't
/// be appended to, the change is not made.
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

/// Reads a page, the newest first, looking at a bounded number of records.
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
