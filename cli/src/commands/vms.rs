//! `vmwatch vms`.

use super::{decimal, note_more, state_tone};
use crate::{
    answers::Vm,
    args::Vms,
    client::{Client, List},
    error::CliError,
    output::{Output, typed},
    table::{Cell, Column, Table, Tone},
};

pub(crate) async fn run(args: &Vms, client: &Client, output: &Output) -> Result<(), CliError> {
    let query = [
        ("q", args.search.clone()),
        ("state", args.state.clone()),
        ("agent", args.agent.clone()),
        ("hypervisor", args.hypervisor.clone()),
        ("label", args.label.clone()),
        ("sort", Some(args.sort.clone())),
    ];
    let List { items, has_more, .. } = client.list("/vms", &query, "vms", args.limit.get()).await?;
    if output.json {
        return output.print_json(&items);
    }
    let vms = typed::<Vm>(items)?;
    output.print_table(&table(&vms), "no VM matches")?;
    note_more(vms.len(), has_more);
    Ok(())
}

fn table(vms: &[Vm]) -> Table {
    let mut table = Table::new([
        Column::Left("NAME"),
        Column::Left("STATE"),
        Column::Left("AGENT"),
        Column::Right("CPU %"),
        Column::Right("MEM %"),
        Column::Right("READ KiB/s"),
        Column::Right("WRITE KiB/s"),
        Column::Left("HYPERVISOR"),
        Column::Left("ID"),
    ]);
    for vm in vms {
        let values = vm.values();
        let number = |value: Option<f64>| Cell::from(value.map(decimal));
        table.row([
            Cell::from(vm.name.as_ref()),
            vm.state
                .as_deref()
                .map_or_else(|| Cell::from("-"), |state| Cell::new(state, state_tone(state))),
            agent(vm.agent.as_deref()),
            number(values.and_then(|values| values.cpu_util)),
            number(values.and_then(|values| values.mem)),
            number(values.and_then(|values| values.disk_read)),
            number(values.and_then(|values| values.disk_write)),
            Cell::from(vm.hypervisor.as_ref()),
            Cell::from(vm.instance_id.as_str()),
        ]);
    }
    table
}

fn agent(agent: Option<&str>) -> Cell {
    let tone = match agent {
        Some("silent") => Tone::Warning,
        _ => Tone::Plain,
    };
    Cell::new(agent.unwrap_or("-"), tone)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn table_shows_unknown_values_as_dashes() {
        let sample = json!({ "at": "2017-01-01T13:37:59Z", "cpu_util": 7.5, "mem": null, "disk_read": 0.0,
            "disk_write": 1024.0, "net_incoming": 0.0, "net_outgoing": 0.0, "proc": 3 });
        let vms = json!([
            { "instance_id": "vm-1", "name": "web\n1", "hypervisor": "lab", "state": "running", "agent": "reporting",
              "last_report_at": null, "sample": sample, "hypervisor_sample": null, "cpu_sparkline": [] },
            { "instance_id": "vm-2", "name": null, "hypervisor": null, "state": null, "agent": null,
              "last_report_at": null, "sample": null, "hypervisor_sample": null, "cpu_sparkline": [] },
        ]);
        let vms: Vec<Vm> = serde_json::from_value(vms).unwrap();
        let expected = "\
NAME   STATE    AGENT      CPU %  MEM %  READ KiB/s  WRITE KiB/s  HYPERVISOR  ID
web\u{fffd}1  running  reporting    7.5      -         0.0       1024.0  lab         vm-1
-      -        -              -      -           -            -  -           vm-2
";
        assert_eq!(table(&vms).render(None, false), expected);
    }
}
