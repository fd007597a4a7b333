//! Command-line client that queries running replicas of lifecycle-svc over the bus. It is restricted only by the bus
//! permissions: a bus user that may publish on `vmwatch.v1.lifecycle.>` and read the audit stream acts as an
//! administrator here.

mod table;

use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use vmwatch_api::{
    InstanceId, Principal, Role, Scope,
    audit::AuditRecord,
    lifecycle::{
        Operation, OperationFilter, OperationId, OperationPosition, OperationRef, OperationsGet,
        OperationsList, State, Target,
    },
    metrics::Limit,
};
use vmwatch_bus::{Bus, BusSettings, Context, audit};

use self::table::{Table, moment};
use crate::LifecycleError;

const DEADLINE: Duration = Duration::from_secs(30);
/// Deadline for connecting to the bus.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// User name of this client in operations and in the audit log.
const USER: &str = "vmwatch-lifecycle";

/// Commands that query the running lifecycle-svc.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Print the current state of a VM on its hypervisor.
    State {
        /// Instance id of the VM.
        instance_id: InstanceId,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// List the newest operations on VMs, or show one operation with its steps.
    Operations {
        /// Id of the operation to show with its steps.
        operation_id: Option<OperationId>,
        /// List only operations on the VM with this instance id.
        #[arg(long, conflicts_with = "operation_id")]
        instance: Option<InstanceId>,
        /// Maximum number of operations to list, from 1 to 1000.
        #[arg(long, default_value = "50", value_parser = limit, conflicts_with = "operation_id")]
        limit: Limit,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Print the newest audit records: logins, user management and operations, with user, client address and result.
    Audit {
        /// Maximum number of audit records to print, from 1 to 1000.
        #[arg(long, default_value = "50", value_parser = limit)]
        limit: Limit,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
}

fn limit(text: &str) -> Result<Limit, &'static str> {
    text.parse().ok().and_then(Limit::new).ok_or(Limit::RULE)
}

/// Sends a query to the running lifecycle-svc and prints the answer to standard output.
pub async fn run(command: ClientCommand, settings: &BusSettings) -> Result<(), LifecycleError> {
    let bus = Bus::connect_within(USER, settings, CONNECT_DEADLINE).await?;
    match command {
        ClientCommand::State { instance_id, json } => {
            let machine = bus.call::<State>(&context(), &Target { instance_id }).await?;
            show(&machine, json, || {
                format!("{}  {}\n", machine.instance_id, machine.state)
            })
        }
        ClientCommand::Operations {
            operation_id: Some(operation_id),
            json,
            ..
        } => {
            let operation = bus
                .call::<OperationsGet>(&context(), &OperationRef { operation_id })
                .await?;
            show(&operation, json, || story(&operation))
        }
        ClientCommand::Operations {
            operation_id: None,
            instance,
            limit,
            json,
        } => {
            let operations = newest_operations(&bus, instance, limit).await?;
            show(&operations, json, || operation_table(&operations))
        }
        ClientCommand::Audit { limit, json } => {
            let records = audit::newest(&bus, u64::from(limit.get())).await?;
            show(&records, json, || audit_table(&records))
        }
    }
}

/// Reads the newest operations page by page, up to the limit.
async fn newest_operations(
    bus: &Bus,
    instance_id: Option<InstanceId>,
    limit: Limit,
) -> Result<Vec<Operation>, LifecycleError> {
    let mut operations = Vec::new();
    let mut filter = OperationFilter {
        instance_id,
        limit,
        ..OperationFilter::default()
    };
    loop {
        let page = bus.call::<OperationsList>(&context(), &filter).await?;
        operations.extend(page.operations);
        let missing = u64::from(limit.get()).saturating_sub(operations.len() as u64);
        let (true, Some(missing), Some(last)) = (page.more, Limit::new(missing), operations.last()) else {
            return Ok(operations);
        };
        filter.limit = missing;
        filter.before = Some(OperationPosition::from_operation(last));
    }
}

/// Prints an answer of the service as JSON or as text.
fn show(answer: &impl Serialize, json: bool, text: impl FnOnce() -> String) -> Result<(), LifecycleError> {
    if json {
        println!("{}", serde_json::to_string(answer)?);
    } else {
        print!("{}", text());
    }
    Ok(())
}

fn operation_table(operations: &[Operation]) -> String {
    let mut table = Table::new([
        "REQUESTED",
        "OPERATION",
        "VERB",
        "INSTANCE",
        "HYPERVISOR",
        "USER",
        "FROM",
        "STATE",
    ]);
    for operation in operations {
        table.row([
            moment(operation.requested_at_ms),
            operation.id.to_string(),
            operation.verb.to_string(),
            operation.instance_id.to_string(),
            operation.hypervisor.clone().unwrap_or_default(),
            operation.user.clone(),
            operation.source.clone().unwrap_or_default(),
            operation.state.to_string(),
        ]);
    }
    table.to_string()
}

fn story(operation: &Operation) -> String {
    let mut history = Table::new(["WHEN", "STATE", "WHAT"]);
    for event in &operation.history {
        history.row([moment(event.at_ms), event.state.to_string(), event.text.clone()]);
    }
    format!("{}\n{history}", operation_table(std::slice::from_ref(operation)))
}

fn audit_table(records: &[AuditRecord]) -> String {
    let mut table = Table::new([
        "WHEN", "USER", "TOKEN", "FROM", "ACTION", "TARGET", "RESULT", "DETAIL",
    ]);
    for record in records {
        table.row([
            moment(record.at_ms),
            record.user.clone(),
            record
                .api_token
                .as_ref()
                .map(|token| token.id.to_string())
                .unwrap_or_default(),
            record.source.clone().unwrap_or_default(),
            record.action.clone(),
            record.target.clone().unwrap_or_default(),
            record.result.to_string(),
            record.detail.clone(),
        ]);
    }
    table.to_string()
}

fn context() -> Context {
    Context::new(DEADLINE).as_principal(Principal {
        user: USER.to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    })
}
