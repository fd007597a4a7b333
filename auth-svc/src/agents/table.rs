//! The agents in memory.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry as Slot},
    ops::Bound,
};

use async_nats::jetstream::kv::Entry;
use tracing::warn;
use vmwatch_api::{
    InstanceId, Scope,
    enrollment::{
        AGENT_BUCKET, AgentKey, AgentList, AgentPage, AgentRecord, AgentSummary, JoinTokenId,
        MAX_JOIN_SECONDS,
    },
    first_page,
};
use vmwatch_bus::follow::Table;

use crate::{bucket, callout::Checks};

/// Time for which a revoked agent is kept at least. All join tokens that it may have used have expired then, so its key
/// cannot be enrolled again by repeating a request.
const KEEP_REVOKED_MS: u64 = MAX_JOIN_SECONDS as u64 * 1000;

/// The agents in the KV bucket, at most [`MAX_AGENTS`](super::MAX_AGENTS). An agent takes about 500 bytes, because only what
/// this service needs is kept and the texts of keys are shared.
#[derive(Debug)]
pub(crate) struct AgentTable {
    agents: BTreeMap<InstanceId, Agent>,
    /// The VMs of each key, even if it was revoked. Enrolment refuses a second VM, but two concurrent enrolments may overtake
    /// its check.
    vms: HashMap<AgentKey, Vec<InstanceId>>,
    /// Takes keys that are no longer valid.
    checks: Checks,
}

/// The part of an [`AgentRecord`] that is kept in memory.
#[derive(Debug)]
struct Agent {
    key: AgentKey,
    join_token: JoinTokenId,
    enrolled_at_ms: u64,
    source: Option<Box<str>>,
    revoked_at_ms: Option<u64>,
    former_keys: Box<[AgentKey]>,
}

impl From<AgentRecord> for Agent {
    fn from(record: AgentRecord) -> Self {
        Self {
            key: record.public_key,
            join_token: record.join_token,
            enrolled_at_ms: record.enrolled_at_ms,
            source: record.source.map(String::into_boxed_str),
            revoked_at_ms: record.revoked_at_ms,
            former_keys: record.former_keys.into_boxed_slice(),
        }
    }
}

