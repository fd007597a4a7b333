//! REST routes for alert rules.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    alerts::{
        RecordId, RecordRef, RevisionRef,
        rules::{self, RuleChange, RulesCreate, RulesGet, RulesList, RulesPreview, RulesRemove, RulesUpdate},
    },
    sessions::Own,
};

use super::{Revision, checked, preview::Preview, refused, specs::RuleSpec};
use crate::{
    Gateway,
    rest::{
        PATH,
        caller::Caller,
        extract::{Json, NoParameters, Path, Query},
        openapi::{Conflict, Unprocessable},
        problem::Problem,
        time::Timestamp,
    },
};

/// A rule: the condition under which alerts fire.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Rule {
    /// Id of the rule.
    id: RecordId,
    /// Number of the rule's last change.
    revision: u64,
    #[schema(value_type = RuleSpec)]
    spec: rules::RuleSpec,
    /// Name of the user that made the last change; empty for a starter rule that was never changed.
    changed_by: String,
    /// Time of the last change.
    changed_at: Timestamp,
    /// Why the rule cannot be evaluated at the moment; null if it can.
    #[schema(required)]
    problem: Option<String>,
    /// Number of alerts of the rule that are firing or acknowledged, of VMs that the user may see.
    active: u64,
}

impl From<rules::Rule> for Rule {
    fn from(rule: rules::Rule) -> Self {
        Self {
            id: rule.id,
            revision: rule.revision,
            spec: rule.spec,
            changed_by: rule.changed_by,
            changed_at: Timestamp::of_ms(rule.changed_ms),
            problem: rule.problem,
            active: rule.active,
        }
    }
}

/// A rule that this version of vmwatch cannot read, such as one of a newer version. It is not evaluated; it can be
/// removed or replaced.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct UnreadableRule {
    /// Id of the rule.
    id: RecordId,
    /// Number of the rule's last change.
    revision: u64,
    /// Name of the rule; null if it cannot be read.
    #[schema(required)]
    name: Option<String>,
    /// Why the rule cannot be read.
    problem: String,
}

/// All rules.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct RuleList {
    /// Rules, sorted by name.
    rules: Vec<Rule>,
    /// Rules that this version of vmwatch cannot read; usually empty.
    unreadable: Vec<UnreadableRule>,
}

/// A change of a rule.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewRuleSpec {
    /// The `revision` on which the change is based.
    #[schema(value_type = u64, maximum = 9_007_199_254_740_991_i64)]
    revision: Revision,
    spec: RuleSpec,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::rest) struct RevisionQuery {
    /// The `revision` on which the removal is based.
    #[param(value_type = u64, maximum = 9_007_199_254_740_991_i64)]
    pub(super) revision: Revision,
}

/// List alert rules
///
/// A rule that names VMs is only for users with access to at least one of them.
#[utoipa::path(
    get, path = "/alert-rules", tag = "alerts", operation_id = "list_alert_rules",
    responses((status = OK, body = RuleList, description = "all rules, at most 500")),
)]
pub(in crate::rest) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<RuleList>, Problem> {
    let list = caller.ask::<RulesList>(&gateway, &Own {}).await?;
    let unreadable = list.unreadable.into_iter().map(|rule| UnreadableRule {
        id: rule.id,
        revision: rule.revision,
        name: rule.name,
        problem: rule.problem,
    });
    Ok(axum::Json(RuleList {
        rules: list.rules.into_iter().map(Rule::from).collect(),
        unreadable: unreadable.collect(),
    }))
}

/// Read an alert rule
#[utoipa::path(
    get, path = "/alert-rules/{id}", tag = "alerts", operation_id = "get_alert_rule",
    params(("id" = RecordId, Path, description = "rule id")),
    responses((status = OK, body = Rule, description = "the rule")),
)]
pub(in crate::rest) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<Rule>, Problem> {
    let rule = caller.ask::<RulesGet>(&gateway, &RecordRef { id }).await?;
    Ok(axum::Json(rule.into()))
}

