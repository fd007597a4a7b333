//! The labels that operators set, in a KV bucket with one key per VM. A change replaces all labels of a VM, and only if
//! they have not changed since they were read, so that of two operators neither undoes what the other one did unseen.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use async_nats::jetstream::{kv::Operation, stream::Config};
use metrics::counter;
use tracing::warn;
use vmwatch_api::{
    InstanceId, Method, Service,
    labels::{LABELS_BUCKET, LabelsChange, LabelsReply, LabelsSet, VmLabels},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus, Context,
    audit::{Audit, AuditError},
    jetstream::{Bucket, JetStreamError},
    provision::{BucketConfig, ProvisionError, ensure_stream},
};

use crate::inventory::{Inventory, MARKER_TTL};

/// Maximum size of the KV bucket. The labels of a VM take at most 19 KB, typically less than 1 KB.
const MAX_BYTES: i64 = 64 << 20;
/// Deadline of a JetStream request. JetStream normally answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(3);
/// Length at which the description of a change in the audit is cut off, in bytes.
const MAX_DETAIL: usize = 2000;

/// Reads and changes the labels that operators set.
pub(crate) struct Labels {
    bucket: Bucket,
    audit: Audit,
    inventory: Arc<Inventory>,
}

/// Why labels could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LabelsError {
    /// JetStream failed; if the request was a write, it may still have taken effect.
    #[error("the KV bucket of labels failed")]
    Bucket(#[from] JetStreamError),
    #[error("labels could not be encoded")]
    Encode(#[from] serde_json::Error),
    #[error("the labels were changed meanwhile")]
    Changed,
    #[error("the deadline passed before the labels were written")]
    DeadlinePassed,
    #[error("the audit record could not be written")]
    NotAudited(#[from] AuditError),
}

/// The configuration of the KV bucket, with this number of replicas in a NATS cluster.
pub(crate) fn bucket(replicas: usize) -> Config {
    let bucket = BucketConfig {
        name: LABELS_BUCKET,
        description: "labels of VMs that operators set",
        max_age: Duration::ZERO,
        max_bytes: MAX_BYTES,
        replicas,
    };
    Config {
        allow_message_ttl: true,
        ..bucket.into()
    }
}

/// Creates the KV bucket if it is missing.
pub(crate) async fn ensure_bucket(bus: &Bus, replicas: usize) -> Result<(), ProvisionError> {
    ensure_stream(bus, Service::Lifecycle, &bucket(replicas)).await?;
    Ok(())
}

impl Labels {
    pub(crate) fn new(bus: &Bus, audit: Audit, inventory: Arc<Inventory>) -> Self {
        Self {
            bucket: Bucket::new(bus, LABELS_BUCKET, DEADLINE),
            audit,
            inventory,
        }
    }

    /// Reads all labels of a VM.
    pub(crate) async fn get(&self, id: &InstanceId) -> Result<LabelsReply, LabelsError> {
        let (stored, revision) = self.read(id).await?;
        Ok(self.reply(id, stored, revision))
    }

    /// Replaces the labels that operators have set, if they still have the given revision.
    pub(crate) async fn set(
        &self,
        context: &Context,
        change: LabelsChange,
    ) -> Result<LabelsReply, LabelsError> {
        let LabelsChange {
            instance_id,
            labels,
            revision,
        } = change;
        let new = VmLabels { labels };
        let (stored, found) = self.read(&instance_id).await?;
        if found != revision {
            return Err(LabelsError::Changed);
        }
        if stored == new {
            return Ok(self.reply(&instance_id, stored, revision));
        }
        let writing = async {
            if context.remaining().is_zero() {
                return Err(LabelsError::DeadlinePassed);
            }
            self.write(&instance_id, &new, revision).await
        };
        let detail = difference(&stored, &new);
        let writing = self
            .audit
            .announced(context, &LabelsSet::INFO, &instance_id, detail, writing);
        let revision = writing.await?;
        Ok(self.reply(&instance_id, new, revision))
    }

    /// Deletes the labels of a VM. Returns whether it had any.
    pub(crate) async fn remove(&self, id: &InstanceId) -> Result<bool, LabelsError> {
        let (stored, revision) = self.read(id).await?;
        if stored == VmLabels::default() {
            return Ok(false);
        }
        self.write(id, &VmLabels::default(), revision).await?;
        Ok(true)
    }

    fn reply(&self, id: &InstanceId, stored: VmLabels, revision: u64) -> LabelsReply {
        let (hypervisor, listed) = self.inventory.labels(id);
        LabelsReply {
            labels: stored.labels,
            hypervisor,
            revision,
            listed,
        }
    }

    /// Reads the stored labels and their revision.
    async fn read(&self, id: &InstanceId) -> Result<(VmLabels, u64), LabelsError> {
        let Some(entry) = self.bucket.entry(id.as_str()).await? else {
            return Ok((VmLabels::default(), 0));
        };
        if entry.operation != Operation::Put {
            return Ok((VmLabels::default(), entry.revision));
        }
        // Labels that cannot be decoded count as none, so that they can be replaced.
        let labels = serde_json::from_slice(&entry.value).unwrap_or_else(|error| {
            counter!("vmwatch_broken_records_total", "bucket" => LABELS_BUCKET).increment(1);
            warn!(%error, instance_id = %id, "the labels of a VM could not be decoded");
            VmLabels::default()
        });
        Ok((labels, entry.revision))
    }

    /// Writes labels if the stored ones have this revision, and returns the new revision. A VM without labels has no
    /// key.
    async fn write(&self, id: &InstanceId, labels: &VmLabels, revision: u64) -> Result<u64, LabelsError> {
        let key = id.as_str();
        let written = if labels.labels.is_empty() {
            self.bucket.delete_revision_for(key, revision, MARKER_TTL).await?
        } else {
            let value = serde_json::to_vec(labels)?.into();
            self.bucket.update(key, value, revision).await?
        };
        written.ok_or(LabelsError::Changed)
    }
}

/// Describes a change for the audit, such as `set rack=r2, team=storage; removed owner`.
fn difference(old: &VmLabels, new: &VmLabels) -> String {
    let set = new
        .labels
        .iter()
        .filter(|(key, value)| old.labels.get(key.as_str()) != Some(*value));
    let set: Vec<_> = set.map(|(key, value)| format!("{key}={value}")).collect();
    let removed = old
        .labels
        .iter()
        .filter(|(key, _)| new.labels.get(key.as_str()).is_none());
    let removed: Vec<_> = removed.map(|(key, _)| key.to_string()).collect();
    let count = set.len() + removed.len();
    let parts = [("set", set), ("removed", removed)].into_iter();
    let parts = parts.filter(|(_, labels)| !labels.is_empty());
    let parts = parts.map(|(what, labels)| format!("{what} {}", labels.join(", ")));
    let mut text = parts.collect::<Vec<_>>().join("; ");
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL));
        // Writing to a string cannot fail.
        let _ = write!(text, "… ({count} labels)");
    }
    text
}

