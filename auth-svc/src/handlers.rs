//! The handlers of auth-svc's methods.

mod api_tokens;
mod enrollment;

use std::sync::Arc;

use tracing::info;
use vmwatch_api::{
    Kind, Method, MethodInfo, Role, UserKey, UserName,
    audit::{AuditFilter, AuditPage, AuditResult},
    auth::{Credentials, Login, Password, Session},
    enrollment::{AgentRef, JoinTokenRef},
    first_page,
    sessions::{Own, SessionIdRef, SessionList, SessionsEnd, UsedSessions},
    time::unix_millis,
    users::{
        Done, NewUser, PasswordChange, SessionRef, User, UserChange, UserList, UserPage, UserRef, UsersAdd,
        UsersRemove, UsersSetPassword, UsersUpdate,
    },
};
use vmwatch_bus::{Context, serve::Refused};

use crate::{
    Auth, AuthError,
    audit::{self, Entry},
    mirror::record_of,
    sessions::NewSession,
    store,
    throttle::{Attempt, network},
};

/// Time in milliseconds after a password change during which the same request, with the old password, can be repeated.
const REPEATABLE_MS: u64 = 60_000;

impl Auth {
    /// Verifies user name and password, and creates a session.
    pub(crate) async fn login(
        self: Arc<Self>,
        context: Context,
        credentials: Credentials,
    ) -> Result<Session, AuthError> {
        let user = credentials.user_name.key();
        let name = self.stored_name(&credentials.user_name);
        let source = context.source.as_deref().unwrap_or("-");
        let attempt = Attempt::new(&user, source);
        let outcome = self
            .try_login(&user, &attempt, context.source.clone(), credentials.password)
            .await;
        let (result, once) = match &outcome {
            Ok(_) => (AuditResult::Succeeded, None),
            // An attacker can cause throttled logins at no cost. Throttled logins share one audit record, so that they
            // do not evict other records.
            Err(AuthError::Throttled(_)) => (AuditResult::Refused, Some(attempt.id().to_owned())),
            Err(error) => (error.audit_result(), None),
        };
        info!(user = %name, source, %result, "login attempted");
        let failed = result != AuditResult::Succeeded;
        if failed && !self.floods.logins.admits(&network(source)) {
            return outcome;
        }
        let entry = Entry {
            action: Login::INFO,
            user: &name,
            target: None,
            result,
            detail: detail(&outcome),
            once,
        };
        audit::append(&self.audit, &context, entry).await;
        outcome
    }

    /// Checks the credentials and creates the session. Unknown user names take as long as known ones.
    async fn try_login(
        &self,
        key: &UserKey,
        attempt: &Attempt,
        source: Option<String>,
        password: Password,
    ) -> Result<Session, AuthError> {
        let (users, hasher) = (&self.accounts.users, &self.accounts.hasher);
        // The throttle is checked before a hashing permit is acquired, so refused attempts occupy no permit, and
        // again afterwards, because other attempts may have failed while this one waited.
        self.throttle.admit(attempt).await?;
        let permit = hasher.login_permit().await?;
        // The time is taken before the user is read, so a later change of the user invalidates the session created
        // here.
        let read_at_ms = unix_millis();
        let (user, ()) = tokio::try_join!(users.find(key), self.throttle.admit(attempt))?;
        // A login as a service account fails like one with an unknown user name.
        let user = user.filter(|user| !user.service);
        let stored = user.as_ref().map(|user| user.password_hash.clone());
        let (right, permit) = hasher.verify(permit, password, stored).await?;
        let Some(user) = user.filter(|_| right) else {
            self.throttle.count_failure(attempt).await?;
            drop(permit);
            return Err(AuthError::WrongCredentials);
        };
        drop(permit);
        self.keep_mirrored(&user).await?;
        let new = NewSession {
            user: user.key.clone(),
            principal: user.principal(),
            // The replica that last changed the user may have a clock that is ahead of this replica's clock.
            began_at_ms: read_at_ms.max(user.sessions_not_before_ms()),
            source,
        };
        let (session, ()) = tokio::join!(self.accounts.sessions.create(new), self.throttle.forget(attempt));
        let session = session?;
        // If the clocks of replicas differ, a change made after the user was read may not invalidate this session by
        // its time. Therefore the user is read again.
        if users.find(key).await?.as_ref() != Some(&user) {
            self.accounts.sessions.end(key, &session.session_id).await?;
            return Err(AuthError::WrongCredentials);
        }
        Ok(session)
    }

    /// Propagates the user if its record in the KV bucket differs from the database; otherwise gateways would refuse
    /// the new session.
    async fn keep_mirrored(&self, user: &store::User) -> Result<(), AuthError> {
        let held = self.mirrored.read().get(&user.key.hash());
        if held.as_deref() == Some(&record_of(user)) {
            return Ok(());
        }
        match self.accounts.pass_on(&user.key).await {
            Err(AuthError::NotPassedOn(cause)) => Err(*cause),
            other => other.map(drop),
        }
    }

