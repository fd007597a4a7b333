//! The current measures of all VMs, page by page.

use vmwatch_api::{
    InstanceId, PageRoom, Scope,
    current::{CurrentPage, CurrentVm, MAX_CURRENT_VMS},
    vms::{Agent, VmQuery},
};

use super::{Found, Vms};
use crate::vms::Row;

impl Vms<'_> {
    /// Returns a page of the VMs that the scope allows: those after this id, sorted by id. `complete` adds the
    /// processes of a VM, which are not part of these tables.
    pub fn current(
        &self,
        scope: &Scope,
        after: Option<&InstanceId>,
        now_ms: u64,
        mut complete: impl FnMut(&mut CurrentVm),
    ) -> CurrentPage {
        let all = VmQuery::default();
        let mut room = PageRoom::new(MAX_CURRENT_VMS);
        let mut page = CurrentPage::default();
        let mut is_full = false;
        self.each(scope, now_ms, |found| {
            if is_full || after.is_some_and(|after| found.id <= after) {
                return;
            }
            let Some(found) = found.select(&all, None) else {
                return;
            };
            let mut vm = found.current();
            complete(&mut vm);
            is_full = !room.take_item(&vm);
            if !is_full {
                page.vms.push(vm);
            }
        });
        let last = page.vms.last().filter(|_| is_full);
        page.next = last.map(|vm| vm.instance_id.clone());
        page
    }
}

impl<'a> Found<'a> {
    /// The newest row whose values are current: that of the agent, unless it is silent or its samples are not stored,
    /// or else that of the hypervisor.
    pub(super) fn current_row(&self) -> Option<&'a Row> {
        let is_current = self.agent == Some(Agent::Reporting) && self.unstored.is_none();
        self.row.filter(|_| is_current).or(self.measured)
    }

    fn current(&self) -> CurrentVm {
        CurrentVm {
            instance_id: self.id.clone(),
            name: self.copy.map(|copy| copy.vm.name.clone()),
            hypervisor: self.copy.map(|copy| copy.hypervisor.to_string()),
            state: self.copy.map(|copy| copy.vm.state),
            labels: self.all_labels(),
            agent: self.agent,
            agent_version: self.status.map(|(status, _)| status.version.clone()),
            agent_faulty: !self.faults().is_empty(),
            last_report_ms: self.row.map(|row| row.reported_ms),
            sample: self.current_row().map(|row| row.sample),
            processes: Vec::new(),
        }
    }
}
