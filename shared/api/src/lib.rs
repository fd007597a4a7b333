//! The contract between vmwatch's programs: every method of every service as a type. [`METHODS`] is the whole table;
//! [`wire`] holds the reply envelope. Plain data without I/O.
//!
//! Adding a method takes a type here (parameters, reply and a row of [`MethodInfo`]), its entry in [`METHODS`], and a handler
//! in its service.

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

/// What every subject of vmwatch's request–reply starts with; the number is the version of the contract.
pub const SUBJECT_PREFIX: &str = "vmwatch.v1.";

/// A service: its name is its queue group, its name in `$SRV` discovery and its name in telemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// Users and sessions.
    Auth,
    /// Rows of VMs and processes.
    Metrics,
    /// Starting and stopping VMs.
    Lifecycle,
}

impl Service {
    /// The name, one token of `[a-z-]`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auth => "vmwatch-auth",
            Self::Metrics => "vmwatch-metrics",
            Self::Lifecycle => "vmwatch-lifecycle",
        }
    }
}

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Without a session.
    Public,
    /// With a session of at least this role.
    Role(Role),
}

/// What a call may do, which decides how long its caller waits and whether it carries an idempotency key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads; may be repeated.
    Query,
    /// Acts; never to be executed late or twice.
    Command,
}

/// A class of requests. Each has a limit of its own in the gateway and in each service (`vmwatch_bus::limits`), so that one
/// kind of load can't use up what another needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Logins: each costs a password hash and needs no session.
    Login,
    /// Logout and user management, which must work under any other load.
    Account,
    /// Commands for VMs, which may take minutes.
    Command,
    /// Reads whose cost is small and known: newest rows, lists, states.
    CheapRead,
    /// Reads that may go through many rows: history, processes over time, the audit.
    HeavyRead,
}

impl Class {
    /// The name used in texts.
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

/// One row of the method table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodInfo {
    /// The service that answers.
    pub service: Service,
    /// The subject without [`SUBJECT_PREFIX`]. It is the method's only name: on the bus, in metrics, traces, logs and the
    /// audit.
    pub subject: &'static str,
    /// Who may call.
    pub access: Access,
    /// Query or command.
    pub kind: Kind,
    /// Which limit it counts against.
    pub class: Class,
}

impl MethodInfo {
    /// The whole subject.
    pub fn full_subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}", self.subject)
    }
}

/// A method of a service.
pub trait Method: 'static {
    /// What the caller sends, validated as it is decoded.
    type Params: Serialize + DeserializeOwned + Send + 'static;
    /// What a success carries.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// The row of the table.
    const INFO: MethodInfo;

    /// The instance that the call is about; who may not see it gets [`Method::hidden`].
    fn instance(_params: &Self::Params) -> Option<&InstanceId> {
        None
    }

    /// What a principal gets who may not see the instance: just what an instance that does not exist gives.
    fn hidden() -> Result<Self::Reply, Fault> {
        Err(no_such_vm())
    }
}

/// The schema of a text that is one of these values. A value of a newer version is none of them: it may be answered, but not
/// asked for.
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

/// The fault of a VM that does not exist, or that the principal may not know of.
pub fn no_such_vm() -> Fault {
    Fault::new(FaultKind::NotFound, "there is no VM with this instance_id")
}

/// All methods.
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

/// How long callers wait, as settings of who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For queries.
    pub query: Duration,
    /// For commands.
    pub command: Duration,
}

impl Deadlines {
    /// The wait for a method of this kind.
    pub const fn of(&self, kind: Kind) -> Duration {
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
    fn every_command_for_a_vm_counts_against_the_limit_of_commands() {
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
