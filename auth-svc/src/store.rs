//! The users in MongoDB, one document per user. The field `_id` is the user's key, so no two user names differ
//! only in letter case.

use std::{
    future::IntoFuture,
    time::{Duration, SystemTime},
};

use futures::TryStreamExt;
use mongodb::{
    Collection, Database,
    bson::{DateTime, Document, doc, serialize_to_bson},
    error::{ErrorKind, WriteFailure},
    options::ReturnDocument,
};
use serde::{Deserialize, Serialize};
use tracing::Instrument;
use vmwatch_api::{Principal, Role, Scope, UserKey, UserName, users::UserChange};
use vmwatch_store::command_span;

use crate::{AuthError, bucket::TRIES};

/// Name of the field with the time when the claim to demote this administrator expires; see
/// [`UserStore::claim_demotion`].
const DEMOTION_CLAIM: &str = "demotion_claim_expires";
/// Name of the field that marks service accounts.
const SERVICE: &str = "service";
/// Lifetime of a demotion claim, far longer than a change of a user takes. If auth-svc crashed during the change, its
/// claim is ignored after this time.
const CLAIM_LIFETIME: Duration = Duration::from_mins(5);

/// MongoDB's error code for a duplicate key.
const DUPLICATE_KEY: i32 = 11_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct User {
    #[serde(rename = "_id")]
    pub(crate) key: UserKey,
    /// The user name as spelled when the user was created.
    pub(crate) name: UserName,
    /// The password hash as a PHC string; see `password.rs`.
    pub(crate) password_hash: String,
    pub(crate) role: Role,
    pub(crate) scope: Scope,
    /// Whether the user is a service account, which cannot log in. Its password hash is that of a random password that
    /// is not stored, so that older versions refuse its logins too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) service: bool,
    pub(crate) created: DateTime,
    /// Sessions that began before this time are invalid. Each change of the user sets it to a later time.
    pub(crate) sessions_not_before: DateTime,
}

impl User {
    pub(crate) fn principal(&self) -> Principal {
        Principal {
            user: self.name.to_string(),
            role: self.role,
            scope: self.scope.clone(),
        }
    }

    pub(crate) fn created_at_ms(&self) -> u64 {
        u64::try_from(self.created.timestamp_millis()).unwrap_or(0)
    }

    pub(crate) fn sessions_not_before_ms(&self) -> u64 {
        u64::try_from(self.sessions_not_before.timestamp_millis()).unwrap_or(0)
    }
}

pub(crate) struct UserStore {
    users: Collection<User>,
}

impl UserStore {
    pub(crate) fn new(database: &Database, collection: &str) -> Self {
        Self {
            users: database.collection(collection),
        }
    }

    pub(crate) async fn find(&self, key: &UserKey) -> Result<Option<User>, AuthError> {
        let found = self.users.find_one(doc! { "_id": key.as_str() }).into_future();
        Ok(found.instrument(command_span("find", self.users.name())).await?)
    }

    /// Returns up to `most` users after the given key, sorted by key.
    pub(crate) async fn list(&self, after: Option<&UserKey>, most: usize) -> Result<Vec<User>, AuthError> {
        let filter = after.map_or_else(Document::new, |key| doc! { "_id": { "$gt": key.as_str() } });
        Ok(self
            .users
            .find(filter)
            .sort(doc! { "_id": 1 })
            .limit(i64::try_from(most).unwrap_or(i64::MAX))
            .await?
            .try_collect()
            .await?)
    }

    pub(crate) async fn is_empty(&self) -> Result<bool, AuthError> {
        Ok(self.users.find_one(doc! {}).await?.is_none())
    }

