//! Methods of auth-svc for user management and for logout.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::{
    Access, Class, Kind, Method, MethodInfo, NewUserName, Role, Scope, Service, UserName,
    auth::{Password, Token},
    bounded_text,
    metrics::Limit,
};

/// Maximum number of VMs in a user's limited scope. The limit keeps two kinds of messages small: every request between
/// gateway and services, which carries the scope in a header, and the HTTP request that sets the scope (500 instance
/// ids of maximum length take half of the 64 KiB that its body may have).
pub const MOST_INSTANCES: usize = 500;

/// A new password: at least 8 characters (NIST SP 800-63B) and at most 1024 bytes.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct NewPassword(Password);

impl NewPassword {
    const RULE: &str = "must be a text of at least 8 characters and at most 1024 bytes";
    const SHORTEST: usize = 8;

    fn allows(text: &str) -> bool {
        text.chars().count() >= Self::SHORTEST && text.parse::<Password>().is_ok()
    }

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

/// A user as shown to administrators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub name: UserName,
    pub role: Role,
    /// The VMs that the user may see.
    pub scope: Scope,
    /// Whether the user is a service account, which has no password and acts only through API tokens.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub service: bool,
    /// Time at which the user was created, in Unix milliseconds.
    pub created_at_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRef {
    pub name: UserName,
}

/// The properties of a user to be created.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewUser {
    pub name: NewUserName,
    /// Absent for a service account, which cannot log in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<NewPassword>,
    #[serde(deserialize_with = "known_role")]
    pub role: Role,
    /// The VMs that the user may see; at most [`MOST_INSTANCES`].
    #[serde(deserialize_with = "bounded_scope")]
    pub scope: Scope,
}

/// Changes to a user. Properties that are absent remain unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserChange {
    pub name: UserName,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "known_role_if_given"
    )]
    pub role: Option<Role>,
    /// The VMs that the user may see; at most [`MOST_INSTANCES`].
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bounded_scope_if_given"
    )]
    pub scope: Option<Scope>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PasswordChange {
    /// Name of the user whose password is set.
    pub name: UserName,
    /// The new password.
    pub password: NewPassword,
    /// The current password; required when users change their own password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_password: Option<Password>,
}

/// Selects a page of users, sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserPage {
    /// Returns only users whose name sorts after this one, which is the last name of the previous page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<UserName>,
    /// Maximum number of users to return.
    #[serde(default)]
    pub limit: Limit,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserList {
    /// The users, sorted by name.
    pub users: Vec<User>,
    /// Whether the list of users continues on a further page.
    pub more: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionRef {
    pub session_id: Token,
}

/// An empty reply: the request succeeded and there is nothing to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// Decodes a role and rejects unknown ones.
pub fn known_role<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Role, D::Error> {
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
            "must list at most {MOST_INSTANCES} VMs"
        ))),
        scope => Ok(scope),
    }
}

fn bounded_scope_if_given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Scope>, D::Error> {
    bounded_scope(deserializer).map(Some)
}

/// The method table entry of a method for user management. It requires the role `admin` unless overridden.
const fn row(subject: &'static str, kind: Kind) -> MethodInfo {
    MethodInfo {
        service: Service::Auth,
        subject,
        access: Access::Role(Role::Admin),
        kind,
        class: Class::Account,
    }
}

/// Ends the session of the request. Anyone who has the session token can end the session.
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

/// Creates a user; fails with a conflict if the user name is taken.
#[derive(Debug)]
pub struct UsersAdd;

impl Method for UsersAdd {
    type Params = NewUser;
    type Reply = User;
    const INFO: MethodInfo = row("auth.users.add", Kind::Command);
}

/// Changes a user's role or scope and ends all of the user's sessions. The last administrator cannot be demoted.
#[derive(Debug)]
pub struct UsersUpdate;

impl Method for UsersUpdate {
    type Params = UserChange;
    type Reply = User;
    const INFO: MethodInfo = row("auth.users.update", Kind::Command);
}

/// Removes a user and ends all of the user's sessions. The last administrator cannot be removed.
#[derive(Debug)]
pub struct UsersRemove;

impl Method for UsersRemove {
    type Params = UserRef;
    type Reply = Done;
    const INFO: MethodInfo = row("auth.users.remove", Kind::Command);
}

/// Sets a user's password and ends all of the user's sessions. Users need their current password to change their own;
/// administrators can set the passwords of other users.
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
    fn short_new_passwords_are_rejected_and_hidden_in_debug_output() {
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
    fn scope_with_too_many_vms_is_rejected() {
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
