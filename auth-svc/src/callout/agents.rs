//! The table of the agents whose keys are valid, as a copy of the KV bucket of agents.

use std::{collections::HashMap, sync::Arc};

use async_nats::jetstream::kv::{Entry, Operation};
use metrics::counter;
use tokio::sync::{Notify, mpsc, mpsc::error::TrySendError};
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    enrollment::{AGENT_BUCKET, AgentKey, AgentRecord},
};
use vmwatch_bus::follow::Table;

/// Maximum number of keys whose connections wait to be checked. If there are more, all connections are checked.
const MAX_CHECKS: usize = 1024;

/// Takes keys whose connections must be checked.
#[derive(Debug, Clone)]
pub(super) struct Checks {
    keys: mpsc::Sender<AgentKey>,
    too_many: Arc<Notify>,
}

impl Checks {
    /// Returns the sender, the receiver, and what is notified if the connections of all keys must be checked.
    pub(super) fn new() -> (Self, mpsc::Receiver<AgentKey>, Arc<Notify>) {
        let (keys, receiver) = mpsc::channel(MAX_CHECKS);
        let too_many = Arc::new(Notify::new());
        let checks = Self {
            keys,
            too_many: Arc::clone(&too_many),
        };
        (checks, receiver, too_many)
    }

    /// Has the connections of this key checked.
    pub(super) fn request(&self, key: AgentKey) {
        if let Err(TrySendError::Full(_)) = self.keys.try_send(key) {
            self.too_many.notify_one();
        }
    }
}

/// The agents whose keys are valid. An agent takes less than 1 KB; the size limit of the KV bucket limits their number.
#[derive(Debug)]
pub(super) struct AgentTable {
    by_key: HashMap<AgentKey, InstanceId>,
    by_vm: HashMap<InstanceId, AgentKey>,
    checks: Checks,
}

impl AgentTable {
    /// Creates an empty table. Keys that become invalid are passed to `checks`.
    pub(super) fn new(checks: Checks) -> Self {
        Self {
            by_key: HashMap::new(),
            by_vm: HashMap::new(),
            checks,
        }
    }

    /// The VM whose agent has this key; `None` if the key is unknown or was revoked.
    pub(super) fn vm(&self, key: &AgentKey) -> Option<&InstanceId> {
        self.by_key.get(key)
    }

    /// Sets the valid key of a VM. A former key becomes invalid.
    fn set(&mut self, vm: InstanceId, key: Option<AgentKey>) {
        let former = match &key {
            Some(key) => self.by_vm.insert(vm.clone(), key.clone()),
            None => self.by_vm.remove(&vm),
        };
        if let Some(former) = former.filter(|former| key.as_ref() != Some(former)) {
            // Of two VMs with one key, the one that was changed last has it.
            if self.by_key.get(&former) == Some(&vm) {
                self.by_key.remove(&former);
            }
            self.checks.request(former);
        }
        if let Some(key) = key {
            self.by_key.insert(key, vm);
        }
    }
}

impl Table for AgentTable {
    fn emptied(&self) -> Self {
        Self::new(self.checks.clone())
    }

    fn apply(&mut self, entry: &Entry) {
        let Ok(vm) = entry.key.parse::<InstanceId>() else {
            warn!(
                key = entry.key,
                "ignored a key of the KV bucket of agents that is not an instance id"
            );
            return;
        };
        let record: Option<AgentRecord> = match entry.operation {
            Operation::Put => serde_json::from_slice(&entry.value)
                .inspect_err(|error| {
                    counter!("vmwatch_broken_records_total", "bucket" => AGENT_BUCKET).increment(1);
                    warn!(%error, %vm, "the record of an agent could not be decoded; the agent cannot log in");
                })
                .ok(),
            Operation::Delete | Operation::Purge => None,
        };
        let valid = record.filter(|record| record.revoked_at_ms.is_none());
        self.set(vm, valid.map(|record| record.public_key));
    }
}

#[cfg(test)]
mod tests {
    use nkeys::KeyPair;

    use super::*;

    fn key() -> AgentKey {
        KeyPair::new_user().public_key().parse().unwrap()
    }

    #[test]
    fn revoked_and_replaced_keys_become_invalid_and_are_checked() {
        let (checks, mut checked, _) = Checks::new();
        let mut table = AgentTable::new(checks);
        let [one, other]: [InstanceId; 2] = ["one", "other"].map(|id| id.parse().unwrap());
        let [first, second] = [key(), key()];
        table.set(one.clone(), Some(first.clone()));
        table.set(one.clone(), Some(first.clone()));
        assert_eq!(table.vm(&first), Some(&one));
        assert!(checked.try_recv().is_err(), "an unchanged key is not checked");

        table.set(one.clone(), Some(second.clone()));
        assert_eq!((table.vm(&first), table.vm(&second)), (None, Some(&one)));
        assert_eq!(checked.try_recv().unwrap(), first);
        table.set(one.clone(), None);
        assert_eq!(table.vm(&second), None);
        assert_eq!(checked.try_recv().unwrap(), second);

        // A revocation of one VM's record does not affect another VM that has enrolled with the same key since.
        table.set(one.clone(), Some(first.clone()));
        table.set(other.clone(), Some(first.clone()));
        table.set(one, None);
        assert_eq!(table.vm(&first), Some(&other));
    }

    #[test]
    fn all_connections_are_checked_if_too_many_keys_wait() {
        let (checks, _receiver, too_many) = Checks::new();
        let key = key();
        for _ in 0..MAX_CHECKS {
            checks.request(key.clone());
        }
        let notified = || futures::FutureExt::now_or_never(too_many.notified()).is_some();
        assert!(!notified());
        checks.request(key);
        assert!(notified());
    }
}
