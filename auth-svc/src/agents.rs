//! Enrolled agents in a JetStream KV bucket, and a copy of them in memory. Only auth-svc writes to the bucket.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use async_nats::jetstream::{kv::Entry, stream::Config};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{
    InstanceId, Scope,
    enrollment::{AGENT_BUCKET, AgentKey, AgentList, AgentPage, AgentRecord, AgentSummary, MAX_JOIN_SECONDS},
    first_page,
    time::unix_millis,
};
use vmwatch_bus::{
    Bus,
    follow::{Follower, Table},
    provision::ProvisionError,
};

use crate::{
    AuthError,
    bucket::{self, Bucket, Kept, Spec, TRIES, Value},
    callout::Checks,
    enrollment::Refusal,
};

/// Maximum number of stored agents, including revoked ones.
pub(crate) const MAX_AGENTS: usize = 100_000;
/// Size limit of the KV bucket: an agent needs at most 600 bytes there; the rest is for deletion markers.
const BUCKET_BYTES: i64 = 96 << 20;
/// Time for which a revoked agent is kept at least. All join tokens that it may have used have expired then, so its key
/// cannot be enrolled again by repeating a request.
const KEEP_REVOKED_MS: u64 = MAX_JOIN_SECONDS as u64 * 1000;
/// Time without confirmation after which the copy in memory is stale. A replica that cannot read the bucket may let in an
/// agent for this long after its revocation; it ends the connection once it can read the bucket.
const STALE_AFTER: Duration = Duration::from_secs(10);

pub(crate) struct Agents {
    bucket: Bucket,
    table: Follower<AgentTable>,
}

/// The agents in the KV bucket, at most [`MAX_AGENTS`].
#[derive(Debug)]
pub(crate) struct AgentTable {
    agents: BTreeMap<InstanceId, Arc<AgentRecord>>,
    /// The VMs of each key, even if it was revoked. Enrolment refuses a second VM, but two concurrent enrolments may overtake
    /// its check.
    vms: HashMap<AgentKey, Vec<InstanceId>>,
    /// Takes keys that are no longer valid.
    checks: Checks,
}

impl AgentTable {
    fn new(checks: Checks) -> Self {
        Self {
            agents: BTreeMap::new(),
            vms: HashMap::new(),
            checks,
        }
    }

    /// The VM whose agent may log in with this key; `None` if the key is unknown, was revoked, or is that of two VMs.
    pub(crate) fn valid_vm(&self, key: &AgentKey) -> Option<&InstanceId> {
        let is_valid = |vm: &&InstanceId| {
            let agent = self.agents.get(*vm);
            agent.is_some_and(|agent| agent.revoked_at_ms.is_none())
        };
        let mut valid = self.vms.get(key)?.iter().filter(is_valid);
        let vm = valid.next()?;
        valid.next().is_none().then_some(vm)
    }

