//! `vmwatch operations`.

use super::note_more;
use crate::{
    answers::Operation,
    args::Operations,
    client::{Client, List},
    error::CliError,
    output::{Output, typed},
    table::{Cell, Column, Table, Tone},
    vm::find_id,
};

pub(crate) async fn run(args: &Operations, client: &Client, output: &Output) -> Result<(), CliError> {
    let query = [
        ("instance_id", find_id(client, args.vm.as_deref()).await?),
        ("state", args.state.clone()),
    ];
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let List { items, has_more, .. } = client.list("/operations", &query, "operations", limit).await?;
    if output.json {
        return output.print_json(&items);
    }
    let operations = typed::<Operation>(items)?;
    output.print_table(&table(&operations, output), "there are no operations")?;
    note_more(operations.len(), has_more);
    Ok(())
}

fn table(operations: &[Operation], output: &Output) -> Table {
    let mut table = Table::new([
        Column::Left("REQUESTED"),
        Column::Left("VM"),
        Column::Left("ACTION"),
        Column::Left("STATE"),
        Column::Left("USER"),
        Column::Left("HYPERVISOR"),
        Column::Left("RESULT"),
    ]);
    for operation in operations {
        let failure = operation.failure.as_ref().map(|failure| failure.detail.as_str());
        table.row([
            Cell::from(output.time(operation.requested_at)),
            Cell::from(operation.instance_id.as_str()),
            Cell::from(&operation.action),
            Cell::new(&operation.state, tone(&operation.state)),
            Cell::from(&operation.user),
            Cell::from(operation.hypervisor.as_ref()),
            Cell::from(failure.or(operation.machine_state.as_deref())),
        ]);
    }
    table
}

fn tone(state: &str) -> Tone {
    match state {
        "succeeded" => Tone::Good,
        "failed" | "timed_out" | "outcome_unknown" => Tone::Bad,
        _ => Tone::Warning,
    }
}
