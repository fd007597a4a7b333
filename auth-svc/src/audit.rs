//! The audit of logins and of what is done with users, and the whole audit for administrators.

use std::time::Duration;

use metrics::counter;
use shared::{
    api::{
        MethodInfo, PageRoom,
        audit::{AuditFilter, AuditPage, AuditRecord, AuditResult},
    },
    bus::{
        Bus, Context,
        audit::{Audit, Reader},
    },
    time::unix_millis,
};
use tracing::error;

use crate::AuthError;

/// Records read at once.
const WINDOW: u64 = 500;
/// Records looked at for one page: some 100 ms of work.
const MOST_LOOKED_AT: u64 = 10_000;
/// Records are appended within seconds of the moment that they name, by whichever replica's clock.
const SLACK: Duration = Duration::from_mins(1);

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

/// Appends an entry. What cannot be appended is in the log, whole, and counted: nobody is kept from logging in because
/// the audit is full.
pub(crate) async fn append(audit: &Audit, context: &Context, entry: Entry<'_>) {
    let record = AuditRecord {
        at_ms: unix_millis(),
        action: entry.action.subject.to_owned(),
        user: entry.user.to_owned(),
        source: context.source.clone(),
        target: entry.target.map(str::to_owned),
        request_id: context.request_id.clone(),
        operation_id: None,
        result: entry.result,
        detail: entry.detail,
    };
    let once = entry.once.unwrap_or_else(|| context.request_id.clone());
    if let Err(cause) = audit.append(&record, &format!("{}.{once}", record.action)).await {
        counter!("vmwatch_audit_lost_total").increment(1);
        error!(%cause, ?record, "not in the audit");
    }
}

/// Reads a page, the newest first, looking at a bounded number of records.
pub(crate) async fn list(bus: &Bus, filter: &AuditFilter) -> Result<AuditPage, AuthError> {
    let mut page = AuditPage::default();
    let Some(reader) = Reader::open(bus).await? else {
        return Ok(page);
    };
    let slack = u64::try_from(SLACK.as_millis()).unwrap_or(u64::MAX);
    let mut before = match (filter.before, filter.to_ms) {
        (None, Some(to)) => Some(reader.end_at(to.saturating_add(slack)).await?),
        (before, _) => before,
    };
    let mut room = PageRoom::new(usize::from(filter.limit.get()));
    let mut looked_at = 0;
    loop {
        let window = reader.window(before, WINDOW).await?;
        for (number, record) in window.records.into_iter().rev() {
            if filter
                .from_ms
                .is_some_and(|from| record.at_ms.saturating_add(slack) < from)
            {
                return Ok(page);
            }
            if !filter.allows(&record) {
                continue;
            }
            if !room.take_item(&record) {
                page.next = Some(number.saturating_add(1));
                return Ok(page);
            }
            page.records.push(record);
            if room.items() == 0 {
                page.next = Some(number);
                return Ok(page);
            }
        }
        looked_at += WINDOW;
        before = window.older_than;
        if before.is_none() || looked_at >= MOST_LOOKED_AT {
            page.next = before;
            return Ok(page);
        }
    }
}
