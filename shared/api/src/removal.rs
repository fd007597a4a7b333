//! Methods that remove a decommissioned VM: lifecycle-svc checks that this is allowed, metrics-svc deletes the history,
//! and lifecycle-svc deletes everything else, the name last. Each step can be repeated.

use serde::{Deserialize, Serialize};

use super::{
    Access, Class, InstanceId, Kind, Method, MethodInfo, Role, Service, bounded_text, lifecycle::Target,
    users::Done,
};

/// Maximum length of a VM's name in a request, in bytes.
const MAX_NAME: usize = 1024;

/// A VM to remove, with its name as confirmation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    pub instance_id: InstanceId,
    /// The name of the VM, or its id if it has no name. A removal with another text is refused.
    #[serde(deserialize_with = "name")]
    pub name: String,
}

fn name<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    bounded_text(deserializer, "must be a text of at most 1024 bytes", |text| {
        text.len() <= MAX_NAME
    })
}

/// The number of records that were deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    pub records: u64,
}

const fn row(service: Service, subject: &'static str, kind: Kind, class: Class) -> MethodInfo {
    MethodInfo {
        service,
        subject,
        access: Access::Role(Role::Admin),
        kind,
        class,
    }
}

/// Checks that a VM may be removed: no hypervisor that answers has it, and the name is right.
#[derive(Debug)]
pub struct RemovalCheck;

impl Method for RemovalCheck {
    type Params = Removal;
    type Reply = Done;
    const INFO: MethodInfo = row(
        Service::Lifecycle,
        "lifecycle.removal.check",
        Kind::Query,
        Class::CheapRead,
    );

    fn instance(params: &Removal) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Deletes all rows and rollups of a VM. At the deadline it fails with [`FaultKind::Timeout`], and a repetition
/// continues.
///
/// [`FaultKind::Timeout`]: crate::wire::FaultKind::Timeout
#[derive(Debug)]
pub struct HistoryRemove;

impl Method for HistoryRemove {
    type Params = Target;
    type Reply = Removed;
    const INFO: MethodInfo = row(
        Service::Metrics,
        "metrics.history.remove",
        Kind::Command,
        Class::Command,
    );

    fn instance(params: &Target) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}

/// Checks like [`RemovalCheck`], then deletes the labels of a VM and what unreachable or former hypervisors had
/// reported of it.
#[derive(Debug)]
pub struct RemovalFinish;

impl Method for RemovalFinish {
    type Params = Removal;
    type Reply = Removed;
    const INFO: MethodInfo = row(
        Service::Lifecycle,
        "lifecycle.removal.finish",
        Kind::Command,
        Class::Command,
    );

    fn instance(params: &Removal) -> Option<&InstanceId> {
        Some(&params.instance_id)
    }
}
