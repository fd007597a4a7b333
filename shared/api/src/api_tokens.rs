//! API tokens, with which programs send REST requests in the name of a user or a service account.
//!
//! auth-svc stores the tokens in a KV bucket that gateways follow. A token permits what its record and its owner permit
//! at the time of the request, whichever is less, and nothing once its owner was removed.

mod texts;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

pub use texts::{ApiToken, ApiTokenId, InvalidApiToken, SecretHash};

use super::{
    Access, Class, Kind, Method, MethodInfo, Principal, Role, Scope, Service, UserName,
    alerts::Title,
    enrollment::SecretText,
    metrics::Limit,
    sessions::UserRecord,
    users::{Done, known_role},
};

/// Name of the JetStream KV bucket of API tokens. The key is the [`ApiTokenId`], the value an [`ApiTokenRecord`].
pub const API_TOKEN_BUCKET: &str = "vmwatch_tokens";

/// Maximum time in seconds for which an API token is valid: 365 days.
pub const MAX_TOKEN_SECONDS: u32 = 365 * 24 * 3600;
/// Maximum number of VMs in the scope of an API token.
pub const MAX_TOKEN_VMS: usize = 100;
/// Maximum number of tokens in one report of used tokens ([`UsedApiTokens`]).
pub const MAX_USED_TOKENS: usize = 1000;

/// The requests that an API token may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ApiTokenAccess {
    /// All requests that its role allows, except those that change users, tokens or channels.
    Full,
    /// Only requests that read.
    ReadOnly,
    /// Only requests for the metrics of VMs.
    MetricsOnly,
    /// A restriction that only a newer version of vmwatch knows. It permits no request.
    #[serde(other)]
    Unknown,
}

/// Implemented by hand because the derived schema would also list `Unknown`, which no API client can send.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for ApiTokenAccess {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let description = "The requests that an API token may send: all that its role allows except those that change users, \
                           tokens, join tokens or channels; only requests that read; or only requests for the metrics of VMs.";
        super::known_values(description, ["full", "read_only", "metrics_only"])
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for ApiTokenAccess {}

/// An API token as stored in the KV bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenRecord {
    /// The secret's hash ([`ApiToken::secret_hash`]).
    pub secret_hash: SecretHash,
    pub name: Title,
    /// Name of the user that owns the token.
    pub owner: String,
    /// Time at which the owner was created, in Unix milliseconds. A user of the same name that was created at another
    /// time is another user.
    pub owner_created_at_ms: u64,
    /// Name of the user that created the token: the owner, or an administrator if the owner is a service account.
    pub created_by: String,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Time from which on the token is refused, in Unix milliseconds.
    pub expires_at_ms: u64,
    pub role: Role,
    /// The VMs that the token may see, as far as its owner may see them.
    pub scope: Scope,
    pub access: ApiTokenAccess,
    /// The latest use that auth-svc knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_use: Option<ApiTokenUse>,
}

/// The id and the name of an API token, by which the audit shows with which token a request was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ApiTokenLabel {
    /// Public id of the API token, which is also part of the token itself.
    pub id: ApiTokenId,
    /// Name that the token was given when it was created.
    pub name: Title,
}

/// A use of an API token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenUse {
    /// Unix milliseconds.
    pub at_ms: u64,
    /// IP address of the client.
    pub source: Option<String>,
}

impl ApiTokenRecord {
    /// Whether the token has the secret of this record and has not expired.
    pub fn allows(&self, token: &ApiToken, now_ms: u64) -> bool {
        self.secret_hash == token.secret_hash() && now_ms < self.expires_at_ms
    }

    /// The principal of a request with the token: the name of its owner, with the lesser of the token's and the owner's
    /// role and scope. `None` if the owner was removed.
    pub fn principal(&self, owner: &UserRecord) -> Option<Principal> {
        let is_owner = !owner.removed && owner.created_at_ms == self.owner_created_at_ms;
        is_owner.then(|| Principal {
            user: owner.principal.user.clone(),
            role: self.role.min(owner.principal.role),
            scope: self.scope.intersection(&owner.principal.scope),
        })
    }
}