/// Create an alert rule
///
/// For operators and administrators with access to all VMs, as are all changes of rules.
#[utoipa::path(
    post, path = "/alert-rules", tag = "alerts", operation_id = "create_alert_rule", request_body = RuleSpec,
    responses(
        (
            status = CREATED, body = Rule, description = "the rule",
            headers(("Location" = String, description = "path of the rule")),
        ),
        (status = CONFLICT, response = Conflict),
        (status = UNPROCESSABLE_ENTITY, response = Unprocessable),
    ),
)]
pub(in crate::rest) async fn create(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(spec): Json<RuleSpec>,
) -> Result<Response, Problem> {
    let spec = checked("", &spec)?;
    let rule = caller
        .ask::<RulesCreate>(&gateway, &spec)
        .await
        .map_err(refused)?;
    let location = format!("{PATH}/alert-rules/{}", rule.id);
    Ok(created(&location, &Rule::from(rule)))
}

/// The answer to a request that created a record.
pub(super) fn created(location: &str, body: &impl Serialize) -> Response {
    let mut response = (StatusCode::CREATED, axum::Json(body)).into_response();
    response
        .headers_mut()
        .extend(HeaderValue::from_str(location).map(|location| (header::LOCATION, location)));
    response
}

/// Change an alert rule
///
/// Replaces the rule. If its condition, duration or VMs change, its alerts are resolved, and the new condition is
/// evaluated from then on. If the rule was changed since `revision`, the answer is 409 and nothing is changed.
#[utoipa::path(
    put, path = "/alert-rules/{id}", tag = "alerts", operation_id = "update_alert_rule", request_body = NewRuleSpec,
    params(("id" = RecordId, Path, description = "rule id")),
    responses(
        (status = OK, body = Rule, description = "the changed rule"),
        (status = CONFLICT, response = Conflict),
        (status = UNPROCESSABLE_ENTITY, response = Unprocessable),
    ),
)]
pub(in crate::rest) async fn update(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
    Json(NewRuleSpec { revision, spec }): Json<NewRuleSpec>,
) -> Result<axum::Json<Rule>, Problem> {
    let change = RuleChange {
        id,
        revision: revision.get(),
        spec: checked("spec.", &spec)?,
    };
    let rule = caller
        .ask::<RulesUpdate>(&gateway, &change)
        .await
        .map_err(refused)?;
    Ok(axum::Json(rule.into()))
}

/// Remove an alert rule
///
/// Its alerts are resolved. A starter rule that was removed is not created again.
#[utoipa::path(
    delete, path = "/alert-rules/{id}", tag = "alerts", operation_id = "remove_alert_rule",
    params(("id" = RecordId, Path, description = "rule id"), RevisionQuery),
    responses(
        (status = NO_CONTENT, description = "the rule is removed"),
        (status = CONFLICT, response = Conflict),
    ),
)]
pub(in crate::rest) async fn remove(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(RevisionQuery { revision }): Query<RevisionQuery>,
) -> Result<StatusCode, Problem> {
    let revision = revision.get();
    caller
        .ask::<RulesRemove>(&gateway, &RevisionRef { id, revision })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Preview an alert rule
///
/// Computes when a rule would have fired in the last seven days, for up to 50 VMs that the user may see. The rule is
/// not stored. `limitation` says what the preview does not show.
#[utoipa::path(
    post, path = "/alert-rules/preview", tag = "alerts", operation_id = "preview_alert_rule", request_body = RuleSpec,
    responses(
        (status = OK, body = Preview, description = "when the rule would have fired"),
        (status = UNPROCESSABLE_ENTITY, response = Unprocessable),
    ),
)]
pub(in crate::rest) async fn preview(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(spec): Json<RuleSpec>,
) -> Result<axum::Json<Preview>, Problem> {
    let spec = checked("", &spec)?;
    let preview = caller
        .ask::<RulesPreview>(&gateway, &spec)
        .await
        .map_err(refused)?;
    Ok(axum::Json(preview.into()))
}
