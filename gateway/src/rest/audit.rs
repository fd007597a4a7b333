//! REST route with which administrators read the audit log.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    UserName,
    api_tokens::ApiTokenLabel,
    audit::{self, AuditFilter, AuditResult},
    lifecycle::OperationId,
};

use super::{
    caller::Caller,
    cursors::AuditPosition,
    extract::{PageLimit, Query, Text, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// A record in the audit log.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditRecord {
    /// Time at which the audit record was written.
    at: Timestamp,
    /// Attempted action, such as `lifecycle.start` or `auth.login`.
    action: String,
    /// User who attempted the action. For a login, the given name, whether or not such a user exists.
    user: String,
    /// API token with which the user sent the request; absent if the user had a session or no credential.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    api_token: Option<ApiTokenLabel>,
    /// Client address of the request, as seen by the gateway.
    #[schema(required)]
    source: Option<String>,
    /// Target of the action: a VM id or a user name.
    #[schema(required)]
    target: Option<String>,
    /// Id of the HTTP request, as in the logs.
    request_id: String,
    /// Id of the operation, if the attempted action was an action on a VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    operation_id: Option<OperationId>,
    /// Result of the attempted action.
    result: AuditResult,
    /// Description of the action's result for administrators.
    detail: String,
}

impl From<audit::AuditRecord> for AuditRecord {
    fn from(record: audit::AuditRecord) -> Self {
        Self {
            at: Timestamp::of_ms(record.at_ms),
            action: record.action,
            user: record.user,
            api_token: record.api_token,
            source: record.source,
            target: record.target,
            request_id: record.request_id,
            operation_id: record.operation_id,
            result: record.result,
            detail: record.detail,
        }
    }
}

/// A page of the audit log.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditPage {
    /// Audit records, newest first. A page may hold fewer records than `limit`, even none, without being the last one,
    /// because the number of records examined per page is limited.
    records: Vec<AuditRecord>,
    /// Value of `before` for the next page; null on the last page.
    #[schema(required)]
    next: Option<AuditPosition>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditQuery {
    /// The `next` value of the previous page.
    before: Option<AuditPosition>,
    /// Maximum number of audit records in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// Return only audit records of this user. The name is case-insensitive.
    user: Option<UserName>,
    /// Return only audit records with this target: a VM id or a user name.
    #[param(inline)]
    target: Option<Text<128>>,
    /// Return only audit records of this action and its sub-actions: `auth` includes `auth.login`.
    #[param(inline)]
    action: Option<Text<128>>,
    /// Return only audit records written at or after this time.
    from: Option<Timestamp>,
    /// Return only audit records written before this time.
    to: Option<Timestamp>,
}

/// Read the audit log
///
/// Records of logins, user management and actions on VMs, with user, API token, client address, target and result.
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
        before: query.before.map(|position| position.0),
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
        next: page.next.map(AuditPosition),
    }))
}
