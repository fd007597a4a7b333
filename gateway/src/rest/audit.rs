//! The audit, for administrators.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    UserName,
    audit::{self, AuditFilter, AuditResult},
    lifecycle::OperationId,
};

use super::{
    caller::Caller,
    cursors::AuditPlace,
    extract::{PageLimit, Query, Text, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// One line of the audit.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditRecord {
    /// When.
    at: Timestamp,
    /// What was asked for, such as `lifecycle.start` or `auth.login`.
    action: String,
    /// Who asked; of a login, the name that was given, known or not.
    user: String,
    /// From which address, as the gateway saw it.
    #[schema(required)]
    source: Option<String>,
    /// On what: an instance id, or the name of a user.
    #[schema(required)]
    target: Option<String>,
    /// What the logs name the request.
    request_id: String,
    /// Of a command on a VM: its record; absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    operation_id: Option<OperationId>,
    /// What became of it.
    result: AuditResult,
    /// The same in words.
    detail: String,
}

impl From<audit::AuditRecord> for AuditRecord {
    fn from(record: audit::AuditRecord) -> Self {
        Self {
            at: Timestamp::of_ms(record.at_ms),
            action: record.action,
            user: record.user,
            source: record.source,
            target: record.target,
            request_id: record.request_id,
            operation_id: record.operation_id,
            result: record.result,
            detail: record.detail,
        }
    }
}

/// A page of the audit.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditPage {
    /// The newest first. A page may hold fewer than were asked for, even none, and still not be the last: only so many
    /// records are looked at for one page.
    records: Vec<AuditRecord>,
    /// What `before` is for the next page; null on the last.
    #[schema(required)]
    next: Option<AuditPlace>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditQuery {
    /// Only records older than this one: `next` of the page before.
    before: Option<AuditPlace>,
    /// At most how many; 100 unless given.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// Of this user only; upper and lower case are the same.
    user: Option<UserName>,
    /// On this only: an instance id, or the name of a user.
    #[param(inline)]
    target: Option<Text<128>>,
    /// Of this action only, or of all below it: `auth` covers `auth.login`.
    #[param(inline)]
    action: Option<Text<128>>,
    /// Not before this moment.
    from: Option<Timestamp>,
    /// Before this moment.
    to: Option<Timestamp>,
}

/// Read the audit
///
/// Logins, what administrators do with users, and commands on VMs: who, from where, what, and what became of it.
#[utoipa::path(
    get, path = "/audit", tag = "audit", operation_id = "list_audit", params(AuditQuery),
    responses((status = OK, body = AuditPage, description = "a page of the audit, the newest first")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<AuditQuery>,
) -> Result<axum::Json<AuditPage>, Problem> {
    let filter = AuditFilter {
        before: query.before.map(|place| place.0),
        limit: page_limit(query.limit),
        user: query.user,
        target: query.target.map(Text::into_inner),
        action: query.action.map(Text::into_inner),
        from_ms: query.from.map(Timestamp::as_ms),
        to_ms: query.to.map(Timestamp::as_ms),
    };
    let page = caller.ask::<audit::List>(&gateway, &filter).await?;
    Ok(axum::Json(AuditPage {
        records: page.records.into_iter().map(AuditRecord::from).collect(),
        next: page.next.map(AuditPlace),
    }))
}
