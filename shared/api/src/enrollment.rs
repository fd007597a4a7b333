//! Enrolment: an administrator creates a join token, with which an agent registers the public key that it logs in to NATS
//! with. The private key never leaves the VM.
//!
//! auth-svc stores tokens and keys in two KV buckets. A key is valid while its record is in [`AGENT_BUCKET`] and not
//! revoked.

mod texts;

use std::num::NonZeroU32;

use serde::{Deserialize, Deserializer, Serialize, de::Error};

pub use texts::{AgentKey, InvalidJoinToken, JoinToken, JoinTokenId, Platform, SecretText};

use super::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service,
    metrics::Limit,
    time::UtcOffset,
    users::Done,
    wire::{Fault, FaultKind},
};

/// Name of the JetStream KV bucket of join tokens. The key is the [`JoinTokenId`], the value a [`JoinTokenRecord`].
pub const JOIN_TOKEN_BUCKET: &str = "vmwatch_join_tokens";
/// Name of the JetStream KV bucket of agents. The key is the VM's [`InstanceId`], the value an [`AgentRecord`].
pub const AGENT_BUCKET: &str = "vmwatch_agents";

/// Default and maximum time in seconds for which a join token is valid.
pub const DEFAULT_JOIN_SECONDS: u32 = 3600;
pub const MAX_JOIN_SECONDS: u32 = 90 * 24 * 3600;
/// Maximum number of VMs that can be enrolled with one join token.
pub const MAX_JOIN_USES: u32 = 10_000;
/// Maximum number of instance ids that a join token lists.
pub const MAX_JOIN_VMS: usize = 100;
/// Maximum number of former keys of a VM that are remembered.
pub const MAX_FORMER_KEYS: usize = 16;

/// The VMs whose agents may use a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JoinVms {
    /// Any VM.
    Any,
    /// The VMs with these ids, 1 to 100.
    #[serde(deserialize_with = "bounded_ids")]
    Only(Vec<InstanceId>),
    /// The VMs whose ids begin with this text.
    Prefix(InstanceId),
}

impl JoinVms {
    /// Whether the agent of this VM may use the token.
    pub fn allows(&self, instance_id: &InstanceId) -> bool {
        match self {
            Self::Any => true,
            Self::Only(ids) => ids.contains(instance_id),
            Self::Prefix(prefix) => instance_id.as_str().starts_with(prefix.as_str()),
        }
    }
}

/// Implemented by hand because the derived schema would allow additional keys and an empty list.
#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for JoinVms {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        use utoipa::openapi::{
            ArrayBuilder, ObjectBuilder, OneOfBuilder, Ref, RefOr, Schema, Type, schema::AdditionalProperties,
        };
        let object = |name: &str, description: &str, value: RefOr<Schema>| {
            ObjectBuilder::new()
                .description(Some(description))
                .property(name, value)
                .required(name)
                .additional_properties(Some(AdditionalProperties::FreeForm(false)))
        };
        let instance = || Ref::from_schema_name("InstanceId");
        let any = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("Any VM."))
            .enum_values(Some(["any"]));
        let ids = ArrayBuilder::new()
            .items(instance())
            .min_items(Some(1))
            .max_items(Some(MAX_JOIN_VMS));
        OneOfBuilder::new()
            .item(any)
            .item(object("only", "The VMs with these ids.", ids.into()))
            .item(object(
                "prefix",
                "The VMs whose ids begin with this text.",
                instance().into(),
            ))
            .description(Some("The VMs whose agents may use a join token."))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for JoinVms {
    fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
        let instance = <InstanceId as utoipa::PartialSchema>::schema();
        schemas.push((<InstanceId as utoipa::ToSchema>::name().into_owned(), instance));
    }
}

fn bounded_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<InstanceId>, D::Error> {
    let ids = Vec::<InstanceId>::deserialize(deserializer)?;
    if (1..=MAX_JOIN_VMS).contains(&ids.len()) {
        Ok(ids)
    } else {
        Err(D::Error::custom("must list 1 to 100 VMs"))
    }
}

/// A join token as stored in the KV bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRecord {
    /// The secret's hash ([`JoinToken::secret_hash`]).
    pub secret_hash: String,
    /// Name of the administrator that created the token.
    pub created_by: String,
    /// Whether a command of auth-svc created the token. Otherwise the token is refused once its creator is no longer an
    /// administrator, and allows only VMs in the creator's scope.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_command: bool,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Time from which on the token is refused, in Unix milliseconds.
    pub expires_at_ms: u64,
    /// Number of VMs that can be enrolled with the token.
    pub uses: u32,
    /// Number of VMs that were enrolled with the token.
    pub used: u32,
    pub vms: JoinVms,
    /// Whether the token may enrol a VM that has an agent; the old agent's key is revoked then.
    pub replace: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
    /// The latest use, so that an enrolment that was interrupted after it had taken the use can be repeated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_use: Option<JoinTokenUse>,
}

