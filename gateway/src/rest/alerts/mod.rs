//! REST routes for alerts, their rules, silences, channels and messages.

pub(super) mod channels;
mod culprits;
pub(super) mod messages;
mod preview;
pub(super) mod rules;
pub(super) mod silences;
mod specs;
mod targets;

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::State;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::{
    IntoParams, ToSchema,
    openapi::{RefOr, Schema, schema::AdditionalProperties},
};
use vmwatch_api::{
    InstanceId,
    alerts::{
        self, AlertFilter, AlertState, AlertsAcknowledge, AlertsGet, AlertsList, RecordId, RecordRef,
        Severity, Title, rules::Condition,
    },
    wire::{Fault, FaultKind},
};

use self::culprits::{Culprits, EndedBy};
use super::{
    caller::Caller,
    cursors::AlertCursor,
    extract::{NoParameters, Number, PageLimit, Path, Query, page_limit},
    problem::Problem,
    time::Timestamp,
};
use crate::Gateway;

/// Number of a record's last change. Every integer within these bounds is exact as a number of JavaScript.
type Revision = Number<0, 9_007_199_254_740_991>;

/// An alert: the condition of a rule holds, or has held.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Alert {
    /// Id of the alert.
    id: RecordId,
    /// Id of the rule, which may have been removed since.
    rule_id: RecordId,
    /// Name of the rule when the alert began.
    rule_name: Title,
    /// Severity of the rule when the alert began.
    severity: Severity,
    /// Condition of the rule when the alert began.
    #[schema(value_type = specs::Condition)]
    condition: Condition,
    /// Id of the VM; null if the alert is about vmwatch itself.
    #[schema(required)]
    instance_id: Option<InstanceId>,
    /// Name of the VM on its hypervisor; null if unknown.
    #[schema(required)]
    vm_name: Option<String>,
    /// Name of the hypervisor; null if unknown.
    #[schema(required)]
    hypervisor: Option<String>,
    /// Labels of the VM when the alert began to fire. Keys of labels of its hypervisor begin with `hv/`.
    #[schema(example = json!({ "env": "production" }))]
    labels: BTreeMap<String, String>,
    /// What of the VM the alert is about: a mount point, the name of a process, a hypervisor, or the id of an
    /// operation; empty for the VM itself.
    subject: String,
    /// State of the alert.
    state: AlertState,
    /// Newest value that was compared; null if the condition compares none.
    #[schema(required)]
    value: Option<f64>,
    /// Time from which on the condition holds, by the clock of the VM.
    since: Timestamp,
    /// Time at which the alert began to fire; null if it has not.
    #[schema(required)]
    fired_at: Option<Timestamp>,
    /// Time at which a user took note of the alert; null if nobody has.
    #[schema(required)]
    acknowledged_at: Option<Timestamp>,
    /// Name of that user.
    #[schema(required)]
    acknowledged_by: Option<String>,
    /// Time at which the condition ended; null if it holds.
    #[schema(required)]
    resolved_at: Option<Timestamp>,
    /// Operation that ended the condition; null if there was none.
    #[schema(required)]
    ended_by: Option<EndedBy>,
    /// What explains the condition; null until it has been looked for.
    #[schema(required)]
    culprits: Option<Culprits>,
    /// Number of the alert's last change. A change with a higher number is newer.
    revision: u64,
}

impl From<alerts::Alert> for Alert {
    fn from(alert: alerts::Alert) -> Self {
        Self {
            id: alert.id,
            rule_id: alert.rule_id,
            rule_name: alert.rule_name,
            severity: alert.severity,
            condition: alert.condition,
            instance_id: alert.instance_id,
            vm_name: alert.vm_name,
            hypervisor: alert.hypervisor,
            labels: alert.labels,
            subject: alert.subject,
            state: alert.state,
            value: alert.value,
            since: Timestamp::of_ms(alert.since_ms),
            fired_at: alert.fired_ms.map(Timestamp::of_ms),
            acknowledged_at: alert.acknowledged_ms.map(Timestamp::of_ms),
            acknowledged_by: alert.acknowledged_by,
            resolved_at: alert.resolved_ms.map(Timestamp::of_ms),
            ended_by: alert.ended_by.map(EndedBy::from),
            culprits: alert.culprits.map(Culprits::from),
            revision: alert.revision,
        }
    }
}

/// Number of alerts that are firing or acknowledged, by severity.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ActiveAlerts {
    info: u64,
    warning: u64,
    critical: u64,
}

