//! Notifies the recipients of alerts. Only the replica that holds the lease does this.
//!
//! ```text
//! alerts that changed ──> planner ─┐                  ┌─> channel ──> receiver
//! alerts that are firing ─> survey ┴─> outbox (MongoDB) ┴─> channel ──> receiver
//! ```

pub(crate) mod addresses;
mod backoff;
mod channel;
mod channels;
mod content;
mod labels;
mod outbox;
mod planner;
mod send;
pub(crate) mod settings;
pub(crate) mod states;
mod survey;
pub(crate) mod template;
#[cfg(test)]
mod tests;
mod words;

use std::{sync::Arc, time::Duration};

use metrics::counter;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::time::{UtcOffset, unix_millis};

pub(crate) use self::outbox::Outbox;
use self::{
    addresses::Addresses,
    channels::Channels,
    planner::Planner,
    send::{Sender, tls::Trust},
    settings::NotifySettings,
    survey::Survey,
};
use crate::{
    AlertError,
    config::AlertSettings,
    definitions::{Definitions, DefinitionsHandle},
    seal::Keys,
    store::Store,
};

/// Interval at which due messages are looked for.
const TICK: Duration = Duration::from_secs(1);
/// Pause before the indexes are created again after a failure.
const PREPARE_PAUSE: Duration = Duration::from_secs(2);

/// How messages are sent: the parts that do not change while the service runs.
#[derive(Debug)]
pub(crate) struct Delivery {
    sender: Sender,
    keys: Arc<Keys>,
    utc_offset: UtcOffset,
    public_url: String,
}

impl Delivery {
    /// Loads the certificate authorities for receivers.
    pub(crate) fn new(settings: &NotifySettings, addresses: Arc<Addresses>) -> Result<Self, AlertError> {
        Ok(Self {
            sender: Sender {
                addresses,
                trust: Trust::load(&settings.authorities)?,
            },
            keys: Arc::clone(&settings.keys),
            utc_offset: settings.utc_offset,
            public_url: settings.public_url.clone(),
        })
    }
}

/// What the tasks of all channels share.
#[derive(Clone)]
struct Context {
    store: Store,
    outbox: Outbox,
    delivery: Arc<Delivery>,
}

/// The rules for addresses of receivers, for checks when a channel is changed and when a message is sent.
pub(crate) async fn addresses(settings: &AlertSettings) -> Result<Arc<Addresses>, AlertError> {
    let rules = settings
        .notify
        .addresses(&settings.bus, &settings.store, settings.health)
        .await?;
    Ok(Arc::new(Addresses::new(rules)))
}

/// Makes and sends messages until it is cancelled. `changed` is notified when an alert has changed.
pub(crate) async fn run(
    delivery: Arc<Delivery>,
    store: Store,
    definitions: DefinitionsHandle,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) {
    let outbox = Outbox::new(&store);
    if shutdown.run_until_cancelled(prepare(&outbox)).await.is_none() {
        return;
    }
    if shutdown.run_until_cancelled(definitions.filled()).await.is_none() {
        return;
    }
    info!(
        has_keys = delivery.keys.are_known(),
        "notifying recipients of alerts"
    );
    let context = Context {
        store: store.clone(),
        outbox: outbox.clone(),
        delivery,
    };
    let mut channels = Channels::new(context);
    let mut makers = Makers {
        planner: Planner::new(&store, &outbox),
        survey: Survey::new(&store, &outbox),
        kept: None,
        store,
    };
    let mut redefined = definitions.changes();
    while !shutdown.is_cancelled() {
        let current = definitions.current();
        channels.follow(&current).await;
        let pass = makers.pass(&current);
        match shutdown.run_until_cancelled(pass).await {
            None => break,
            Some(Ok(is_more)) => {
                channels.wake_due().await;
                if is_more {
                    continue;
                }
            }
            Some(Err(error)) => {
                counter!("vmwatch_alert_notify_failed_total").increment(1);
                warn!(%error, "making messages of alerts failed; retrying");
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = changed.notified() => {}
            _ = redefined.changed() => {}
            () = sleep(TICK) => {}
        }
    }
    channels.stop().await;
}

async fn prepare(outbox: &Outbox) {
    while let Err(error) = outbox.prepare().await {
        warn!(%error, "the indexes of messages could not be created; retrying");
        sleep(PREPARE_PAUSE).await;
    }
}

/// Makes messages.
struct Makers {
    store: Store,
    planner: Planner,
    survey: Survey,
    /// The channels whose states are kept.
    kept: Option<Vec<String>>,
}

impl Makers {
    /// Returns whether more alerts wait for their messages.
    async fn pass(&mut self, definitions: &Definitions) -> Result<bool, AlertError> {
        let ids: Vec<_> = definitions
            .channels
            .iter()
            .map(|channel| channel.id.clone())
            .collect();
        if self.kept.as_ref() != Some(&ids) {
            states::keep_only(&self.store, &ids).await?;
            self.kept = Some(ids);
        }
        let is_more = self.planner.pass(definitions, unix_millis()).await?;
        self.survey.pass(definitions, unix_millis()).await?;
        Ok(is_more)
    }
}