impl AgentTable {
    pub(super) fn new(checks: Checks) -> Self {
        Self {
            agents: BTreeMap::new(),
            vms: HashMap::new(),
            checks,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.agents.len()
    }

    pub(super) fn contains(&self, instance_id: &InstanceId) -> bool {
        self.agents.contains_key(instance_id)
    }

    /// The VM whose agent may log in with this key; `None` if the key is unknown, was revoked, or is that of two VMs.
    pub(crate) fn valid_vm(&self, key: &AgentKey) -> Option<&InstanceId> {
        self.valid_entry(key).map(|(_, vm)| vm)
    }

    /// Like [`AgentTable::valid_vm`], with the table's own copy of the key, whose text other copies can share.
    pub(crate) fn valid_entry(&self, key: &AgentKey) -> Option<(&AgentKey, &InstanceId)> {
        let is_valid = |vm: &&InstanceId| {
            let agent = self.agents.get(*vm);
            agent.is_some_and(|agent| agent.revoked_at_ms.is_none())
        };
        let (key, vms) = self.vms.get_key_value(key)?;
        let mut valid = vms.iter().filter(is_valid);
        let vm = valid.next()?;
        valid.next().is_none().then_some((key, vm))
    }

    /// Whether the agent of another VM has this key or had it. Former keys have no index: enrolments are rare, and looking
    /// through 100,000 agents takes milliseconds.
    pub(super) fn is_of_another_vm(&self, key: &AgentKey, instance_id: &InstanceId) -> bool {
        let mut holders = self.vms.get(key).into_iter().flatten();
        let mut all = self.agents.iter();
        holders.any(|vm| vm != instance_id)
            || all.any(|(vm, agent)| vm != instance_id && agent.former_keys.contains(key))
    }

    pub(super) fn page(&self, page: &AgentPage, scope: &Scope) -> AgentList {
        let limit = usize::from(page.limit.get());
        let after = page.after.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let agents = self
            .agents
            .range::<InstanceId, _>((after, Bound::Unbounded))
            .filter(|(instance_id, _)| scope.allows(instance_id))
            .take(limit + 1)
            .map(|(instance_id, agent)| summary(instance_id, agent));
        let (agents, more) = first_page(agents, limit);
        AgentList { agents, more }
    }

    /// The agent that was revoked first, if it may be removed.
    pub(super) fn removable(&self, now_ms: u64) -> Option<InstanceId> {
        let revoked = self
            .agents
            .iter()
            .filter_map(|(instance_id, agent)| Some((agent.revoked_at_ms?, instance_id)));
        let (revoked_at_ms, instance_id) = revoked.min()?;
        let is_old = revoked_at_ms.saturating_add(KEEP_REVOKED_MS) <= now_ms;
        is_old.then(|| instance_id.clone())
    }

    /// Replaces the record of a VM. Keys that are no longer valid for their VM are passed on, so that their connections end.
    fn set(&mut self, instance_id: InstanceId, agent: Option<AgentRecord>) {
        let old = self.agents.get(&instance_id).map(|agent| agent.key.clone());
        let new = agent.as_ref().map(|agent| agent.public_key.clone());
        let new = new.filter(|new| old.as_ref() != Some(new));
        let with_vm = |key: AgentKey| {
            let vm = self.valid_vm(&key).cloned();
            vm.map(|vm| (key, vm))
        };
        let valid: Vec<_> = old.into_iter().chain(new).filter_map(with_vm).collect();
        self.remove(&instance_id);
        if let Some(agent) = agent {
            match self.vms.entry(agent.public_key.clone()) {
                Slot::Vacant(slot) => {
                    slot.insert(vec![instance_id.clone()]);
                }
                Slot::Occupied(mut slot) => {
                    warn!(%instance_id, others = ?slot.get(), "several VMs have the same key; it is valid only if all but one were revoked");
                    slot.get_mut().push(instance_id.clone());
                }
            }
            self.agents.insert(instance_id, agent.into());
        }
        for (key, vm) in valid {
            if self.valid_vm(&key) != Some(&vm) {
                self.checks.request(key);
            }
        }
    }

    fn remove(&mut self, instance_id: &InstanceId) {
        let Some(agent) = self.agents.remove(instance_id) else {
            return;
        };
        if let Slot::Occupied(mut vms) = self.vms.entry(agent.key) {
            vms.get_mut().retain(|vm| vm != instance_id);
            if vms.get().is_empty() {
                vms.remove();
            }
        }
    }
}

impl Table for AgentTable {
    fn emptied(&self) -> Self {
        Self::new(self.checks.clone())
    }

