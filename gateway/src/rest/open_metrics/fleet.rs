//! Encodes the metrics of a fleet.

use std::{
    collections::{BTreeMap, HashSet},
    io,
};

use bytes::Bytes;
use vmwatch_api::{
    agents::AgentText,
    alerts::Severity,
    current::{CurrentVm, MAX_PROCESS_SERIES, ProcessUse},
    vms::{Agent, Stale},
};

use super::{
    families::{
        ALERTS, FAULTY, INFO, LAST_REPORT, MEASURES, MeasureFamily, PROCESS_CPU, PROCESS_MEMORY,
        PROCESSES_LEFT_OUT, REPORTING, SAMPLED_AT, SOURCES, STATE, VMS,
    },
    text::{Family, Text, push_label},
};

/// What the metrics are made of.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    /// Sorted by id.
    pub(super) vms: Vec<CurrentVm>,
    /// Number of firing and acknowledged alerts by severity; `None` if alert-svc did not answer.
    pub(super) alerts: Option<BTreeMap<String, u64>>,
    /// Data that is incomplete or out of date.
    pub(super) stale: HashSet<Source>,
    /// Number of values of processes that are left out; `None` if processes are not listed.
    pub(super) processes_left_out: Option<u64>,
}

/// A source of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Inventory,
    Labels,
    Samples,
    Alerts,
}

impl Source {
    const ALL: [Self; 4] = [Self::Inventory, Self::Labels, Self::Samples, Self::Alerts];

    /// The source that metrics-svc cannot follow; `None` if only a newer version knows it.
    pub(super) const fn of(stale: Stale) -> Option<Self> {
        match stale {
            Stale::Inventory => Some(Self::Inventory),
            Stale::Labels => Some(Self::Labels),
            Stale::Samples => Some(Self::Samples),
            Stale::Unknown => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Inventory => "inventory",
            Self::Labels => "labels",
            Self::Samples => "samples",
            Self::Alerts => "alerts",
        }
    }
}

/// Encodes the metrics of a fleet, compressed with gzip.
pub(super) fn encode(fleet: &Fleet) -> io::Result<Bytes> {
    let mut text = Text::new(VMS);
    text.sample("", number(fleet.vms.len() as u64))?;
    text.begin(SOURCES);
    for source in Source::ALL {
        let is_current = !fleet.stale.contains(&source);
        text.sample(&label("source", source.name()), flag(is_current))?;
    }
    if let Some(alerts) = &fleet.alerts {
        text.begin(ALERTS);
        for severity in [Severity::Info, Severity::Warning, Severity::Critical] {
            let count = alerts.get(severity.as_str()).copied().unwrap_or(0);
            text.sample(&label("severity", severity.as_str()), number(count))?;
        }
    }
    let vms: Vec<_> = fleet.vms.iter().map(|vm| (identity(vm), vm)).collect();
    states(&mut text, &vms)?;
    for (index, MeasureFamily { family, divisor }) in MEASURES.into_array().into_iter().enumerate() {
        let value = |vm: &CurrentVm| {
            let values = vm.sample?.values.as_floats().into_array();
            Some(values.get(index).copied()?? / divisor)
        };
        each(&mut text, family, &vms, value)?;
    }
    if let Some(left_out) = fleet.processes_left_out {
        processes(&mut text, &vms, left_out)?;
    }
    text.finish()
}

/// The VMs with their encoded labels.
type Vms<'a> = [(String, &'a CurrentVm)];
/// Reads a value of processes.
type ValueOf = fn(&ProcessUse) -> Option<f64>;

