//! `vmwatch changed`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::decimal;
use crate::{
    answers::Timestamp,
    args::Changed,
    client::Client,
    error::CliError,
    output::{Output, note},
    table::{Cell, Column, Table, Tone},
    time::to_query,
    vm::find_vm,
};

#[derive(Debug, Serialize, Deserialize)]
struct ProcessChanges {
    before: Option<ComparedTable>,
    after: Option<ComparedTable>,
    rebooted: Option<bool>,
    incomplete: bool,
    came: Groups,
    went: Groups,
    grew: Groups,
    restarted: Groups,
}

#[derive(Debug, Serialize, Deserialize)]
struct ComparedTable {
    at: Timestamp,
}

#[derive(Debug, Serialize, Deserialize)]
struct Groups {
    total: u64,
    groups: Vec<Group>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Group {
    name: String,
    user: Option<String>,
    unit: Option<String>,
    container: Option<String>,
    before: Option<Usage>,
    after: Option<Usage>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Usage {
    processes: u32,
    cpu_util: f64,
    mem: f64,
}

pub(crate) async fn run(args: &Changed, client: &Client, output: &Output) -> Result<(), CliError> {
    let from = output.moment(args.range.from.as_deref())?;
    let to = output.moment(args.range.to.as_deref())?;
    let vm = find_vm(client, &args.vm).await?;
    let query = [
        ("from", from.map(to_query)),
        ("to", to.map(to_query)),
        ("limit", Some(args.limit.to_string())),
    ];
    let answer: Value = client
        .get(&format!("/vms/{}/changes", vm.instance_id), &query)
        .await?;
    if output.json {
        return output.print_json(&answer);
    }
    let changes: ProcessChanges =
        serde_json::from_value(answer).map_err(|error| CliError::Answer(error.to_string()))?;
    let (Some(before), Some(after)) = (&changes.before, &changes.after) else {
        note("no processes are stored for the seven days before one of the moments");
        return Ok(());
    };
    output.print_table(&table(&changes), "no process came, went or grew")?;
    let reboot = if changes.rebooted == Some(true) {
        "; the VM was started between them"
    } else {
        ""
    };
    note(&format!(
        "{}: {} compared with {}{reboot}",
        vm.title(),
        output.time(after.at),
        output.time(before.at)
    ));
    if changes.incomplete {
        note(
            "the agent does not report all processes, so one that it did not report may seem to have come or gone",
        );
    }
    Ok(())
}

fn table(changes: &ProcessChanges) -> Table {
    let mut table = Table::new([
        Column::Left("CHANGE"),
        Column::Right("PROCESSES"),
        Column::Right("CPU %"),
        Column::Right("MEM %"),
        Column::Left("USER"),
        Column::Left("UNIT"),
        Column::Left("NAME"),
    ]);
    for (change, tone, list) in [
        ("came", Tone::Good, &changes.came),
        ("went", Tone::Bad, &changes.went),
        ("grew", Tone::Warning, &changes.grew),
        ("restarted", Tone::Plain, &changes.restarted),
    ] {
        for group in &list.groups {
            let processes = both(group, |usage| usage.processes.to_string());
            table.row([
                Cell::new(change, tone),
                Cell::from(processes),
                Cell::from(both(group, |usage| decimal(usage.cpu_util))),
                Cell::from(both(group, |usage| decimal(usage.mem))),
                Cell::from(group.user.as_ref()),
                Cell::from(group.unit.as_ref().or(group.container.as_ref())),
                Cell::from(&group.name),
            ]);
        }
        let left_out = list
            .total
            .saturating_sub(u64::try_from(list.groups.len()).unwrap_or(list.total));
        if left_out > 0 {
            note(&format!(
                "{left_out} more {change}; set another number with --limit"
            ));
        }
    }
    table
}

/// A value at both moments, such as `1.0→93.5`, or at the one at which the group ran.
fn both(group: &Group, value: impl Fn(Usage) -> String) -> String {
    match (group.before.map(&value), group.after.map(&value)) {
        (Some(before), Some(after)) if before != after => format!("{before}→{after}"),
        (_, Some(one)) | (Some(one), None) => one,
        (None, None) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changes_show_the_usage_at_both_moments() {
        crate::answers::tests::check::<ProcessChanges>("ProcessChanges");
        let usage = |processes: u32, cpu: f64| json!({ "processes": processes, "cpu_util": cpu, "mem": 1.5, "disk_read": 0.0, "disk_write": 0.0, "started_at": null });
        let group = |name: &str, before: Value, after: Value| json!({ "name": name, "user": "root", "unit": null, "container": "db", "before": before, "after": after, "kept": 0 });
        let list = |groups: Vec<Value>| json!({ "total": groups.len(), "groups": groups });
        let changes: ProcessChanges = serde_json::from_value(json!({
            "before": { "at": "2026-11-27T13:00:00Z" }, "after": { "at": "2026-11-27T14:00:00Z" }, "rebooted": true, "incomplete": false,
            "came": list(vec![group("stress", Value::Null, usage(1, 93.5))]),
            "went": list(vec![group("cron", usage(2, 0.0), Value::Null)]),
            "grew": list(vec![group("postgres", usage(3, 1.0), usage(5, 40.0))]),
            "restarted": list(vec![]),
        }))
        .unwrap();
        let expected = "\
CHANGE  PROCESSES     CPU %  MEM %  USER  UNIT  NAME
came            1      93.5    1.5  root  db    stress
went            2       0.0    1.5  root  db    cron
grew          3→5  1.0→40.0    1.5  root  db    postgres
";
        assert_eq!(table(&changes).render(None, false), expected);
    }
}