    /// Ends the session that a token belongs to.
    pub(crate) async fn logout(
        self: Arc<Self>,
        context: Context,
        session: SessionRef,
    ) -> Result<Done, AuthError> {
        self.accounts
            .sessions
            .end(&UserKey::from_name(context.user()), &session.session_id)
            .await?;
        Ok(Done {})
    }

    /// Lists the caller's sessions.
    pub(crate) async fn list_sessions(
        self: Arc<Self>,
        context: Context,
        _: Own,
    ) -> Result<SessionList, AuthError> {
        let key = UserKey::from_name(context.user());
        let user = self.accounts.users.find(&key).await?;
        let user = user.ok_or(AuthError::NoSuchSession)?;
        let sessions = self.accounts.sessions.valid(&key, user.sessions_not_before_ms());
        Ok(SessionList {
            sessions: sessions.await?,
        })
    }

    /// Ends one of the caller's sessions, given by its public id.
    pub(crate) async fn end_session(
        self: Arc<Self>,
        context: Context,
        session: SessionIdRef,
    ) -> Result<Done, AuthError> {
        let key = UserKey::from_name(context.user());
        let outcome = async {
            if self.accounts.sessions.end_by_id(&key, &session.id).await? {
                Ok(Done {})
            } else {
                Err(AuthError::NoSuchSession)
            }
        };
        // The audit record follows the action, so a session can be ended even while the audit is unreachable.
        let outcome = outcome.await;
        let target = Some(context.user());
        let result = outcome
            .as_ref()
            .err()
            .map_or(AuditResult::Succeeded, AuthError::audit_result);
        if result == AuditResult::Refused {
            self.record_refusal(&context, SessionsEnd::INFO, target, detail(&outcome))
                .await;
            return outcome;
        }
        let entry = Entry {
            action: SessionsEnd::INFO,
            user: context.user(),
            target,
            result,
            detail: detail(&outcome),
            once: None,
        };
        audit::append(&self.audit, &context, entry).await;
        outcome
    }

    /// Records when sessions were used, as reported by a gateway.
    pub(crate) async fn note_uses(
        self: Arc<Self>,
        _: Context,
        used: UsedSessions,
    ) -> Result<Done, AuthError> {
        self.accounts.sessions.note_uses(used.sessions).await?;
        Ok(Done {})
    }

    pub(crate) async fn get_user(self: Arc<Self>, _: Context, user: UserRef) -> Result<User, AuthError> {
        Ok(self.accounts.find(&user.name).await?.into())
    }

    pub(crate) async fn list_users(
        self: Arc<Self>,
        _: Context,
        page: UserPage,
    ) -> Result<UserList, AuthError> {
        let limit = usize::from(page.limit.get());
        // One more user than requested is read to determine whether more users follow.
        let after = page.after.as_ref().map(UserName::key);
        let users = self.accounts.users.list(after.as_ref(), limit + 1).await?;
        let (users, more) = first_page(users.into_iter().map(User::from), limit);
        Ok(UserList { users, more })
    }

    pub(crate) async fn add_user(
        self: Arc<Self>,
        context: Context,
        user: NewUser,
    ) -> Result<User, AuthError> {
        let name = user.name.as_name().clone();
        let added = async { Box::pin(self.accounts.add(user)).await.map(User::from) };
        self.audited(&context, UsersAdd::INFO, &name, added).await
    }

    pub(crate) async fn update_user(
        self: Arc<Self>,
        context: Context,
        change: UserChange,
    ) -> Result<User, AuthError> {
        let changed = Box::pin(async { self.accounts.update(&change).await.map(User::from) });
        self.audited(&context, UsersUpdate::INFO, &change.name, changed)
            .await
    }

    pub(crate) async fn remove_user(
        self: Arc<Self>,
        context: Context,
        user: UserRef,
    ) -> Result<Done, AuthError> {
        let removed = Box::pin(async { self.accounts.remove(&user.name).await.map(|_| Done {}) });
        self.audited(&context, UsersRemove::INFO, &user.name, removed)
            .await
    }

    pub(crate) async fn set_password(
        self: Arc<Self>,
        context: Context,
        change: PasswordChange,
    ) -> Result<Done, AuthError> {
        let name = change.name.clone();
        let old = match needed_old_password(&context, &change) {
            Ok(old) => old,
            Err(error) => {
                let (target, detail) = (self.stored_name(&name), error.to_string());
                self.record_refusal(&context, UsersSetPassword::INFO, Some(&target), detail)
                    .await;
                return Err(error);
            }
        };
        let set = Box::pin(async {
            if let Some(old) = old {
                self.check_old_password(&context, &change, old).await?;
            }
            self.accounts.set_password(&change.name, change.password).await?;
            Ok(Done {})
        });
        self.audited(&context, UsersSetPassword::INFO, &name, set).await
    }

