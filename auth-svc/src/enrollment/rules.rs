//! The rules of enrolment: what the records of a join token and of a VM's agent allow.

use vmwatch_api::{
    InstanceId,
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
        "the key of this agent was revoked; delete the agent's identity, so that it enrols with a new key"
    )]
    KeyRevoked,
    #[error("the VM {0} has an agent; revoke that agent, or use a join token that may replace it")]
    HasAgent(InstanceId),
    #[error(
        "this key belongs to the agent of another VM; delete the agent's identity, so that it enrols with a new key"
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

/// Decides on the enrolment of a VM with a key, with a token whose secret is right. `has_use` says whether this request has
/// already taken a use.
pub(super) fn decide(
    (id, token): (&JoinTokenId, &JoinTokenRecord),
    agent: Found<'_>,
    wanted: &JoinTokenUse,
    has_use: bool,
    now_ms: u64,
) -> Result<Decision, Refusal> {
    if let Found::Agent(agent) = agent
        && agent.public_key == wanted.public_key
    {
        if agent.revoked_at_ms.is_some() {
            return Err(Refusal::KeyRevoked);
        }
        // This succeeds even if the token has expired meanwhile: the answer to the first request may have been lost.
        if agent.join_token == *id {
            return Ok(Decision::Repeated);
        }
    }
    let use_taken = has_use || token.last_use.as_ref() == Some(wanted);
    if token.revoked {
        return Err(Refusal::TokenRevoked);
    }
    if now_ms >= token.expires_at_ms {
        return Err(Refusal::TokenExpired);
    }
    if !token.vms.allows(&wanted.instance_id) {
        return Err(Refusal::OtherVm(wanted.instance_id.clone()));
    }
    if token.used >= token.uses && !use_taken {
        return Err(Refusal::TokenUsedUp);
    }
    let has_agent = match agent {
        Found::Nothing => false,
        Found::Unreadable => true,
        Found::Agent(agent) => agent.revoked_at_ms.is_none() && agent.public_key != wanted.public_key,
    };
    if has_agent && !token.replace {
        return Err(Refusal::HasAgent(wanted.instance_id.clone()));
    }
    Ok(if use_taken {
        Decision::UseTaken
    } else {
        Decision::TakeUse
    })
}
