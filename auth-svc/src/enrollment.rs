//! Join tokens and the enrolment of agents. The methods on the bus and the command line share this code.
//!
//! An enrolment writes two records: first the token's, which then has one use less, then the agent's. Both are written
//! only if they have not changed since they were read, so that of two agents only one gets the last use. The token's
//! record names the agent that took the latest use, and the revision of the VM's agent record at that time. If the second
//! write fails, or the program is killed between the two, the agent repeats its request and needs no further use. Only if
//! other agents used the token or the VM's record changed meanwhile is that use lost, and the repetition takes another one.
//!
//! The record of a VM's agent lists the keys that the VM had before. None of them comes back, whichever token is used.

mod rules;

use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Method, Scope,
    audit::AuditResult,
    enrollment::{
        AgentKey, AgentRecord, AgentRef, AgentsEnroll, AgentsRevoke, CreatedJoinToken, Enrollment as Request,
        JoinTokenId, JoinTokenRecord, JoinTokenRef, JoinTokenUse, JoinTokensCreate, JoinTokensRevoke,
        NewJoinToken, SecretText,
    },
    time::unix_millis,
    users::Done,
};
use vmwatch_bus::{Bus, Context, audit::Audit, follow::Follower, provision::ProvisionError};

pub(crate) use self::rules::Refusal;
use self::rules::{Decision, Found, Token, decide};
use crate::{
    AuthError,
    agents::{AgentTable, Agents},
    audit,
    bucket::{Kept, TRIES, Value},
    callout::Checks,
    join_tokens::{JoinTokens, generate},
};

/// Join tokens, and the agents that enrolled with them.
pub(crate) struct Enrollment {
    pub(crate) tokens: JoinTokens,
    pub(crate) agents: Agents,
}

/// A successful enrolment.
#[derive(Debug)]
pub(crate) enum Registered {
    /// The agent is new. The key that it replaced is no longer valid.
    New { replaced: Option<AgentKey> },
    /// The agent was enrolled before, by the same request.
    Repeated,
}

/// A request to enrol, with a token whose secret is right, and what its tries have done so far.
pub(crate) struct Registration<'a> {
    audit: &'a Audit,
    context: &'a Context,
    id: &'a JoinTokenId,
    /// The VMs that the token's creator may enrol; `None` if the creator is no longer an administrator.
    scope: Option<Scope>,
    request: &'a Request,
    announced: bool,
    taken: bool,
}

impl<'a> Registration<'a> {
    pub(crate) const fn new(
        audit: &'a Audit,
        context: &'a Context,
        id: &'a JoinTokenId,
        scope: Option<Scope>,
        request: &'a Request,
    ) -> Self {
        Self {
            audit,
            context,
            id,
            scope,
            request,
            announced: false,
            taken: false,
        }
    }

    /// Writes the audit record that announces the use, once for all tries.
    async fn announce(&mut self, token: &JoinTokenRecord) -> Result<(), AuthError> {
        if self.announced {
            return Ok(());
        }
        let entry = audit::Entry {
            action: AgentsEnroll::INFO,
            user: &token.created_by,
            target: Some(self.request.instance_id.as_str()),
            result: AuditResult::Requested,
            detail: format!("join token {}", self.id),
            once: None,
        };
        let (record, once) = entry.record(self.context);
        let announced = self.audit.begin(&record, &once).await;
        announced.map_err(AuthError::NotAudited)?;
        self.announced = true;
        Ok(())
    }
}

impl Enrollment {
    /// Creates the KV buckets if they are missing.
    pub(crate) async fn ensure_buckets(bus: &Bus, replicas: usize) -> Result<(), ProvisionError> {
        JoinTokens::ensure_bucket(bus, replicas).await?;
        Agents::ensure_bucket(bus, replicas).await
    }

    /// Starts following the KV buckets until shutdown. Keys of agents that become invalid are passed to `checks`.
    pub(crate) fn follow(bus: &Bus, shutdown: &CancellationToken, checks: Checks) -> Self {
        Self {
            tokens: JoinTokens::follow(bus, shutdown),
            agents: Agents::follow(bus, shutdown, checks),
        }
    }

    /// The copy of the KV bucket of agents.
    pub(crate) fn agents(&self) -> Follower<AgentTable> {
        self.agents.table()
    }

    /// Waits until all join tokens and agents have been read.
    pub(crate) async fn filled(&self) {
        self.tokens.filled().await;
        self.agents.filled().await;
    }

