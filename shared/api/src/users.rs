//! Methods of auth-svc by which users are managed, and a session ended.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::{
    Access, Class, Kind, Method, MethodInfo, NewUserName, Role, Scope, Service, UserName,
    auth::{Password, Token},
    bounded_text,
    metrics::Limit,
};

/// The most instances of a limited scope: the principal travels in a header of every request on the bus, and with ids
/// of the greatest length they fit the 64 KiB of an HTTP body twice.
pub const MOST_INSTANCES: usize = 500;

/// A password that is about to be set: at least 8 characters (NIST SP 800-63B) and at most 1024 bytes.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct NewPassword(Password);

impl NewPassword {
    const RULE: &str = "must be a text of at least 8 characters and at most 1024 bytes";
    const SHORTEST: usize = 8;

    fn allows(text: &str) -> bool {
        text.chars().count() >= Self::SHORTEST && text.parse::<Password>().is_ok()
    }

    /// The password.
    pub fn into_inner(self) -> Password {
        self.0
    }
}

impl FromStr for NewPassword {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            text.parse().map(Self)
        } else {
            Err(Self::RULE)
        }
    }
}

impl<'de> Deserialize<'de> for NewPassword {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// A user, as administrators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its name.
    pub name: UserName,
    /// What it may do.
    pub role: Role,
    /// Which instances it may see.
    pub scope: Scope,
    /// When it was made, Unix milliseconds.
    pub created_at_ms: u64,
}

/// Which user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRef {
    /// Its name.
    pub name: UserName,
}

/// A user to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewUser {
    /// Its name.
    pub name: NewUserName,
    /// Its first password.
    pub password: NewPassword,
    /// What it may do.
    #[serde(deserialize_with = "known_role")]
    pub role: Role,
    /// Which instances it may see; at most [`MOST_INSTANCES`].
    #[serde(deserialize_with = "bounded_scope")]
    pub scope: Scope,
}

/// What to change of a user; what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserChange {
    /// Which user.
    pub name: UserName,
    /// What it may do.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "known_role_if_given"
    )]
    pub role: Option<Role>,
    /// Which instances it may see; at most [`MOST_INSTANCES`].
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bounded_scope_if_given"
    )]
    pub scope: Option<Scope>,
}

/// A user's new password.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PasswordChange {
    /// Whose.
    pub name: UserName,
    /// The password from now on.
    pub password: NewPassword,
    /// The password until now: needed by who changes its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_password: Option<Password>,
}

/// Asks for users, a page at a time, in the order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserPage {
    /// Only names behind this one: the last of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<UserName>,
    /// At most how many.
    #[serde(default)]
    pub limit: Limit,
}

/// A page of users.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserList {
    /// In the order of their names.
    pub users: Vec<User>,
    /// Whether there are more behind the last.
    pub more: bool,
}

/// Which session to end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionRef {
    /// Its token.
    pub session_id: Token,
}

/// Done, with nothing to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

fn known_role<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Role, D::Error> {
    match Role::deserialize(deserializer)? {
        Role::Unknown => Err(D::Error::custom("must be viewer, operator or admin")),
        role => Ok(role),
    }
}

fn known_role_if_given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Role>, D::Error> {
    known_role(deserializer).map(Some)
}

fn bounded_scope<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Scope, D::Error> {
    match Scope::deserialize(deserializer)? {
        Scope::Unknown => Err(D::Error::custom("must be all or only")),
        Scope::Only(instances) if instances.len() > MOST_INSTANCES => Err(D::Error::custom(format!(
            "must name at most {MOST_INSTANCES} instances"
        ))),
        scope => Ok(scope),
    }
}

fn bounded_scope_if_given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Scope>, D::Error> {
    bounded_scope(deserializer).map(Some)
}

/// A row of the table for what only administrators may, unless it says otherwise.
const fn row(subject: &'static str, kind: Kind) -> MethodInfo {
    MethodInfo {
        service: Service::Auth,
        subject,
        access: Access::Role(Role::Admin),
        kind,
        class: Class::Account,
    }
}

/// Ends the session that the call itself was made with. Whoever holds a token may end it.
#[derive(Debug)]
pub struct Logout;

impl Method for Logout {
    type Params = SessionRef;
    type Reply = Done;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Role(Role::Viewer),
        ..row("auth.logout", Kind::Command)
    };
}

/// Reads a user.
#[derive(Debug)]
pub struct UsersGet;

impl Method for UsersGet {
    type Params = UserRef;
    type Reply = User;
    const INFO: MethodInfo = row("auth.users.get", Kind::Query);
}

/// Lists users.
#[derive(Debug)]
pub struct UsersList;

impl Method for UsersList {
    type Params = UserPage;
    type Reply = UserList;
    const INFO: MethodInfo = row("auth.users.list", Kind::Query);
}

/// Makes a user; a taken name is a conflict.
#[derive(Debug)]
pub struct UsersAdd;

impl Method for UsersAdd {
    type Params = NewUser;
    type Reply = User;
    const INFO: MethodInfo = row("auth.users.add", Kind::Command);
}

/// Changes a user's role or scope, which ends its sessions: they carry both. The last administrator stays one.
#[derive(Debug)]
pub struct UsersUpdate;

impl Method for UsersUpdate {
    type Params = UserChange;
    type Reply = User;
    const INFO: MethodInfo = row("auth.users.update", Kind::Command);
}

/// Removes a user, which ends its sessions. The last administrator stays.
#[derive(Debug)]
pub struct UsersRemove;

impl Method for UsersRemove {
    type Params = UserRef;
    type Reply = Done;
    const INFO: MethodInfo = row("auth.users.remove", Kind::Command);
}

/// Sets a password, which ends the user's sessions: one's own with the old one, another's as an administrator.
#[derive(Debug)]
pub struct UsersSetPassword;

impl Method for UsersSetPassword {
    type Params = PasswordChange;
    type Reply = Done;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Role(Role::Viewer),
        ..row("auth.users.set_password", Kind::Command)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_password_has_at_least_8_characters_and_is_never_shown() {
        for (text, good) in [
            ("1234567", false),
            ("12345678", true),
            ("пароль", false),
            ("пароль88", true),
            (&"x".repeat(1025), false),
        ] {
            assert_eq!(text.parse::<NewPassword>().is_ok(), good, "{text}");
        }
        let shown = format!("{:?}", "hunter22".parse::<NewPassword>().unwrap());
        assert!(!shown.contains("hunter22"), "{shown}");
    }

    #[test]
    fn a_scope_has_a_bound() {
        let of = |count: usize| {
            let scope = Scope::Only(vec!["vm-1".parse().unwrap(); count]);
            let change = serde_json::json!({ "name": "ann", "scope": scope });
            serde_json::from_value::<UserChange>(change).is_ok()
        };
        assert!(of(MOST_INSTANCES) && !of(MOST_INSTANCES + 1));
        let nothing: UserChange = serde_json::from_str(r#"{"name":"ann"}"#).unwrap();
        assert_eq!((nothing.role, nothing.scope), (None, None));
    }
}