impl From<LabelsError> for Fault {
    fn from(error: LabelsError) -> Self {
        match error {
            LabelsError::Changed => Self::new(
                FaultKind::Conflict,
                "the labels were changed meanwhile; read them again and repeat the change",
            ),
            LabelsError::DeadlinePassed => Self::new(
                FaultKind::Timeout,
                "the deadline passed before the labels were changed",
            ),
            LabelsError::NotAudited(error) => error.into(),
            LabelsError::Bucket(_) | LabelsError::Encode(_) => Self::new(
                FaultKind::Backend,
                "the storage for labels is unreachable or full; try again shortly",
            )
            .caused_by(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn labels(labels: &Value) -> VmLabels {
        serde_json::from_value(json!({ "labels": labels })).unwrap()
    }

    #[test]
    fn audit_describes_which_labels_change() {
        let old = labels(&json!({ "a": "1", "b": "2", "c": "3" }));
        let new = labels(&json!({ "b": "2", "c": "x=y", "d": "" }));
        assert_eq!(difference(&old, &new), "set c=x=y, d=; removed a");
        assert_eq!(difference(&old, &labels(&json!({}))), "removed a, b, c");
        let many: Value = (0..32)
            .map(|key| (format!("k{key}"), json!("ü".repeat(127))))
            .collect();
        let text = difference(&old, &labels(&many));
        assert!(
            text.starts_with("set k0=ü") && text.ends_with("ü… (35 labels)") && text.len() < 2100,
            "{text}"
        );
    }
}