    /// Checks the old password of a user that changes its own password. A wrong one counts as a failed login.
    async fn check_old_password(
        &self,
        context: &Context,
        change: &PasswordChange,
        old: Password,
    ) -> Result<(), AuthError> {
        let attempt = Attempt::new(&change.name.key(), context.source.as_deref().unwrap_or("-"));
        let user = self.accounts.find(&change.name).await?;
        if self.is_password(&attempt, &user, old).await? {
            return Ok(());
        }
        // A password change that was stored but not propagated can be repeated with the same old password.
        let repeatable_until_ms = user.sessions_not_before_ms().saturating_add(REPEATABLE_MS);
        let new = change.password.clone().into_inner();
        if unix_millis() < repeatable_until_ms && self.is_password(&attempt, &user, new).await? {
            return Ok(());
        }
        Err(AuthError::WrongOldPassword)
    }

    /// Verifies the user's password. However many attempts run concurrently, only as many passwords are verified as the
    /// throttle allows.
    async fn is_password(
        &self,
        attempt: &Attempt,
        user: &store::User,
        password: Password,
    ) -> Result<bool, AuthError> {
        self.throttle.admit(attempt).await?;
        let hasher = &self.accounts.hasher;
        let permit = hasher.permit().await?;
        self.throttle.claim(attempt).await?;
        let stored = Some(user.password_hash.clone());
        let (right, permit) = hasher.verify(permit, password, stored).await?;
        drop(permit);
        if right {
            self.throttle.forget(attempt).await;
        }
        Ok(right)
    }

    /// Writes an audit record of a request that was refused because the user lacked permission.
    pub(crate) async fn refused(&self, refused: Refused) {
        if refused.method.kind == Kind::Command {
            let (target, detail) = (self.target(&refused.body), refused.fault.message);
            self.record_refusal(&refused.context, refused.method, target.as_deref(), detail)
                .await;
        }
    }

    /// Writes an audit record of a refused request. Records beyond the limit of the user are only counted.
    pub(crate) async fn record_refusal(
        &self,
        context: &Context,
        action: MethodInfo,
        target: Option<&str>,
        detail: String,
    ) {
        let entry = Entry {
            action,
            user: context.user(),
            target,
            result: AuditResult::Refused,
            detail,
            once: None,
        };
        let (record, once) = entry.record(context);
        self.refusals.record(&record, &once).await;
    }

    /// The target of a refused request, whose parameters have not been validated: a user, a VM or a join token.
    fn target(&self, body: &[u8]) -> Option<String> {
        let user = serde_json::from_slice::<UserRef>(body).map(|user| self.stored_name(&user.name));
        let agent = || serde_json::from_slice::<AgentRef>(body).map(|agent| agent.instance_id.to_string());
        let token = || serde_json::from_slice::<JoinTokenRef>(body).map(|token| token.id.to_string());
        user.or_else(|_| agent()).or_else(|_| token()).ok()
    }

    pub(crate) async fn list_audit(
        self: Arc<Self>,
        _: Context,
        filter: AuditFilter,
    ) -> Result<AuditPage, AuthError> {
        audit::list(&self.bus, &filter).await
    }

    async fn audited<T>(
        &self,
        context: &Context,
        action: MethodInfo,
        target: &UserName,
        change: impl Future<Output = Result<T, AuthError>>,
    ) -> Result<T, AuthError> {
        let target = self.stored_name(target);
        audit::announced(&self.audit, context, action, &target, change).await
    }

    /// The user name as stored, for the audit and the log. The caller may have spelled it differently.
    fn stored_name(&self, given: &UserName) -> String {
        let known = self.mirrored.read().get(&given.key().hash());
        known.map_or_else(|| given.shown(), |known| known.principal.user.clone())
    }
}

/// The old password that a user must give to change its own; `None` if an administrator changes that of another user.
fn needed_old_password(context: &Context, change: &PasswordChange) -> Result<Option<Password>, AuthError> {
    let principal = context.principal.as_ref();
    // User keys are compared, so a different spelling of the caller's own name does not count as another user.
    if principal.is_some_and(|principal| UserKey::from_name(&principal.user) == change.name.key()) {
        let old = change.old_password.clone();
        return old.map(Some).ok_or(AuthError::OldPasswordNeeded);
    }
    let is_admin = principal.is_some_and(|principal| principal.role == Role::Admin);
    is_admin.then_some(None).ok_or(AuthError::NotYours)
}

fn detail<T>(outcome: &Result<T, AuthError>) -> String {
    outcome
        .as_ref()
        .err()
        .map(ToString::to_string)
        .unwrap_or_default()
}

impl From<store::User> for User {
    fn from(user: store::User) -> Self {
        Self {
            service: user.service,
            created_at_ms: user.created_at_ms(),
            name: user.name,
            role: user.role,
            scope: user.scope,
        }
    }
}
