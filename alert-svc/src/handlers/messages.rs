//! Lists messages, and queues test messages.

use std::{collections::BTreeMap, sync::Arc};

use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use vmwatch_api::{
    alerts::{
        RecordRef,
        channels::{
            ChannelsTest, MAX_WAITING, Message, MessageFilter, MessagePage, MessagePosition, MessagesList,
            Purpose,
        },
    },
    first_page,
    time::unix_millis,
};
use vmwatch_bus::Context;

use super::{Handlers, conflict, new_id};
use crate::{
    AlertError,
    store::{StoredMessage, is_duplicate, signed},
};

impl Handlers {
    /// Lists messages, newest first.
    pub(super) async fn list_messages(
        self: Arc<Self>,
        context: Context,
        filter: MessageFilter,
    ) -> Result<MessagePage, AlertError> {
        self.require_all_vms::<MessagesList>(&context, None).await?;
        let limit = usize::from(filter.limit.get());
        // One more message than requested is read to determine whether more follow.
        let found = self
            .store
            .messages
            .find(selection(&filter))
            .sort(doc! { "message.created_ms": -1, "_id": 1 })
            .limit(i64::from(filter.limit.get()) + 1);
        let found: Vec<StoredMessage> = found.await?.try_collect().await?;
        let (messages, more) = first_page(found.into_iter().map(|stored| stored.message), limit);
        let next = messages.last().filter(|_| more).map(|last| MessagePosition {
            created_ms: last.created_ms,
            id: last.id.clone(),
        });
        Ok(MessagePage { messages, next })
    }

    /// Queues a test message, which the notifier sends like any other.
    pub(super) async fn test_channel(
        self: Arc<Self>,
        context: Context,
        channel: RecordRef,
    ) -> Result<Message, AlertError> {
        self.require_all_vms::<ChannelsTest>(&context, Some(&channel.id))
            .await?;
        let found = self.find_channel(&channel.id).await?;
        if !found.spec.enabled {
            return Err(conflict("the channel is not enabled, so it sends nothing"));
        }
        let waiting = doc! { "message.channel_id": channel.id.as_str(), "due_ms": { "$exists": true } };
        let waiting = self.store.messages.count_documents(waiting).await?;
        if waiting >= MAX_WAITING as u64 {
            return Err(conflict(format!(
                "{waiting} messages of the channel are already waiting"
            )));
        }
        let id = new_id::<ChannelsTest>(&context)?;
        let now_ms = unix_millis();
        let message = Message {
            id: id.clone(),
            channel_id: channel.id.clone(),
            purpose: Purpose::Test,
            group: BTreeMap::new(),
            alerts: Vec::new(),
            created_ms: now_ms,
            next_ms: Some(now_ms),
            delivered_ms: None,
            tries: 0,
            attempts: Vec::new(),
        };
        let stored = StoredMessage {
            id: id.to_string(),
            message: message.clone(),
            due_ms: Some(signed(now_ms)),
            keys: Vec::new(),
            revision: 0,
            claimed: false,
            skipped: false,
        };
        let change = async {
            match self.store.messages.insert_one(&stored).await {
                Err(error) if !is_duplicate(&error) => Err(error.into()),
                _ => {
                    self.changed.notify_one();
                    Ok(message)
                }
            }
        };
        let detail = format!("{}: test message {id}", found.spec.name);
        self.audited::<ChannelsTest, _>(&context, &channel.id, detail, change)
            .await
    }
}

/// The database's filter for a list of messages.
fn selection(filter: &MessageFilter) -> Document {
    let mut all = Vec::new();
    if let Some(channel) = &filter.channel_id {
        all.push(doc! { "message.channel_id": channel.as_str() });
    }
    if let Some(alert) = &filter.alert_id {
        all.push(doc! { "message.alerts.id": alert.as_str() });
    }
    if let Some(after) = &filter.after {
        let created_ms = signed(after.created_ms);
        let same = doc! { "message.created_ms": created_ms, "_id": { "$gt": after.id.as_str() } };
        all.push(doc! { "$or": [{ "message.created_ms": { "$lt": created_ms } }, same] });
    }
    if all.is_empty() {
        doc! {}
    } else {
        doc! { "$and": all }
    }
}
