//! REST routes for the channels of alerts, for administrators with access to all VMs.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmwatch_api::{
    alerts::{
        RecordId, RecordRef, RevisionRef, Title,
        channels::{
            self, ChannelChange, ChannelsCreate, ChannelsList, ChannelsNames, ChannelsRemove, ChannelsTest,
            ChannelsUpdate,
        },
    },
    enrollment::SecretText,
    sessions::Own,
};

use super::{
    Revision, checked,
    messages::Message,
    refused,
    rules::{RevisionQuery, created},
    targets::ChannelSpec,
};
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

/// A channel, through which alerts notify people or programs, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Channel {
    /// Id of the channel.
    id: RecordId,
    /// Number of the channel's last change.
    revision: u64,
    #[schema(value_type = ChannelSpec)]
    spec: channels::ChannelSpec,
    /// Whether the channel has a secret.
    has_secret: bool,
    /// Name of the user that made the last change.
    changed_by: String,
    /// Time of the last change.
    changed_at: Timestamp,
    /// Number of messages that wait to be delivered.
    waiting: u64,
    /// Time at which a message was last delivered; null if none was.
    #[schema(required)]
    delivered_at: Option<Timestamp>,
    /// Why messages are not delivered at the moment; null if they are.
    #[schema(required)]
    problem: Option<String>,
}

impl From<channels::Channel> for Channel {
    fn from(channel: channels::Channel) -> Self {
        Self {
            id: channel.id,
            revision: channel.revision,
            spec: channel.spec,
            has_secret: channel.has_secret,
            changed_by: channel.changed_by,
            changed_at: Timestamp::of_ms(channel.changed_ms),
            waiting: channel.waiting,
            delivered_at: channel.delivered_ms.map(Timestamp::of_ms),
            problem: channel.problem,
        }
    }
}

/// All channels.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct ChannelList {
    /// Channels, sorted by name.
    channels: Vec<Channel>,
    /// Whether the deployment has the key that seals secrets. Without it, channels with a secret send nothing.
    has_key: bool,
}

/// What users need of a channel to choose it as a recipient of a rule.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct ChannelName {
    /// Id of the channel.
    id: RecordId,
    /// Name of the channel.
    name: Title,
    /// Kind of the receiver: `email`, `webhook` or `alertmanager`. More values may be added.
    kind: String,
    /// Whether the channel sends its messages.
    enabled: bool,
}

/// Names of all channels.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct ChannelNames {
    /// Channels, sorted by name.
    channels: Vec<ChannelName>,
}

/// A channel to create.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewChannel {
    spec: ChannelSpec,
    /// Password of the mail server, key that signs webhooks, or bearer token of an Alertmanager. Default: none.
    #[schema(value_type = Option<String>, format = Password, min_length = 1, max_length = 1024)]
    secret: Option<SecretText>,
}

/// A change of a channel.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewChannelSpec {
    /// The `revision` on which the change is based.
    #[schema(value_type = u64, maximum = 9_007_199_254_740_991_i64)]
    revision: Revision,
    spec: ChannelSpec,
    /// New secret. Default: the channel keeps its secret. If the receiver changes, a secret must be given again or
    /// forgotten.
    #[schema(value_type = Option<String>, format = Password, min_length = 1, max_length = 1024)]
    secret: Option<SecretText>,
    /// Whether the secret is deleted. Default: false.
    #[serde(default)]
    forget_secret: bool,
}

/// List channels
#[utoipa::path(
    get, path = "/alert-channels", tag = "alerts", operation_id = "list_alert_channels",
    responses((status = OK, body = ChannelList, description = "all channels, at most 100")),
)]
pub(in crate::rest) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<ChannelList>, Problem> {
    let list = caller.ask::<ChannelsList>(&gateway, &Own {}).await?;
    Ok(axum::Json(ChannelList {
        channels: list.channels.into_iter().map(Channel::from).collect(),
        has_key: list.has_key,
    }))
}

