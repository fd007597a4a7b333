//! The methods of auth-svc.

use futures::future::try_join_all;
use shared::{
    api::{
        Kind, Method, MethodInfo, Role,
        audit::{AuditFilter, AuditPage, AuditResult},
        auth::{Credentials, Login, Session, UserName},
        first_page,
        users::{
            Done, NewUser, PasswordChange, SessionRef, User, UserChange, UserList, UserPage, UserRef,
            UsersAdd, UsersRemove, UsersSetPassword, UsersUpdate,
        },
    },
    bus::{Context, serve::Refused},
};
use tracing::{info, warn};

use crate::{
    Auth, AuthError,
    audit::{self, Entry},
    store,
    throttle::Attempt,
};

impl Auth {
    /// Checks name and password, and makes a session.
    pub(crate) async fn login(
        &self,
        context: &Context,
        credentials: Credentials,
    ) -> Result<Session, AuthError> {
        let name = credentials.user_name.clone();
        let source = context.source.as_deref().unwrap_or("-");
        let attempt = Attempt::new(&name, source);
        let outcome = self.try_login(&attempt, credentials).await;
        let (result, once) = match &outcome {
            Ok(_) => (AuditResult::Succeeded, None),
            // Costs nothing to ask for, and must not push what else the audit holds out of it.
            Err(AuthError::Throttled(_)) => (AuditResult::Refused, Some(attempt.id().to_owned())),
            Err(error) => (error.audit_result(), None),
        };
        info!(user = %name, source, %result, "login");
        let entry = Entry {
            action: Login::INFO,
            user: name.as_str(),
            target: None,
            result,
            detail: detail(&outcome),
            once,
        };
        audit::append(&self.audit, context, entry).await;
        outcome
    }

    /// Unknown users cost the same work as known ones.
    async fn try_login(&self, attempt: &Attempt, credentials: Credentials) -> Result<Session, AuthError> {
        let Credentials { user_name, password } = credentials;
        let (users, hasher) = (&self.accounts.users, &self.accounts.hasher);
        // Asked once more under the permit: who has to wait takes no place from others meanwhile.
        self.throttle.admit(attempt).await?;
        let permit = hasher.login_permit().await?;
        let (user, ()) = tokio::try_join!(users.find(&user_name), self.throttle.admit(attempt))?;
        let stored = user.as_ref().map(|user| user.password_hash.clone());
        let (right, permit) = hasher.verify(permit, password, stored).await?;
        let Some(user) = user.filter(|_| right) else {
            self.throttle.count_failure(attempt).await?;
            drop(permit);
            return Err(AuthError::WrongCredentials);
        };
        drop(permit);
        let (session, ()) = tokio::join!(
            self.sessions.create(user.principal()),
            self.throttle.forget(attempt)
        );
        let session = session?;
        // What was changed since the user was read has ended its sessions, and may have missed this one.
        if users.find(&user_name).await?.as_ref() != Some(&user) {
            self.sessions.end(&session.session_id).await?;
            return Err(AuthError::WrongCredentials);
        }
        self.end_beyond_limit(&session).await?;
        Ok(session)
    }

    /// Ends the oldest sessions of a user who has too many; the new one, where that cannot be known.
    async fn end_beyond_limit(&self, session: &Session) -> Result<(), AuthError> {
        let limit = &self.session_limit;
        match limit
            .add(&session.principal.user, &session.session_id.key())
            .await
        {
            Ok(beyond) => {
                let ends = beyond.iter().map(|key| self.sessions.end_key(key));
                try_join_all(ends).await.map(drop)
            }
            Err(error) => {
                self.sessions.end(&session.session_id).await?;
                Err(error)
            }
        }
    }

    /// Ends a session.
    pub(crate) async fn logout(&self, context: &Context, session: SessionRef) -> Result<Done, AuthError> {
        let key = session.session_id.key();
        self.sessions.end_key(&key).await?;
        if let Some(principal) = &context.principal
            && let Err(error) = self.session_limit.remove(&principal.user, &key).await
        {
            warn!(%error, "a session that is over is counted as one still");
        }
        Ok(Done {})
    }

    pub(crate) async fn get_user(&self, user: UserRef) -> Result<User, AuthError> {
        Ok(self.accounts.find(&user.name).await?.into())
    }