/// The properties of an API token to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewApiToken {
    pub name: Title,
    /// For how many seconds the token is valid, 60 to [`MAX_TOKEN_SECONDS`].
    #[serde(deserialize_with = "valid_seconds")]
    pub valid_seconds: u32,
    #[serde(deserialize_with = "known_role")]
    pub role: Role,
    /// The VMs that the token may see; at most [`MAX_TOKEN_VMS`].
    #[serde(deserialize_with = "bounded_scope")]
    pub scope: Scope,
    #[serde(deserialize_with = "known_access")]
    pub access: ApiTokenAccess,
    /// The service account that will own the token; absent for a token of the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<UserName>,
}

fn valid_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ 60..=MAX_TOKEN_SECONDS => Ok(seconds),
        _ => Err(D::Error::custom("must be 60 to 31536000 seconds")),
    }
}

/// Decodes the scope of a new API token.
pub fn bounded_scope<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Scope, D::Error> {
    match Scope::deserialize(deserializer)? {
        Scope::Unknown => Err(D::Error::custom("must be all or only")),
        Scope::Only(instances) if instances.len() > MAX_TOKEN_VMS => {
            Err(D::Error::custom(format!("must list at most {MAX_TOKEN_VMS} VMs")))
        }
        scope => Ok(scope),
    }
}

/// Decodes the access of a new API token.
pub fn known_access<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ApiTokenAccess, D::Error> {
    match ApiTokenAccess::deserialize(deserializer)? {
        ApiTokenAccess::Unknown => Err(D::Error::custom("must be full, read_only or metrics_only")),
        access => Ok(access),
    }
}

/// An API token as shown to its owner and to administrators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenSummary {
    pub id: ApiTokenId,
    pub name: Title,
    pub owner: String,
    pub created_by: String,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Unix milliseconds.
    pub expires_at_ms: u64,
    pub role: Role,
    pub scope: Scope,
    pub access: ApiTokenAccess,
    pub last_use: Option<ApiTokenUse>,
}

/// An API token that was just created. Only this reply contains the token itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreatedApiToken {
    pub token: SecretText,
    pub summary: ApiTokenSummary,
}