    /// Adds the user. Returns false if the user name is taken.
    pub(crate) async fn add(&self, user: &User) -> Result<bool, AuthError> {
        match self.users.insert_one(user).await {
            Ok(_) => Ok(true),
            Err(error) if is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the user's password hash; `None` if the user does not exist.
    pub(crate) async fn set_password(&self, key: &UserKey, hash: &str) -> Result<Option<User>, AuthError> {
        self.change(key, doc! { "password_hash": hash }, Document::new())
            .await
    }

    /// Sets the user's role and scope as far as they are given; `None` if the user does not exist.
    pub(crate) async fn update(&self, change: &UserChange, may: Ending) -> Result<Option<User>, AuthError> {
        let mut set = Document::new();
        if let Some(role) = change.role {
            set.insert("role", role.to_string());
        }
        if let Some(scope) = &change.scope {
            set.insert(
                "scope",
                serialize_to_bson(scope).map_err(mongodb::error::Error::from)?,
            );
        }
        let mut only_if = may.filter();
        if change.role == Some(Role::Admin) {
            only_if.insert(SERVICE, doc! { "$ne": true });
        }
        self.change(&change.name.key(), set, only_if).await
    }

    /// Changes the user and invalidates the sessions that began up to now. Returns the user after the change. The time
    /// `sessions_not_before` always increases, even if the clocks of replicas differ, so each change has a
    /// different time.
    async fn change(
        &self,
        key: &UserKey,
        set: Document,
        only_if: Document,
    ) -> Result<Option<User>, AuthError> {
        for _ in 0..TRIES {
            let Some(user) = self.find(key).await? else {
                return Ok(None);
            };
            let mut set = set.clone();
            set.insert("sessions_not_before", not_before(Some(&user)));
            let mut unchanged = doc! { "_id": key.as_str(), "sessions_not_before": user.sessions_not_before };
            unchanged.extend(only_if.clone());
            let mut update = doc! { "$set": set };
            if only_if.contains_key(DEMOTION_CLAIM) {
                update.insert("$unset", doc! { DEMOTION_CLAIM: "" });
            }
            let update = self.users.find_one_and_update(unchanged, update);
            let changed = update.return_document(ReturnDocument::After).await?;
            if changed.is_some() {
                return Ok(changed);
            }
        }
        Err(AuthError::Contended)
    }

    /// Removes the user. Returns false if the user does not exist.
    pub(crate) async fn remove(&self, key: &UserKey, may: Ending) -> Result<bool, AuthError> {
        let mut filter = doc! { "_id": key.as_str() };
        filter.extend(may.filter());
        Ok(self.users.delete_one(filter).await?.deleted_count == 1)
    }

    /// Claims the right to demote this administrator; `None` if another change holds a claim on this user, or the user
    /// is no longer an administrator.
    ///
    /// The holder of a claim then counts the administrators without a claim and may demote this one only if there is
    /// another. If two changes run concurrently, the one that claims later sees the earlier claim and does not count
    /// that claim's administrator, so the two changes cannot demote the last two administrators.
    pub(crate) async fn claim_demotion(&self, key: &UserKey) -> Result<Option<Ending>, AuthError> {
        let expires = DateTime::from_system_time(SystemTime::now() + CLAIM_LIFETIME);
        let mut unclaimed = unclaimed_administrators();
        unclaimed.insert("_id", key.as_str());
        let ending = Ending::Claimed(expires);
        let claim = doc! { "$set": ending.filter() };
        let claimed = self.users.update_one(unclaimed, claim).await?;
        Ok((claimed.matched_count == 1).then_some(ending))
    }

    /// Withdraws the claim to demote an administrator.
    pub(crate) async fn withdraw(&self, key: &UserKey, claim: Ending) -> Result<(), AuthError> {
        let Ending::Claimed(expires) = claim else {
            return Ok(());
        };
        let claimed = doc! { "_id": key.as_str(), DEMOTION_CLAIM: expires };
        let unset = doc! { "$unset": { DEMOTION_CLAIM: "" } };
        self.users.update_one(claimed, unset).await?;
        Ok(())
    }

    /// Counts the administrators other than this user. Returns two numbers: all of them, and those without a demotion
    /// claim.
    pub(crate) async fn other_administrators(&self, key: &UserKey) -> Result<(u64, u64), AuthError> {
        let count = async |mut filter: Document| {
            filter.insert("_id", doc! { "$ne": key.as_str() });
            self.users.count_documents(filter).await
        };
        let all = count(doc! { "role": Role::Admin.to_string() }).await?;
        Ok((all, count(unclaimed_administrators()).await?))
    }
}

/// What a change of a user means for the user's role of administrator.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending {
    /// The user remains or becomes an administrator, or the change does not concern the role.
    Nothing,
    /// The user was not an administrator when the change was prepared. If the user has become one since, the change is
    /// not made.
    NoAdministrator,
    /// The change holds a demotion claim that expires at this time.
    Claimed(DateTime),
}

impl Ending {
    fn filter(self) -> Document {
        match self {
            Self::Nothing => Document::new(),
            Self::NoAdministrator => doc! { "role": { "$ne": Role::Admin.to_string() } },
            Self::Claimed(expires) => doc! { DEMOTION_CLAIM: expires },
        }
    }
}

/// A query filter that matches administrators without a valid demotion claim.
fn unclaimed_administrators() -> Document {
    let claimed = doc! { "$gt": DateTime::now() };
    doc! { "role": Role::Admin.to_string(), DEMOTION_CLAIM: { "$not": claimed } }
}

/// The new `sessions_not_before` for a change of the user that is made now: the earliest start of a session that
/// remains valid. Sessions that began up to the present millisecond become invalid.
pub(crate) fn not_before(before: Option<&User>) -> DateTime {
    let before = before.map_or(0, |user| user.sessions_not_before.timestamp_millis());
    let now = DateTime::now().timestamp_millis();
    DateTime::from_millis(now.max(before).saturating_add(1))
}

fn is_duplicate(error: &mongodb::error::Error) -> bool {
    matches!(&*error.kind, ErrorKind::Write(WriteFailure::WriteError(write)) if write.code == DUPLICATE_KEY)
}

#[cfg(test)]
mod tests {
    use bson::{Bson, deserialize_from_document, serialize_to_document};
    use serde_json::Value;

