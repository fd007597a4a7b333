//! The in-memory copy of the KV bucket with the process names that rules are about.

use std::collections::HashSet;

use async_nats::jetstream::kv::{Entry, Operation};
use tracing::warn;
use vmwatch_api::alerts::evaluation::{MAX_WATCHED_NAMES, WATCHED_KEY, WatchedNames};
use vmwatch_bus::follow::Table;

/// The process names that rules are about, at most [`MAX_WATCHED_NAMES`].
#[derive(Debug, Default)]
pub(crate) struct WatchedTable {
    /// Revision of the list; 0 if there is none.
    revision: u64,
    names: HashSet<Box<str>>,
}

impl WatchedTable {
    pub(super) fn new(revision: u64, watched: &WatchedNames) -> Self {
        let names = watched.names.iter().take(MAX_WATCHED_NAMES);
        Self {
            revision,
            names: names.map(|name| name.as_str().into()).collect(),
        }
    }

    pub(super) const fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

impl Table for WatchedTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        if entry.key != WATCHED_KEY {
            return;
        }
        if entry.operation != Operation::Put {
            *self = Self::default();
            return;
        }
        *self = match serde_json::from_slice(&entry.value) {
            Ok(watched) => Self::new(entry.revision, &watched),
            Err(error) => {
                warn!(%error, "the list of watched process names cannot be decoded; no process is watched");
                Self::default()
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn entry(key: &str, value: &str, revision: u64, operation: Operation) -> Entry {
        Entry {
            bucket: "vmwatch_watched_names".to_owned(),
            key: key.to_owned(),
            value: value.to_owned().into(),
            revision,
            delta: 0,
            created: SystemTime::now().into(),
            operation,
            seen_current: true,
        }
    }

    #[test]
    fn list_of_watched_names_is_replaced_as_a_whole() {
        let mut table = WatchedTable::default();
        let mut apply = |key, value, revision, operation| {
            table.apply(&entry(key, value, revision, operation));
            let found = ["nginx", "sshd"].map(|name| table.contains(name));
            (table.revision(), found)
        };
        let put = Operation::Put;
        assert_eq!(
            apply(WATCHED_KEY, r#"{"names":["nginx"]}"#, 4, put),
            (4, [true, false])
        );
        assert_eq!(
            apply("another", r#"{"names":["sshd"]}"#, 5, put),
            (4, [true, false])
        );
        assert_eq!(
            apply(WATCHED_KEY, r#"{"names":["sshd"]}"#, 6, put),
            (6, [false, true])
        );
        assert_eq!(apply(WATCHED_KEY, "not JSON", 7, put), (0, [false, false]));
        assert_eq!(
            apply(WATCHED_KEY, r#"{"names":["sshd"]}"#, 8, put),
            (8, [false, true])
        );
        assert_eq!(apply(WATCHED_KEY, "", 9, Operation::Delete), (0, [false, false]));
    }

    #[test]
    fn names_beyond_the_maximum_are_ignored() {
        let names: Vec<_> = (0..=MAX_WATCHED_NAMES)
            .map(|index| format!("n{index:04}"))
            .collect();
        let watched = serde_json::from_value(serde_json::json!({ "names": names })).unwrap();
        let table = WatchedTable::new(1, &watched);
        assert!(table.contains("n0999") && !table.contains("n1000"));
    }
}
