//! English texts for conditions, values, durations and processes.

mod processes;

use vmwatch_api::{
    alerts::{
        Alert,
        rules::{Condition, Direction, FaultKind, MeasureName, Threshold},
    },
    measures::{Unit, VM_MEASURES},
    time::{CreateDate, UtcOffset},
};

pub(super) use self::processes::culprits;

/// The condition of an alert, such as `CPU above 90 %`.
pub(super) fn condition(alert: &Alert) -> String {
    let subject = alert.subject.as_str();
    match &alert.condition {
        Condition::Measure { measure, threshold } => {
            let unit = unit(*measure);
            limited(measure_label(*measure), *threshold, |value| quantity(value, unit))
        }
        Condition::Filesystem { threshold, .. } => {
            limited(&format!("filesystem {subject}"), *threshold, percent)
        }
        Condition::ProcessCount { name, threshold } => process_count(name.as_str(), *threshold),
        Condition::ProcessCpu { name, threshold } => {
            limited(&format!("CPU of {}", name.as_str()), *threshold, |value| {
                format!("{} of a core", percent(value))
            })
        }
        Condition::ProcessMem { name, threshold } => {
            limited(&format!("memory of {}", name.as_str()), *threshold, percent)
        }
        Condition::VmState { states } => {
            let names: Vec<_> = states
                .iter()
                .map(|state| state.as_str().replace('_', " "))
                .collect();
            let on = if subject.is_empty() {
                String::new()
            } else {
                format!(" on {subject}")
            };
            format!("VM is {}{on}", names.join(" or "))
        }
        Condition::AgentSilent {} => "agent is silent".to_owned(),
        Condition::AgentFault { fault } => fault_text(*fault).to_owned(),
        Condition::OperationFailed {} => "operation failed".to_owned(),
        Condition::NotReceiving {} => "vmwatch is not receiving samples".to_owned(),
    }
}

fn limited(what: &str, threshold: Threshold, text: impl Fn(f64) -> String) -> String {
    let side = match threshold.direction() {
        Direction::Above => "above",
        Direction::Below => "below",
    };
    format!("{what} {side} {}", text(threshold.limit()))
}

fn process_count(name: &str, threshold: Threshold) -> String {
    let limit = threshold.limit();
    match threshold.direction() {
        Direction::Below if limit <= 1.0 => format!("no process {name}"),
        Direction::Below => format!("fewer than {} processes {name}", number(limit)),
        Direction::Above => format!("more than {} processes {name}", number(limit)),
    }
}

const fn fault_text(fault: FaultKind) -> &'static str {
    match fault {
        FaultKind::Clock => "clock of the VM is wrong",
        FaultKind::UtcOffset => "agent has a wrong UTC offset",
        FaultKind::TwoAgents => "two agents report as this VM",
        FaultKind::NotStored => "rows are not stored",
        FaultKind::OverLimit => "VM sends more than a limit allows",
    }
}

fn measure_label(measure: MeasureName) -> &'static str {
    match measure.as_str() {
        "cpu_util" => "CPU",
        "mem" => "memory",
        "disk_read" => "disk reads",
        "disk_write" => "disk writes",
        "net_incoming" => "incoming traffic",
        "net_outgoing" => "outgoing traffic",
        "proc" => "number of processes",
        "cores" => "number of cores",
        "steal" => "CPU steal",
        "pressure_cpu" => "CPU pressure",
        "pressure_mem" => "memory pressure",
        "pressure_io" => "I/O pressure",
        other => other,
    }
}

fn unit(measure: MeasureName) -> Unit {
    let mut measures = VM_MEASURES.into_array().into_iter();
    let found = measures.find(|candidate| candidate.name == measure.as_str());
    found.map_or(Unit::Count, |measure| measure.unit)
}

/// The newest value of an alert, with its unit; `None` if it has none.
pub(super) fn value(alert: &Alert) -> Option<String> {
    let value = alert.value?;
    match &alert.condition {
        Condition::Measure { measure, .. } => Some(quantity(value, unit(*measure))),
        Condition::Filesystem { .. } | Condition::ProcessMem { .. } => Some(percent(value)),
        Condition::ProcessCpu { .. } => Some(format!("{} of a core", percent(value))),
        Condition::ProcessCount { .. } => Some(number(value)),
        _ => None,
    }
}

