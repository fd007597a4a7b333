//! Creates, changes and removes users. The methods on the bus and the command line share this code.
//!
//! Each change is first stored in the database and then propagated: the user's record in the KV bucket of users makes
//! it effective on all gateways, and the user's sessions are ended. If a step fails, the caller can repeat the request;
//! the reconciler ([`crate::reconcile`]) also completes the remaining steps.

use std::time::Duration;

use metrics::counter;
use mongodb::bson::DateTime;
use tracing::warn;
use vmwatch_api::{
    Role, UserKey, UserName,
    auth::Password,
    sessions::UserRecord,
    users::{NewPassword, NewUser, UserChange},
};
use vmwatch_service::jitter::jittered;

use crate::{
    AuthError,
    bucket::TRIES,
    mirror::Mirror,
    password::Hasher,
    sessions::Sessions,
    store::{Ending, User, UserStore, not_before},
};

/// Wait before checking again whether a concurrent change of an administrator has finished.
const CLAIM_PAUSE: Duration = Duration::from_millis(100);

/// Changes users according to the rules, such as that one administrator must always remain.
pub(crate) struct Accounts {
    pub(crate) users: UserStore,
    pub(crate) hasher: Hasher,
    pub(crate) mirror: Mirror,
    pub(crate) sessions: Sessions,
}

impl Accounts {
    pub(crate) async fn find(&self, name: &UserName) -> Result<User, AuthError> {
        let found = self.users.find(&name.key()).await?;
        found.ok_or_else(|| AuthError::NoSuchUser(name.clone()))
    }

    pub(crate) async fn add(&self, new: NewUser) -> Result<User, AuthError> {
        let password = new.password.map(NewPassword::into_inner);
        let service = password.is_none();
        if service && new.role == Role::Admin {
            return Err(AuthError::ServiceAdministrator);
        }
        let name = new.name.into_inner();
        let hashed = match &password {
            Some(password) => password.clone(),
            None => unknown_password()?,
        };
        let user = User {
            password_hash: self.hasher.hash(hashed).await?,
            key: name.key(),
            name,
            role: new.role,
            scope: new.scope,
            service,
            created: DateTime::now(),
            sessions_not_before: not_before(None),
        };
        if self.users.add(&user).await? {
            self.pass_on(&user.key).await?;
            return Ok(user);
        }
        self.add_repeated(user, password).await
    }

    /// Handles an attempt to add a user whose name is taken. If an earlier attempt added the same user but did not
    /// propagate it, this attempt completes the work and succeeds.
    async fn add_repeated(&self, user: User, password: Option<Password>) -> Result<User, AuthError> {
        let taken = AuthError::NameTaken(user.name.clone());
        let Some(found) = self.users.find(&user.key).await? else {
            return Err(taken);
        };
        let of = |user: &User| (user.name.clone(), user.role, user.scope.clone(), user.service);
        if of(&found) != of(&user) || self.mirror.holds(&found).await? {
            return Err(taken);
        }
        if let Some(password) = password {
            let permit = self.hasher.permit().await?;
            let stored = Some(found.password_hash.clone());
            let (right, _) = self.hasher.verify(permit, password, stored).await?;
            if !right {
                return Err(taken);
            }
        }
        self.pass_on(&found.key).await?;
        Ok(found)
    }

    pub(crate) async fn update(&self, change: &UserChange) -> Result<User, AuthError> {
        if change.role == Some(Role::Admin) && self.find(&change.name).await?.service {
            return Err(AuthError::ServiceAdministrator);
        }
        let may = if change.role.is_some_and(|role| role != Role::Admin) {
            self.keep_an_administrator(&change.name).await?
        } else {
            Ending::Nothing
        };
        let updated = self.users.update(change, may).await;
        if !matches!(updated, Ok(Some(_))) {
            self.withdraw(&change.name, may).await;
        }
        let user = updated?.ok_or_else(|| AuthError::NoSuchUser(change.name.clone()))?;
        self.pass_on(&user.key).await?;
        Ok(user)
    }

    /// Sets the user's password. Returns the number of ended sessions.
    pub(crate) async fn set_password(
        &self,
        name: &UserName,
        password: NewPassword,
    ) -> Result<usize, AuthError> {
        // The user is looked up before the password is hashed, because hashing occupies a CPU core for 45 ms.
        let user = self.find(name).await?;
        if user.service {
            return Err(AuthError::ServicePassword(user.name));
        }
        let key = user.key;
        let hash = self.hasher.hash(password.into_inner()).await?;
        if self.users.set_password(&key, &hash).await?.is_none() {
            return Err(AuthError::NoSuchUser(name.clone()));
        }
        self.pass_on(&key).await
    }