/// A page of alerts.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AlertList {
    /// Alerts, those that began last first.
    alerts: Vec<Alert>,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<AlertCursor>,
    /// Number of alerts that are firing or acknowledged, whatever the filter.
    active: ActiveAlerts,
    /// Whether a rule has recipients. Without any, alerts are only shown.
    has_recipients: bool,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AlertsQuery {
    /// Return only alerts in this state. Default: those that are pending, firing or acknowledged.
    state: Option<AlertState>,
    /// Return only alerts of this severity.
    severity: Option<Severity>,
    /// Return only alerts of this VM.
    instance_id: Option<InstanceId>,
    /// Return only alerts of this rule.
    rule_id: Option<RecordId>,
    /// Return only alerts whose condition held at this time or later.
    from: Option<Timestamp>,
    /// Return only alerts whose condition began to hold before this time.
    to: Option<Timestamp>,
    /// Maximum number of alerts in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page.
    cursor: Option<AlertCursor>,
}

/// List alerts
///
/// Alerts of the VMs that the user may see. Alerts about vmwatch itself are only for users with access to all VMs.
/// Resolved alerts are kept for 90 days by default.
#[utoipa::path(
    get, path = "/alerts", tag = "alerts", operation_id = "list_alerts", params(AlertsQuery),
    responses((status = OK, body = AlertList, description = "a page of alerts, newest first")),
)]
pub(super) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<AlertsQuery>,
) -> Result<axum::Json<AlertList>, Problem> {
    let filter = AlertFilter {
        state: query.state,
        severity: query.severity,
        instance_id: query.instance_id,
        rule_id: query.rule_id,
        from_ms: query.from.map(Timestamp::as_ms),
        to_ms: query.to.map(Timestamp::as_ms),
        after: query.cursor.map(|cursor| cursor.0),
        limit: page_limit(query.limit),
    };
    let page = caller.ask::<AlertsList>(&gateway, &filter).await?;
    let active = |severity: Severity| page.active.get(severity.as_str()).copied().unwrap_or(0);
    Ok(axum::Json(AlertList {
        active: ActiveAlerts {
            info: active(Severity::Info),
            warning: active(Severity::Warning),
            critical: active(Severity::Critical),
        },
        alerts: page.alerts.into_iter().map(Alert::from).collect(),
        next: page.next.map(AlertCursor),
        has_recipients: page.has_recipients,
    }))
}

/// Read an alert
#[utoipa::path(
    get, path = "/alerts/{id}", tag = "alerts", operation_id = "get_alert",
    params(("id" = RecordId, Path, description = "alert id")),
    responses((status = OK, body = Alert, description = "the alert")),
)]
pub(super) async fn get(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<Alert>, Problem> {
    let alert = caller.ask::<AlertsGet>(&gateway, &RecordRef { id }).await?;
    Ok(axum::Json(alert.into()))
}

/// Acknowledge an alert
///
/// Records that the user has taken note of a firing alert, so that its notifications are not repeated. An alert that is
/// acknowledged stays as it is. If the alert is pending or resolved, the answer is 409.
#[utoipa::path(
    put, path = "/alerts/{id}/acknowledgement", tag = "alerts", operation_id = "acknowledge_alert",
    params(("id" = RecordId, Path, description = "alert id")),
    responses(
        (status = OK, body = Alert, description = "the acknowledged alert"),
        (status = CONFLICT, response = super::openapi::Conflict),
    ),
)]
pub(super) async fn acknowledge(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<Alert>, Problem> {
    let alert = caller
        .ask::<AlertsAcknowledge>(&gateway, &RecordRef { id })
        .await?;
    Ok(axum::Json(alert.into()))
}

/// Converts a part of a request body to the type of the bus, which has the same JSON and checks the rules that a schema
/// cannot express.
fn checked<T: DeserializeOwned>(field: &str, given: &impl Serialize) -> Result<T, Problem> {
    // Encoding cannot fail, because the value was decoded from JSON.
    let json = serde_json::to_value(given).unwrap_or_default();
    serde_path_to_error::deserialize(json).map_err(|error| {
        let path = match error.path().to_string() {
            path if path == "." => String::new(),
            path => format!("{path}: "),
        };
        Problem::alert(format!("body: {field}{path}{}", error.into_inner()))
    })
}

/// A value that the gateway accepts and the service refuses breaks a rule that a schema cannot express.
fn refused(fault: Fault) -> Problem {
    match fault.kind {
        FaultKind::Invalid => Problem::alert(format!("body: {}", fault.message)),
        _ => fault.into(),
    }
}

/// Adds to the schema of an enumeration of objects that these have no other fields.
fn closed(schema: RefOr<Schema>) -> RefOr<Schema> {
    let RefOr::T(Schema::OneOf(mut one_of)) = schema else {
        return schema;
    };
    for item in &mut one_of.items {
        if let RefOr::T(Schema::Object(object)) = item {
            object.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(false)));
        }
    }
    RefOr::T(Schema::OneOf(one_of))
}
