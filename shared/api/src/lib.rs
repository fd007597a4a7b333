//! The contract between vmwatch's programs: every method of every service as a type. [`METHODS`] lists them all;
//! [`wire`] defines the reply envelope. Plain data without I/O.
//!
//! To add a method, add a type here (parameters, reply and [`MethodInfo`]), its entry in [`METHODS`], and a handler
//! in its service.

#![expect(
    missing_docs,
    reason = "the names of most types and fields say what they hold"
)]

pub mod audit;
pub mod auth;
pub mod events;
#[cfg(test)]
mod forms;
pub mod history;
pub mod lifecycle;
pub mod measures;
pub mod metrics;
mod operation;
mod page;
mod principal;
pub mod processes;
pub mod sessions;
mod text;
pub mod time;
mod user_name;
pub mod users;
pub mod wire;

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};

pub use page::{PAGE_BYTES, PageRoom, first_page};
pub use principal::{Principal, Role, Scope};
pub use text::{InstanceId, InvalidInstanceId, bounded_text};
pub use user_name::{InvalidUserName, NewUserName, UserHash, UserKey, UserName};

use crate::wire::{Fault, FaultKind};

/// The prefix of all request subjects; the number is the version of the contract.
pub const SUBJECT_PREFIX: &str = "vmwatch.v1.";

/// A service. Its name is its queue group and its name in `$SRV` discovery and in telemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    Auth,
    Metrics,
    Lifecycle,
}

impl Service {
    /// The name: one subject token of `[a-z-]`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auth => "vmwatch-auth",
            Self::Metrics => "vmwatch-metrics",
            Self::Lifecycle => "vmwatch-lifecycle",
        }
    }
}

/// The access that a method requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// No session is required.
    Public,
    /// A session of at least this role is required.
    Role(Role),
}

/// Whether a method reads or acts. This decides its deadline and whether it carries an idempotency key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads; can be repeated.
    Query,
    /// Acts; must not be executed late or twice.
    Command,
}

/// A class of requests. Each class has a limit of its own in the gateway and in each service (`vmwatch_bus::limits`),
/// so that load of one class cannot exhaust what another needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Logins: each costs a password hash and needs no session.
    Login,
    /// Logout and user management, which must work under any other load.
    Account,
    /// Actions on VMs, which can take minutes.
    Command,
    /// Reads with a small and known cost: newest rows, lists, states.
    CheapRead,
    /// Reads that can scan many rows: history, processes over time, the audit.
    HeavyRead,
}

impl Class {
    /// The name in public messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Login => "logins",
            Self::Account => "account requests",
            Self::Command => "commands",
            Self::CheapRead => "cheap reads",
            Self::HeavyRead => "heavy reads",
        }
    }
}

/// An entry of the method table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodInfo {
    /// The service that implements the method.
    pub service: Service,
    /// The subject without [`SUBJECT_PREFIX`]. It is the method's only name: on the bus, in metrics, traces, logs and
    /// the audit.
    pub subject: &'static str,
    pub access: Access,
    pub kind: Kind,
    /// The limit that the request counts against.
    pub class: Class,
}

impl MethodInfo {
    /// The subject with its prefix.
    pub fn full_subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}", self.subject)
    }
}

pub trait Method: 'static {
    /// The request parameters, validated while they are decoded.
    type Params: Serialize + DeserializeOwned + Send + 'static;
    /// The reply on success.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    const INFO: MethodInfo;

    /// The VM that the call is about. A principal that may not see it gets [`Method::hidden`].
    fn instance(_params: &Self::Params) -> Option<&InstanceId> {
        None
    }

    /// The reply to a principal that may not see the VM: the same as for a VM that does not exist.
    fn hidden() -> Result<Self::Reply, Fault> {
        Err(no_such_vm())
    }
}

/// The schema of a text that is one of these values. The value for "unknown to this version" can be returned but not
/// requested, so that it is not listed.
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

/// The fault for a VM that does not exist or that the principal may not see.
pub fn no_such_vm() -> Fault {
    Fault::new(FaultKind::NotFound, "there is no VM with this instance_id")
}

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
    metrics::ProcessLatest::INFO,
    metrics::VmLatest::INFO,
    metrics::ProcessByName::INFO,
    history::VmList::INFO,
    history::VmGet::INFO,
    history::VmHistory::INFO,
    processes::ProcessesAt::INFO,
    processes::ProcessHistory::INFO,
    processes::ProcessEvents::INFO,
    lifecycle::Start::INFO,
    lifecycle::State::INFO,
    lifecycle::Stop::INFO,
    lifecycle::ForceStop::INFO,
    lifecycle::Reboot::INFO,
    lifecycle::List::INFO,
    lifecycle::OperationsGet::INFO,
    lifecycle::OperationsList::INFO,
];

/// Configured deadlines of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    pub query: Duration,
    pub command: Duration,
}

impl Deadlines {
    /// The deadline of a method of this kind.
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
    fn subjects_are_unique() {
        let subjects: HashSet<_> = METHODS.iter().map(|method| method.subject).collect();
        assert_eq!(subjects.len(), METHODS.len());
    }

    #[test]
    fn vm_commands_count_against_the_command_limit() {
        for method in METHODS {
            let commands_a_vm = method.service == Service::Lifecycle && method.kind == Kind::Command;
            assert_eq!(
                method.class == Class::Command,
                commands_a_vm,
                "{}",
                method.subject
            );
        }
    }
}