    /// Removes the user. Returns the number of ended sessions. If an earlier attempt has already removed the user from
    /// the database, only the remaining records are removed.
    pub(crate) async fn remove(&self, name: &UserName) -> Result<usize, AuthError> {
        let key = name.key();
        let removed = match self.keep_an_administrator(name).await {
            Err(AuthError::NoSuchUser(_)) => false,
            may => {
                let may = may?;
                let removed = self.users.remove(&key, may).await;
                if !matches!(removed, Ok(true)) {
                    self.withdraw(name, may).await;
                }
                removed?
            }
        };
        let left = self.sync(&key).await?;
        // The session index can list sessions of a user that no longer has any record; they must end as well.
        let ended = self.end_sessions(&key, left.as_ref()).await;
        if removed || left.is_some() || ended > 0 {
            Ok(ended)
        } else {
            Err(AuthError::NoSuchUser(name.clone()))
        }
    }

    /// Propagates the user's state from the database to the gateways. Returns the number of ended sessions.
    pub(crate) async fn pass_on(&self, user: &UserKey) -> Result<usize, AuthError> {
        let record = self.sync(user).await?;
        Ok(self.end_sessions(user, record.as_ref()).await)
    }

    async fn sync(&self, user: &UserKey) -> Result<Option<UserRecord>, AuthError> {
        let synced = self.mirror.sync(&self.users, user).await;
        synced.map_err(|error| AuthError::NotPassedOn(Box::new(error)))
    }

    /// Ends those sessions of the user that gateways already refuse. Returns their number. A session that cannot be
    /// ended now expires later; if the user was removed, the reconciler ends it.
    async fn end_sessions(&self, user: &UserKey, record: Option<&UserRecord>) -> usize {
        let not_before_ms = record.map_or(u64::MAX, |record| record.sessions_not_before_ms);
        let ended = async {
            let ended = self.sessions.end_before(user, not_before_ms).await?;
            if record.is_some_and(|record| record.removed) {
                self.mirror.forget(user).await?;
            }
            Ok::<_, AuthError>(ended)
        };
        ended.await.unwrap_or_else(|error| {
            counter!("vmwatch_sessions_not_ended_total").increment(1);
            warn!(%error, %user, "deleting invalidated sessions failed; gateways refuse them anyway");
            0
        })
    }

    /// Prepares a change after which the user is no longer an administrator. It fails if no other administrator would
    /// remain. If two concurrent changes demote the last two administrators, the later one fails.
    async fn keep_an_administrator(&self, name: &UserName) -> Result<Ending, AuthError> {
        let key = name.key();
        for _ in 0..TRIES {
            if self.find(name).await?.role != Role::Admin {
                return Ok(Ending::NoAdministrator);
            }
            if let Some(claim) = self.users.claim_demotion(&key).await? {
                let others = self.users.other_administrators(&key).await;
                if let Ok((_, 1..)) = others {
                    return Ok(claim);
                }
                self.withdraw(name, claim).await;
                if others?.0 == 0 {
                    return Err(AuthError::LastAdministrator(name.clone()));
                }
            }
            // The other change finishes or withdraws its claim within milliseconds. Random jitter keeps the two changes
            // from retrying at the same time.
            tokio::time::sleep(jittered(CLAIM_PAUSE, 0.1)).await;
        }
        Err(AuthError::Contended)
    }

    /// Withdraws the demotion claim of a change that was not made. If withdrawing fails, the claim expires.
    async fn withdraw(&self, name: &UserName, claim: Ending) {
        if let Err(error) = self.users.withdraw(&name.key(), claim).await {
            warn!(%error, user = %name, "failed to withdraw the lock that keeps two administrators from being demoted at once; it will expire");
        }
    }
}

/// A password of 256 random bits that is stored nowhere.
fn unknown_password() -> Result<Password, AuthError> {
    let mut bits = [0; 32];
    getrandom::fill(&mut bits).map_err(AuthError::Random)?;
    hex::encode(bits)
        .parse()
        .map_err(|rule: &str| AuthError::Hash(rule.to_owned()))
}
