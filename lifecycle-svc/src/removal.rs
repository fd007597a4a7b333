//! Removal of decommissioned VMs.
//!
//! A VM that a hypervisor has would be listed again at once, so it cannot be removed. What an unreachable or former
//! hypervisor had reported of the VM is deleted. If the hypervisor answers again and has the VM, the VM is listed again.

use vmwatch_api::{
    Method,
    removal::{Removal, RemovalFinish, Removed},
    users::Done,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{Context, audit::AuditError};

use crate::{
    handlers::Lifecycle,
    inventory::{OutOfDate, WriteError},
    labels::LabelsError,
};

/// Why a VM was not removed.
#[derive(Debug, thiserror::Error)]
enum RemovalError {
    #[error(transparent)]
    Labels(#[from] LabelsError),
    #[error(transparent)]
    Inventory(#[from] WriteError),
    #[error("the audit record could not be written")]
    NotAudited(#[from] AuditError),
}

impl Lifecycle {
    /// Checks that the VM may be removed.
    pub(crate) fn check_removal(&self, removal: &Removal) -> Result<Done, Fault> {
        let id = &removal.instance_id;
        let on = self.inventory.hypervisors_of(id)?;
        if let Some((hypervisor, _)) = on.iter().find(|(_, is_reachable)| *is_reachable) {
            return Err(Fault::new(
                FaultKind::Conflict,
                format!("the hypervisor {hypervisor} still has this VM; delete the VM there first"),
            ));
        }
        let name = self.inventory.name(id);
        let (expected, what) = match &name {
            Some(name) => (name.as_str(), "name"),
            None => (id.as_str(), "id, because it has no name"),
        };
        if removal.name == expected {
            return Ok(Done {});
        }
        Err(Fault::new(
            FaultKind::Conflict,
            format!("the removal is confirmed by the wrong name; name must be the VM's {what}"),
        ))
    }

    /// Deletes the labels and the leftovers in the inventory of a VM, the name last: until then a repeated request has
    /// the same name.
    pub(crate) async fn remove(&self, context: &Context, removal: &Removal) -> Result<Removed, Fault> {
        self.check_removal(removal)?;
        let id = &removal.instance_id;
        let on = self.inventory.hypervisors_of(id)?;
        let removing = async {
            let mut records = u64::from(self.labels.remove(id).await?);
            for (hypervisor, _) in &on {
                self.inventory.forget(hypervisor, id).await?;
                records += 1;
            }
            Ok::<_, RemovalError>(Removed { records })
        };
        let detail = format!("name: {}", removal.name);
        let removing = self
            .audit
            .announced(context, &RemovalFinish::INFO, id, detail, removing);
        Ok(removing.await?)
    }
}

impl From<OutOfDate> for Fault {
    fn from(error: OutOfDate) -> Self {
        Self::new(
            FaultKind::Unavailable,
            "the list of VMs is out of date; try again shortly",
        )
        .caused_by(error)
    }
}

impl From<RemovalError> for Fault {
    fn from(error: RemovalError) -> Self {
        match error {
            RemovalError::Labels(error) => error.into(),
            RemovalError::NotAudited(error) => error.into(),
            RemovalError::Inventory(_) => Self::new(
                FaultKind::Backend,
                "the storage for the list of VMs is unreachable; try again shortly",
            )
            .caused_by(error),
        }
    }
}
