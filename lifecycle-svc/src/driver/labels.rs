//! The labels that a hypervisor has for a VM.

use std::collections::BTreeMap;

use vmwatch_api::labels::{MAX_LABELS, is_hypervisor_label};

/// Labels of a VM within the limits, and the number of those beyond the limits, which are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FoundLabels {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) omitted: u64,
}

impl FoundLabels {
    /// Adds a label, unless it is beyond the limits or the VM has a label with this key already.
    pub(super) fn add(&mut self, key: &str, value: &str) {
        let fits = is_hypervisor_label(key, value)
            && self.labels.len() < MAX_LABELS
            && !self.labels.contains_key(key);
        if fits {
            self.labels.insert(key.to_owned(), value.to_owned());
        } else {
            self.omitted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_beyond_the_limits_are_left_out_and_counted() {
        let mut found = FoundLabels::default();
        let (key, value) = ("k".repeat(63), "v".repeat(255));
        found.add(&key, &value);
        found.add("tag", "");
        assert_eq!((found.labels.len(), found.omitted), (2, 0));
        for (key, value) in [
            ("tag", "again"),
            ("", "x"),
            ("a=b", "x"),
            ("lines", "a\nb"),
            (&"k".repeat(64), "x"),
            ("long", &"v".repeat(256)),
        ] {
            found.add(key, value);
        }
        assert_eq!((found.labels.len(), found.omitted), (2, 6));
        assert_eq!(found.labels["tag"], "");
        for number in 0..40 {
            found.add(&format!("key-{number}"), "x");
        }
        assert_eq!((found.labels.len(), found.omitted), (32, 16));
    }
}