/// A use of a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenUse {
    pub instance_id: InstanceId,
    pub public_key: AgentKey,
    /// Revision of the VM's agent record when the use was taken; 0 if there was none. If the record has changed since, the
    /// use does not permit storing the agent.
    #[serde(default)]
    pub agent_revision: u64,
}

/// An enrolled agent as stored in the KV bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    pub public_key: AgentKey,
    /// The join token that the agent used.
    pub join_token: JoinTokenId,
    /// Unix milliseconds.
    pub enrolled_at_ms: u64,
    /// IP address from which the agent enrolled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Not known for VMs whose platform has no identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Time at which the key was revoked, in Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at_ms: Option<u64>,
    /// The keys that the VM had before, which no token brings back: the newest [`MAX_FORMER_KEYS`], newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_keys: Vec<AgentKey>,
}

impl AgentRecord {
    /// The keys that the VM has had if this agent is replaced by one with another key.
    pub fn keys_before(&self, next: &AgentKey) -> Vec<AgentKey> {
        let mut keys = self.former_keys.clone();
        if self.public_key != *next {
            keys.push(self.public_key.clone());
        }
        let surplus = keys.len().saturating_sub(MAX_FORMER_KEYS);
        keys.split_off(surplus)
    }
}

/// The properties of a join token to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewJoinToken {
    /// For how many seconds the token is valid, 60 to [`MAX_JOIN_SECONDS`].
    #[serde(deserialize_with = "valid_seconds")]
    pub valid_seconds: u32,
    /// How many VMs can be enrolled, 1 to [`MAX_JOIN_USES`].
    #[serde(deserialize_with = "bounded_uses")]
    pub uses: NonZeroU32,
    pub vms: JoinVms,
    pub replace: bool,
}

fn valid_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ 60..=MAX_JOIN_SECONDS => Ok(seconds),
        _ => Err(D::Error::custom("must be 60 to 7776000 seconds")),
    }
}

fn bounded_uses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NonZeroU32, D::Error> {
    let uses = NonZeroU32::deserialize(deserializer)?;
    if uses.get() <= MAX_JOIN_USES {
        Ok(uses)
    } else {
        Err(D::Error::custom("must be 1 to 10000"))
    }
}

/// A join token as shown to administrators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenSummary {
    pub id: JoinTokenId,
    pub created_by: String,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Unix milliseconds.
    pub expires_at_ms: u64,
    pub uses: u32,
    pub used: u32,
    pub vms: JoinVms,
    pub replace: bool,
    pub revoked: bool,
}

/// A join token that was just created. Only this reply contains the token itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreatedJoinToken {
    pub token: SecretText,
    pub summary: JoinTokenSummary,
}

/// The valid, used up, expired and revoked join tokens that are still stored, newest first; at most 1,000.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenList {
    pub tokens: Vec<JoinTokenSummary>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRef {
    pub id: JoinTokenId,
}

/// The request of an agent for enrolment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Enrollment {
    pub token: SecretText,
    pub instance_id: InstanceId,
    pub public_key: AgentKey,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// What an enrolled agent needs in order to report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    pub instance_id: InstanceId,
    /// URLs of the NATS servers, such as `tls://bus.example.com:4222` or `wss://bus.example.com:443`.
    pub nats_urls: Vec<String>,
    /// PEM certificates of the authorities that sign the NATS servers' certificates; empty if the VM's own authorities do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ca_certificates: String,
    pub utc_offset: UtcOffset,
    /// Intervals at which the agent samples the VM and its processes, in milliseconds.
    pub vm_interval_ms: u64,
    pub process_interval_ms: u64,
}

/// Selects a page of enrolled agents, sorted by instance id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentPage {
    /// Returns only agents whose instance id sorts after this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<InstanceId>,
    #[serde(default)]
    pub limit: Limit,
}

