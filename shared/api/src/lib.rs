//! The contract between vmwatch's programs: each method of each service is a Rust type. [`METHODS`] lists all methods;
//! [`wire`] defines the format of replies. This crate performs no I/O.
//!
//! To add a method, define its type in this crate (parameters, reply and [`MethodInfo`]), add an entry to [`METHODS`],
//! and write a handler in its service.

#![expect(
    missing_docs,
    reason = "the names of most types and fields are sufficient documentation"
)]

pub mod actions;
pub mod agents;
pub mod alerts;
pub mod api_tokens;
pub mod audit;
pub mod auth;
pub mod current;
pub mod enrollment;
pub mod events;
pub mod filesystems;
#[cfg(test)]
mod forms;
mod hex_id;
pub mod history;
pub mod hypervisor_samples;
pub mod inventory;
pub mod labels;
pub mod lifecycle;
pub mod measures;
pub mod metrics;
mod operation;
mod page;
mod principal;
pub mod process_changes;
pub mod process_search;
pub mod processes;
pub mod removal;
pub mod rows;
pub mod sessions;
pub mod starts;
pub mod status;
mod text;
pub mod time;
mod user_name;
pub mod users;
pub mod vms;
pub mod wire;

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

pub use page::{PAGE_BYTES, PageRoom, first_page};
#[cfg(feature = "openapi")]
pub use principal::scope_schema;
pub use principal::{Principal, Role, Scope};
pub use text::{InstanceId, InvalidInstanceId, bounded_text};
pub use user_name::{InvalidUserName, NewUserName, UserHash, UserKey, UserName};

use crate::wire::{Fault, FaultKind};

/// Prefix of the NATS subjects of all requests; `v1` is the version of the contract.
pub const SUBJECT_PREFIX: &str = "vmwatch.v1.";

/// A backend service. Its name is used as its NATS queue group, in `$SRV` discovery, and in telemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    Auth,
    Metrics,
    Lifecycle,
    Alert,
}

impl Service {
    /// The service's name: a single NATS subject token of the characters `[a-z-]`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auth => "vmwatch-auth",
            Self::Metrics => "vmwatch-metrics",
            Self::Lifecycle => "vmwatch-lifecycle",
            Self::Alert => "vmwatch-alert",
        }
    }
}

/// The authorization that a method requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The method requires no session.
    Public,
    /// The method requires a session of a user with at least this role.
    Role(Role),
}

/// Whether a method only reads or has an effect. The kind decides the deadline, and only commands have an idempotency
/// key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The method only reads, so it can be retried.
    Query,
    /// The method has an effect, so it must not be executed after its deadline or twice.
    Command,
}

/// A class of requests. The gateway and each service limit each class separately (`vmwatch_bus::limits`), so load
/// of one class cannot exhaust the capacity for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Logins: each costs a password hash, and clients can send them without a session.
    Login,
    /// Enrolments of agents, which have no session. Each costs some writes to KV buckets.
    Enrollment,
    /// Logouts, user management, and changes of alerts, which must remain possible under any other load.
    Account,
    /// Actions on VMs, which can take minutes.
    Command,
    /// Reads with a small, known cost: newest rows, lists, VM states.
    CheapRead,
    /// Reads that can scan many rows: histories of VMs and processes, and the audit.
    HeavyRead,
}

impl Class {
    /// The name of the request class in public messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Login => "logins",
            Self::Enrollment => "enrolments",
            Self::Account => "account requests",
            Self::Command => "commands",
            Self::CheapRead => "cheap reads",
            Self::HeavyRead => "heavy reads",
        }
    }
}

/// The properties of a method: an entry of the method table [`METHODS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodInfo {
    /// The service that implements the method.
    pub service: Service,
    /// The method's subject without [`SUBJECT_PREFIX`]. It is also the method's name in metrics, traces, logs and the
    /// audit.
    pub subject: &'static str,
    pub access: Access,
    pub kind: Kind,
    /// The class whose limit applies to requests of this method.
    pub class: Class,
}

impl MethodInfo {
    /// The NATS subject of the method, including [`SUBJECT_PREFIX`].
    pub fn full_subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}", self.subject)
    }
}

pub trait Method: 'static {
    /// The request parameters, validated while they are decoded.
    type Params: Serialize + DeserializeOwned + Send + 'static;
    /// The type of a successful reply.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    const INFO: MethodInfo;

    /// The VM that the request refers to. A principal whose scope excludes this VM gets the reply [`Method::hidden`].
    fn instance(_params: &Self::Params) -> Option<&InstanceId> {
        None
    }

    /// The reply to a principal whose scope excludes the VM. It is the same as the reply for a VM that does not exist.
    fn hidden() -> Result<Self::Reply, Fault> {
        Err(no_such_vm())
    }
}

