//! `vmwatch who-ran`.

use super::{decimal, note_more};
use crate::{
    answers::VmThatRan,
    args::WhoRan,
    client::{Client, List},
    error::CliError,
    output::{Output, typed},
    table::{Cell, Column, Table},
    time::to_query,
};

pub(crate) async fn run(args: &WhoRan, client: &Client, output: &Output) -> Result<(), CliError> {
    let matching = if args.prefix { "prefix" } else { "exact" };
    // All pages have the same time range.
    let to = output
        .moment(args.range.to.as_deref())?
        .unwrap_or_else(|| output.now().timestamp());
    let from = output.moment(args.range.from.as_deref())?;
    let query = [
        ("name", Some(args.name.clone())),
        ("match", Some(matching.to_owned())),
        ("from", from.map(to_query)),
        ("to", Some(to_query(to))),
    ];
    let List { items, has_more, .. } = client.list("/processes", &query, "vms", args.limit.get()).await?;
    if output.json {
        return output.print_json(&items);
    }
    let vms = typed::<VmThatRan>(items)?;
    output.print_table(
        &table(&vms, output),
        &format!("{} ran in no VM of this time", args.name),
    )?;
    note_more(vms.len(), has_more);
    Ok(())
}

fn table(vms: &[VmThatRan], output: &Output) -> Table {
    let mut table = Table::new([
        Column::Left("VM"),
        Column::Left("FIRST SEEN"),
        Column::Left("LAST SEEN"),
        Column::Right("HOURS"),
        Column::Right("MAX PROCESSES"),
        Column::Right("MAX CPU %"),
        Column::Right("MAX MEM %"),
        Column::Left("PROCESSES"),
        Column::Left("ID"),
    ]);
    for vm in vms {
        table.row([
            Cell::from(vm.name.as_ref()),
            Cell::from(output.time(vm.first_at)),
            Cell::from(output.time(vm.last_at)),
            Cell::from(vm.hours.to_string()),
            Cell::from(vm.max_processes.to_string()),
            Cell::from(decimal(vm.max_cpu_util)),
            Cell::from(decimal(vm.max_mem)),
            Cell::from(vm.process_names.join(", ")),
            Cell::from(vm.instance_id.as_str()),
        ]);
    }
    table
}
