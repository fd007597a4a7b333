//! Lists and changes channels.

mod checks;

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt, TryStreamExt, stream};
use mongodb::bson::{Document, deserialize_from_document, doc};
use vmwatch_api::{
    alerts::{
        RecordId, RevisionRef,
        channels::{
            Channel, ChannelChange, ChannelList, ChannelName, ChannelNames, ChannelSpec, ChannelTarget,
            ChannelsCreate, ChannelsList, ChannelsRemove, ChannelsUpdate, MAX_CHANNELS, NewChannel,
        },
    },
    enrollment::SecretText,
    sessions::Own,
    time::unix_millis,
    users::Done,
};
use vmwatch_bus::Context;

use self::checks::{check_password, check_receiver, difference};
use super::{Handlers, alerts::Count, changed_meanwhile, check_size, conflict, invalid, new_id, not_found};
use crate::{
    AlertError, definitions,
    notify::{states, template},
    seal::SealError,
    store::{StoredChannel, is_duplicate, signed, unsigned},
};

/// Number of channels whose messages are looked up at the same time.
const AT_ONCE: usize = 8;

impl Handlers {
    pub(super) async fn list_channels(
        self: Arc<Self>,
        context: Context,
        _: Own,
    ) -> Result<ChannelList, AlertError> {
        self.require_all_vms::<ChannelsList>(&context, None).await?;
        let channels = definitions::read(&self.store).await?.channels;
        let waiting = self.count_waiting().await?;
        let problems = states::problems(&self.store).await?;
        let answered = stream::iter(channels)
            .map(|stored| {
                let waiting = waiting.get(&stored.id).copied().unwrap_or(0);
                let problem = problems.get(&stored.id).cloned();
                self.channel(stored, waiting, problem)
            })
            .buffered(AT_ONCE);
        Ok(ChannelList {
            channels: answered.try_collect().await?,
            has_key: self.keys.are_known(),
        })
    }

    pub(super) async fn list_channel_names(
        self: Arc<Self>,
        _: Context,
        _: Own,
    ) -> Result<ChannelNames, AlertError> {
        let channels = definitions::read(&self.store).await?.channels;
        let names = channels.into_iter().filter_map(|stored| {
            Some(ChannelName {
                id: stored.id.parse().ok()?,
                kind: stored.spec.target.kind().to_owned(),
                name: stored.spec.name,
                enabled: stored.spec.enabled,
            })
        });
        Ok(ChannelNames {
            channels: names.collect(),
        })
    }

    pub(super) async fn create_channel(
        self: Arc<Self>,
        context: Context,
        new: NewChannel,
    ) -> Result<Channel, AlertError> {
        let NewChannel { spec, secret } = new;
        let id = new_id::<ChannelsCreate>(&context)?;
        self.require_all_vms::<ChannelsCreate>(&context, Some(&id))
            .await?;
        self.check_spec(&spec).await?;
        let others = self.other_channels(&id).await?;
        if others.len() >= MAX_CHANNELS {
            return Err(conflict(format!(
                "there are already {MAX_CHANNELS} channels; remove one first"
            )));
        }
        check_size("channels", others.iter().chain([&spec]))?;
        let secret = secret
            .map(|secret| self.seal(&id, &spec.target, &secret))
            .transpose()?;
        let detail = format!("{} ({})", spec.name, spec.target.kind());
        let channel = stored(&context, &id, 1, spec, secret);
        let change = async {
            match self.store.channels.insert_one(&channel).await {
                Ok(_) => Ok(channel),
                Err(error) if is_duplicate(&error) => self.find_channel(&id).await,
                Err(error) => Err(error.into()),
            }
        };
        let created = self
            .audited::<ChannelsCreate, _>(&context, &id, detail, change)
            .await?;
        self.channel(created, 0, None).await
    }

    pub(super) async fn update_channel(
        self: Arc<Self>,
        context: Context,
        change: ChannelChange,
    ) -> Result<Channel, AlertError> {
        let ChannelChange {
            id,
            revision,
            spec,
            secret,
            forget_secret,
        } = change;
        self.require_all_vms::<ChannelsUpdate>(&context, Some(&id))
            .await?;
        self.check_spec(&spec).await?;
        let before = self.find_channel(&id).await?;
        if unsigned(before.revision) != revision {
            return Err(changed_meanwhile("channel"));
        }
        let others = self.other_channels(&id).await?;
        check_size("channels", others.iter().chain([&spec]))?;
        let is_new_secret = secret.is_some();
        let secret = match (secret, forget_secret) {
            (Some(_), true) => return Err(invalid("secret: must not be given if it is to be forgotten")),
            (Some(secret), false) => Some(self.seal(&id, &spec.target, &secret)?),
            (None, true) => None,
            (None, false) => {
                check_receiver(&before, &spec)?;
                before.secret.clone()
            }
        };
        let detail = difference(&before.spec, &spec, is_new_secret, forget_secret);
        let channel = stored(&context, &id, revision.saturating_add(1), spec, secret);
        let change = async {
            let unchanged = doc! { "_id": id.as_str(), "revision": signed(revision) };
            let replaced = self.store.channels.replace_one(unchanged, &channel).await?;
            if replaced.matched_count == 1 {
                Ok(channel)
            } else {
                Err(changed_meanwhile("channel"))
            }
        };
        let changed = self
            .audited::<ChannelsUpdate, _>(&context, &id, detail, change)
            .await?;
        let waiting = self.count_waiting().await?;
        let waiting = waiting.get(id.as_str()).copied().unwrap_or(0);
        // The problem of the former settings is not shown.
        self.channel(changed, waiting, None).await
    }

