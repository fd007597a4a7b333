//! A copy of rules, silences and channels in memory. Every replica reads it from the database every two seconds, and at
//! once after a change that this replica made.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::TryStreamExt;
use metrics::counter;
use mongodb::{
    Collection,
    bson::{Document, deserialize_from_document, doc},
};
use serde::de::DeserializeOwned;
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
    store::{Store, StoredChannel, StoredRule, StoredSilence},
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

impl Definitions {
    fn decode(rules: Vec<Document>, silences: Vec<Document>, channels: Vec<Document>) -> Self {
        let mut definitions = Self {
            is_loaded: true,
            ..Self::default()
        };
        for document in rules {
            match decode_rule(&document) {
                Ok(rule) => definitions.rules.push(rule),
                Err(unreadable) => definitions.unreadable.extend(unreadable),
            }
        }
        let broken = &mut definitions.broken;
        let silences = silences
            .into_iter()
            .filter_map(|document| decode::<StoredSilence>("alert_silences", document, broken))
            .filter_map(StoredSilence::into_silence);
        definitions.silences = silences.collect();
        let channels = channels
            .into_iter()
            .filter_map(|document| decode::<StoredChannel>("alert_channels", document, broken));
        definitions.channels = channels.collect();
        definitions
            .rules
            .sort_by(|one, other| (&one.spec.name, &one.id).cmp(&(&other.spec.name, &other.id)));
        definitions
            .channels
            .sort_by(|one, other| (&one.spec.name, &one.id).cmp(&(&other.spec.name, &other.id)));
        definitions
    }
}

/// Decodes a stored rule. A rule that cannot be decoded is returned with what is known of it; one without a valid id is
/// ignored.
fn decode_rule(document: &Document) -> Result<Rule, Option<UnreadableRule>> {
    let text = |name: &str| document.get_str(name).map(str::to_owned);
    let id = text("_id").ok().and_then(|id| id.parse().ok());
    let revision = document.get_i64("revision").ok();
    let name = document
        .get_document("spec")
        .and_then(|spec| spec.get_str("name"))
        .map(str::to_owned);
    let decoded = deserialize_from_document::<StoredRule>(document.clone());
    let problem = match decoded {
        Ok(stored) => match stored.into_rule() {
            Some(rule) => return Ok(rule),
            None => "the id of the rule is not valid".to_owned(),
        },
        Err(error) => format!("this version of vmwatch cannot read the rule: {error}"),
    };
    Err(id.map(|id| UnreadableRule {
        id,
        revision: revision
            .and_then(|revision| revision.try_into().ok())
            .unwrap_or(0),
        name: name.ok(),
        problem,
    }))
}

/// Decodes a document, or notes why it cannot be decoded.
fn decode<T: DeserializeOwned>(
    collection: &str,
    document: Document,
    broken: &mut BTreeMap<String, String>,
) -> Option<T> {
    let id = document.get_str("_id").unwrap_or_default().to_owned();
    match deserialize_from_document(document) {
        Ok(decoded) => Some(decoded),
        Err(error) => {
            broken.insert(format!("{collection}/{id}"), error.to_string());
            None
        }
    }
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

#[cfg(test)]
mod tests {
    use mongodb::bson::serialize_to_document;
    use serde_json::{Value, json};

    use super::*;

    fn document(json: &Value) -> Document {
        serialize_to_document(json).unwrap()
    }

    fn rule(id: char, name: &str, condition: &Value) -> Document {
        document(&json!({
            "_id": id.to_string().repeat(32),
            "revision": 7,
            "spec": {
                "name": name, "enabled": true, "condition": condition, "for_seconds": 60, "severity": "warning",
            },
            "changed_by": "ann",
            "changed_ms": 1_483_277_879_001_i64,
        }))
    }

    #[test]
    fn rule_of_newer_version_is_listed_as_unreadable() {
        let threshold = json!({ "direction": "below", "limit": 1.0 });
        let missing = json!({ "kind": "process_count", "name": "postgres", "threshold": threshold });
        let rules = vec![
            rule('a', "postgres is gone", &missing),
            rule('b', "of a newer version", &json!({ "kind": "gpu" })),
            document(&json!({ "_id": "not an id" })),
        ];
        let definitions = Definitions::decode(rules, Vec::new(), Vec::new());
        assert!(definitions.is_loaded);
        let names = definitions.rules.iter().map(|rule| rule.spec.name.as_str());
        assert_eq!(names.collect::<Vec<_>>(), ["postgres is gone"]);
        let [unreadable] = definitions.unreadable.as_slice() else {
            panic!("{:?}", definitions.unreadable);
        };
        assert_eq!(
            (
                unreadable.id.as_str(),
                unreadable.revision,
                unreadable.name.as_deref()
            ),
            ("b".repeat(32).as_str(), 7, Some("of a newer version"))
        );
        let watched = watched_names(&definitions);
        assert_eq!(
            serde_json::to_value(watched).unwrap(),
            json!({ "names": ["postgres"] })
        );
    }

    #[test]
    fn names_of_disabled_rules_are_not_watched() {
        let threshold = json!({ "direction": "above", "limit": 50.0 });
        let condition = json!({ "kind": "process_cpu", "name": "gzip", "threshold": threshold });
        let mut disabled = rule('a', "gzip", &condition);
        disabled
            .get_document_mut("spec")
            .unwrap()
            .insert("enabled", false);
        let definitions = Definitions::decode(vec![disabled], Vec::new(), Vec::new());
        assert_eq!(definitions.rules.len(), 1);
        assert_eq!(watched_names(&definitions), WatchedNames::default());
    }

    #[test]
    fn broken_channel_hides_no_other_channel() {
        let channel = |id: char, target: Value| {
            document(&json!({
                "_id": id.to_string().repeat(32),
                "revision": 1,
                "spec": { "name": "ops", "enabled": true, "target": target },
                "changed_by": "ann",
                "changed_ms": 1,
            }))
        };
        let channels = vec![
            channel('a', json!({ "kind": "pigeon" })),
            channel('b', json!({ "kind": "webhook", "url": "https://example.com/" })),
        ];
        let definitions = Definitions::decode(Vec::new(), Vec::new(), channels);
        assert_eq!(definitions.channels.len(), 1);
        let broken: Vec<_> = definitions.broken.keys().cloned().collect();
        assert_eq!(broken, [format!("alert_channels/{}", "a".repeat(32))]);
    }
}
