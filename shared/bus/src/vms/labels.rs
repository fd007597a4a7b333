//! The in-memory copy of the KV bucket with the labels that operators have set.

use std::collections::{BTreeMap, btree_map};

use async_nats::jetstream::kv::Entry;
use vmwatch_api::{
    InstanceId,
    labels::{LABELS_BUCKET, Labels, VmLabels},
};

use super::decode;
use crate::follow::Table;

/// The labels of all VMs that have any. The size limit of the KV bucket limits their number.
#[derive(Debug, Default)]
pub struct LabelTable {
    vms: BTreeMap<InstanceId, Labelled>,
}

/// The labels of a VM.
#[derive(Debug)]
pub(super) struct Labelled {
    pub(super) labels: Labels,
    /// Each label as `key=value` in lower case, one per line.
    search: Box<str>,
}

impl Labelled {
    /// Whether a label contains this text, which is in lower case.
    pub(super) fn contains(&self, text: &str) -> bool {
        self.search.contains(text)
    }
}

impl LabelTable {
    /// The labels of a VM; `None` if it has none.
    pub fn get(&self, id: &InstanceId) -> Option<&Labels> {
        self.vms.get(id).map(|vm| &vm.labels)
    }

    pub(super) fn of(&self, id: &InstanceId) -> Option<&Labelled> {
        self.vms.get(id)
    }

    /// All VMs that have labels, sorted by id.
    pub(super) fn sorted(&self) -> btree_map::Iter<'_, InstanceId, Labelled> {
        self.vms.iter()
    }

    pub(super) fn set(&mut self, id: InstanceId, labels: Labels) {
        if labels.is_empty() {
            self.vms.remove(&id);
            return;
        }
        let mut text = String::new();
        for (key, value) in &labels {
            text.extend([key.as_str(), "=", value.as_str(), "\n"]);
        }
        let search = text.to_lowercase().into();
        self.vms.insert(id, Labelled { labels, search });
    }
}

impl Table for LabelTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        // A newer version of vmwatch may write keys of other kinds; this version ignores them.
        if let Ok(id) = entry.key.parse() {
            let record: Option<VmLabels> = decode(entry, LABELS_BUCKET);
            self.set(id, record.unwrap_or_default().labels);
        }
    }
}