    /// Creates a join token for the user of the context, or for a command; the audit records it first.
    pub(crate) async fn create_token(
        &self,
        audit: &Audit,
        context: &Context,
        new: NewJoinToken,
        by_command: bool,
    ) -> Result<CreatedJoinToken, AuthError> {
        let (token, record) = generate(new, context.user(), by_command)?;
        let creating = async {
            let summary = self.tokens.create(&token, record).await?;
            Ok(CreatedJoinToken {
                token: SecretText::new(&token),
                summary,
            })
        };
        audit::announced(
            audit,
            context,
            JoinTokensCreate::INFO,
            token.id.as_str(),
            creating,
        )
        .await
    }

    /// Revokes a join token; the audit records it first. Agents that have used the token stay enrolled.
    pub(crate) async fn revoke_token(
        &self,
        audit: &Audit,
        context: &Context,
        JoinTokenRef { id }: &JoinTokenRef,
    ) -> Result<Done, AuthError> {
        let revoking = async { self.tokens.revoke(id).await.map(|()| Done {}) };
        audit::announced(audit, context, JoinTokensRevoke::INFO, id.as_str(), revoking).await
    }

    /// Revokes the key of a VM's agent; the audit records it first. Returns the key.
    pub(crate) async fn revoke_agent(
        &self,
        audit: &Audit,
        context: &Context,
        AgentRef { instance_id }: &AgentRef,
    ) -> Result<AgentKey, AuthError> {
        let revoking = self.agents.revoke(instance_id);
        audit::announced(audit, context, AgentsRevoke::INFO, instance_id.as_str(), revoking).await
    }

    /// Enrols an agent with a token whose secret is right; the audit records it first, unless nothing changes.
    pub(crate) async fn register(&self, mut new: Registration<'_>) -> Result<Registered, AuthError> {
        let request = new.request;
        self.agents
            .check_key(&request.instance_id, &request.public_key)
            .await?;
        for _ in 0..TRIES {
            if let Some(registered) = self.try_register(&mut new).await? {
                return Ok(registered);
            }
        }
        Err(AuthError::Contended)
    }

    /// Returns `None` if one of the records was changed by another request after it was read.
    async fn try_register(&self, new: &mut Registration<'_>) -> Result<Option<Registered>, AuthError> {
        let (id, request) = (new.id, new.request);
        let reads = tokio::try_join!(self.tokens.entry(id), self.agents.entry(&request.instance_id));
        let (token_entry, agent_entry) = reads?;
        let Value::Whole(mut token) = self.tokens.decode(token_entry.as_ref()) else {
            // The token was removed meanwhile, or this NATS server does not have the new token yet.
            return Ok(None);
        };
        let held = self.agents.decode(agent_entry.as_ref());
        let found = match &held {
            Value::Nothing => Found::Nothing,
            Value::Broken => Found::Unreadable,
            Value::Whole(agent) => Found::Agent(&agent.known),
        };
        let wanted = JoinTokenUse {
            instance_id: request.instance_id.clone(),
            public_key: request.public_key.clone(),
            agent_revision: match (&agent_entry, &held) {
                (Some(entry), Value::Whole(_) | Value::Broken) => entry.revision,
                // Deletion markers do not count, because NATS deletes them at any time.
                _ => 0,
            },
        };
        let known = Token {
            id,
            record: &token.known,
            scope: new.scope.as_ref(),
        };
        let decision = decide(known, found, &wanted, new.taken, unix_millis())?;
        if decision == Decision::Repeated {
            return Ok(Some(Registered::Repeated));
        }
        if matches!(found, Found::Nothing) {
            self.agents.make_room().await?;
        }
        // This is after the last reason for a refusal, because clients can repeat refused requests without limit.
        new.announce(&token.known).await?;
        if decision == Decision::TakeUse {
            token.known.used = token.known.used.saturating_add(1);
            token.known.last_use = Some(wanted);
            if !self.tokens.replace(id, &token, token_entry.as_ref()).await? {
                return Ok(None);
            }
            new.taken = true;
        }
        let agent = Kept::new(AgentRecord {
            public_key: request.public_key.clone(),
            join_token: id.clone(),
            enrolled_at_ms: unix_millis(),
            source: new.context.source.clone(),
            platform: request.platform.clone(),
            revoked_at_ms: None,
            former_keys: match found {
                Found::Agent(old) => old.keys_before(&request.public_key),
                Found::Nothing | Found::Unreadable => Vec::new(),
            },
        });
        let written = self
            .agents
            .write(&request.instance_id, &agent, agent_entry.as_ref())
            .await?;
        let replaced = match found {
            Found::Agent(old) if old.public_key != request.public_key && old.revoked_at_ms.is_none() => {
                Some(old.public_key.clone())
            }
            _ => None,
        };
        Ok(written.then_some(Registered::New { replaced }))
    }
}