    /// Removes a channel, its waiting messages, and its mention in rules. A repeated request removes what an
    /// interrupted one has left.
    pub(super) async fn remove_channel(
        self: Arc<Self>,
        context: Context,
        channel: RevisionRef,
    ) -> Result<Done, AlertError> {
        let RevisionRef { id, revision } = channel;
        self.require_all_vms::<ChannelsRemove>(&context, Some(&id))
            .await?;
        let before = match self.find_channel(&id).await {
            Ok(before) => before,
            Err(error) => {
                self.forget_channel(&id).await?;
                return Err(error);
            }
        };
        if unsigned(before.revision) != revision {
            return Err(changed_meanwhile("channel"));
        }
        let detail = before.spec.name.to_string();
        let change = async {
            let unchanged = doc! { "_id": id.as_str(), "revision": signed(revision) };
            if self.store.channels.delete_one(unchanged).await?.deleted_count == 0 {
                return Err(changed_meanwhile("channel"));
            }
            self.forget_channel(&id).await?;
            Ok(Done {})
        };
        self.audited::<ChannelsRemove, _>(&context, &id, detail, change)
            .await
    }

    /// Removes what is left of a channel that does not exist any more.
    async fn forget_channel(&self, id: &RecordId) -> Result<(), AlertError> {
        let mentions = doc! { "spec.recipients": id.as_str() };
        let removal = doc! {
            "$pull": { "spec.recipients": id.as_str() },
            "$inc": { "revision": 1_i64 },
        };
        self.store.rules.update_many(mentions, removal).await?;
        let waiting = doc! { "message.channel_id": id.as_str(), "due_ms": { "$exists": true } };
        self.store.messages.delete_many(waiting).await?;
        Ok(())
    }

    pub(super) async fn find_channel(&self, id: &RecordId) -> Result<StoredChannel, AlertError> {
        let found = self.store.channels.find_one(doc! { "_id": id.as_str() }).await?;
        found.ok_or_else(|| not_found("channel"))
    }

    /// The settings of all channels except this one.
    async fn other_channels(&self, id: &RecordId) -> Result<Vec<ChannelSpec>, AlertError> {
        let channels = definitions::read(&self.store).await?.channels;
        let others = channels.into_iter().filter(|channel| channel.id != id.as_str());
        Ok(others.map(|channel| channel.spec).collect())
    }

    /// Refuses a channel whose receiver must not be connected to, or whose template has a syntax error.
    async fn check_spec(&self, spec: &ChannelSpec) -> Result<(), AlertError> {
        check_password(spec)?;
        if let Some(template) = &spec.template {
            template::check(template).map_err(|problem| invalid(format!("template: {problem}")))?;
        }
        let checked = self.addresses.check_target(&spec.target).await;
        checked
            .map(drop)
            .map_err(|error| invalid(format!("target: {error}")))
    }

    fn seal(&self, id: &RecordId, target: &ChannelTarget, secret: &SecretText) -> Result<String, AlertError> {
        if secret.as_str().is_empty() {
            return Err(invalid("secret: must not be empty"));
        }
        Ok(self.keys.seal(id, target, secret.as_str())?)
    }

    /// Number of messages that wait to be delivered, by channel.
    async fn count_waiting(&self) -> Result<BTreeMap<String, u64>, AlertError> {
        let pipeline = [
            doc! { "$match": { "due_ms": { "$exists": true } } },
            doc! { "$group": { "_id": "$message.channel_id", "count": { "$sum": 1 } } },
        ];
        let found = self.store.messages.aggregate(pipeline).await?;
        let counts: Vec<Document> = found.try_collect().await?;
        let counts = counts
            .into_iter()
            .filter_map(|count| deserialize_from_document::<Count>(count).ok());
        Ok(counts.map(|count| (count.id, unsigned(count.count))).collect())
    }

    /// The channel as answered, with what is known of its messages.
    async fn channel(
        &self,
        stored: StoredChannel,
        waiting: u64,
        problem: Option<String>,
    ) -> Result<Channel, AlertError> {
        let messages = &self.store.messages;
        let delivered = doc! { "message.channel_id": &stored.id, "message.delivered_ms": { "$gt": 0 } };
        let delivered = messages
            .find_one(delivered)
            .sort(doc! { "message.channel_id": 1, "message.delivered_ms": -1 })
            .await?;
        let problem = match &stored.secret {
            Some(_) if !self.keys.are_known() => Some(SealError::NoKey.to_string()),
            _ => self.addresses.problem().or(problem),
        };
        Ok(Channel {
            id: stored.id.parse().map_err(|_| not_found("channel"))?,
            revision: unsigned(stored.revision),
            spec: stored.spec,
            has_secret: stored.secret.is_some(),
            changed_by: stored.changed_by,
            changed_ms: unsigned(stored.changed_ms),
            waiting,
            delivered_ms: delivered.and_then(|stored| stored.message.delivered_ms),
            problem,
        })
    }
}

fn stored(
    context: &Context,
    id: &RecordId,
    revision: u64,
    spec: ChannelSpec,
    secret: Option<String>,
) -> StoredChannel {
    StoredChannel {
        id: id.to_string(),
        revision: signed(revision),
        spec,
        secret,
        changed_by: context.user().to_owned(),
        changed_ms: signed(unix_millis()),
    }
}