    fn page(&self, page: &AgentPage, scope: &Scope) -> AgentList {
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
    fn removable(&self, now_ms: u64) -> Option<InstanceId> {
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
        let old = self
            .agents
            .get(&instance_id)
            .map(|agent| agent.public_key.clone());
        let new = agent.as_ref().map(|agent| agent.public_key.clone());
        let new = new.filter(|new| old.as_ref() != Some(new));
        let with_vm = |key: AgentKey| {
            let vm = self.valid_vm(&key).cloned();
            vm.map(|vm| (key, vm))
        };
        let valid: Vec<_> = old.into_iter().chain(new).filter_map(with_vm).collect();
        self.remove(&instance_id);
        if let Some(agent) = agent {
            let vms = self.vms.entry(agent.public_key.clone()).or_default();
            if let Some(other) = vms.first() {
                warn!(%instance_id, %other, "two VMs have the same key; it is valid for neither unless one of them was revoked");
            }
            vms.push(instance_id.clone());
            self.agents.insert(instance_id, Arc::new(agent));
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
        if let hash_map::Entry::Occupied(mut vms) = self.vms.entry(agent.public_key.clone()) {
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

impl Agents {
    /// The configuration of the KV bucket of agents.
    pub(crate) fn bucket(replicas: usize) -> Config {
        let spec = Spec {
            name: AGENT_BUCKET,
            description: "enrolled agents and their public keys",
            // The bucket has no age limit, because an agent's record must exist as long as the agent.
            max_age: Duration::ZERO,
            max_bytes: BUCKET_BYTES,
            replicas,
        };
        bucket::with_marker_ttl(spec)
    }

    /// Creates the KV bucket if it is missing.
    pub(crate) async fn ensure_bucket(bus: &Bus, replicas: usize) -> Result<(), ProvisionError> {
        bucket::ensure(bus, &Self::bucket(replicas)).await
    }

    /// Starts following the KV bucket until shutdown. Keys that become invalid are passed to `checks`.
    pub(crate) fn follow(bus: &Bus, shutdown: &CancellationToken, checks: Checks) -> Self {
        let table = AgentTable::new(checks);
        Self {
            bucket: Bucket::existing(bus, AGENT_BUCKET),
            table: Follower::start(bus, AGENT_BUCKET, STALE_AFTER, table, shutdown.clone()),
        }
    }

    /// The copy of the KV bucket.
    pub(crate) fn table(&self) -> Follower<AgentTable> {
        self.table.clone()
    }

    /// Waits until all agents have been read.
    pub(crate) async fn filled(&self) {
        self.table.filled().await;
    }

    /// A page of the agents whose VMs are in the scope, sorted by instance id.
    pub(crate) async fn list(&self, page: &AgentPage, scope: &Scope) -> Result<AgentList, AuthError> {
        self.table.catch_up().await?;
        Ok(self.table.read().page(page, scope))
    }

    /// Refuses a key that belongs to the agent of another VM: a key must say which VM its agent is in.
    pub(crate) async fn check_key(&self, instance_id: &InstanceId, key: &AgentKey) -> Result<(), AuthError> {
        let vms = self.table.find(|table| table.vms.get(key).cloned()).await?;
        if vms.is_some_and(|vms| vms.iter().any(|vm| vm != instance_id)) {
            return Err(Refusal::KeyInUse.into());
        }
        Ok(())
    }

    /// Makes room for one more agent: at the maximum, the agent that was revoked first is removed.
    pub(crate) async fn make_room(&self) -> Result<(), AuthError> {
        let removable = {
            let table = self.table.read();
            if table.agents.len() < MAX_AGENTS {
                return Ok(());
            }
            table.removable(unix_millis())
        };
        let removable = removable.ok_or(Refusal::TooManyAgents)?;
        let entry = self.entry(&removable).await?;
        if let (Some(entry), Value::Whole(agent)) = (&entry, self.decode(entry.as_ref()))
            && agent.known.revoked_at_ms.is_some()
        {
            // If the record changed meanwhile, the VM has a new agent. The bucket may then hold one agent more.
            self.bucket.delete_read_with_ttl(entry).await?;
        }
        Ok(())
    }

    /// Reads the latest entry of a VM's agent.
    pub(crate) async fn entry(&self, instance_id: &InstanceId) -> Result<Option<Entry>, AuthError> {
        self.bucket.entry(instance_id.as_str()).await
    }

    pub(crate) fn decode(&self, entry: Option<&Entry>) -> Value<Kept<AgentRecord>> {
        self.bucket.decode(entry)
    }

    /// Writes an agent's record only if it is unchanged since `read`. Returns false if it was changed in between.
    pub(crate) async fn write(
        &self,
        instance_id: &InstanceId,
        agent: &Kept<AgentRecord>,
        read: Option<&Entry>,
    ) -> Result<bool, AuthError> {
        let value = serde_json::to_vec(agent)?;
        self.bucket.write_over(instance_id.as_str(), value, read).await
    }

    /// Marks the key of a VM's agent as revoked. Succeeds as well if it is revoked already. Every replica follows the
    /// bucket, so that this write alone makes the key invalid for new connections. A revoked record is written again, because
    /// only the write proves that the record which was read is the latest: the NATS server that was asked may be behind, and
    /// the VM may have a new agent.
    pub(crate) async fn revoke(&self, instance_id: &InstanceId) -> Result<AgentKey, AuthError> {
        for _ in 0..TRIES {
            let entry = self.entry(instance_id).await?;
            let Value::Whole(mut agent) = self.decode(entry.as_ref()) else {
                // The NATS server that was asked may not have the record of a new agent yet.
                self.table.catch_up().await?;
                if self.table.read().agents.contains_key(instance_id) {
                    continue;
                }
                return Err(AuthError::NoSuchAgent);
            };
            agent.known.revoked_at_ms.get_or_insert_with(unix_millis);
            if self.write(instance_id, &agent, entry.as_ref()).await? {
                return Ok(agent.known.public_key);
            }
        }
        Err(AuthError::Contended)
    }
}

fn summary(instance_id: &InstanceId, agent: &AgentRecord) -> AgentSummary {
    AgentSummary {
        instance_id: instance_id.clone(),
        public_key: agent.public_key.clone(),
        join_token: agent.join_token.clone(),
        enrolled_at_ms: agent.enrolled_at_ms,
        source: agent.source.clone(),
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
    fn revoking_an_agent_preserves_fields_of_newer_version() {
        bucket::assert_matches_golden::<AgentRecord>(include_str!("../../tests/golden/forms/agent.json"));
    }
}