/// The OpenAPI schema of a string enumeration. The variant `Unknown` is omitted: replies can contain it, but clients
/// cannot send it.
#[cfg(feature = "openapi")]
pub fn known_values<const N: usize>(
    description: &str,
    values: [&'static str; N],
) -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
    utoipa::openapi::ObjectBuilder::new()
        .schema_type(utoipa::openapi::Type::String)
        .description(Some(description))
        .enum_values(Some(values))
        .into()
}

/// The fault for a VM that does not exist or that is outside the principal's scope.
pub fn no_such_vm() -> Fault {
    Fault::new(FaultKind::NotFound, "there is no VM with this instance_id")
}

/// Every method. The end-to-end test `every_subject_enforces_roles_and_scopes` compares this list with the methods that
/// the services answer.
pub const METHODS: &[MethodInfo] = &[
    auth::Login::INFO,
    users::Logout::INFO,
    sessions::SessionsList::INFO,
    sessions::SessionsEnd::INFO,
    sessions::SessionsUsed::INFO,
    users::UsersGet::INFO,
    users::UsersList::INFO,
    users::UsersAdd::INFO,
    users::UsersUpdate::INFO,
    users::UsersRemove::INFO,
    users::UsersSetPassword::INFO,
    audit::List::INFO,
    api_tokens::ApiTokensCreate::INFO,
    api_tokens::ApiTokensList::INFO,
    api_tokens::ApiTokensRevoke::INFO,
    api_tokens::ApiTokensUsed::INFO,
    enrollment::JoinTokensCreate::INFO,
    enrollment::JoinTokensList::INFO,
    enrollment::JoinTokensRevoke::INFO,
    enrollment::AgentsEnroll::INFO,
    enrollment::AgentsList::INFO,
    enrollment::AgentsRevoke::INFO,
    metrics::ProcessLatest::INFO,
    metrics::VmLatest::INFO,
    metrics::ProcessByName::INFO,
    vms::List::INFO,
    vms::Get::INFO,
    current::VmsCurrent::INFO,
    history::VmHistory::INFO,
    history::VmHypervisorHistory::INFO,
    processes::ProcessesAt::INFO,
    processes::ProcessHistory::INFO,
    processes::ProcessEvents::INFO,
    filesystems::FilesystemsAt::INFO,
    rows::RowExport::INFO,
    process_search::ProcessSearch::INFO,
    status::MetricsStatus::INFO,
    process_changes::ProcessChangesBetween::INFO,
    starts::VmStarts::INFO,
    lifecycle::Start::INFO,
    lifecycle::State::INFO,
    lifecycle::Stop::INFO,
    lifecycle::ForceStop::INFO,
    lifecycle::Reboot::INFO,
    vms::ListWithoutMeasures::INFO,
    vms::GetWithoutMeasures::INFO,
    lifecycle::OperationsGet::INFO,
    lifecycle::OperationsList::INFO,
    labels::LabelsGet::INFO,
    labels::LabelsSet::INFO,
    removal::RemovalCheck::INFO,
    removal::HistoryRemove::INFO,
    removal::RemovalFinish::INFO,
    alerts::culprits::ProcessTop::INFO,
    alerts::AlertsList::INFO,
    alerts::AlertsGet::INFO,
    alerts::AlertsAcknowledge::INFO,
    alerts::rules::RulesList::INFO,
    alerts::rules::RulesGet::INFO,
    alerts::rules::RulesCreate::INFO,
    alerts::rules::RulesUpdate::INFO,
    alerts::rules::RulesRemove::INFO,
    alerts::rules::RulesPreview::INFO,
    alerts::silences::SilencesList::INFO,
    alerts::silences::SilencesCreate::INFO,
    alerts::silences::SilencesEnd::INFO,
    alerts::channels::ChannelsList::INFO,
    alerts::channels::ChannelsNames::INFO,
    alerts::channels::ChannelsCreate::INFO,
    alerts::channels::ChannelsUpdate::INFO,
    alerts::channels::ChannelsRemove::INFO,
    alerts::channels::ChannelsTest::INFO,
    alerts::channels::MessagesList::INFO,
];

/// The configured time limits of requests, by kind of method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    pub query: Duration,
    pub command: Duration,
}

impl Deadlines {
    /// The time limit for methods of this kind.
    pub const fn for_kind(&self, kind: Kind) -> Duration {
        match kind {
            Kind::Query => self.query,
            Kind::Command => self.command,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_methods_have_the_same_subject() {
        let subjects: HashSet<_> = METHODS.iter().map(|method| method.subject).collect();
        assert_eq!(subjects.len(), METHODS.len());
    }

    #[test]
    fn vm_actions_use_the_command_class() {
        for method in METHODS {
            let is_of_vms = matches!(method.service, Service::Metrics | Service::Lifecycle);
            let commands_a_vm = is_of_vms && method.kind == Kind::Command;
            assert_eq!(
                method.class == Class::Command,
                commands_a_vm,
                "{}",
                method.subject
            );
        }
    }
}
