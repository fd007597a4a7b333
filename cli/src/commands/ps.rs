//! `vmwatch ps`.

use std::fmt::Write as _;

use serde_json::Value;

use super::{decimal, note_more};
use crate::{
    answers::{Process, ProcessTable, Timestamp, Vm},
    args::Ps,
    client::Client,
    error::CliError,
    output::{Output, note},
    table::{Cell, Column, Table, Tone},
    time::{rough, to_query},
    vm::find_vm,
};

pub(crate) async fn run(args: &Ps, client: &Client, output: &Output) -> Result<(), CliError> {
    let at = output.moment(args.at.as_deref())?;
    let vm = find_vm(client, &args.vm).await?;
    let path = format!("/vms/{}/processes", vm.instance_id);
    let query = [
        ("at", at.map(to_query)),
        ("sort", Some(args.sort.clone())),
        ("name", args.name.clone()),
    ];
    let list = client.list(&path, &query, "processes", args.limit.get()).await?;
    let mut whole = list.head;
    if let Some(fields) = whole.as_object_mut() {
        fields.insert("processes".to_owned(), list.items.into());
        fields.insert("next".to_owned(), Value::Null);
    }
    if output.json {
        return output.print_json(&whole);
    }
    let found: ProcessTable =
        serde_json::from_value(whole).map_err(|error| CliError::Answer(error.to_string()))?;
    let Some(taken_at) = found.at else {
        note("no processes are stored for the seven days before this moment");
        return Ok(());
    };
    output.print_table(&table(&found.processes, output), "no process matches")?;
    note_more(found.processes.len(), list.has_more);
    note(&summary(&found, taken_at, &vm, output));
    Ok(())
}

/// Which processes these are, such as `526 of 526 processes of web-1 at 2026-11-27 14:03:10 (3 h ago)`.
fn summary(found: &ProcessTable, taken_at: Timestamp, vm: &Vm, output: &Output) -> String {
    let age = rough(output.now().timestamp().duration_since(taken_at.0));
    let (shown, total, at) = (found.processes.len(), found.total, output.time(taken_at));
    format!(
        "{shown} of {total} processes of {} at {at} ({age} ago)",
        vm.title()
    )
}

fn table(processes: &[Process], output: &Output) -> Table {
    let mut table = Table::new([
        Column::Right("PID"),
        Column::Left("USER"),
        Column::Right("CPU %"),
        Column::Right("MEM %"),
        Column::Right("READ KiB/s"),
        Column::Right("WRITE KiB/s"),
        Column::Left("STARTED"),
        Column::Left("UNIT"),
        Column::Left("NAME"),
    ]);
    for process in processes {
        table.row([
            Cell::from(process.pid.map(|pid| pid.to_string())),
            Cell::from(process.user.as_ref()),
            Cell::from(decimal(process.cpu_util)),
            Cell::from(decimal(process.mem)),
            Cell::from(decimal(process.disk_read)),
            Cell::from(decimal(process.disk_write)),
            Cell::from(process.started_at.map(|at| output.time(at))),
            Cell::from(process.unit.as_ref()),
            name(process),
        ]);
    }
    table
}

/// The name of a process, with what distinguishes it from a running one.
fn name(process: &Process) -> Cell {
    let tone = if process.ended_at.is_some() {
        Tone::Faint
    } else {
        Tone::Plain
    };
    Cell::new(&full_name(process), tone)
}

/// The name, the number of processes of a sum, and how a process ended; the command line if it is known.
pub(crate) fn full_name(process: &Process) -> String {
    let mut text = process
        .command_line
        .clone()
        .unwrap_or_else(|| process.name.clone());
    // Writing to a String cannot fail.
    if process.pid.is_none() {
        let count = process
            .processes
            .map_or_else(|| "several".to_owned(), |count| count.to_string());
        let _ = write!(text, " ({count} processes)");
    }
    match (process.ended_at, process.exit_code) {
        (Some(_), Some(code)) => {
            let _ = write!(text, " (ended with exit code {code})");
        }
        (Some(_), None) => text += " (ended)",
        (None, _) => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn name_says_how_many_processes_ran_and_how_one_ended() {
        let process = |changes: Value| -> Process {
            let mut process = json!({ "processes": 1, "name": "sh", "pid": 7, "cpu_util": 0.0, "mem": 0.0,
                "disk_read": 0.0, "disk_write": 0.0, "started_at": null, "ended_at": null, "exit_code": null,
                "user": null, "parent_pid": null, "unit": null, "container": null, "command_line": null });
            for (name, value) in changes.as_object().unwrap() {
                process[name] = value.clone();
            }
            serde_json::from_value(process).unwrap()
        };
        for (changes, text) in [
            (json!({}), "sh"),
            (json!({ "command_line": "sh -c true" }), "sh -c true"),
            (json!({ "pid": null, "processes": 5471 }), "sh (5471 processes)"),
            (
                json!({ "pid": null, "processes": null }),
                "sh (several processes)",
            ),
            (
                json!({ "ended_at": "2017-01-01T13:37:59Z", "exit_code": 137 }),
                "sh (ended with exit code 137)",
            ),
            (json!({ "ended_at": "2017-01-01T13:37:59Z" }), "sh (ended)"),
        ] {
            assert_eq!(full_name(&process(changes)), text);
        }
    }
}
