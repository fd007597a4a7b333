//! The rules of enrolment: what the records of a join token and of a VM's agent allow.

use vmwatch_api::{
    InstanceId, Scope,
    enrollment::{AgentRecord, JoinTokenId, JoinTokenRecord, JoinTokenUse},
    wire::FaultKind,
};

use crate::agents::MAX_AGENTS;

/// The reason why an agent was not enrolled. Only callers with the right secret get another one than
/// [`Refusal::WrongToken`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The token is malformed, unknown, or has another secret.
    #[error("the join token is not valid; check that it is complete, or create a new one")]
    WrongToken,
    #[error("the join token was revoked; create a new one")]
    TokenRevoked,
    #[error("the join token has expired; create a new one")]
    TokenExpired,
    #[error("the join token is used up; create a new one")]
    TokenUsedUp,
    #[error("the join token is not for the VM {0}; create one that is")]
    OtherVm(InstanceId),
    #[error(
        "the creator of the join token, {0}, is no longer an administrator; ask an administrator for a new one"
    )]
    CreatorGone(String),
    #[error("the VM {0} is not one of those that the creator of the join token may see")]
    OutsideScope(InstanceId),
    /// The key of the VM's agent was revoked, or is a former one.
    #[error(
        "the key of this agent was revoked or replaced; delete the agent's identity, so that it enrols with a new key"
    )]
    KeyRevoked,
    #[error("the VM {0} has an agent; revoke that agent, or use a join token that may replace it")]
    HasAgent(InstanceId),
    #[error(
        "this key belongs or belonged to the agent of another VM; delete the agent's identity, so that it enrols with a new key"
    )]
    KeyInUse,
    #[error(
        "the maximum of {MAX_AGENTS} agents is reached; revoke agents of VMs that no longer exist, which are removed 90 days later"
    )]
    TooManyAgents,
}

impl Refusal {
    pub(crate) const fn kind(&self) -> FaultKind {
        match self {
            Self::WrongToken => FaultKind::Unauthenticated,
            Self::TokenRevoked
            | Self::TokenExpired
            | Self::TokenUsedUp
            | Self::OtherVm(_)
            | Self::CreatorGone(_)
            | Self::OutsideScope(_)
            | Self::KeyRevoked => FaultKind::Forbidden,
            Self::HasAgent(_) | Self::KeyInUse | Self::TooManyAgents => FaultKind::Conflict,
        }
    }
}

/// What to do for an enrolment that is not refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// The agent was enrolled before, by the same request.
    Repeated,
    /// Take a use of the token, then store the agent.
    TakeUse,
    /// Store the agent: an earlier attempt took the use and did not store the agent, and the VM's record is unchanged since.
    UseTaken,
}

/// The agent of a VM, as far as its record could be decoded.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found<'a> {
    Nothing,
    Unreadable,
    Agent(&'a AgentRecord),
}

/// A join token as it is now, whose secret the caller has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'a> {
    pub(super) id: &'a JoinTokenId,
    pub(super) record: &'a JoinTokenRecord,
    /// The VMs that the token's creator may enrol; `None` if the creator is no longer an administrator.
    pub(super) scope: Option<&'a Scope>,
}

/// Decides on the enrolment of a VM with a key. `has_use` says whether this request has already taken a use of the token.
pub(super) fn decide(
    Token { id, record, scope }: Token<'_>,
    agent: Found<'_>,
    wanted: &JoinTokenUse,
    has_use: bool,
    now_ms: u64,
) -> Result<Decision, Refusal> {
    if let Found::Agent(agent) = agent {
        let has_key = agent.public_key == wanted.public_key;
        if agent.former_keys.contains(&wanted.public_key) || has_key && agent.revoked_at_ms.is_some() {
            return Err(Refusal::KeyRevoked);
        }
        // This succeeds even if the token has expired meanwhile: the answer to the first request may have been lost.
        if has_key && agent.join_token == *id {
            return Ok(Decision::Repeated);
        }
    }
    check_token(record, scope, &wanted.instance_id, now_ms)?;
    let use_taken = has_use || record.last_use.as_ref() == Some(wanted);
    if record.used >= record.uses && !use_taken {
        return Err(Refusal::TokenUsedUp);
    }
    let has_agent = match agent {
        Found::Nothing => false,
        Found::Unreadable => true,
        Found::Agent(agent) => agent.revoked_at_ms.is_none() && agent.public_key != wanted.public_key,
    };
    if has_agent && !record.replace {
        return Err(Refusal::HasAgent(wanted.instance_id.clone()));
    }
    Ok(if use_taken {
        Decision::UseTaken
    } else {
        Decision::TakeUse
    })
}

/// Checks everything about the token but its uses.
fn check_token(
    token: &JoinTokenRecord,
    scope: Option<&Scope>,
    instance_id: &InstanceId,
    now_ms: u64,
) -> Result<(), Refusal> {
    if token.revoked {
        return Err(Refusal::TokenRevoked);
    }
    if now_ms >= token.expires_at_ms {
        return Err(Refusal::TokenExpired);
    }
    let Some(scope) = scope else {
        return Err(Refusal::CreatorGone(token.created_by.clone()));
    };
    if !token.vms.allows(instance_id) {
        return Err(Refusal::OtherVm(instance_id.clone()));
    }
    if !scope.allows(instance_id) {
        return Err(Refusal::OutsideScope(instance_id.clone()));
    }
    Ok(())
}
