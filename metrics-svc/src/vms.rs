//! Answers the list of VMs from memory: the inventory and the labels, which this service follows in KV buckets of
//! lifecycle-svc, and the newest rows.

use std::{sync::Arc, time::Duration};

use vmwatch_api::{
    InstanceId, Scope,
    current::{CurrentPage, CurrentQuery, CurrentVm},
    no_such_vm,
    process_search::ProcessSearchPage,
    status::AgentsStatus,
    time::{UtcOffset, unix_millis},
    vms::{Agent, Stale, VmDetail, VmPage, VmQuery},
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    follow::Follower,
    vms::{Measures, StatusTable, Vms},
};

use crate::{deadline::Deadline, greatest::GreatestProcesses, known_vms::KnownVms, newest::NewestRows};

/// Everything that is known about VMs.
pub(crate) struct VmList {
    known: KnownVms,
    newest: Arc<NewestRows>,
    greatest: Arc<GreatestProcesses>,
    statuses: Follower<StatusTable>,
    silent_after_ms: u64,
    utc_offset: UtcOffset,
}

impl VmList {
    /// Creates the list. Rows older than `silent_after` are those of silent agents or of VMs that are not measured any
    /// more, and agents must have this UTC offset.
    pub(crate) fn new(
        known: &KnownVms,
        newest: &Arc<NewestRows>,
        greatest: &Arc<GreatestProcesses>,
        statuses: &Follower<StatusTable>,
        silent_after: Duration,
        utc_offset: UtcOffset,
    ) -> Self {
        Self {
            known: known.clone(),
            newest: Arc::clone(newest),
            greatest: Arc::clone(greatest),
            statuses: statuses.clone(),
            silent_after_ms: u64::try_from(silent_after.as_millis()).unwrap_or(u64::MAX),
            utc_offset,
        }
    }

    /// Returns a page of the VMs that the scope allows.
    pub(crate) fn list(&self, scope: &Scope, query: &VmQuery) -> Result<VmPage, Fault> {
        let mut page = self.read(|vms| vms.list(scope, query, unix_millis()))?;
        page.stale = self.stale();
        Ok(page)
    }

    /// Returns a page of the current measures of the VMs that the scope allows.
    pub(crate) fn current(&self, scope: &Scope, query: CurrentQuery) -> CurrentPage {
        let now_ms = unix_millis();
        let ranks = if self.greatest.is_on() {
            query.ranks.or_else(|| self.greatest.ranks(scope, now_ms))
        } else {
            None
        };
        let mut left_out = 0;
        let complete = |vm: &mut CurrentVm| {
            if let (Some(ranks), Some(Agent::Reporting)) = (&ranks, vm.agent) {
                left_out += self.greatest.complete(vm, ranks, now_ms);
            }
        };
        let mut page = self.read(|vms| vms.current(scope, query.after.as_ref(), now_ms, complete));
        page.processes_left_out = left_out;
        page.ranks = ranks;
        page.stale = self.stale();
        page
    }

    /// Returns a VM. If it lacks a row in memory, its rows are read from the database.
    pub(crate) async fn get(&self, id: &InstanceId, deadline: Deadline) -> Result<VmDetail, Fault> {
        let is_known = self.newest.read().get(id).is_some();
        if !is_known {
            self.newest.load(id, deadline).await?;
        }
        let stale = self.stale();
        let found = self.read(|vms| vms.get(id, unix_millis()));
        let mut detail = found.ok_or_else(|| {
            if stale.contains(&Stale::Inventory) {
                let text = "the VMs of hypervisors cannot be read; try again shortly";
                return Fault::new(FaultKind::Unavailable, text);
            }
            no_such_vm()
        })?;
        detail.stale = stale;
        Ok(detail)
    }

    /// Number of VMs that fell silent within this time. After it, a silent VM is assumed to be deleted or stopped on purpose.
    pub(crate) fn fell_silent(&self, within: Duration) -> usize {
        let now_ms = unix_millis();
        let until = now_ms.saturating_sub(self.silent_after_ms);
        let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        let range = until.saturating_sub(within_ms)..until;
        self.newest.read().last_reported_within(&range, now_ms)
    }

    /// Number of VMs whose agents have faults.
    pub(crate) fn faulty(&self) -> usize {
        self.read(|vms| vms.count_faulty(unix_millis()))
    }

    /// Counts the agents of the VMs that the scope allows.
    pub(crate) fn agents(&self, scope: &Scope) -> AgentsStatus {
        self.read(|vms| vms.agents(scope, unix_millis()))
    }

    /// Adds the names that hypervisors have for the VMs.
    pub(crate) fn with_names(&self, mut found: ProcessSearchPage) -> ProcessSearchPage {
        let inventory = self.known.inventory.read();
        for vm in &mut found.vms {
            vm.vm_name = inventory.name(&vm.instance_id);
        }
        found.stale = self.stale();
        found.stale.retain(|stale| *stale == Stale::Inventory);
        found
    }

    fn read<T>(&self, read: impl FnOnce(Vms<'_>) -> T) -> T {
        let (inventory, labels) = (self.known.inventory.read(), self.known.labels.read());
        let (rows, measured) = (self.newest.read(), self.newest.read_measured());
        let statuses = self.statuses.read();
        read(Vms {
            inventory: &inventory,
            labels: &labels,
            measures: Some(Measures {
                rows: &rows,
                measured: &measured,
                silent_after_ms: self.silent_after_ms,
                utc_offset: self.utc_offset,
                statuses: &statuses,
                version: env!("CARGO_PKG_VERSION"),
            }),
        })
    }

    /// The data that may be out of date or incomplete.
    fn stale(&self) -> Vec<Stale> {
        let of = [
            (Stale::Inventory, self.known.inventory.is_current()),
            (Stale::Labels, self.known.labels.is_current()),
            (Stale::Samples, self.newest.is_current()),
        ];
        of.into_iter()
            .filter(|(_, is_current)| !is_current)
            .map(|(stale, _)| stale)
            .collect()
    }
}