/// An enrolled agent as shown to administrators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentSummary {
    pub instance_id: InstanceId,
    pub public_key: AgentKey,
    pub join_token: JoinTokenId,
    /// Unix milliseconds.
    pub enrolled_at_ms: u64,
    pub source: Option<String>,
    /// Unix milliseconds; `None` if the key is valid.
    pub revoked_at_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentList {
    pub agents: Vec<AgentSummary>,
    /// Whether the list continues on a further page.
    pub more: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRef {
    pub instance_id: InstanceId,
}

/// The method table entry of a method for join tokens and agents. It requires the role `admin` unless overridden.
const fn row(subject: &'static str, kind: Kind) -> MethodInfo {
    MethodInfo {
        service: Service::Auth,
        subject,
        access: Access::Role(Role::Admin),
        kind,
        class: Class::Account,
    }
}

/// Creates a join token.
#[derive(Debug)]
pub struct JoinTokensCreate;

impl Method for JoinTokensCreate {
    type Params = NewJoinToken;
    type Reply = CreatedJoinToken;
    const INFO: MethodInfo = row("auth.join_tokens.create", Kind::Command);
}

/// Lists join tokens.
#[derive(Debug)]
pub struct JoinTokensList;

impl Method for JoinTokensList {
    type Params = super::sessions::Own;
    type Reply = JoinTokenList;
    const INFO: MethodInfo = row("auth.join_tokens.list", Kind::Query);
}

/// Revokes a join token. Agents that have used it stay enrolled.
#[derive(Debug)]
pub struct JoinTokensRevoke;

impl Method for JoinTokensRevoke {
    type Params = JoinTokenRef;
    type Reply = Done;
    const INFO: MethodInfo = row("auth.join_tokens.revoke", Kind::Command);
}

/// Registers the public key of an agent. The same request with the same key can be repeated.
#[derive(Debug)]
pub struct AgentsEnroll;

impl Method for AgentsEnroll {
    type Params = Enrollment;
    type Reply = Enrolled;
    const INFO: MethodInfo = MethodInfo {
        access: Access::Public,
        // Like logins, clients can send enrolments without a session. They must not use up the permits of account
        // requests.
        class: Class::Enrollment,
        ..row("auth.agents.enroll", Kind::Command)
    };
}

/// Lists the enrolled agents of the VMs in the principal's scope.
#[derive(Debug)]
pub struct AgentsList;

impl Method for AgentsList {
    type Params = AgentPage;
    type Reply = AgentList;
    const INFO: MethodInfo = row("auth.agents.list", Kind::Query);
}

/// Revokes the key of an agent and ends its connections.
#[derive(Debug)]
pub struct AgentsRevoke;

impl Method for AgentsRevoke {
    type Params = AgentRef;
    type Reply = Done;
    const INFO: MethodInfo = row("auth.agents.revoke", Kind::Command);

    fn instance(params: &AgentRef) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }

    fn hidden() -> Result<Done, Fault> {
        Err(no_such_agent())
    }
}

/// The fault for a VM that has no agent or that is outside the principal's scope.
pub fn no_such_agent() -> Fault {
    Fault::new(FaultKind::NotFound, "this VM has no enrolled agent")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_token_allows_only_its_vms() {
        let id = |text: &str| text.parse::<InstanceId>().unwrap();
        assert!(JoinVms::Any.allows(&id("a")));
        let only = JoinVms::Only(vec![id("a"), id("b")]);
        assert!(only.allows(&id("b")) && !only.allows(&id("ab")));
        let prefix = JoinVms::Prefix(id("web-"));
        assert!(prefix.allows(&id("web-1")) && !prefix.allows(&id("db-1")));
    }

    #[test]
    fn newest_former_keys_of_a_vm_are_kept() {
        let key = |number: usize| {
            format!("U{:A>55}", "B".repeat(number))
                .parse::<AgentKey>()
                .unwrap()
        };
        let mut agent = AgentRecord {
            public_key: key(1),
            join_token: "0000000000000000".parse().unwrap(),
            enrolled_at_ms: 0,
            source: None,
            platform: None,
            revoked_at_ms: None,
            former_keys: Vec::new(),
        };
        assert_eq!(agent.keys_before(&key(1)), [], "the key stays the same");
        for next in 2..MAX_FORMER_KEYS + 5 {
            agent.former_keys = agent.keys_before(&key(next));
            agent.public_key = key(next);
        }
        let newest: Vec<_> = (4..MAX_FORMER_KEYS + 4).map(key).collect();
        assert_eq!(agent.former_keys, newest);
    }

    #[test]
    fn limits_of_join_tokens_are_checked_while_decoding() {
        let read = |seconds: u32, uses: u32, vms: &str| {
            let text = format!(r#"{{"valid_seconds":{seconds},"uses":{uses},"vms":{vms},"replace":false}}"#);
            serde_json::from_str::<NewJoinToken>(&text).is_ok()
        };
        assert!(read(60, 1, r#""any""#) && read(MAX_JOIN_SECONDS, MAX_JOIN_USES, r#"{"prefix":"web-"}"#));
        assert!(!read(59, 1, r#""any""#) && !read(MAX_JOIN_SECONDS + 1, 1, r#""any""#));
        assert!(!read(60, 0, r#""any""#) && !read(60, MAX_JOIN_USES + 1, r#""any""#));
        assert!(read(60, 1, r#"{"only":["a"]}"#) && !read(60, 1, r#"{"only":[]}"#));
    }
}
