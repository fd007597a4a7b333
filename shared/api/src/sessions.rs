//! Sessions and users as auth-svc stores them for gateways, and the methods that list and end sessions.
//!
//! A session is valid only while its user is in the KV bucket [`USER_BUCKET`], and only if it began at or after the
//! user's `sessions_not_before_ms`. Therefore a single write to that bucket ends all sessions of a changed or removed
//! user, even if deleting the sessions themselves fails.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Access, Class, Kind, Method, MethodInfo, Principal, Role, Service, UserKey, auth::TokenHash,
    bounded_text, users::Done,
};

/// Name of the JetStream KV bucket of sessions. The key is [`super::auth::Token::key`], the value a [`SessionRecord`].
pub const SESSION_BUCKET: &str = "vmwatch_sessions";

/// Name of the JetStream KV bucket of users. The key is [`UserKey::bucket_key`], the value a [`UserRecord`].
pub const USER_BUCKET: &str = "vmwatch_users";

/// Maximum number of sessions in one report of used sessions ([`UsedSessions`]).
pub const MOST_USED: usize = 1000;

/// A session as stored in the KV bucket. The user's role and scope are stored separately, in [`UserRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    pub user: UserKey,
    /// Time at which the session began, in Unix milliseconds.
    pub began_at_ms: u64,
    /// Time at which the session expires even if it is in use, in Unix milliseconds. The gateway checks this time
    /// independently of the KV bucket's age limit.
    pub expires_at_ms: u64,
    /// Time at which the session was last used, as far as auth-svc knows, in Unix milliseconds.
    pub last_used_at_ms: u64,
    /// Time at which the session expires if it is not used again, in Unix milliseconds.
    pub idle_ends_at_ms: u64,
    /// IP address of the client at login.
    pub source: Option<String>,
}

/// A copy of a user's database record, which gateways read from a KV bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRecord {
    /// Name, role and scope of the user.
    pub principal: Principal,
    /// Sessions of the user that began before this time are invalid, Unix milliseconds.
    pub sessions_not_before_ms: u64,
    /// Time at which the user was created, Unix milliseconds; 0 in records of older versions. It distinguishes the user
    /// from earlier users of the same name.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub created_at_ms: u64,
    /// Whether the user was removed but the user's sessions have not been deleted yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde requires"
)]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl UserRecord {
    /// Whether a session of this user that began at the given time is valid.
    pub const fn allows_session_of(&self, began_at_ms: u64) -> bool {
        !self.removed && began_at_ms >= self.sessions_not_before_ms
    }
}

/// The public id of a session: 32 hex digits that reveal nothing about the session token.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(pattern = "^[0-9a-f]{32}$")
)]
pub struct SessionId(String);

impl SessionId {
    const RULE: &str = "must be 32 characters of 0-9 and a-f";

    /// Derives the public session id from the hash of the session token.
    pub fn from_token_hash(token: &TokenHash) -> Self {
        let digest: [u8; 32] = Sha256::new()
            .chain_update(b"vmwatch session id")
            .chain_update(token)
            .finalize()
            .into();
        Self(hex::encode(digest.split_at(16).0))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl FromStr for SessionId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Self::RULE)
        }
    }
}

impl<'de> Deserialize<'de> for SessionId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Empty parameters for methods that apply to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {}

/// A session as shown to its user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSummary {
    pub id: SessionId,
    /// Time at which the session began, in Unix milliseconds.
    pub began_at_ms: u64,
    /// Time at which the session was last used, as far as auth-svc knows, in Unix milliseconds.
    pub last_used_at_ms: u64,
    /// Time at which the session expires if it is not used again, in Unix milliseconds.
    pub idle_ends_at_ms: u64,
    /// Time at which the session expires even if it is in use, in Unix milliseconds.
    pub expires_at_ms: u64,
    /// IP address of the client at login.
    pub source: Option<String>,
}

/// The valid sessions of a user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionList {
    /// The user's valid sessions, newest first; at most `VMWATCH_SESSIONS_PER_USER`.
    pub sessions: Vec<SessionSummary>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionIdRef {
    pub id: SessionId,
}

/// The times at which sessions were last used, as reported by a gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedSessions {
    /// The used sessions. If there are more than [`MOST_USED`], auth-svc ignores the excess.
    pub sessions: Vec<UsedSession>,
}

/// The last use of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedSession {
    /// Key of the session in the KV bucket [`SESSION_BUCKET`].
    pub key: String,
    /// Time at which the session was used, in Unix milliseconds.
    pub used_at_ms: u64,
}

/// The method table entry of a method on the caller's own sessions. Its class is `Class::Account` unless overridden.
const fn row(subject: &'static str, kind: Kind) -> MethodInfo {
    MethodInfo {
        service: Service::Auth,
        subject,
        access: Access::Role(Role::Viewer),
        kind,
        class: Class::Account,
    }
}

/// Lists the caller's valid sessions.
#[derive(Debug)]
pub struct SessionsList;

impl Method for SessionsList {
    type Params = Own;
    type Reply = SessionList;
    const INFO: MethodInfo = row("auth.sessions.list", Kind::Query);
}

/// Ends one of the caller's sessions.
#[derive(Debug)]
pub struct SessionsEnd;

impl Method for SessionsEnd {
    type Params = SessionIdRef;
    type Reply = Done;
    const INFO: MethodInfo = row("auth.sessions.end", Kind::Command);
}

/// Records when sessions were used, so sessions in use do not expire as idle. Gateways call this method without a
/// principal.
#[derive(Debug)]
pub struct SessionsUsed;

impl Method for SessionsUsed {
    type Params = UsedSessions;
    type Reply = Done;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Public,
        class: Class::CheapRead,
        ..row("auth.sessions.used", Kind::Query)
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scope, auth::Token};

    #[test]
    fn session_id_reveals_neither_token_nor_hash() {
        let token = Token::from_random([7; 16]);
        let id = SessionId::from_token_hash(&token.hash());
        assert_eq!(id.as_str().parse(), Ok(id.clone()));
        assert_ne!(
            id,
            SessionId::from_token_hash(&Token::from_random([8; 16]).hash())
        );
        assert!(!token.key().contains(id.as_str()) && !token.to_string().contains(id.as_str()));
        for bad in ["", "0", &"g".repeat(32), &"A".repeat(32), &"0".repeat(33)] {
            assert!(bad.parse::<SessionId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sessions_of_removed_users_and_sessions_from_before_the_cutoff_are_invalid() {
        let mut user = UserRecord {
            principal: Principal {
                user: "eve".into(),
                role: Role::Viewer,
                scope: Scope::All,
            },
            sessions_not_before_ms: 1000,
            created_at_ms: 0,
            removed: false,
        };
        assert!(user.allows_session_of(1000) && !user.allows_session_of(999));
        user.removed = true;
        assert!(!user.allows_session_of(1000));
    }
}
