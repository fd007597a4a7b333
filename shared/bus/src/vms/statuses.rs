//! The in-memory copy of the KV bucket with the status that each agent last sent.

use std::collections::HashMap;

use async_nats::jetstream::kv::Entry;
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    agents::{AgentStatus, STATUS_BUCKET},
};

use super::{MAX_ROWS, decode};
use crate::follow::Table;

/// The status of the agents of at most [`MAX_ROWS`] VMs.
#[derive(Debug, Default)]
pub struct StatusTable {
    vms: HashMap<InstanceId, AgentStatus>,
}

impl StatusTable {
    /// The status that the agent of a VM last sent; `None` if it is not known.
    pub fn get(&self, id: &InstanceId) -> Option<&AgentStatus> {
        self.vms.get(id)
    }

    pub(super) fn set(&mut self, id: InstanceId, status: Option<AgentStatus>) {
        match status {
            None => drop(self.vms.remove(&id)),
            Some(_) if self.vms.len() >= MAX_ROWS && !self.vms.contains_key(&id) => {
                warn!(%id, most = MAX_ROWS, "more agents have a status than the list of VMs has room for");
            }
            Some(status) => drop(self.vms.insert(id, status)),
        }
    }
}

impl Table for StatusTable {
    fn emptied(&self) -> Self {
        Self::default()
    }

    fn apply(&mut self, entry: &Entry) {
        if let Ok(id) = entry.key.parse() {
            self.set(id, decode(entry, STATUS_BUCKET));
        }
    }
}

/// Whether a version is older than another one. Their numbers are compared; a text that does not begin with three numbers is
/// not older than any version.
pub(super) fn is_older(version: &str, than: &str) -> bool {
    match (numbers(version), numbers(than)) {
        (Some(version), Some(than)) => version < than,
        _ => false,
    }
}

/// The three numbers of a version and whether it is a release: a pre-release is older than its release.
fn numbers(version: &str) -> Option<([u64; 3], bool)> {
    let (version, _) = version.split_once('+').unwrap_or((version, ""));
    let (numbers, pre_release) = version.split_once('-').unwrap_or((version, ""));
    let mut parts = numbers.splitn(3, '.').map(|part| part.parse().ok());
    let numbers = [parts.next()??, parts.next()??, parts.next()??];
    Some((numbers, pre_release.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, than) in [
            ("0.9.0", "0.10.0"),
            ("0.10.1", "0.10.2"),
            ("9.0.0", "10.0.0"),
            ("1.0.0-rc.1", "1.0.0"),
        ] {
            assert!(is_older(version, than), "{version} {than}");
            assert!(!is_older(than, version), "{than} {version}");
        }
        for version in ["1.0.0", "1.0.0+build", "?", "1.0", "1.0.0.0", ""] {
            assert!(!is_older(version, "1.0.0"), "{version}");
        }
    }
}