    pub(crate) async fn list_users(&self, page: UserPage) -> Result<UserList, AuthError> {
        let limit = usize::from(page.limit.get());
        // One more tells whether there are more.
        let users = self.accounts.users.list(page.after.as_ref(), limit + 1).await?;
        let (users, more) = first_page(users.into_iter().map(User::from), limit);
        Ok(UserList { users, more })
    }

    pub(crate) async fn add_user(&self, context: &Context, user: NewUser) -> Result<User, AuthError> {
        let name = user.name.clone();
        let outcome = self.accounts.add(user).await.map(User::from);
        self.audited(context, UsersAdd::INFO, &name, outcome).await
    }

    pub(crate) async fn update_user(&self, context: &Context, change: UserChange) -> Result<User, AuthError> {
        let changed = async {
            let user = self.accounts.update(&change).await?;
            self.end_sessions(&change.name).await?;
            Ok(user.into())
        };
        self.audited(context, UsersUpdate::INFO, &change.name, changed.await)
            .await
    }

    pub(crate) async fn remove_user(&self, context: &Context, user: UserRef) -> Result<Done, AuthError> {
        let removed = async {
            self.accounts.remove(&user.name).await?;
            self.end_sessions(&user.name).await
        };
        self.audited(context, UsersRemove::INFO, &user.name, removed.await)
            .await
    }

    pub(crate) async fn set_password(
        &self,
        context: &Context,
        change: PasswordChange,
    ) -> Result<Done, AuthError> {
        let name = change.name.clone();
        let set = async {
            self.may_set_password(context, &change).await?;
            self.accounts.set_password(&change.name, change.password).await?;
            self.end_sessions(&change.name).await
        };
        self.audited(context, UsersSetPassword::INFO, &name, set.await)
            .await
    }

    /// One's own with the old one, counted as a login is; another's as an administrator.
    async fn may_set_password(&self, context: &Context, change: &PasswordChange) -> Result<(), AuthError> {
        let principal = context.principal.as_ref();
        if principal.is_none_or(|principal| principal.user != change.name.as_str()) {
            let is_admin = principal.is_some_and(|principal| principal.role == Role::Admin);
            return if is_admin {
                Ok(())
            } else {
                Err(AuthError::NotYours)
            };
        }
        let Some(old) = change.old_password.clone() else {
            return Err(AuthError::OldPasswordNeeded);
        };
        let attempt = Attempt::new(&change.name, context.source.as_deref().unwrap_or("-"));
        self.throttle.admit(&attempt).await?;
        if self.accounts.knows(&change.name, old).await? {
            return Ok(());
        }
        self.throttle.count_failure(&attempt).await?;
        Err(AuthError::WrongOldPassword)
    }

    /// Puts a command that was refused for who asked on record.
    pub(crate) async fn refused(&self, refused: Refused) {
        if refused.method.kind != Kind::Command {
            return;
        }
        let context = &refused.context;
        let target = serde_json::from_slice::<UserRef>(&refused.body).ok();
        let entry = Entry {
            action: refused.method,
            user: context.principal.as_ref().map_or("", |principal| &principal.user),
            target: target.as_ref().map(|target| target.name.as_str()),
            result: AuditResult::Refused,
            detail: refused.fault.message.clone(),
            once: None,
        };
        audit::append(&self.audit, context, entry).await;
    }

    pub(crate) async fn list_audit(&self, filter: AuditFilter) -> Result<AuditPage, AuthError> {
        audit::list(&self.bus, &filter).await
    }

    async fn end_sessions(&self, name: &UserName) -> Result<Done, AuthError> {
        let ended = self.sessions.end_all_of(name.as_str()).await;
        ended
            .map(|_| Done {})
            .map_err(|error| AuthError::SessionsLiveOn(Box::new(error)))
    }

    async fn audited<T>(
        &self,
        context: &Context,
        action: MethodInfo,
        target: &UserName,
        outcome: Result<T, AuthError>,
    ) -> Result<T, AuthError> {
        let entry = Entry {
            action,
            user: context.principal.as_ref().map_or("", |principal| &principal.user),
            target: Some(target.as_str()),
            result: outcome
                .as_ref()
                .err()
                .map_or(AuditResult::Succeeded, AuthError::audit_result),
            detail: detail(&outcome),
            once: None,
        };
        audit::append(&self.audit, context, entry).await;
        outcome
    }
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
            name: user.name,
            role: user.role,
            scope: user.scope,
            created_at_ms: u64::try_from(user.created.timestamp_millis()).unwrap_or(0),
        }
    }
}
