//! `vmwatch alerts`.

use vmwatch_api::InstanceId;

use super::note_more;
use crate::{
    answers::{Alert, Culprit},
    args::Alerts,
    client::{Client, List},
    error::CliError,
    output::{Output, typed},
    table::{Cell, Column, Table, Tone},
    vm::find_id,
};

pub(crate) async fn run(args: &Alerts, client: &Client, output: &Output) -> Result<(), CliError> {
    let query = [
        ("instance_id", find_id(client, args.vm.as_deref()).await?),
        ("state", args.state.clone()),
        ("severity", args.severity.clone()),
    ];
    let List { items, has_more, .. } = client.list("/alerts", &query, "alerts", args.limit.get()).await?;
    if output.json {
        return output.print_json(&items);
    }
    let alerts = typed::<Alert>(items)?;
    output.print_table(&table(&alerts, output), "there are no such alerts")?;
    note_more(alerts.len(), has_more);
    Ok(())
}

fn table(alerts: &[Alert], output: &Output) -> Table {
    let mut table = Table::new([
        Column::Left("SINCE"),
        Column::Left("SEVERITY"),
        Column::Left("STATE"),
        Column::Left("VM"),
        Column::Left("RULE"),
        Column::Left("SUBJECT"),
        Column::Right("VALUE"),
        Column::Left("CULPRITS"),
    ]);
    for alert in alerts {
        let id = alert.instance_id.as_ref().map(InstanceId::as_str);
        table.row([
            Cell::from(output.time(alert.since)),
            Cell::new(&alert.severity, tone(&alert.severity)),
            Cell::from(&alert.state),
            Cell::from(alert.vm_name.as_deref().or(id)),
            Cell::from(&alert.rule_name),
            Cell::from(&alert.subject),
            Cell::from(alert.value.map(super::decimal)),
            Cell::from(culprits(alert)),
        ]);
    }
    table
}

fn tone(severity: &str) -> Tone {
    match severity {
        "critical" => Tone::Bad,
        "warning" => Tone::Warning,
        _ => Tone::Plain,
    }
}

/// The processes that explain the alert, such as `stress (pid 7, 93 %)`.
fn culprits(alert: &Alert) -> Option<String> {
    let culprits = alert.culprits.as_ref()?;
    if culprits.processes.is_empty() {
        return culprits.problem.clone();
    }
    Some(
        culprits
            .processes
            .iter()
            .map(culprit)
            .collect::<Vec<_>>()
            .join(", "),
    )
}

fn culprit(process: &Culprit) -> String {
    let which = match (process.pid, process.processes) {
        (Some(pid), _) => format!("pid {pid}"),
        (None, Some(count)) => format!("{count} processes"),
        (None, None) => "several processes".to_owned(),
    };
    let share = process.share.map(|share| format!(", {:.0} %", share * 100.0));
    format!("{} ({which}{})", process.name, share.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn culprits_are_named_with_their_share() {
        let alert = |processes: Vec<Culprit>, problem: Option<&str>| Alert {
            id: "5e".to_owned(),
            rule_name: "CPU is busy".to_owned(),
            severity: "warning".to_owned(),
            instance_id: None,
            vm_name: None,
            subject: String::new(),
            state: "firing".to_owned(),
            value: None,
            since: crate::answers::Timestamp(jiff::Timestamp::UNIX_EPOCH),
            culprits: Some(crate::answers::Culprits {
                processes,
                problem: problem.map(str::to_owned),
            }),
        };
        let process = |pid, processes, share| Culprit {
            name: "stress".to_owned(),
            pid,
            processes,
            share,
        };
        let both = alert(
            vec![process(Some(7), None, Some(0.931)), process(None, Some(12), None)],
            None,
        );
        assert_eq!(
            culprits(&both).unwrap(),
            "stress (pid 7, 93 %), stress (12 processes)"
        );
        assert_eq!(
            culprits(&alert(Vec::new(), Some("too late"))).unwrap(),
            "too late"
        );
    }
}
