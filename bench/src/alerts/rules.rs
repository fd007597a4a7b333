//! The rules of the benchmark, and the channel that they notify.

use anyhow::Context as _;
use serde_json::{Value, json};
use testkit::PATIENCE;
use vmwatch_api::{
    Principal, Role, Scope,
    alerts::{
        Alert, AlertFilter, AlertsList, RecordId,
        channels::{ChannelsCreate, NewChannel},
        rules::{RuleSpec, RulesCreate, RulesList},
    },
    sessions::Own,
};
use vmwatch_bus::{Bus, Context};

/// The name of the rule whose alerts are measured.
const MEASURED: &str = "CPU is busy";

/// Measures with a limit that no VM of the fleet reaches, so that each record is evaluated and fires nothing.
const NEVER: [(&str, f64); 8] = [
    ("cpu_util", 99.95),
    ("mem", 100.0),
    ("disk_read", 1e9),
    ("disk_write", 1e9),
    ("net_incoming", 1e9),
    ("net_outgoing", 1e9),
    ("proc", 100_000.0),
    ("load", 1e6),
];
/// Process names whose number and CPU usage rules are about.
pub(super) const NAMES: [&str; 4] = ["postgres", "nginx", "java", "sshd"];

fn administrator() -> Context {
    Context::new(PATIENCE).as_principal(Principal {
        user: "bench".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    })
}

/// Creates a webhook channel, and rules until there are `count`, including the starter rules.
pub(super) async fn create(bus: &Bus, count: usize, url: &str) -> anyhow::Result<()> {
    let channel = json!({ "spec": {
        "name": "bench", "enabled": true, "target": { "kind": "webhook", "url": url }, "group_by": ["vm", "rule"],
    } });
    let channel: NewChannel = serde_json::from_value(channel)?;
    let channel = bus.call::<ChannelsCreate>(&administrator(), &channel).await?.id;
    let existing = bus.call::<RulesList>(&administrator(), &Own {}).await?;
    let missing = count.saturating_sub(existing.rules.len());
    for spec in specs(&channel).into_iter().take(missing) {
        let spec: RuleSpec = serde_json::from_value(spec)?;
        bus.call::<RulesCreate>(&administrator(), &spec)
            .await
            .with_context(|| format!("the rule {} was refused", spec.name))?;
    }
    Ok(())
}

fn specs(channel: &RecordId) -> Vec<Value> {
    let rule = |name: String, condition: Value, seconds: u32, recipients: &[&RecordId]| {
        json!({
            "name": name, "enabled": true, "condition": condition, "for_seconds": seconds, "severity": "warning",
            "recipients": recipients,
        })
    };
    let above = |limit: f64| json!({ "direction": "above", "limit": limit });
    let busy = json!({ "kind": "measure", "measure": "cpu_util", "threshold": above(99.0) });
    let mut specs = vec![rule(MEASURED.to_owned(), busy, 10, &[channel])];
    for (measure, limit) in NEVER {
        let condition = json!({ "kind": "measure", "measure": measure, "threshold": above(limit) });
        specs.push(rule(format!("{measure} is high"), condition, 60, &[]));
    }
    for name in NAMES {
        let many = json!({ "kind": "process_count", "name": name, "threshold": above(1e6) });
        specs.push(rule(format!("many {name}"), many, 60, &[]));
        let busy = json!({ "kind": "process_cpu", "name": name, "threshold": above(1e6) });
        specs.push(rule(format!("{name} is busy"), busy, 60, &[]));
    }
    let full = json!({ "kind": "filesystem", "threshold": above(99.9) });
    specs.push(rule("filesystem is full".to_owned(), full, 60, &[]));
    let off = json!({ "kind": "vm_state", "states": ["paused"] });
    specs.push(rule("VM is paused".to_owned(), off, 60, &[]));
    specs.push(rule(
        "agent is silent".to_owned(),
        json!({ "kind": "agent_silent" }),
        3600,
        &[],
    ));
    specs
}

/// Returns the firing alerts of the measured rule.
pub(super) async fn firing(bus: &Bus) -> anyhow::Result<Vec<Alert>> {
    let mut filter = AlertFilter::default();
    let mut found = Vec::new();
    loop {
        let page = bus.call::<AlertsList>(&administrator(), &filter).await?;
        let measured = page.alerts.into_iter();
        found
            .extend(measured.filter(|alert| alert.rule_name.as_str() == MEASURED && alert.state.is_active()));
        let Some(next) = page.next else {
            return Ok(found);
        };
        filter.after = Some(next);
    }
}
