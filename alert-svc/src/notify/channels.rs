//! The tasks of all channels. A task is started again when its channel changes.

use std::{collections::HashMap, sync::Arc};

use metrics::counter;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{error, warn};
use vmwatch_api::{alerts::RecordId, time::unix_millis};

use super::{Context, channel::ChannelTask};
use crate::{definitions::Definitions, store::StoredChannel};

/// The running tasks, by the id of their channel.
pub(super) struct Channels {
    context: Context,
    running: HashMap<String, Running>,
    /// Tasks that were stopped and may have an attempt in progress.
    stopping: Vec<Running>,
}

struct Running {
    channel: StoredChannel,
    wake: Arc<Notify>,
    stop: CancellationToken,
    /// Ends when this value is dropped, so that no messages are sent after the lease was lost.
    task: AbortOnDropHandle<()>,
}

impl Channels {
    pub(super) fn new(context: Context) -> Self {
        Self {
            context,
            running: HashMap::new(),
            stopping: Vec::new(),
        }
    }

    /// Starts the tasks of enabled channels, and stops those of channels that have changed or no longer exist. A task that
    /// panicked is started again.
    pub(super) async fn follow(&mut self, definitions: &Definitions) {
        let enabled = definitions.channels.iter().filter(|channel| channel.spec.enabled);
        let wanted: HashMap<_, _> = enabled.map(|channel| (channel.id.as_str(), channel)).collect();
        let is_current = |id: &String, running: &Running| {
            wanted.get(id.as_str()) == Some(&&running.channel) && !running.task.is_finished()
        };
        let (current, outdated): (HashMap<_, _>, HashMap<_, _>) = self
            .running
            .drain()
            .partition(|(id, running)| is_current(id, running));
        self.running = current;
        for running in outdated.into_values() {
            running.stop.cancel();
            self.stopping.push(running);
        }
        let (ended, stopping) = self
            .stopping
            .drain(..)
            .partition(|running| running.task.is_finished());
        self.stopping = stopping;
        ended_all(ended).await;
        for (id, channel) in wanted {
            if !self.running.contains_key(id)
                && let Ok(record_id) = id.parse()
            {
                let running = self.start(record_id, channel.clone());
                self.running.insert(id.to_owned(), running);
            }
        }
    }

    fn start(&self, id: RecordId, channel: StoredChannel) -> Running {
        let (wake, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let task = ChannelTask {
            context: self.context.clone(),
            id,
            channel: channel.clone(),
            wake: Arc::clone(&wake),
            stop: stop.clone(),
        };
        Running {
            channel,
            wake,
            stop,
            task: AbortOnDropHandle::new(tokio::spawn(task.run())),
        }
    }

    /// Wakes the tasks of channels with messages that are due.
    pub(super) async fn wake_due(&self) {
        match self.context.outbox.channels_with_due(unix_millis()).await {
            Ok(ids) => {
                for running in ids.iter().filter_map(|id| self.running.get(id)) {
                    running.wake.notify_one();
                }
            }
            Err(error) => warn!(%error, "looking for messages that are due failed; retrying"),
        }
    }

    /// Stops all tasks and waits until they have ended, which takes no longer than the time that an attempt in progress gets.
    pub(super) async fn stop(mut self) {
        let running = self.running.drain().map(|(_, running)| running);
        let all: Vec<_> = running.chain(self.stopping).collect();
        for running in &all {
            running.stop.cancel();
        }
        ended_all(all).await;
    }
}

/// Waits until the tasks have ended.
async fn ended_all(tasks: Vec<Running>) {
    for running in tasks {
        if let Err(error) = running.task.await {
            counter!("vmwatch_panics_total", "task" => "alert_channel").increment(1);
            error!(%error, channel = running.channel.id, "the task of a channel panicked; it is started again");
        }
    }
}
