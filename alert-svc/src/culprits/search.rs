//! Decides what explains an alert, by its condition: which processes, or the last operation, and in which time.

use vmwatch_api::{
    alerts::{
        Alert,
        culprits::{Culprits, MAX_TOP_MS, TopMeasure},
        rules::{Condition, MeasureName},
    },
    history::TimeRange,
    processes::ProcessName,
};

/// Minimum time before an alert fired in which processes are compared: a little more than the usual interval between two
/// samples of processes.
const MIN_WINDOW_MS: u64 = 75_000;
/// Time before a process was missing in which its last rows are looked for.
const LAST_ROWS_MS: u64 = 15 * 60_000;
/// Time after an alert fired that still belongs to it. The other parts of the sample that completed the condition have nearly
/// the same date.
const AFTER_MS: u64 = 1000;

const NO_NETWORK: &str =
    "processes have no counters of network traffic; these are the processes that used the most CPU time";

/// What explains an alert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Search {
    /// The processes that used the most, and what a user must know about them.
    Top(TopMeasure, Option<&'static str>),
    /// The processes with this name, in the time before the condition held or while it did.
    Named(ProcessName, TopMeasure),
    /// The last known processes, and the last operation on the VM.
    LastKnown,
    /// The last failed operation on the VM.
    FailedOperation,
    /// Nothing: the condition says it all.
    Nothing,
}

/// The time in which an alert is explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) from_ms: u64,
    /// The end, which is not part of the window.
    pub(super) to_ms: u64,
}

impl Window {
    /// The window of an alert: the time that its rule requires, or longer if the condition has held longer.
    pub(super) fn new(alert: &Alert, for_seconds: u32) -> Self {
        let fired_ms = alert.fired_ms.unwrap_or(alert.since_ms);
        let wanted = u64::from(for_seconds) * 1000;
        let held = fired_ms.saturating_sub(alert.since_ms);
        let mut length = wanted.max(held).max(MIN_WINDOW_MS);
        if matches!(alert.condition, Condition::ProcessCount { .. }) {
            length = length.max(held + LAST_ROWS_MS);
        }
        Self {
            from_ms: fired_ms.saturating_sub(length.min(MAX_TOP_MS - AFTER_MS)),
            to_ms: fired_ms.saturating_add(AFTER_MS),
        }
    }

    pub(super) fn range(self) -> Option<TimeRange> {
        TimeRange::new(self.from_ms, self.to_ms)
    }

    /// Culprits of this window, without any process.
    pub(super) fn nothing(self) -> Culprits {
        Culprits {
            from_ms: self.from_ms,
            to_ms: self.to_ms,
            ..Culprits::default()
        }
    }
}

/// Returns what explains an alert.
pub(super) fn search(alert: &Alert) -> Search {
    match &alert.condition {
        Condition::Measure { measure, .. } => of_measure(*measure),
        Condition::Filesystem { .. } => Search::Top(TopMeasure::Disk, None),
        Condition::ProcessMem { name, .. } => Search::Named(name.clone(), TopMeasure::Mem),
        Condition::ProcessCpu { name, .. } | Condition::ProcessCount { name, .. } => {
            Search::Named(name.clone(), TopMeasure::Cpu)
        }
        Condition::VmState { .. } | Condition::AgentSilent {} => Search::LastKnown,
        Condition::OperationFailed {} => Search::FailedOperation,
        Condition::AgentFault { .. } | Condition::NotReceiving {} => Search::Nothing,
    }
}

