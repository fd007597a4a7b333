//! The commands that ask a running service over the bus. Who may is settled by the permissions of the bus: whoever may
//! publish on `vmwatch.v1.lifecycle.*` acts as an administrator here.

use std::time::Duration;

use clap::Subcommand;
use shared::{
    api::{
        InstanceId, Principal, Role, Scope,
        lifecycle::{Machine, State, Target},
    },
    bus::{Bus, BusSettings, Context},
    wire::{Fault, FaultKind},
};

use crate::LifecycleError;

const DEADLINE: Duration = Duration::from_secs(30);
/// What records of the bus call the user of these commands.
const USER: &str = "vmwatch-lifecycle";

/// What can be asked of a running service.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Ask a running service for a VM's state.
    State {
        /// Its instance id.
        instance_id: InstanceId,
        /// As JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
}

/// Carries out a command.
pub async fn run(command: ClientCommand, settings: &BusSettings) -> Result<(), LifecycleError> {
    let bus = connect(settings).await?;
    let ClientCommand::State { instance_id, json } = command;
    let machine = bus.call::<State>(&context(), &Target { instance_id }).await?;
    print_machine(&machine, json)
}

fn print_machine(machine: &Machine, json: bool) -> Result<(), LifecycleError> {
    let text = serde_json::to_string(machine)?;
    if json {
        println!("{text}");
    } else {
        println!("{}  {}", machine.instance_id, machine.state);
    }
    Ok(())
}

/// A connection that is there: one that is merely being tried is of no use to who waits at a prompt.
async fn connect(settings: &BusSettings) -> Result<Bus, LifecycleError> {
    let bus = Bus::connect(USER, settings).await?;
    let connected = async {
        while !bus.is_connected() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), connected)
        .await
        .map_err(|_| {
            Fault::new(
                FaultKind::Unavailable,
                format!(
                    "the message bus does not answer; is {} right?",
                    shared::config::NATS_URL.name
                ),
            )
        })?;
    Ok(bus)
}

fn context() -> Context {
    Context::new(DEADLINE).as_principal(Principal {
        user: USER.to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    })
}
