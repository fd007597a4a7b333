//! The handlers of the methods for join tokens and agents.

use std::sync::Arc;

use nkeys::{KeyPair, KeyPairType};
use tracing::info;
use vmwatch_api::{
    Method, Role, Scope, UserKey,
    audit::AuditResult,
    enrollment::{
        AgentKey, AgentList, AgentPage, AgentRef, AgentsEnroll, CreatedJoinToken, Enrolled, Enrollment,
        JoinToken, JoinTokenId, JoinTokenList, JoinTokenRecord, JoinTokenRef, JoinVms, NewJoinToken,
    },
    sessions::Own,
    users::Done,
};
use vmwatch_bus::Context;

use crate::{
    Auth, AuthError,
    audit::{self, Entry},
    enrollment::{Refusal, Registered, Registration},
    join_tokens::has_secret_of,
    store,
    throttle::{Attempt, network},
};

/// A join token with the record of its id. Its secret may be wrong.
type Known = (JoinToken, Arc<JoinTokenRecord>);

/// A join token whose secret is right.
struct Verified {
    id: JoinTokenId,
    record: Arc<JoinTokenRecord>,
}

impl Auth {
    pub(crate) async fn create_join_token(
        self: Arc<Self>,
        context: Context,
        new: NewJoinToken,
    ) -> Result<CreatedJoinToken, AuthError> {
        let scope = scope_of(&context);
        if let JoinVms::Only(vms) = &new.vms
            && let Some(outside) = vms.iter().find(|vm| !scope.allows(vm))
        {
            return Err(Refusal::OutsideScope(outside.clone()).into());
        }
        let creating = self.enrollment.create_token(&self.audit, &context, new, false);
        creating.await
    }

    pub(crate) async fn list_join_tokens(
        self: Arc<Self>,
        _: Context,
        _: Own,
    ) -> Result<JoinTokenList, AuthError> {
        let tokens = self.enrollment.tokens.list().await?;
        Ok(JoinTokenList { tokens })
    }

    pub(crate) async fn revoke_join_token(
        self: Arc<Self>,
        context: Context,
        token: JoinTokenRef,
    ) -> Result<Done, AuthError> {
        self.enrollment.revoke_token(&self.audit, &context, &token).await
    }

    pub(crate) async fn list_agents(
        self: Arc<Self>,
        context: Context,
        page: AgentPage,
    ) -> Result<AgentList, AuthError> {
        self.enrollment.agents.list(&page, &scope_of(&context)).await
    }

    pub(crate) async fn revoke_agent(
        self: Arc<Self>,
        context: Context,
        agent: AgentRef,
    ) -> Result<Done, AuthError> {
        let key = self
            .enrollment
            .revoke_agent(&self.audit, &context, &agent)
            .await?;
        info!(instance_id = %agent.instance_id, %key, "revoked the key of an agent");
        Ok(Done {})
    }

    /// Registers the public key of an agent that has a valid join token.
    pub(crate) async fn enroll(
        self: Arc<Self>,
        context: Context,
        request: Enrollment,
    ) -> Result<Enrolled, AuthError> {
        let source = context.source.as_deref().unwrap_or("-");
        let token = request.token.as_str().parse::<JoinToken>().ok();
        let found = self.known(token).await;
        let known = found.as_ref().ok().and_then(Option::as_ref);
        let attempt = Attempt::of_join_token(known.map(|(token, _)| &token.id), source);
        let verified = match found {
            Ok(known) => self.verified(&attempt, &request, known).await,
            Err(error) => Err(error),
        };
        let (verified, outcome) = match verified {
            Ok(token) => {
                let outcome = Box::pin(self.register(&context, &request, &token)).await;
                (Some(token), outcome)
            }
            Err(error) => (None, Err(error)),
        };
        self.record_enrollment(&context, &attempt, &request, verified.as_ref(), &outcome)
            .await;
        outcome?;
        self.for_agents.enrolled(request.instance_id)
    }

    async fn register(
        &self,
        context: &Context,
        request: &Enrollment,
        token: &Verified,
    ) -> Result<Registered, AuthError> {
        let scope = self.scope_of_creator(&token.record).await?;
        let new = Registration::new(&self.audit, context, &token.id, scope, request);
        self.enrollment.register(new).await
    }

