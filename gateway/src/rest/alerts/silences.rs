//! REST routes for silences of alerts.

use std::{collections::BTreeMap, sync::Arc};

use axum::{extract::State, http::StatusCode, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::{
    ToSchema,
    openapi::{ObjectBuilder, Schema, Type},
};
use vmwatch_api::{
    alerts::{
        RecordId, RecordRef,
        silences::{self, MAX_MATCHER_TEXT, MAX_MATCHERS, SilencesCreate, SilencesEnd, SilencesList},
    },
    history::TimeRange,
    sessions::Own,
};

use super::{checked, refused, rules::created};
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

/// A silence: a time in which alerts with certain labels notify nobody.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Silence {
    /// Id of the silence.
    id: RecordId,
    #[schema(schema_with = matchers_schema)]
    matchers: silences::Matchers,
    /// Start of the silence.
    from: Timestamp,
    /// End of the silence.
    to: Timestamp,
    /// Comment that was given with the silence.
    comment: String,
    /// Name of that user.
    created_by: String,
    /// Time at which the silence was created.
    created_at: Timestamp,
}

impl From<silences::Silence> for Silence {
    fn from(silence: silences::Silence) -> Self {
        let created = silence.silence;
        Self {
            id: silence.id,
            matchers: created.matchers,
            from: Timestamp::of_ms(created.range.from_ms()),
            to: Timestamp::of_ms(created.range.to_ms()),
            comment: created.comment.as_str().to_owned(),
            created_by: silence.created_by,
            created_at: Timestamp::of_ms(silence.created_ms),
        }
    }
}

/// Silences.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct SilenceList {
    /// Silences that have not ended or have ended within the last week, those that were created last first.
    silences: Vec<Silence>,
}

/// A silence to create.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewSilence {
    #[schema(schema_with = matchers_schema)]
    matchers: BTreeMap<String, String>,
    /// Start of the silence. Default: now.
    from: Option<Timestamp>,
    /// End of the silence, at most 366 days after its start.
    to: Timestamp,
    /// Comment, such as the reason.
    #[serde(default)]
    #[schema(max_length = 1024)]
    comment: String,
}

/// Schema of the labels that a silence compares.
fn matchers_schema() -> Schema {
    let description = "Labels that an alert must have. Besides the labels of its VM, an alert has the labels `rule`, \
                       `severity`, `instance_id`, `vm_name`, `hypervisor` and `subject`. Names and values are at most 1024 \
                       bytes long.";
    let text = || {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .max_length(Some(MAX_MATCHER_TEXT))
    };
    let schema = ObjectBuilder::new()
        .schema_type(Type::Object)
        .description(Some(description))
        .property_names(Some(text().min_length(Some(1))))
        .additional_properties(Some(text()))
        .min_properties(Some(1))
        .max_properties(Some(MAX_MATCHERS))
        .examples([serde_json::json!({ "env": "test", "rule": "CPU above 95 %" })]);
    schema.into()
}

/// List silences
///
/// A silence that names a VM is only for users with access to it.
#[utoipa::path(
    get, path = "/alert-silences", tag = "alerts", operation_id = "list_alert_silences",
    responses((status = OK, body = SilenceList, description = "silences, at most 1000")),
)]
pub(in crate::rest) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<SilenceList>, Problem> {
    let list = caller.ask::<SilencesList>(&gateway, &Own {}).await?;
    let silences = list.silences.into_iter().map(Silence::from).collect();
    Ok(axum::Json(SilenceList { silences }))
}

/// Create a silence
///
/// For operators and administrators with access to all VMs.
#[utoipa::path(
    post, path = "/alert-silences", tag = "alerts", operation_id = "create_alert_silence", request_body = NewSilence,
    responses(
        (
            status = CREATED, body = Silence, description = "the silence",
            headers(("Location" = String, description = "path of the silence")),
        ),
        (status = CONFLICT, response = Conflict),
        (status = UNPROCESSABLE_ENTITY, response = Unprocessable),
    ),
)]
pub(in crate::rest) async fn create(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(new): Json<NewSilence>,
) -> Result<Response, Problem> {
    let from = new.from.unwrap_or_else(Timestamp::now);
    let range = TimeRange::new(from.as_ms(), new.to.as_ms())
        .ok_or_else(|| Problem::contradictory("body: from must be before to"))?;
    let silence = silences::NewSilence {
        matchers: checked("matchers: ", &new.matchers)?,
        range,
        comment: checked("comment: ", &new.comment)?,
    };
    let silence = caller
        .ask::<SilencesCreate>(&gateway, &silence)
        .await
        .map_err(refused)?;
    let location = format!("{PATH}/alert-silences/{}", silence.id);
    Ok(created(&location, &Silence::from(silence)))
}

/// End a silence
///
/// A silence that has ended stays as it is.
#[utoipa::path(
    delete, path = "/alert-silences/{id}", tag = "alerts", operation_id = "end_alert_silence",
    params(("id" = RecordId, Path, description = "silence id")),
    responses(
        (status = NO_CONTENT, description = "the silence has ended"),
        (status = CONFLICT, response = Conflict),
    ),
)]
pub(in crate::rest) async fn end(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<StatusCode, Problem> {
    caller.ask::<SilencesEnd>(&gateway, &RecordRef { id }).await?;
    Ok(StatusCode::NO_CONTENT)
}
