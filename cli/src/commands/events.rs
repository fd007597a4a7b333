//! `vmwatch events`.

use serde_json::{Value, json};

use crate::{
    answers::Timestamp,
    args::Events,
    client::Client,
    error::CliError,
    output::{Output, note},
    sse::{Event, Follower, Received},
    table::Tone,
    text::{pad, printable},
    vm::find_vm,
};

pub(crate) async fn run(args: &Events, client: &Client, output: &Output) -> Result<(), CliError> {
    let mut ids = Vec::new();
    for vm in &args.vm {
        ids.push(find_vm(client, vm).await?.instance_id.to_string());
    }
    let query = vec![
        ("instance_id", (!ids.is_empty()).then(|| ids.join(","))),
        ("kind", Some(args.kind.clone())),
    ];
    let mut follower = Follower::new(client, query);
    let (mut shown, mut is_lost) = (0_u64, false);
    while args.count.is_none_or(|count| shown < count) {
        match follower.next().await? {
            Received::Event(event) => {
                show(&event, output)?;
                shown += 1;
            }
            Received::Missed => note("some events were missed"),
            Received::Connected if is_lost => {
                note("connected again");
                is_lost = false;
            }
            Received::Lost(reason) if !is_lost => {
                note(&format!("connection lost ({reason}); connecting again"));
                is_lost = true;
            }
            Received::Connected | Received::Lost(_) => {}
        }
    }
    Ok(())
}

fn show(event: &Event, output: &Output) -> Result<(), CliError> {
    let data: Value =
        serde_json::from_str(&event.data).map_err(|error| CliError::Answer(error.to_string()))?;
    if output.json {
        return output.print(&format!("{}\n", json!({ "kind": event.name, "data": data })));
    }
    let text = |name: &str| data.get(name).and_then(Value::as_str);
    let at = [
        "at",
        "finished_at",
        "requested_at",
        "resolved_at",
        "fired_at",
        "since",
    ];
    let at = at
        .iter()
        .find_map(|name| text(name))
        .and_then(|at| at.parse().ok());
    let at = at.map_or_else(|| "-".to_owned(), |at| output.time(Timestamp(at)));
    let kind = Tone::Heading.paint(&pad(&printable(&event.name), 9, false), output.colours);
    let vm = printable(text("instance_id").unwrap_or("-"));
    output.print(&format!(
        "{at}  {kind}  {vm}  {}\n",
        printable(&description(&event.name, &data))
    ))
}

/// What happened, in a few words.
fn description(kind: &str, data: &Value) -> String {
    let text = |name: &str| data.get(name).and_then(Value::as_str).unwrap_or_default();
    let number = |name: &str| {
        let value = data.get(name).and_then(Value::as_f64);
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
    };
    match kind {
        "sample" | "hypervisor_sample" => format!("CPU {} %, memory {} %", number("cpu_util"), number("mem")),
        "processes" => "new process table".to_owned(),
        "machine" => match text("state") {
            "" => "no hypervisor has the VM any more".to_owned(),
            state => state.to_owned(),
        },
        "operation" => {
            let step = data
                .pointer("/history")
                .and_then(Value::as_array)
                .and_then(|steps| steps.last());
            let step = step.and_then(|step| step.get("text")).and_then(Value::as_str);
            let user = text("user");
            format!(
                "{} by {user}: {}",
                text("action"),
                step.unwrap_or_else(|| text("state"))
            )
        }
        "removed" => "an administrator removed the VM".to_owned(),
        "alert" => format!("{} {}: {}", text("severity"), text("state"), text("rule_name")),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_described_in_a_few_words() {
        for (kind, data, expected) in [
            (
                "sample",
                json!({ "cpu_util": 93.04, "mem": null }),
                "CPU 93.0 %, memory - %",
            ),
            ("machine", json!({ "state": "shut_off" }), "shut_off"),
            (
                "machine",
                json!({ "state": null }),
                "no hypervisor has the VM any more",
            ),
            (
                "operation",
                json!({ "action": "stop", "user": "ann", "state": "running", "history": [{ "text": "first" }, { "text": "asked the guest" }] }),
                "stop by ann: asked the guest",
            ),
            (
                "operation",
                json!({ "action": "stop", "user": "ann", "state": "requested", "history": [] }),
                "stop by ann: requested",
            ),
            (
                "alert",
                json!({ "severity": "warning", "state": "firing", "rule_name": "CPU is busy" }),
                "warning firing: CPU is busy",
            ),
            ("new", json!({}), ""),
        ] {
            assert_eq!(description(kind, &data), expected);
        }
    }
}
