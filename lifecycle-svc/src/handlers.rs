//! Handlers of the bus methods of lifecycle-svc.

use std::{future::ready, sync::Arc};

use vmwatch_api::{
    Method, MethodInfo, Scope, Service,
    actions::{self, Refusal},
    labels::{LabelsChange, LabelsGet, LabelsReply, LabelsSet},
    lifecycle::{
        ActionTarget, ForceStop, Machine, Operation, OperationRef, OperationsGet, OperationsList, Reboot,
        RebootTarget, Start, State, Stop, Target, Verb,
    },
    no_such_vm,
    removal::{Removal, RemovalCheck, RemovalFinish, Removed},
    vms::{GetWithoutMeasures, ListWithoutMeasures, Stale, VmDetail, VmPage, VmQuery},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Bus, Context,
    audit::Audit,
    serve::{ServeSettings, Server, bind},
};

use crate::{
    driver::DriverError,
    fleet::Fleet,
    inventory::Inventory,
    labels::Labels,
    operations::{Command, Operations},
    state_machine,
};

/// State shared by the handlers of all bus methods.
pub(crate) struct Lifecycle {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) operations: Arc<Operations>,
    pub(crate) inventory: Arc<Inventory>,
    pub(crate) labels: Labels,
    pub(crate) audit: Audit,
}

impl Lifecycle {
    /// Creates the bus server that answers all methods of lifecycle-svc.
    pub(crate) fn server(self, bus: &Bus, settings: ServeSettings) -> Server {
        let this = Arc::new(self);
        let operations = Arc::clone(&this.operations);
        Server::new(bus, Service::Lifecycle, settings)
            .on_refusal(move |refused| {
                let operations = Arc::clone(&operations);
                async move { operations.refused(refused).await }
            })
            .method(Start, bind(&this, Self::start))
            .method(Stop, bind(&this, Self::stop))
            .method(Reboot, bind(&this, Self::reboot))
            .method(ForceStop, bind(&this, Self::force_stop))
            .method(State, bind(&this, Self::state))
            .method(
                ListWithoutMeasures,
                bind(&this, |this, context, query| ready(this.list(&context, &query))),
            )
            .method(
                GetWithoutMeasures,
                bind(&this, |this, _, target| ready(this.listed(&target))),
            )
            .method(OperationsGet, bind(&this, Self::operation))
            .method(
                OperationsList,
                bind(&this, |this, context, filter| {
                    ready(this.operations.list(context.principal.as_ref(), &filter))
                }),
            )
            .method(LabelsGet, bind(&this, Self::labels))
            .method(LabelsSet, bind(&this, Self::set_labels))
            .method(
                RemovalCheck,
                bind(&this, |this, _, removal| ready(this.check_removal(&removal))),
            )
            .method(RemovalFinish, bind(&this, Self::finish_removal))
    }

    async fn start(self: Arc<Self>, context: Context, target: ActionTarget) -> Result<Machine, Fault> {
        self.command(&context, Start::INFO, Verb::Start, target).await
    }

    async fn stop(self: Arc<Self>, context: Context, target: ActionTarget) -> Result<Machine, Fault> {
        self.command(&context, Stop::INFO, Verb::Stop, target).await
    }

    async fn force_stop(self: Arc<Self>, context: Context, target: ActionTarget) -> Result<Machine, Fault> {
        self.command(&context, ForceStop::INFO, Verb::ForceStop, target)
            .await
    }

    async fn command(
        &self,
        context: &Context,
        method: MethodInfo,
        verb: Verb,
        target: ActionTarget,
    ) -> Result<Machine, Fault> {
        let command = Command {
            method,
            verb,
            hard: false,
            instance_id: target.instance_id,
            hypervisor: target.hypervisor,
        };
        Box::pin(self.operations.submit(context, command)).await
    }

    async fn reboot(self: Arc<Self>, context: Context, target: RebootTarget) -> Result<Machine, Fault> {
        let command = Command {
            method: Reboot::INFO,
            verb: Verb::Reboot,
            hard: target.hard,
            instance_id: target.instance_id,
            hypervisor: target.hypervisor,
        };
        Box::pin(self.operations.submit(&context, command)).await
    }

    async fn operation(self: Arc<Self>, context: Context, which: OperationRef) -> Result<Operation, Fault> {
        self.operations
            .get(context.principal.as_ref(), &which.operation_id)
            .await
    }

    async fn state(self: Arc<Self>, _context: Context, target: Target) -> Result<Machine, Fault> {
        let located = self.fleet.locate(&target.instance_id).await?;
        let refused_actions = if self.inventory.is_disputed(&target.instance_id) {
            actions::all_refused(Refusal::SeveralHypervisors)
        } else {
            state_machine::refused(located.vm)
        };
        Ok(Machine {
            name: self.inventory.name(&target.instance_id),
            hypervisor: Some(located.hypervisor.name.clone()),
            instance_id: target.instance_id,
            state: located.vm.state,
            allowed_actions: actions::allowed(&refused_actions),
            refused_actions,
        })
    }

    async fn labels(self: Arc<Self>, _context: Context, target: Target) -> Result<LabelsReply, Fault> {
        Ok(self.labels.get(&target.instance_id).await?)
    }

    async fn set_labels(
        self: Arc<Self>,
        context: Context,
        change: LabelsChange,
    ) -> Result<LabelsReply, Fault> {
        Ok(self.labels.set(&context, change).await?)
    }

    async fn finish_removal(self: Arc<Self>, context: Context, removal: Removal) -> Result<Removed, Fault> {
        self.remove(&context, &removal).await
    }

    /// Answers from memory, without a call to a hypervisor.
    fn list(&self, context: &Context, query: &VmQuery) -> Result<VmPage, Fault> {
        let nothing = Scope::Only(Vec::new());
        let scope = context
            .principal
            .as_ref()
            .map_or(&nothing, |principal| &principal.scope);
        self.inventory.list(scope, query)
    }

    /// Answers from memory, without a call to a hypervisor.
    fn listed(&self, target: &Target) -> Result<VmDetail, Fault> {
        let found = self.inventory.get(&target.instance_id);
        found.ok_or_else(|| {
            if self.inventory.stale().contains(&Stale::Inventory) {
                return Fault::new(
                    FaultKind::Unavailable,
                    "the VMs of hypervisors cannot be read; try again shortly",
                );
            }
            no_such_vm()
        })
    }
}

impl From<DriverError> for Fault {
    fn from(error: DriverError) -> Self {
        match error {
            DriverError::NotFound => no_such_vm(),
            DriverError::Conflict(_) => {
                Self::new(FaultKind::Conflict, format!("the hypervisor refused: {error}"))
            }
            DriverError::Rejected(_) => {
                Self::new(FaultKind::Backend, format!("the hypervisor refused: {error}"))
            }
            DriverError::Unavailable(_) | DriverError::NotBegun(_) | DriverError::Timeout => Self::new(
                FaultKind::Backend,
                "the hypervisor does not answer; try again shortly",
            )
            .caused_by(error),
        }
    }
}
