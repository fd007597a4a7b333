//! How long rows are kept: by their kind, and by the labels of their VM.
//!
//! The retention of a block is determined when the block is written, from the labels that the VM then has. While the
//! labels are unknown, the longest retention applies, so that no row expires too early.

use std::time::Duration;

use vmwatch_api::InstanceId;

use crate::{
    config::{MetricsSettings, RetentionRules, RetentionSettings},
    known_vms::KnownVms,
    row_kind::RowKind,
};

/// The retention of the rows of all VMs.
pub(crate) struct RowRetention {
    /// The retention of VMs to which no rule applies.
    default: RetentionSettings,
    rules: RetentionRules,
    vms: Option<KnownVms>,
}

impl RowRetention {
    /// Creates the retention according to the settings. Without `vms`, all labels are unknown.
    pub(crate) fn new(settings: &MetricsSettings, vms: Option<KnownVms>) -> Self {
        Self {
            default: settings.retention,
            rules: settings.retention_rules.clone(),
            vms,
        }
    }

    /// The retention of rows of a VM that are written now.
    pub(crate) fn of(&self, kind: RowKind, instance: &InstanceId) -> Duration {
        for rule in self.rules.of(kind) {
            let vms = self.vms.as_ref();
            match vms.and_then(|vms| vms.has_label(instance, &rule.label)) {
                None => return self.longest(kind),
                Some(true) => return rule.keep,
                Some(false) => {}
            }
        }
        self.default.of(kind)
    }

    /// The longest retention that rows of this kind may have.
    pub(crate) fn longest(&self, kind: RowKind) -> Duration {
        let rules = self.rules.of(kind).map(|rule| rule.keep);
        rules.fold(self.default.of(kind), Duration::max)
    }

    /// The shortest retention that rows of this kind may have.
    pub(crate) fn shortest(&self, kind: RowKind) -> Duration {
        let rules = self.rules.of(kind).map(|rule| rule.keep);
        rules.fold(self.default.of(kind), Duration::min)
    }
}
