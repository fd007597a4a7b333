//! The greatest processes of each VM in memory, by name, for the metrics that the gateway serves to Prometheus. Empty
//! unless
//! `VMWATCH_PROCESS_SERIES` is set.
//!
//! The replica that stores a sample sums its processes by name and adds the greatest sums to the live event of the
//! sample. Every replica follows these events, and thus has the processes of all VMs.

mod ranks;
mod sums;

use std::{
    collections::BTreeMap,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

use metrics::counter;
use vmwatch_api::{
    InstanceId, Scope,
    current::{CurrentVm, ProcessRanks, ProcessUse},
    events::ProcessesEvent,
};
use vmwatch_bus::vms::MAX_ROWS;

use self::ranks::{Ranked, smallest_listed};
pub(crate) use self::sums::sum_by_name;

/// Number of names of a VM with the greatest CPU usage that are kept, and of those with the greatest memory usage.
const NAMES: usize = 10;
/// Processes that are older than this are not listed. It is ten times the interval at which agents sample processes.
const LISTED_FOR_MS: u64 = 600_000;

/// The greatest processes of the newest sample of each VM.
#[derive(Debug)]
pub(crate) struct GreatestProcesses {
    /// Maximum number of values of each measure in the answers to one request; 0 if processes are not listed.
    values: usize,
    vms: RwLock<BTreeMap<InstanceId, Processes>>,
}

/// The greatest processes of a VM in one sample.
#[derive(Debug)]
struct Processes {
    /// Time of the sample, Unix milliseconds.
    at_ms: u64,
    /// When the live event was published, Unix milliseconds.
    noted_ms: u64,
    uses: Vec<ProcessUse>,
    /// Number of names that are not in `uses`.
    left_out: u32,
}

impl Processes {
    fn is_listed(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.noted_ms) <= LISTED_FOR_MS
    }
}

impl GreatestProcesses {
    /// Creates an empty table. `series` is the maximum number of values in the answers to one request: one half of them
    /// is CPU usage, the other memory usage.
    pub(crate) fn new(series: usize) -> Self {
        Self {
            values: series / 2,
            vms: RwLock::default(),
        }
    }

    /// Whether processes are listed at all.
    pub(crate) const fn is_on(&self) -> bool {
        self.values > 0
    }

    /// Notes the processes of a sample part, whose live event was published at this time. The parts of a sample are
    /// summed. An event must be noted only once.
    pub(crate) fn note(&self, event: &ProcessesEvent, noted_ms: u64) {
        if !self.is_on() {
            return;
        }
        let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
        if !vms.contains_key(&event.instance_id) && vms.len() >= MAX_ROWS {
            vms.retain(|_, processes| processes.is_listed(noted_ms));
            if vms.len() >= MAX_ROWS {
                counter!("vmwatch_vms_omitted_total").increment(1);
                return;
            }
        }
        let known = vms.entry(event.instance_id.clone()).or_insert_with(|| Processes {
            at_ms: event.at_ms,
            noted_ms,
            uses: Vec::new(),
            left_out: 0,
        });
        if event.at_ms < known.at_ms {
            return;
        }
        if event.at_ms > known.at_ms {
            known.uses.clear();
            known.left_out = 0;
        }
        let both = known.uses.drain(..).chain(event.greatest.iter().cloned());
        let (uses, left_out) = sums::greatest(both);
        *known = Processes {
            at_ms: event.at_ms,
            noted_ms,
            uses,
            left_out: known
                .left_out
                .saturating_add(event.names_left_out)
                .saturating_add(left_out),
        };
    }

    /// Removes the processes of a VM.
    pub(crate) fn remove(&self, id: &InstanceId) {
        let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
        vms.remove(id);
    }

    /// Determines the smallest values that are listed; `None` if processes are not listed.
    pub(crate) fn ranks(&self, scope: &Scope, now_ms: u64) -> Option<ProcessRanks> {
        if !self.is_on() {
            return None;
        }
        let vms = self.read();
        let listed: Vec<_> = match scope {
            Scope::All => vms.iter().collect(),
            Scope::Only(ids) => ids.iter().filter_map(|id| vms.get_key_value(id)).collect(),
            Scope::Unknown => Vec::new(),
        };
        let listed = listed
            .into_iter()
            .filter(|(_, processes)| processes.is_listed(now_ms));
        let uses: Vec<_> = listed
            .flat_map(|(id, processes)| processes.uses.iter().map(move |one| (id, one)))
            .collect();
        let cpu = |one: &ProcessUse| one.cpu_util;
        let mem = |one: &ProcessUse| one.mem;
        Some(ProcessRanks {
            cpu_util: smallest_listed(&uses, cpu, self.values),
            mem: smallest_listed(&uses, mem, self.values),
        })
    }

    /// Adds the listed processes to a VM. Returns the number of its values that are not listed.
    pub(crate) fn complete(&self, vm: &mut CurrentVm, ranks: &ProcessRanks, now_ms: u64) -> u64 {
        let vms = self.read();
        let known = vms.get(&vm.instance_id);
        let Some(known) = known.filter(|processes| processes.is_listed(now_ms)) else {
            return 0;
        };
        let mut left_out = u64::from(known.left_out) * 2;
        for one in &known.uses {
            let mut kept = |value: Option<f64>, smallest| {
                let ranked = Ranked::new(value?, &vm.instance_id, &one.name);
                let is_listed = ranked.is_listed(smallest);
                left_out += u64::from(!is_listed);
                is_listed.then_some(ranked.value)
            };
            let cpu_util = kept(one.cpu_util, ranks.cpu_util.as_ref());
            let mem = kept(one.mem, ranks.mem.as_ref());
            if cpu_util.is_some() || mem.is_some() {
                vm.processes.push(ProcessUse {
                    name: one.name.clone(),
                    cpu_util,
                    mem,
                });
            }
        }
        left_out
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<InstanceId, Processes>> {
        self.vms.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
