//! Decodes rules, silences and channels. One that cannot be decoded hides no other.

use std::collections::BTreeMap;

use mongodb::bson::{Document, deserialize_from_document};
use serde::de::DeserializeOwned;
use vmwatch_api::alerts::rules::{Rule, UnreadableRule};

use super::Definitions;
use crate::store::{StoredChannel, StoredRule, StoredSilence};

impl Definitions {
    pub(super) fn decode(rules: Vec<Document>, silences: Vec<Document>, channels: Vec<Document>) -> Self {
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

#[cfg(test)]
mod tests {
    use mongodb::bson::serialize_to_document;
    use serde_json::{Value, json};
    use vmwatch_api::alerts::evaluation::WatchedNames;

    use super::*;
    use crate::definitions::watched_names;

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