/// Writes what is known about VMs apart from their measures.
fn states(text: &mut Text, vms: &Vms<'_>) -> io::Result<()> {
    text.begin(INFO);
    for (identity, vm) in vms {
        text.sample(&described(identity, vm), 1.0)?;
    }
    text.begin(STATE);
    for (identity, vm) in vms {
        if let Some(state) = vm.state {
            let mut labels = identity.clone();
            push_label(&mut labels, "state", state.as_str());
            text.sample(&labels, 1.0)?;
        }
    }
    each(text, REPORTING, vms, |vm| {
        Some(flag(vm.agent? == Agent::Reporting))
    })?;
    each(text, FAULTY, vms, |vm| Some(flag(vm.agent_faulty)))?;
    each(text, LAST_REPORT, vms, |vm| vm.last_report_ms.map(seconds))?;
    each(text, SAMPLED_AT, vms, |vm| {
        vm.sample.map(|sample| seconds(sample.at_ms))
    })
}

/// Writes the value of each VM that has one.
fn each(
    text: &mut Text,
    family: Family,
    vms: &Vms<'_>,
    value: impl Fn(&CurrentVm) -> Option<f64>,
) -> io::Result<()> {
    text.begin(family);
    for (identity, vm) in vms {
        if let Some(value) = value(vm).filter(|value| value.is_finite()) {
            text.sample(identity, value)?;
        }
    }
    Ok(())
}

/// Writes the values of processes. The limit holds even if processes changed while the pages were read.
fn processes(text: &mut Text, vms: &Vms<'_>, mut left_out: u64) -> io::Result<()> {
    let mut room = MAX_PROCESS_SERIES;
    let measures: [(Family, ValueOf); 2] =
        [(PROCESS_CPU, |one| one.cpu_util), (PROCESS_MEMORY, |one| one.mem)];
    for (family, value) in measures {
        text.begin(family);
        let uses = vms
            .iter()
            .flat_map(|(identity, vm)| vm.processes.iter().map(move |one| (identity, one)));
        for (identity, one) in uses {
            let Some(value) = value(one).filter(|value| value.is_finite()) else {
                continue;
            };
            if room == 0 {
                left_out += 1;
                continue;
            }
            room -= 1;
            let mut labels = identity.clone();
            push_label(&mut labels, "process", one.name.as_str());
            text.sample(&labels, value / 100.0)?;
        }
    }
    text.begin(PROCESSES_LEFT_OUT);
    text.sample("", number(left_out))
}

/// The labels that each metric of a VM has.
fn identity(vm: &CurrentVm) -> String {
    let mut labels = label("instance_id", vm.instance_id.as_str());
    push_label(&mut labels, "name", vm.name.as_deref().unwrap_or_default());
    push_label(
        &mut labels,
        "hypervisor",
        vm.hypervisor.as_deref().unwrap_or_default(),
    );
    labels
}

/// The labels of the metric with the VM's own labels. Of labels whose names become equal, those after the first get a number.
fn described(identity: &str, vm: &CurrentVm) -> String {
    let mut labels = identity.to_owned();
    let version = vm.agent_version.as_ref().map(AgentText::as_str);
    push_label(&mut labels, "agent_version", version.unwrap_or_default());
    let mut names: HashSet<String> = HashSet::new();
    for (key, value) in &vm.labels {
        let base = label_name(key);
        let mut name = base.clone();
        let mut number = 2;
        while names.contains(&name) {
            name = format!("{base}_{number}");
            number += 1;
        }
        push_label(&mut labels, &name, value);
        names.insert(name);
    }
    labels
}

/// The name of the metric's label for a label of a VM.
fn label_name(key: &str) -> String {
    let characters = key.chars().map(|character| match character {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '_' => character,
        _ => '_',
    });
    "label_".chars().chain(characters).collect()
}

fn label(name: &str, value: &str) -> String {
    let mut labels = String::with_capacity(128);
    push_label(&mut labels, name, value);
    labels
}

const fn flag(is_set: bool) -> f64 {
    if is_set { 1.0 } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
const fn number(count: u64) -> f64 {
    count as f64
}

fn seconds(ms: u64) -> f64 {
    number(ms) / 1000.0
}

#[cfg(test)]
mod tests;
