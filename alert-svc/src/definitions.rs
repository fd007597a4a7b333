//! A copy of rules, silences and channels in memory. Every replica reads it from the database every two seconds, and at
//! once after a change that this replica made.

mod decode;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::TryStreamExt;
use metrics::counter;
use mongodb::{
    Collection,
    bson::{Document, doc},
};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    alerts::{
        channels::MAX_CHANNELS,
        evaluation::{MAX_WATCHED_NAMES, WatchedNames},
        rules::{MAX_RULES, Rule, UnreadableRule},
        silences::{MAX_SILENCES, Silence},
    },
    time::unix_millis,
};

use crate::{
    AlertError,
    store::{Store, StoredChannel},
};

/// Interval at which the definitions are read.
const INTERVAL: Duration = Duration::from_secs(2);

/// The rules, silences and channels at a moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Definitions {
    /// Whether the database has been read. Until then all lists are empty, which does not mean that there are no rules.
    pub(crate) is_loaded: bool,
    /// All rules, also those that are not enabled, sorted by name.
    pub(crate) rules: Vec<Rule>,
    /// The rules that this version cannot decode. They are not evaluated.
    pub(crate) unreadable: Vec<UnreadableRule>,
    /// The silences that had not ended when they were read, also those that have not begun.
    pub(crate) silences: Vec<Silence>,
    /// All channels, sorted by name.
    pub(crate) channels: Vec<StoredChannel>,
    /// Why silences and channels cannot be decoded, by collection and id.
    broken: BTreeMap<String, String>,
}

/// Reads and follows the definitions. Clones share the copy.
#[derive(Debug, Clone)]
pub(crate) struct DefinitionsHandle {
    current: watch::Receiver<Arc<Definitions>>,
    reload: Arc<Notify>,
}

impl DefinitionsHandle {
    /// The definitions that were read last.
    pub(crate) fn current(&self) -> Arc<Definitions> {
        Arc::clone(&self.current.borrow())
    }

    /// A receiver that is notified when the definitions change.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<Definitions>> {
        self.current.clone()
    }

    /// Has the definitions read at once, without waiting until they have been.
    pub(crate) fn reload(&self) {
        self.reload.notify_one();
    }

    /// Waits until the definitions have been read for the first time. Returns `None` if they are no longer read.
    pub(crate) async fn filled(&self) -> Option<Arc<Definitions>> {
        let mut current = self.current.clone();
        let filled = current.wait_for(|definitions| definitions.is_loaded).await;
        filled.ok().map(|definitions| Arc::clone(&definitions))
    }
}

/// Starts reading the definitions, until shutdown.
pub(crate) fn follow(store: Store, shutdown: CancellationToken) -> DefinitionsHandle {
    let (sender, current) = watch::channel(Arc::new(Definitions::default()));
    let reload = Arc::new(Notify::new());
    let handle = DefinitionsHandle {
        current,
        reload: Arc::clone(&reload),
    };
    tokio::spawn(async move {
        let mut is_failing = false;
        loop {
            let Some(read) = shutdown.run_until_cancelled(read(&store)).await else {
                return;
            };
            match read {
                Ok(definitions) => {
                    is_failing = false;
                    replace(&sender, definitions);
                }
                Err(error) => {
                    counter!("vmwatch_alert_definitions_failed_total").increment(1);
                    if !is_failing {
                        warn!(%error, "reading rules, silences and channels failed; retrying");
                    }
                    is_failing = true;
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = reload.notified() => {}
                () = tokio::time::sleep(INTERVAL) => {}
            }
        }
    });
    handle
}

/// Replaces the copy if it differs, and logs each record that newly cannot be decoded.
fn replace(sender: &watch::Sender<Arc<Definitions>>, new: Definitions) {
    let old = Arc::clone(&sender.borrow());
    if *old == new {
        return;
    }
    for rule in new
        .unreadable
        .iter()
        .filter(|rule| !old.unreadable.contains(rule))
    {
        counter!("vmwatch_broken_records_total", "collection" => "alert_rules").increment(1);
        warn!(id = %rule.id, problem = rule.problem, "a rule could not be decoded; it is not evaluated");
    }
    for (id, problem) in new.broken.iter().filter(|(id, _)| !old.broken.contains_key(*id)) {
        let collection = id.split('/').next().unwrap_or_default().to_owned();
        counter!("vmwatch_broken_records_total", "collection" => collection).increment(1);
        warn!(
            id,
            problem, "a silence or channel could not be decoded; it is ignored"
        );
    }
    sender.send_replace(Arc::new(new));
}

/// Reads all definitions.
pub(crate) async fn read(store: &Store) -> Result<Definitions, AlertError> {
    let now_ms = i64::try_from(unix_millis()).unwrap_or(i64::MAX);
    let rules = documents(&store.rules, doc! { "removed": { "$ne": true } }, MAX_RULES * 2);
    let silences = documents(
        &store.silences,
        doc! { "until_ms": { "$gt": now_ms } },
        MAX_SILENCES * 2,
    );
    let channels = documents(&store.channels, doc! {}, MAX_CHANNELS * 2);
    let (rules, silences, channels) = tokio::try_join!(rules, silences, channels)?;
    Ok(Definitions::decode(rules, silences, channels))
}

/// Reads documents without decoding them, so that one that cannot be decoded does not hide the others. Somewhat more
/// than the permitted number are read, because replicas may exceed it when they create records at the same time.
async fn documents<T: Send + Sync>(
    collection: &Collection<T>,
    filter: Document,
    most: usize,
) -> Result<Vec<Document>, AlertError> {
    let documents = collection.clone_with_type::<Document>();
    let found = documents
        .find(filter)
        .sort(doc! { "_id": 1 })
        .limit(i64::try_from(most).unwrap_or(i64::MAX));
    Ok(found.await?.try_collect().await?)
}

/// The process names that enabled rules are about.
pub(crate) fn watched_names(definitions: &Definitions) -> WatchedNames {
    let rules = definitions.rules.iter().filter(|rule| rule.spec.enabled);
    let names = rules.filter_map(|rule| rule.spec.condition.process().cloned());
    WatchedNames {
        // There are fewer rules than this, so no name is omitted.
        names: names.take(MAX_WATCHED_NAMES).collect(),
    }
}