/// The resource whose use by processes explains a measure of the VM.
fn of_measure(measure: MeasureName) -> Search {
    match measure.as_str() {
        "mem" | "swap" | "pressure_mem" => Search::Top(TopMeasure::Mem, None),
        "disk_read" | "disk_write" | "pressure_io" => Search::Top(TopMeasure::Disk, None),
        "net_incoming" | "net_outgoing" => Search::Top(TopMeasure::Cpu, Some(NO_NETWORK)),
        _ => Search::Top(TopMeasure::Cpu, None),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;
    use vmwatch_api::measures::VM_MEASURES;

    use super::*;

    /// An alert that fired ten seconds after its condition began to hold.
    pub(in super::super) fn alert(condition: &serde_json::Value, subject: &str) -> Alert {
        serde_json::from_value(json!({
            "id": "0".repeat(32), "rule_id": "1".repeat(32), "rule_name": "a rule", "severity": "warning",
            "condition": condition, "instance_id": "vm-1", "subject": subject, "state": "firing",
            "since_ms": 1_000_000_000, "fired_ms": 1_000_010_000, "revision": 4,
        }))
        .unwrap()
    }

    fn threshold() -> serde_json::Value {
        json!({ "direction": "above", "limit": 90.0 })
    }

    #[test]
    fn each_measure_is_explained_by_the_processes_that_use_its_resource() {
        let found = VM_MEASURES.into_array().map(|measure| {
            let condition = json!({ "kind": "measure", "measure": measure.name, "threshold": threshold() });
            let Search::Top(by, note) = search(&alert(&condition, "")) else {
                panic!("{}", measure.name);
            };
            assert_eq!(note.is_some(), measure.name.starts_with("net_"));
            (measure.name, by)
        });
        let by = |wanted| {
            let found = found.iter().filter(|(_, by)| *by == wanted);
            found.map(|(name, _)| *name).collect::<Vec<_>>()
        };
        assert_eq!(by(TopMeasure::Mem), ["mem", "swap", "pressure_mem"]);
        assert_eq!(by(TopMeasure::Disk), ["disk_read", "disk_write", "pressure_io"]);
    }

    #[test]
    fn other_conditions_are_explained_by_what_they_are_about() {
        let nginx = || ProcessName::new("nginx").unwrap();
        let about_nginx = |kind: &str| json!({ "kind": kind, "name": "nginx", "threshold": threshold() });
        for (condition, subject, expected) in [
            (
                json!({ "kind": "filesystem", "threshold": threshold() }),
                "/",
                Search::Top(TopMeasure::Disk, None),
            ),
            (
                about_nginx("process_count"),
                "nginx",
                Search::Named(nginx(), TopMeasure::Cpu),
            ),
            (
                about_nginx("process_mem"),
                "nginx",
                Search::Named(nginx(), TopMeasure::Mem),
            ),
            (json!({ "kind": "agent_silent" }), "", Search::LastKnown),
            (
                json!({ "kind": "vm_state", "states": ["shut_off"] }),
                "lab",
                Search::LastKnown,
            ),
            (json!({ "kind": "operation_failed" }), "", Search::FailedOperation),
            (json!({ "kind": "not_receiving" }), "", Search::Nothing),
        ] {
            assert_eq!(search(&alert(&condition, subject)), expected, "{condition}");
        }
    }

    #[test]
    fn window_is_the_duration_of_the_rule_but_at_least_a_minute() {
        let cpu = json!({ "kind": "measure", "measure": "cpu_util", "threshold": threshold() });
        let mut alert = alert(&cpu, "");
        let length = |alert: &Alert, for_seconds| {
            let window = Window::new(alert, for_seconds);
            assert_eq!(window.to_ms, alert.fired_ms.unwrap() + AFTER_MS);
            window.range().unwrap().length_ms()
        };
        assert_eq!(length(&alert, 0), MIN_WINDOW_MS + AFTER_MS);
        assert_eq!(length(&alert, 900), 900_000 + AFTER_MS);
        let mut late = alert.clone();
        (late.since_ms, late.fired_ms) = (1_000_000_000, Some(1_086_400_000));
        assert_eq!(length(&late, 86_400), MAX_TOP_MS);
        // The rule was changed since.
        alert.since_ms = 999_000_000;
        assert_eq!(length(&alert, 60), 1_010_000 + AFTER_MS);
        alert.condition = serde_json::from_value(
            json!({ "kind": "process_count", "name": "nginx", "threshold": threshold() }),
        )
        .unwrap();
        assert_eq!(length(&alert, 60), 1_010_000 + LAST_ROWS_MS + AFTER_MS);
    }
}
