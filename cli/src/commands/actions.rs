//! `vmwatch start`, `stop` and `reboot`.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    answers::Operation,
    args::Act,
    client::Client,
    error::CliError,
    output::{Output, note},
    vm::find_vm,
};

/// Interval at which the record of an operation is read.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long an operation may remain open after its deadline, before waiting ends.
const PATIENCE_SECONDS: i64 = 60;

/// Requests an action, such as `force-stop`.
pub(crate) async fn run(action: &str, args: &Act, client: &Client, output: &Output) -> Result<(), CliError> {
    let vm = find_vm(client, &args.vm).await?;
    let path = format!("/vms/{}/actions", vm.instance_id);
    let mut body = json!({ "action": action });
    if let (Some(hypervisor), Some(fields)) = (&args.hypervisor, body.as_object_mut()) {
        fields.insert("hypervisor".to_owned(), json!(hypervisor));
    }
    let mut record: Value = client.post(&path, &body).await?;
    let mut operation = read(&record)?;
    if args.wait {
        if !output.json {
            note(&format!(
                "{action} of {}: waiting for operation {}",
                vm.title(),
                operation.id
            ));
        }
        record = wait(client, &operation, record).await?;
        operation = read(&record)?;
    }
    if output.json {
        output.print_json(&record)?;
    } else if operation.failure.is_none() {
        let state = operation.machine_state.as_deref().unwrap_or(&operation.state);
        note(&format!(
            "{action} of {}: {state} (operation {})",
            vm.title(),
            operation.id
        ));
    }
    result(&operation, args.wait)
}

fn read(record: &Value) -> Result<Operation, CliError> {
    serde_json::from_value(record.clone()).map_err(|error| CliError::Answer(error.to_string()))
}

/// Waits until the operation has ended, at most until a minute after its deadline. Returns its last record.
async fn wait(client: &Client, operation: &Operation, mut record: Value) -> Result<Value, CliError> {
    let path = format!("/operations/{}", operation.id);
    let last = operation.deadline.0.as_second().saturating_add(PATIENCE_SECONDS);
    while read(&record)?.finished_at.is_none() {
        if Timestamp::now().as_second() > last {
            return Err(CliError::OperationOpen(operation.id.clone()));
        }
        sleep(INTERVAL).await;
        match client.get(&path, &[]).await {
            Ok(newer) => record = newer,
            // The operation continues while the gateway is unreachable.
            Err(error) if error.is_temporary() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(record)
}

/// An operation that has ended without success is an error. One that has not ended is one only after waiting.
fn result(operation: &Operation, waited: bool) -> Result<(), CliError> {
    if operation.state == "succeeded" || (operation.finished_at.is_none() && !waited) {
        return Ok(());
    }
    let failure = operation.failure.as_ref().map(|failure| failure.detail.clone());
    Err(CliError::OperationFailed {
        id: operation.id.clone(),
        reason: failure.unwrap_or_else(|| operation.state.clone()),
    })
}
