//! What may be done with users, by whichever way it is asked: over the bus or on the command line.

use mongodb::bson::DateTime;
use shared::api::{
    Role,
    auth::{Password, UserName},
    users::{NewPassword, NewUser, UserChange},
};

use crate::{
    AuthError,
    password::Hasher,
    store::{User, UserStore},
};

/// The users, with the rules.
pub(crate) struct Accounts {
    pub(crate) users: UserStore,
    pub(crate) hasher: Hasher,
}

impl Accounts {
    pub(crate) async fn find(&self, name: &UserName) -> Result<User, AuthError> {
        let found = self.users.find(name).await?;
        found.ok_or_else(|| AuthError::NoSuchUser(name.clone()))
    }

    pub(crate) async fn add(&self, user: NewUser) -> Result<User, AuthError> {
        let user = User {
            password_hash: self.hasher.hash(user.password.into_inner()).await?,
            name: user.name,
            role: user.role,
            scope: user.scope,
            created: DateTime::now(),
        };
        if self.users.add(&user).await? {
            Ok(user)
        } else {
            Err(AuthError::NameTaken(user.name))
        }
    }

    /// Changes role and scope; the caller ends the user's sessions, which carry both.
    pub(crate) async fn update(&self, change: &UserChange) -> Result<User, AuthError> {
        if change.role.is_some_and(|role| role != Role::Admin) {
            self.keep_an_administrator(&change.name).await?;
        }
        let updated = self.users.update(change).await?;
        updated.ok_or_else(|| AuthError::NoSuchUser(change.name.clone()))
    }

    /// Sets the password; the caller ends the user's sessions.
    pub(crate) async fn set_password(&self, name: &UserName, password: NewPassword) -> Result<(), AuthError> {
        // Looked up first: a hash takes a core for 45 ms.
        self.find(name).await?;
        let hash = self.hasher.hash(password.into_inner()).await?;
        if self.users.set_password(name, &hash).await? {
            Ok(())
        } else {
            Err(AuthError::NoSuchUser(name.clone()))
        }
    }

    /// Whether this is the user's password.
    pub(crate) async fn knows(&self, name: &UserName, password: Password) -> Result<bool, AuthError> {
        let stored = self.find(name).await?.password_hash;
        let permit = self.hasher.permit().await?;
        let (right, _) = self.hasher.verify(permit, password, Some(stored)).await?;
        Ok(right)
    }

    /// Removes the user; the caller ends its sessions.
    pub(crate) async fn remove(&self, name: &UserName) -> Result<(), AuthError> {
        self.keep_an_administrator(name).await?;
        if self.users.remove(name).await? {
            Ok(())
        } else {
            Err(AuthError::NoSuchUser(name.clone()))
        }
    }

    /// Refuses where the user is the only administrator. Two administrators who remove each other in the same moment
    /// both succeed; `vmwatch-auth user add` makes another.
    async fn keep_an_administrator(&self, name: &UserName) -> Result<(), AuthError> {
        if self.find(name).await?.role == Role::Admin && self.users.administrators().await? == 1 {
            return Err(AuthError::LastAdministrator(name.clone()));
        }
        Ok(())
    }
}
