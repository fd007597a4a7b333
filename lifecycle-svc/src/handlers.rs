//! The methods of lifecycle-svc.

use std::time::Duration;

use shared::{
    api::{
        lifecycle::{Machine, MachineState, Target},
        no_such_vm,
    },
    bus::Context,
    wire::{Fault, FaultKind},
};
use tracing::info;

use crate::{
    driver::DriverError,
    fleet::{Fleet, Located},
};

/// Between two looks at a machine: soon at first, since most start at once.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_secs(2);

/// Reads a machine's state.
pub(crate) async fn state(fleet: &Fleet, target: Target) -> Result<Machine, Fault> {
    let located = fleet.locate(&target.instance_id).await?;
    Ok(Machine {
        instance_id: target.instance_id,
        state: located.state,
    })
}

/// Starts a machine, and answers well only when the hypervisor says that it runs.
pub(crate) async fn start(fleet: &Fleet, context: &Context, target: Target) -> Result<Machine, Fault> {
    let id = target.instance_id;
    let Located {
        hypervisor,
        mut state,
    } = fleet.locate(&id).await?;
    if state != MachineState::Running {
        info!(instance = %id, hypervisor = hypervisor.name, ?state, "starting");
        if let Err(error) = hypervisor.driver.start(&id).await {
            state = hypervisor.driver.state(&id).await?;
            let may_go_on = matches!(error, DriverError::Timeout | DriverError::Unavailable(_));
            if state != MachineState::Running && !may_go_on {
                return Err(error.into());
            }
        }
    }
    let mut pause = FIRST_LOOK;
    while state != MachineState::Running {
        if context.remaining().is_zero() {
            return Err(Fault::new(FaultKind::Timeout, "the machine does not run yet"));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
        state = hypervisor.driver.state(&id).await?;
    }
    info!(instance = %id, hypervisor = hypervisor.name, "running");
    Ok(Machine {
        instance_id: id,
        state,
    })
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
            DriverError::Unavailable(_) | DriverError::Timeout => Self::new(
                FaultKind::Backend,
                "the hypervisor does not answer; try again shortly",
            )
            .caused_by(error),
        }
    }
}
