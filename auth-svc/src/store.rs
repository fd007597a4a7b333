//! The users in MongoDB: one document a user, its name the `_id`.

use std::future::IntoFuture;

use futures::TryStreamExt;
use mongodb::{
    Collection, Database,
    bson::{DateTime, Document, doc, serialize_to_bson},
    error::{ErrorKind, WriteFailure},
    options::ReturnDocument,
};
use serde::{Deserialize, Serialize};
use shared::{
    api::{Principal, Role, Scope, auth::UserName, users::UserChange},
    store::command_span,
};
use tracing::Instrument;

use crate::AuthError;

/// The code of a unique index that says no.
const DUPLICATE_KEY: i32 = 11_000;

/// A user as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct User {
    #[serde(rename = "_id")]
    pub(crate) name: UserName,
    /// A PHC string; see `password.rs`.
    pub(crate) password_hash: String,
    pub(crate) role: Role,
    pub(crate) scope: Scope,
    pub(crate) created: DateTime,
}

impl User {
    pub(crate) fn principal(&self) -> Principal {
        Principal {
            user: self.name.to_string(),
            role: self.role,
            scope: self.scope.clone(),
        }
    }
}

pub(crate) struct UserStore {
    users: Collection<User>,
}

impl UserStore {
    pub(crate) fn of(database: &Database, collection: &str) -> Self {
        Self {
            users: database.collection(collection),
        }
    }

    pub(crate) async fn find(&self, name: &UserName) -> Result<Option<User>, AuthError> {
        let found = self.users.find_one(doc! { "_id": name.as_str() }).into_future();
        Ok(found.instrument(command_span("find", self.users.name())).await?)
    }

    /// Users in the order of their names, those behind the given one, at most so many.
    pub(crate) async fn list(&self, after: Option<&UserName>, most: usize) -> Result<Vec<User>, AuthError> {
        let filter = after.map_or_else(Document::new, |name| doc! { "_id": { "$gt": name.as_str() } });
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

    /// Adds the user; `false` where the name is taken.
    pub(crate) async fn add(&self, user: &User) -> Result<bool, AuthError> {
        match self.users.insert_one(user).await {
            Ok(_) => Ok(true),
            Err(error) if is_duplicate(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// `false` where there is no such user.
    pub(crate) async fn set_password(&self, name: &UserName, hash: &str) -> Result<bool, AuthError> {
        let update = doc! { "$set": { "password_hash": hash } };
        Ok(self
            .users
            .update_one(doc! { "_id": name.as_str() }, update)
            .await?
            .matched_count
            == 1)
    }

    /// The user as it is then; `None` where there is none.
    pub(crate) async fn update(&self, change: &UserChange) -> Result<Option<User>, AuthError> {
        let name = doc! { "_id": change.name.as_str() };
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
        if set.is_empty() {
            return Ok(self.users.find_one(name).await?);
        }
        let update = self.users.find_one_and_update(name, doc! { "$set": set });
        Ok(update.return_document(ReturnDocument::After).await?)
    }

    /// `false` where there is no such user.
    pub(crate) async fn remove(&self, name: &UserName) -> Result<bool, AuthError> {
        Ok(self
            .users
            .delete_one(doc! { "_id": name.as_str() })
            .await?
            .deleted_count
            == 1)
    }

    pub(crate) async fn administrators(&self) -> Result<u64, AuthError> {
        Ok(self
            .users
            .count_documents(doc! { "role": Role::Admin.to_string() })
            .await?)
    }
}

fn is_duplicate(error: &mongodb::error::Error) -> bool {
    matches!(&*error.kind, ErrorKind::Write(WriteFailure::WriteError(write)) if write.code == DUPLICATE_KEY)
}