fn quantity(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Percent => percent(value),
        Unit::KibPerSecond if value >= 1024.0 => format!("{} MiB/s", number(value / 1024.0)),
        Unit::KibPerSecond => format!("{} KiB/s", number(value)),
        Unit::Count | Unit::Load => number(value),
    }
}

fn percent(value: f64) -> String {
    format!("{} %", number(value))
}

/// A number with at most one decimal place.
fn number(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// A duration as people say it, such as `5 minutes`; `None` below one second.
pub(super) fn duration(millis: u64) -> Option<String> {
    let seconds = millis / 1000;
    let (count, unit) = match seconds {
        0 => return None,
        1..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if count == 1 { "" } else { "s" };
    Some(format!("{count} {unit}{plural}"))
}

/// The time of day with the deployment's UTC offset; with the date, if it is not the day of `now_ms`.
pub(super) fn time(millis: u64, now_ms: u64, offset: UtcOffset) -> String {
    let text = |millis| CreateDate::at_millis(millis, offset).as_str().to_owned();
    let (then, now) = (text(millis), text(now_ms));
    let minutes = then.get(11..16).unwrap_or_default();
    match (then.get(..10), now.get(..10)) {
        (Some(day), today) if Some(day) != today => format!("{day} {minutes}"),
        _ => minutes.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn alert(condition: &Value, subject: &str, value: Option<f64>) -> Alert {
        serde_json::from_value(json!({
            "id": "a".repeat(32), "rule_id": "b".repeat(32), "rule_name": "rule", "severity": "warning",
            "condition": condition, "subject": subject, "state": "firing", "value": value,
            "since_ms": 1, "revision": 1,
        }))
        .unwrap()
    }

    #[test]
    fn conditions_and_values_are_english() {
        let above = |limit: f64| json!({ "direction": "above", "limit": limit });
        let below = |limit: f64| json!({ "direction": "below", "limit": limit });
        let measure =
            |measure: &str| json!({ "kind": "measure", "measure": measure, "threshold": above(90.0) });
        for (condition, subject, value, expected, with) in [
            (
                measure("cpu_util"),
                "",
                Some(97.04),
                "CPU above 90 %",
                Some("97 %"),
            ),
            (
                measure("disk_read"),
                "",
                Some(5120.0),
                "disk reads above 90 KiB/s",
                Some("5 MiB/s"),
            ),
            (measure("load"), "", Some(12.34), "load above 90", Some("12.3")),
            (
                json!({ "kind": "filesystem", "threshold": above(97.5) }),
                "/var",
                Some(98.0),
                "filesystem /var above 97.5 %",
                Some("98 %"),
            ),
            (
                json!({ "kind": "process_count", "name": "postgres", "threshold": below(1.0) }),
                "postgres",
                Some(0.0),
                "no process postgres",
                Some("0"),
            ),
            (
                json!({ "kind": "process_count", "name": "php", "threshold": above(50.0) }),
                "php",
                Some(51.0),
                "more than 50 processes php",
                Some("51"),
            ),
            (
                json!({ "kind": "vm_state", "states": ["shut_off", "crashed"] }),
                "lab",
                None,
                "VM is shut off or crashed on lab",
                None,
            ),
            (
                json!({ "kind": "agent_silent" }),
                "",
                None,
                "agent is silent",
                None,
            ),
            (
                json!({ "kind": "not_receiving" }),
                "",
                None,
                "vmwatch is not receiving samples",
                None,
            ),
        ] {
            let alert = alert(&condition, subject, value);
            assert_eq!(super::condition(&alert), expected);
            assert_eq!(super::value(&alert).as_deref(), with, "{expected}");
        }
    }

    #[test]
    fn durations_have_one_unit() {
        for (millis, expected) in [
            (0, None),
            (1_000, Some("1 second")),
            (119_999, Some("119 seconds")),
            (300_500, Some("5 minutes")),
            (7_200_000, Some("2 hours")),
            (172_800_000, Some("2 days")),
        ] {
            assert_eq!(duration(millis).as_deref(), expected, "{millis}");
        }
    }
}
