//! The audit log, for administrators.

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

/// An audit record.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditRecord {
    /// Time of the record.
    at: Timestamp,
    /// The action, such as `lifecycle.start` or `auth.login`.
    action: String,
    /// The user; for a login the given name, whether or not the user exists.
    user: String,
    /// Source address of the request, as seen by the gateway.
    #[schema(required)]
    source: Option<String>,
    /// The target: a VM id or a user name.
    #[schema(required)]
    target: Option<String>,
    /// The request ID, as in the logs.
    request_id: String,
    /// The operation, for actions on VMs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    operation_id: Option<OperationId>,
    /// The result.
    result: AuditResult,
    /// Description of the result.
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

/// A page of audit records.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditPage {
    /// Newest first. A page may hold fewer records than `limit`, even none, without being the last, because the number
    /// of records examined per page is limited.
    records: Vec<AuditRecord>,
    /// Value of `before` for the next page; null on the last page.
    #[schema(required)]
    next: Option<AuditPlace>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditQuery {
    /// `next` of the previous page.
    before: Option<AuditPlace>,
    /// Page size. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// Only records of this user; upper and lower case are the same.
    user: Option<UserName>,
    /// Only records with this target: a VM id or a user name.
    #[param(inline)]
    target: Option<Text<128>>,
    /// Only this action or its sub-actions: `auth` covers `auth.login`.
    #[param(inline)]
    action: Option<Text<128>>,
    /// Only records at or after this time.
    from: Option<Timestamp>,
    /// Only records before this time.
    to: Option<Timestamp>,
}

/// Read the audit log
///
/// Logins, user management and actions on VMs, with user, source address, target and result.
#[utoipa::path(
    get, path = "/audit", tag = "audit", operation_id = "list_audit", params(AuditQuery),
    responses((status = OK, body = AuditPage, description = "a page of audit records, newest first")),
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