/// List the names of channels
///
/// For all users, because rules name channels as recipients.
#[utoipa::path(
    get, path = "/alert-channels/names", tag = "alerts", operation_id = "list_alert_channel_names",
    responses((status = OK, body = ChannelNames, description = "the names of all channels")),
)]
pub(in crate::rest) async fn names(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<axum::Json<ChannelNames>, Problem> {
    let names = caller.ask::<ChannelsNames>(&gateway, &Own {}).await?;
    let channels = names.channels.into_iter().map(|channel| ChannelName {
        id: channel.id,
        name: channel.name,
        kind: channel.kind,
        enabled: channel.enabled,
    });
    Ok(axum::Json(ChannelNames {
        channels: channels.collect(),
    }))
}

/// Create a channel
///
/// For administrators with access to all VMs, as are all requests about channels except the list of names.
#[utoipa::path(
    post, path = "/alert-channels", tag = "alerts", operation_id = "create_alert_channel", request_body = NewChannel,
    responses(
        (
            status = CREATED, body = Channel, description = "the channel",
            headers(("Location" = String, description = "path of the channel")),
        ),
        (status = CONFLICT, response = Conflict),
        (status = UNPROCESSABLE_ENTITY, response = Unprocessable),
    ),
)]
pub(in crate::rest) async fn create(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(NoParameters {}): Query<NoParameters>,
    Json(NewChannel { spec, secret }): Json<NewChannel>,
) -> Result<Response, Problem> {
    let new = channels::NewChannel {
        spec: checked("spec.", &spec)?,
        secret,
    };
    let channel = caller
        .ask::<ChannelsCreate>(&gateway, &new)
        .await
        .map_err(refused)?;
    let location = format!("{PATH}/alert-channels/{}", channel.id);
    Ok(created(&location, &Channel::from(channel)))
}

/// Change a channel
///
/// Replaces everything except the secret, which is kept unless a new one is given. If the channel was changed since
/// `revision`, the answer is 409 and nothing is changed.
#[utoipa::path(
    put, path = "/alert-channels/{id}", tag = "alerts", operation_id = "update_alert_channel",
    request_body = NewChannelSpec,
    params(("id" = RecordId, Path, description = "channel id")),
    responses(
        (status = OK, body = Channel, description = "the changed channel"),
        (status = CONFLICT, response = Conflict),
        (status = UNPROCESSABLE_ENTITY, response = Unprocessable),
    ),
)]
pub(in crate::rest) async fn update(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
    Json(new): Json<NewChannelSpec>,
) -> Result<axum::Json<Channel>, Problem> {
    let change = ChannelChange {
        id,
        revision: new.revision.get(),
        spec: checked("spec.", &new.spec)?,
        secret: new.secret,
        forget_secret: new.forget_secret,
    };
    let channel = caller
        .ask::<ChannelsUpdate>(&gateway, &change)
        .await
        .map_err(refused)?;
    Ok(axum::Json(channel.into()))
}

/// Remove a channel
///
/// Also removes its waiting messages and its mention in rules.
#[utoipa::path(
    delete, path = "/alert-channels/{id}", tag = "alerts", operation_id = "remove_alert_channel",
    params(("id" = RecordId, Path, description = "channel id"), RevisionQuery),
    responses(
        (status = NO_CONTENT, description = "the channel is removed"),
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
        .ask::<ChannelsRemove>(&gateway, &RevisionRef { id, revision })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Send a test message
///
/// Queues a message that says that it is a test. The list of messages shows whether it was delivered.
#[utoipa::path(
    post, path = "/alert-channels/{id}/test", tag = "alerts", operation_id = "test_alert_channel",
    params(("id" = RecordId, Path, description = "channel id")),
    responses(
        (status = ACCEPTED, body = Message, description = "the message, which will be delivered"),
        (status = CONFLICT, response = Conflict),
    ),
)]
pub(in crate::rest) async fn test(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Path(id): Path<RecordId>,
    Query(NoParameters {}): Query<NoParameters>,
) -> Result<(StatusCode, axum::Json<Message>), Problem> {
    let message = caller.ask::<ChannelsTest>(&gateway, &RecordRef { id }).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(message.into())))
}
