//! `vmwatch history`.

use serde_json::Value;

use super::decimal;
use crate::{
    answers::{ProcessSeries, Series, Stat},
    args::History,
    client::Client,
    error::CliError,
    output::Output,
    table::{Cell, Column, Table},
    time::to_query,
    vm::find_vm,
};

pub(crate) async fn run(args: &History, client: &Client, output: &Output) -> Result<(), CliError> {
    let from = output.moment(args.range.from.as_deref())?;
    let to = output.moment(args.range.to.as_deref())?;
    let vm = find_vm(client, &args.vm).await?;
    let query = [
        ("name", args.process.clone()),
        ("from", from.map(to_query)),
        ("to", to.map(to_query)),
        ("points", Some(args.points.to_string())),
    ];
    let path = match args.process {
        Some(_) => format!("/vms/{}/processes/history", vm.instance_id),
        None => format!("/vms/{}/samples", vm.instance_id),
    };
    let answer: Value = client.get(&path, &query).await?;
    if output.json {
        return output.print_json(&answer);
    }
    let unexpected = |error: serde_json::Error| CliError::Answer(error.to_string());
    let table = match args.process {
        Some(_) => process_table(&serde_json::from_value(answer).map_err(unexpected)?, output),
        None => vm_table(&serde_json::from_value(answer).map_err(unexpected)?, output),
    };
    output.print_table(&table, "no samples are stored in this time range")
}

fn vm_table(series: &Series, output: &Output) -> Table {
    let mut table = Table::new([
        Column::Left("FROM"),
        Column::Right("CPU %"),
        Column::Right("MAX"),
        Column::Right("MEM %"),
        Column::Right("LOAD"),
        Column::Right("READ KiB/s"),
        Column::Right("WRITE KiB/s"),
        Column::Right("NET IN KiB/s"),
        Column::Right("NET OUT KiB/s"),
        Column::Right("PROCESSES"),
    ]);
    let average = |stat: Option<Stat>| Cell::from(stat.map(|stat| decimal(stat.avg)));
    for bucket in &series.buckets {
        let stats = &bucket.stats;
        table.row([
            Cell::from(output.time(bucket.at)),
            average(stats.cpu_util),
            Cell::from(stats.cpu_util.map(|stat| decimal(stat.max))),
            average(stats.mem),
            average(stats.load),
            average(stats.disk_read),
            average(stats.disk_write),
            average(stats.net_incoming),
            average(stats.net_outgoing),
            average(stats.proc),
        ]);
    }
    table
}

fn process_table(series: &ProcessSeries, output: &Output) -> Table {
    let mut table = Table::new([
        Column::Left("FROM"),
        Column::Right("PROCESSES"),
        Column::Right("CPU %"),
        Column::Right("MAX"),
        Column::Right("MEM %"),
        Column::Right("READ KiB/s"),
        Column::Right("WRITE KiB/s"),
    ]);
    for point in &series.buckets {
        table.row([
            Cell::from(output.time(point.at)),
            Cell::from(decimal(point.processes.avg)),
            Cell::from(decimal(point.cpu_util.avg)),
            Cell::from(decimal(point.cpu_util.max)),
            Cell::from(decimal(point.mem.avg)),
            Cell::from(decimal(point.disk_read.avg)),
            Cell::from(decimal(point.disk_write.avg)),
        ]);
    }
    table
}