    fn apply(&mut self, entry: &Entry) {
        let Ok(instance_id) = entry.key.parse::<InstanceId>() else {
            warn!(
                key = entry.key,
                "ignored a key of the KV bucket of agents that is not an instance id"
            );
            return;
        };
        self.set(
            instance_id,
            bucket::decode(AGENT_BUCKET, Some(entry)).into_option(),
        );
    }
}

fn summary(instance_id: &InstanceId, agent: &Agent) -> AgentSummary {
    AgentSummary {
        instance_id: instance_id.clone(),
        public_key: agent.key.clone(),
        join_token: agent.join_token.clone(),
        enrolled_at_ms: agent.enrolled_at_ms,
        source: agent.source.as_deref().map(str::to_owned),
        revoked_at_ms: agent.revoked_at_ms,
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::metrics::Limit;

    use super::*;

    fn key(name: &str) -> AgentKey {
        format!("U{name:A>55}").parse().unwrap()
    }

    fn agent(name: &str, revoked_at_ms: Option<u64>) -> AgentRecord {
        AgentRecord {
            public_key: key(name),
            join_token: "0000000000000000".parse().unwrap(),
            enrolled_at_ms: 0,
            source: None,
            platform: None,
            revoked_at_ms,
            former_keys: Vec::new(),
        }
    }

    /// Agents whose keys are named like their VMs.
    fn table(agents: &[(&str, Option<u64>)]) -> AgentTable {
        let mut table = AgentTable::new(Checks::new().0);
        for (vm, revoked_at_ms) in agents {
            table.set(vm.parse().unwrap(), Some(agent(vm, *revoked_at_ms)));
        }
        table
    }

    #[test]
    fn only_agents_revoked_long_ago_may_be_removed() {
        let agents = table(&[("A", None), ("B", Some(2000)), ("C", Some(1000))]);
        assert_eq!(agents.removable(KEEP_REVOKED_MS + 999), None);
        let oldest = agents.removable(KEEP_REVOKED_MS + 1000);
        assert_eq!(oldest, Some("C".parse().unwrap()));
        assert_eq!(table(&[("A", None)]).removable(u64::MAX), None);
    }

    #[test]
    fn revoked_and_replaced_keys_become_invalid_and_are_checked() {
        let (checks, mut queue) = Checks::new();
        let mut table = AgentTable::new(checks);
        let [one, other]: [InstanceId; 2] = ["one", "other"].map(|id| id.parse().unwrap());
        table.set(one.clone(), Some(agent("A", None)));
        table.set(one.clone(), Some(agent("A", None)));
        assert_eq!(table.valid_vm(&key("A")), Some(&one));
        assert!(queue.keys.try_recv().is_err(), "an unchanged key is not checked");

        table.set(one.clone(), Some(agent("B", None)));
        assert_eq!(table.valid_vm(&key("A")), None);
        assert_eq!(table.valid_vm(&key("B")), Some(&one));
        assert_eq!(queue.keys.try_recv(), Ok(key("A")));
        table.set(one.clone(), Some(agent("B", Some(1))));
        assert_eq!(table.valid_vm(&key("B")), None);
        assert_eq!(queue.keys.try_recv(), Ok(key("B")));
        table.set(one.clone(), None);
        assert!(
            queue.keys.try_recv().is_err(),
            "an invalid key is not checked again"
        );

        // Whatever the order in which the records arrive, a key of two VMs is valid only if one of them was revoked.
        table.set(one.clone(), Some(agent("A", None)));
        table.set(other.clone(), Some(agent("A", None)));
        assert_eq!(table.valid_vm(&key("A")), None);
        assert_eq!(queue.keys.try_recv(), Ok(key("A")));
        table.set(one.clone(), Some(agent("A", Some(1))));
        assert_eq!(table.valid_vm(&key("A")), Some(&other));
        table.set(one, None);
        assert_eq!(table.valid_vm(&key("A")), Some(&other));
    }

    #[test]
    fn page_has_only_agents_in_the_scope() {
        let agents = table(&[("A", None), ("B", None)]);
        let page = AgentPage {
            after: None,
            limit: Limit::default(),
        };
        assert_eq!(agents.page(&page, &Scope::All).agents.len(), 2);
        let only = Scope::Only(vec!["B".parse().unwrap()]);
        assert_eq!(agents.page(&page, &only).agents.len(), 1);
        assert!(agents.page(&page, &Scope::Unknown).agents.is_empty());
    }

    #[test]
    fn former_keys_belong_to_their_vm() {
        let mut agents = table(&[("A", None)]);
        let replaced = AgentRecord {
            former_keys: vec![key("FORMER")],
            ..agent("B", None)
        };
        let [one, other]: [InstanceId; 2] = ["B", "A"].map(|id| id.parse().unwrap());
        agents.set(one.clone(), Some(replaced));
        for name in ["B", "FORMER"] {
            assert!(agents.is_of_another_vm(&key(name), &other), "{name}");
            assert!(!agents.is_of_another_vm(&key(name), &one), "{name}");
        }
        assert!(!agents.is_of_another_vm(&key("NEW"), &other));
        assert_eq!(agents.valid_vm(&key("FORMER")), None);
    }
}