    /// The VMs that the creator of a token may enrol now; `None` if the creator is no longer an administrator. A user of the
    /// same name that was created after the token is another user.
    async fn scope_of_creator(&self, token: &JoinTokenRecord) -> Result<Option<Scope>, AuthError> {
        if token.by_command {
            return Ok(Some(Scope::All));
        }
        let creator = self
            .accounts
            .users
            .find(&UserKey::from_name(&token.created_by))
            .await?;
        let is_creator =
            |user: &store::User| user.role == Role::Admin && user.created_at_ms() <= token.created_at_ms;
        Ok(creator.filter(is_creator).map(|user| user.scope))
    }

    /// A token with its record; `None` if the token is malformed or unknown.
    async fn known(&self, token: Option<JoinToken>) -> Result<Option<Known>, AuthError> {
        let Some(token) = token else {
            return Ok(None);
        };
        let record = self.enrollment.tokens.find(&token.id).await?;
        Ok(record.map(|record| (token, record)))
    }

    /// Checks everything that does not depend on the VM. Unknown tokens and tokens with a wrong secret get the same
    /// answer, and count as failures of the source address.
    async fn verified(
        &self,
        attempt: &Attempt,
        request: &Enrollment,
        known: Option<Known>,
    ) -> Result<Verified, AuthError> {
        self.for_agents.check()?;
        if !is_user_key(&request.public_key) {
            return Err(AuthError::InvalidAgentKey);
        }
        self.throttle.admit(attempt).await.map_err(|error| match error {
            AuthError::Throttled(wait) => AuthError::EnrollmentThrottled(wait),
            error => error,
        })?;
        let found = known.filter(|(token, record)| has_secret_of(token, record));
        let verified = found.map(|(token, record)| Verified { id: token.id, record });
        let Some(verified) = verified else {
            self.throttle.count_failure(attempt).await?;
            return Err(Refusal::WrongToken.into());
        };
        self.throttle.forget(attempt).await;
        Ok(verified)
    }

    /// Writes the audit record of the result of an enrolment. An agent can cause refusals and repetitions at no cost: refusals have the
    /// same limit as failed logins, and repetitions change nothing and have no record.
    async fn record_enrollment(
        &self,
        context: &Context,
        attempt: &Attempt,
        request: &Enrollment,
        token: Option<&Verified>,
        outcome: &Result<Registered, AuthError>,
    ) {
        let source = context.source.as_deref().unwrap_or("-");
        let instance_id = request.instance_id.as_str();
        let named = token
            .map(|token| format!("join token {}", token.id))
            .unwrap_or_default();
        let (result, detail) = match outcome {
            Ok(Registered::Repeated) => {
                info!(instance_id, source, "an agent repeated its enrolment");
                return;
            }
            Ok(Registered::New { replaced: None }) => (AuditResult::Succeeded, named),
            Ok(Registered::New { replaced: Some(key) }) => {
                (AuditResult::Succeeded, format!("{named}, replaced the key {key}"))
            }
            Err(error) if token.is_some() => (error.audit_result(), format!("{named}: {error}")),
            Err(error) => (error.audit_result(), error.to_string()),
        };
        info!(instance_id, source, %result, detail, "enrolment attempted");
        if result != AuditResult::Succeeded && !self.floods.enrollments.admits(&network(source)) {
            return;
        }
        let throttled = matches!(outcome, Err(AuthError::EnrollmentThrottled(_)));
        let entry = Entry {
            action: AgentsEnroll::INFO,
            user: token.map_or("", |token| &token.record.created_by),
            target: Some(instance_id),
            result,
            detail,
            // As for logins, throttled requests share one audit record.
            once: throttled.then(|| attempt.id().to_owned()),
        };
        audit::append(&self.audit, context, entry).await;
    }
}

/// The VMs that the user of a request may see.
fn scope_of(context: &Context) -> Scope {
    let principal = context.principal.as_ref();
    principal.map_or(Scope::Unknown, |principal| principal.scope.clone())
}

/// Whether the checksum of the key is right.
fn is_user_key(key: &AgentKey) -> bool {
    KeyPair::from_public_key(key.as_str()).is_ok_and(|key| key.key_pair_type() == KeyPairType::User)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_with_a_wrong_checksum_are_refused() {
        let good = KeyPair::new_user().public_key();
        assert!(is_user_key(&good.parse().unwrap()));
        let last = if good.ends_with('A') { "B" } else { "A" };
        let wrong = format!("{}{last}", &good[..55]);
        assert!(!is_user_key(&wrong.parse().unwrap()));
    }
}
