//! Enrolled agents in a JetStream KV bucket, and a copy of them in memory. Only auth-svc writes to the bucket.

mod table;

use std::time::Duration;

use async_nats::jetstream::{kv::Entry, stream::Config};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    InstanceId, Scope,
    enrollment::{AGENT_BUCKET, AgentKey, AgentList, AgentPage, AgentRecord},
    time::unix_millis,
};
use vmwatch_bus::{Bus, follow::Follower, provision::ProvisionError};

pub(crate) use self::table::AgentTable;

use crate::{
    AuthError,
    bucket::{self, Bucket, Kept, Spec, TRIES, Value},
    callout::Checks,
    enrollment::Refusal,
};

/// Maximum number of stored agents, including revoked ones.
pub(crate) const MAX_AGENTS: usize = 100_000;
/// Size limit of the KV bucket. An agent needs at most 600 bytes there, and 60 for each former key, of which most VMs have at
/// most one; the rest is for deletion markers.
const BUCKET_BYTES: i64 = 96 << 20;
/// Time without confirmation after which the copy in memory is stale. A replica that cannot read the bucket may let in an
/// agent for this long after its revocation; it ends the connection once it can read the bucket.
const STALE_AFTER: Duration = Duration::from_secs(10);

pub(crate) struct Agents {
    bucket: Bucket,
    table: Follower<AgentTable>,
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

    /// Refuses a key that the agent of another VM has or had: a key must say which VM its agent is in.
    pub(crate) async fn check_key(&self, instance_id: &InstanceId, key: &AgentKey) -> Result<(), AuthError> {
        let is_foreign = |table: &AgentTable| table.is_of_another_vm(key, instance_id).then_some(());
        match self.table.find(is_foreign).await? {
            Some(()) => Err(Refusal::KeyInUse.into()),
            None => Ok(()),
        }
    }

    /// Makes room for one more agent: at the maximum, the agent that was revoked first is removed.
    pub(crate) async fn make_room(&self) -> Result<(), AuthError> {
        let removable = {
            let table = self.table.read();
            if table.len() < MAX_AGENTS {
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
                if self.table.read().contains(instance_id) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revoking_an_agent_preserves_fields_of_newer_version() {
        bucket::assert_matches_golden::<AgentRecord>(include_str!("../../tests/golden/forms/agent.json"));
    }
}