    use super::*;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/forms/user-document.json")).unwrap()
    }

    fn read(document: Value) -> User {
        let document = Bson::try_from(document).unwrap();
        deserialize_from_document(document.as_document().unwrap().clone()).unwrap()
    }

    #[test]
    fn user_document_matches_golden_file() {
        let written = serialize_to_document(&read(golden())).unwrap();
        assert_eq!(Bson::from(written).into_relaxed_extjson(), golden());
    }

    /// Replicas of different versions respect each other's claims.
    #[test]
    fn demotion_claim_matches_golden_file() {
        const GOLDEN: &str = include_str!("../../tests/golden/forms/user-demotion-claim.json");
        let claim: Value = serde_json::from_str(GOLDEN).unwrap();
        let expires = DateTime::parse_rfc3339_str("2017-01-01T13:41:40.001Z").unwrap();
        let written = Bson::from(Ending::Claimed(expires).filter());
        assert_eq!(written.into_relaxed_extjson(), claim);
        // The claim is a field of the user's document; code that reads the document for other purposes ignores it.
        let mut claimed = golden();
        claimed[DEMOTION_CLAIM] = claim[DEMOTION_CLAIM].clone();
        assert_eq!(read(claimed), read(golden()));
    }

    #[test]
    fn user_document_of_newer_version_can_be_read() {
        let mut newer = golden();
        newer["role"] = "auditor".into();
        newer["scope"] = serde_json::json!({ "tenant": "x" });
        newer["of_a_newer_version"] = 1.into();
        let user = read(newer);
        assert_eq!((user.role, user.scope), (Role::Unknown, Scope::Unknown));
    }
}
