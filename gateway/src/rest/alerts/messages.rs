//! REST route for the messages of channels and the attempts to deliver them, for administrators with access to all VMs.

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::alerts::{
    AlertState, RecordId,
    channels::{self, MessageFilter, MessagesList, Purpose},
};

use crate::{
    Gateway,
    rest::{
        caller::Caller,
        cursors::MessageCursor,
        extract::{PageLimit, Query, page_limit},
        problem::Problem,
        time::Timestamp,
    },
};

/// An alert in a message.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct MessageAlert {
    /// Id of the alert.
    id: RecordId,
    /// State of the alert that the message reports.
    state: AlertState,
}

/// An attempt to deliver a message.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Attempt {
    /// Time at which the attempt began.
    at: Timestamp,
    /// How long the attempt took, in milliseconds.
    took_ms: u64,
    /// Whether the receiver accepted the message.
    delivered: bool,
    /// Status of the receiver and the first 200 bytes of its answer, or why there was no answer.
    answer: String,
}

/// A message of a channel, delivered or waiting.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct Message {
    /// Id of the message. The receiver gets it with each attempt, so that it can recognize a duplicate.
    id: RecordId,
    /// Id of the channel.
    channel_id: RecordId,
    /// What the message is for.
    purpose: Purpose,
    /// What the alerts of the message have in common, by the key by which they are grouped.
    #[schema(example = json!({ "vm": "db-1" }))]
    group: BTreeMap<String, String>,
    /// Alerts in the message.
    alerts: Vec<MessageAlert>,
    /// Time at which the message was created.
    created_at: Timestamp,
    /// Time of the next attempt; null if the message was delivered.
    #[schema(required)]
    next_attempt_at: Option<Timestamp>,
    /// Time at which the receiver accepted the message; null if it has not.
    #[schema(required)]
    delivered_at: Option<Timestamp>,
    /// Number of all attempts.
    tries: u64,
    /// The newest 20 attempts, oldest first.
    attempts: Vec<Attempt>,
}

impl From<channels::Message> for Message {
    fn from(message: channels::Message) -> Self {
        let alerts = message.alerts.into_iter().map(|alert| MessageAlert {
            id: alert.id,
            state: alert.state,
        });
        let attempts = message.attempts.into_iter().map(|attempt| Attempt {
            at: Timestamp::of_ms(attempt.at_ms),
            took_ms: attempt.took_ms,
            delivered: attempt.delivered,
            answer: attempt.answer,
        });
        Self {
            id: message.id,
            channel_id: message.channel_id,
            purpose: message.purpose,
            group: message.group,
            alerts: alerts.collect(),
            created_at: Timestamp::of_ms(message.created_ms),
            next_attempt_at: message.next_ms.map(Timestamp::of_ms),
            delivered_at: message.delivered_ms.map(Timestamp::of_ms),
            tries: message.tries,
            attempts: attempts.collect(),
        }
    }
}

/// A page of messages.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::rest) struct MessageList {
    /// Messages, newest first.
    messages: Vec<Message>,
    /// Value of `cursor` for the next page; null on the last page.
    #[schema(required)]
    next: Option<MessageCursor>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::rest) struct MessagesQuery {
    /// Return only messages of this channel.
    channel_id: Option<RecordId>,
    /// Return only messages that contain this alert.
    alert_id: Option<RecordId>,
    /// Maximum number of messages in the answer. Default: 100.
    #[param(inline)]
    limit: Option<PageLimit>,
    /// The `next` value of the previous page.
    cursor: Option<MessageCursor>,
}

/// List messages
///
/// Messages of all channels with the attempts to deliver them. Delivered messages are kept for 30 days, heartbeats for
/// one day.
#[utoipa::path(
    get, path = "/alert-messages", tag = "alerts", operation_id = "list_alert_messages", params(MessagesQuery),
    responses((status = OK, body = MessageList, description = "a page of messages, newest first")),
)]
pub(in crate::rest) async fn list(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<MessagesQuery>,
) -> Result<axum::Json<MessageList>, Problem> {
    let filter = MessageFilter {
        channel_id: query.channel_id,
        alert_id: query.alert_id,
        after: query.cursor.map(|cursor| cursor.0),
        limit: page_limit(query.limit),
    };
    let page = caller.ask::<MessagesList>(&gateway, &filter).await?;
    Ok(axum::Json(MessageList {
        messages: page.messages.into_iter().map(Message::from).collect(),
        next: page.next.map(MessageCursor),
    }))
}
