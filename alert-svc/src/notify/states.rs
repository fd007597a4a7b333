//! What hinders the delivery of each channel's messages, which the list of channels shows.

use std::collections::HashMap;

use futures::TryStreamExt;
use mongodb::bson::doc;
use tracing::warn;

use crate::{
    AlertError,
    store::{Store, StoredChannelState},
};

/// The problem of each channel that has one, by the channel's id; texts for administrators.
pub(crate) async fn problems(store: &Store) -> Result<HashMap<String, String>, AlertError> {
    let states: Vec<_> = store.channel_states.find(doc! {}).await?.try_collect().await?;
    let problems = states.into_iter().filter_map(|state| {
        let problem = state.delivery.or(state.template)?;
        Some((state.id, problem))
    });
    Ok(problems.collect())
}

/// Deletes the states of channels other than these.
pub(super) async fn keep_only(store: &Store, channels: &[String]) -> Result<(), AlertError> {
    let others = doc! { "_id": { "$nin": channels } };
    store.channel_states.delete_many(others).await?;
    Ok(())
}

/// The state of one channel. It is written when it changes.
#[derive(Debug)]
pub(super) struct State {
    store: Store,
    channel: String,
    stored: Option<StoredChannelState>,
}

impl State {
    pub(super) fn new(store: &Store, channel: &str) -> Self {
        Self {
            store: store.clone(),
            channel: channel.to_owned(),
            stored: None,
        }
    }

    /// Stores why messages are not sent. The template's problem stays as it is.
    pub(super) async fn set_unsent(&mut self, problem: String) {
        let template = self.stored.as_ref().and_then(|state| state.template.clone());
        self.set(Some(problem), template).await;
    }

    /// Stores why messages are not delivered, and why the template is not used.
    pub(super) async fn set(&mut self, delivery: Option<String>, template: Option<String>) {
        let before = self.stored.clone().unwrap_or_default();
        let state = StoredChannelState {
            id: self.channel.clone(),
            delivery,
            template,
        };
        if self.stored.as_ref() == Some(&state) {
            return;
        }
        if state.delivery != before.delivery
            && let Some(problem) = &state.delivery
        {
            warn!(
                channel = self.channel,
                problem, "notifications of a channel are not delivered"
            );
        }
        let replaced = self
            .store
            .channel_states
            .replace_one(doc! { "_id": &self.channel }, &state)
            .upsert(true);
        match replaced.await {
            Ok(_) => self.stored = Some(state),
            Err(error) => {
                warn!(%error, "the state of a channel could not be stored; it is stored after the next attempt");
            }
        }
    }
}