/// Selects a page of API tokens, sorted by id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenPage {
    /// Whether to return the tokens of all users instead of the caller's, which only administrators may do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
    /// Returns only tokens with ids that sort after this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<ApiTokenId>,
    #[serde(default)]
    pub limit: Limit,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenList {
    pub tokens: Vec<ApiTokenSummary>,
    /// Whether the list continues on a further page.
    pub more: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiTokenRef {
    pub id: ApiTokenId,
}

/// The latest uses of API tokens, as reported by a gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedApiTokens {
    /// The used tokens. If there are more than [`MAX_USED_TOKENS`], auth-svc ignores the excess.
    pub tokens: Vec<UsedApiToken>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedApiToken {
    pub id: ApiTokenId,
    pub last_use: ApiTokenUse,
}

/// The method table entry of a method for API tokens.
const fn row(subject: &'static str, kind: Kind) -> MethodInfo {
    MethodInfo {
        service: Service::Auth,
        subject,
        access: Access::Role(Role::Viewer),
        kind,
        class: Class::Account,
    }
}

/// Creates an API token of the caller, or, if the caller is an administrator, of a service account.
#[derive(Debug)]
pub struct ApiTokensCreate;

impl Method for ApiTokensCreate {
    type Params = NewApiToken;
    type Reply = CreatedApiToken;
    const INFO: MethodInfo = row("auth.tokens.create", Kind::Command);
}

/// Lists the caller's API tokens, or, for administrators, those of all users.
#[derive(Debug)]
pub struct ApiTokensList;

impl Method for ApiTokensList {
    type Params = ApiTokenPage;
    type Reply = ApiTokenList;
    const INFO: MethodInfo = row("auth.tokens.list", Kind::Query);
}

/// Revokes an API token of the caller, or, if the caller is an administrator, of any user.
#[derive(Debug)]
pub struct ApiTokensRevoke;

impl Method for ApiTokensRevoke {
    type Params = ApiTokenRef;
    type Reply = Done;
    const INFO: MethodInfo = row("auth.tokens.revoke", Kind::Command);
}

/// Records the latest uses of API tokens. Gateways call this method without a principal.
#[derive(Debug)]
pub struct ApiTokensUsed;

impl Method for ApiTokensUsed {
    type Params = UsedApiTokens;
    type Reply = Done;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Public,
        class: Class::CheapRead,
        ..row("auth.tokens.used", Kind::Query)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = include_str!("../../../tests/golden/forms/api-token.json");

    fn record() -> ApiTokenRecord {
        serde_json::from_str(RECORD).unwrap()
    }

    fn owner(role: Role, scope: Scope) -> UserRecord {
        UserRecord {
            principal: Principal {
                user: "Ann".to_owned(),
                role,
                scope,
            },
            sessions_not_before_ms: 0,
            created_at_ms: record().owner_created_at_ms,
            removed: false,
        }
    }

    fn only(ids: &[&str]) -> Scope {
        Scope::Only(ids.iter().map(|id| id.parse().unwrap()).collect())
    }

    #[test]
    fn token_permits_the_lesser_of_its_own_and_its_owners_role_and_scope() {
        let mut token = record();
        token.role = Role::Operator;
        token.scope = only(&["vm-1", "vm-2"]);
        let principal = |token: &ApiTokenRecord, role, scope| token.principal(&owner(role, scope)).unwrap();
        let of_admin = principal(&token, Role::Admin, Scope::All);
        assert_eq!(
            (of_admin.user.as_str(), of_admin.role, of_admin.scope),
            ("Ann", Role::Operator, only(&["vm-1", "vm-2"]))
        );
        let of_viewer = principal(&token, Role::Viewer, only(&["vm-2", "vm-3"]));
        assert_eq!((of_viewer.role, of_viewer.scope), (Role::Viewer, only(&["vm-2"])));
        token.scope = Scope::All;
        let of_viewer = principal(&token, Role::Unknown, only(&["vm-3"]));
        assert_eq!(
            (of_viewer.role, of_viewer.scope),
            (Role::Unknown, only(&["vm-3"]))
        );
        assert_eq!(
            principal(&token, Role::Admin, Scope::Unknown).scope,
            Scope::Unknown
        );
        token.scope = Scope::Unknown;
        assert_eq!(principal(&token, Role::Admin, Scope::All).scope, Scope::Unknown);
    }

    #[test]
    fn token_of_removed_user_permits_nothing_even_if_another_user_gets_the_name() {
        let token = record();
        let mut user = owner(Role::Admin, Scope::All);
        assert!(token.principal(&user).is_some());
        user.removed = true;
        assert_eq!(token.principal(&user), None);
        user.removed = false;
        user.created_at_ms += 1;
        assert_eq!(token.principal(&user), None);
    }

    #[test]
    fn token_is_refused_with_another_secret_and_from_its_expiry_on() {
        let token = ApiToken::from_random([1; 8], [2; 32]);
        let mut record = record();
        record.secret_hash = token.secret_hash();
        record.expires_at_ms = 1000;
        assert!(record.allows(&token, 999) && !record.allows(&token, 1000));
        assert!(!record.allows(&ApiToken::from_random([1; 8], [3; 32]), 0));
    }

    #[test]
    fn limits_of_new_tokens_are_checked_while_decoding() {
        let new = |seconds: u32, role: &str, scope: serde_json::Value, access: &str| {
            let token = serde_json::json!({
                "name": "x", "valid_seconds": seconds, "role": role, "scope": scope, "access": access,
            });
            serde_json::from_value::<NewApiToken>(token).is_ok()
        };
        let all = || serde_json::json!("all");
        assert!(new(60, "viewer", all(), "full") && new(MAX_TOKEN_SECONDS, "admin", all(), "metrics_only"));
        assert!(!new(59, "viewer", all(), "full") && !new(MAX_TOKEN_SECONDS + 1, "viewer", all(), "full"));
        assert!(!new(60, "root", all(), "full") && !new(60, "viewer", all(), "writes"));
        let some = |count: usize| serde_json::json!({ "only": vec!["vm-1"; count] });
        assert!(new(60, "viewer", some(MAX_TOKEN_VMS), "full"));
        assert!(!new(60, "viewer", some(MAX_TOKEN_VMS + 1), "full"));
        assert!(!new(60, "viewer", serde_json::json!("mine"), "full"));
    }
}
