//! Scope, filter, order and pages of the list of VMs.

mod agents;
mod current;

use std::{
    cmp::Ordering,
    collections::{BTreeMap, btree_map},
    iter::Peekable,
};

use vmwatch_api::{
    InstanceId, PageRoom, Scope,
    actions::{Refusal, Refused, VmAction, all_refused},
    agents::{AgentFault, AgentStatus},
    inventory::InventoryHypervisor,
    labels::HYPERVISOR_LABEL,
    lifecycle::MachineState,
    processes::Order,
    time::UtcOffset,
    vms::{
        Agent, AgentFilter, CopyOnHypervisor, HypervisorPart, LabelFilter, ListedVm, MAX_PARTS, SortValue,
        VmCursor, VmDetail, VmPage, VmQuery, VmSort,
    },
    wire::{Fault, FaultKind},
};

use super::{
    InventoryTable, LabelTable, Row, Rows, StatusTable, VmCopy, labels::Labelled, over_limit::LimitsOfVm,
    statuses::is_older,
};

/// Default of `VMWATCH_LAST_HYPERVISOR_KEEP`, for records of older versions that lack the setting.
const USUAL_KEEP_MS: u64 = 600_000;

/// What is known about VMs.
#[derive(Debug, Clone, Copy)]
pub struct Vms<'a> {
    /// The VMs of all hypervisors.
    pub inventory: &'a InventoryTable,
    /// The labels that operators have set.
    pub labels: &'a LabelTable,
    /// The newest rows; `None` if this service does not know them.
    pub measures: Option<Measures<'a>>,
}

/// The newest rows of VMs.
#[derive(Debug, Clone, Copy)]
pub struct Measures<'a> {
    /// The rows that agents reported.
    pub rows: &'a Rows,
    /// The rows that hypervisors measured.
    pub measured: &'a Rows,
    /// Time without a report after which an agent counts as silent, in milliseconds. A row of a hypervisor that is older
    /// than that is not listed.
    pub silent_after_ms: u64,
    /// The UTC offset of the deployment, which agents must have.
    pub utc_offset: UtcOffset,
    /// The status of agents.
    pub statuses: &'a StatusTable,
    /// The version of the service; older agents are outdated.
    pub version: &'static str,
}

/// A VM that may be listed.
#[derive(Debug, Clone, Copy)]
struct Found<'a> {
    inventory: &'a InventoryTable,
    id: &'a InstanceId,
    copies: &'a [VmCopy],
    /// The copy that the list shows.
    copy: Option<&'a VmCopy>,
    labels: Option<&'a Labelled>,
    row: Option<&'a Row>,
    /// The row that the hypervisor measured recently.
    measured: Option<&'a Row>,
    agent: Option<Agent>,
    /// Why the last sample of the VM was not stored.
    unstored: Option<AgentFault>,
    /// The limits that the VM is or was above.
    over_limits: Option<&'a LimitsOfVm>,
    now_ms: u64,
    /// The UTC offset of the deployment.
    utc_offset: UtcOffset,
    /// The status that the agent last sent, and whether the agent is outdated.
    status: Option<(&'a AgentStatus, bool)>,
}

/// The position of a VM in a list.
struct Key<'a> {
    value: Option<SortValue<'a>>,
    id: &'a InstanceId,
}

impl Key<'_> {
    /// VMs without a value come last in either direction; VMs with equal values are sorted by id.
    fn compare(&self, other: &Key<'_>, order: Order) -> Ordering {
        let values = match (&self.value, &other.value, order) {
            (Some(mine), Some(others), Order::Asc) => mine.cmp(others),
            (Some(mine), Some(others), Order::Desc) => others.cmp(mine),
            (mine, others, _) => mine.is_none().cmp(&others.is_none()),
        };
        values.then_with(|| self.id.cmp(other.id))
    }
}

impl<'a> Vms<'a> {
    /// Returns a page of the VMs that the scope allows and the filter selects. It fails if the cursor belongs to another
    /// list.
    pub fn list(&self, scope: &Scope, query: &VmQuery, now_ms: u64) -> Result<VmPage, Fault> {
        if !query.has_own_cursor() {
            let text = "the cursor belongs to a list with another filter, sort value or order; request the first page without a cursor";
            return Err(Fault::new(FaultKind::Invalid, text));
        }
        let search = query.filter.search.as_ref().map(|text| text.to_lowercase());
        let after = query.cursor.as_ref().map(position);
        let order = query.order();
        let (mut total, mut left) = (0, Vec::new());
        self.each(scope, now_ms, |found| {
            let Some(found) = found.select(query, search.as_deref()) else {
                return;
            };
            total += 1;
            let key = found.key(query.sort);
            if after
                .as_ref()
                .is_none_or(|after| key.compare(after, order).is_gt())
            {
                left.push((key, found));
            }
        });
        let limit = usize::from(query.limit.get());
        let mut more = left.len() > limit;
        if more {
            left.select_nth_unstable_by(limit, |(one, _), (other, _)| one.compare(other, order));
            left.truncate(limit);
        }
        left.sort_unstable_by(|(one, _), (other, _)| one.compare(other, order));
        let mut room = PageRoom::new(limit);
        let (mut vms, mut last) = (Vec::with_capacity(left.len()), None);
        for (key, found) in left {
            let vm = found.listed(now_ms);
            if !room.take_item(&vm) {
                more = true;
                break;
            }
            vms.push(vm);
            last = Some(key);
        }
        let next = last.filter(|_| more).map(|key| {
            let value = key.value.map(SortValue::into_owned);
            query.cursor_after(value, key.id.clone())
        });
        Ok(VmPage {
            vms,
            total,
            next,
            hypervisors: self.parts(scope, now_ms),
            stale: Vec::new(),
        })
    }

    /// Returns a VM; `None` if no hypervisor has it and it has no row.
    pub fn get(&self, id: &InstanceId, now_ms: u64) -> Option<VmDetail> {
        let found = self.find(id, now_ms)?;
        let names = found.copies.iter().map(|copy| &*copy.hypervisor);
        Some(VmDetail {
            vm: found.select(&VmQuery::default(), None)?.listed(now_ms),
            hypervisors: names.map(|name| self.part(name, now_ms)).collect(),
            agent_status: found.status.map(|(status, _)| status.clone()),
            stale: Vec::new(),
        })
    }

    /// Number of VMs whose agents have faults.
    pub fn count_faulty(&self, now_ms: u64) -> usize {
        let mut count = 0;
        self.each(&Scope::All, now_ms, |found| {
            count += usize::from(found.has_agent(AgentFilter::Faulty));
        });
        count
    }

    /// Whether a VM has a label that an operator has set or that one of its hypervisors has.
    pub fn has_label(&self, id: &'a InstanceId, label: &LabelFilter) -> bool {
        let copies = self.inventory.copies(id);
        self.found(id, copies, NewestOfVm::default(), self.labels.of(id), 0)
            .has_label(label)
    }

    /// Calls a function for each VM in the scope.
    fn each(&self, scope: &Scope, now_ms: u64, mut call: impl FnMut(Found<'a>)) {
        match scope {
            Scope::All => {
                let joined = Joined {
                    copies: self.inventory.sorted().peekable(),
                    rows: self.measures.map(|measures| measures.rows.sorted().peekable()),
                    measured: self
                        .measures
                        .map(|measures| measures.measured.sorted().peekable()),
                    labels: self.labels.sorted().peekable(),
                };
                for Known {
                    id,
                    copies,
                    rows,
                    labels,
                } in joined
                {
                    call(self.found(id, copies, rows, labels, now_ms));
                }
            }
            Scope::Only(ids) => {
                let mut ids: Vec<_> = ids.iter().collect();
                ids.sort_unstable();
                ids.dedup();
                ids.into_iter()
                    .filter_map(|id| self.find(id, now_ms))
                    .for_each(call);
            }
            Scope::Unknown => {}
        }
    }

    fn find(&self, id: &InstanceId, now_ms: u64) -> Option<Found<'a>> {
        let row = self.measures.and_then(|measures| measures.rows.entry(id));
        let measured = self.measures.and_then(|measures| measures.measured.entry(id));
        let known = self.inventory.entry(id);
        let id = known.map(|(id, _)| id).or(row.or(measured).map(|(id, _)| id))?;
        let copies = known.map_or(&[][..], |(_, copies)| copies);
        let rows = NewestOfVm {
            agent: row.map(|(_, row)| row),
            hypervisor: measured.map(|(_, row)| row),
        };
        Some(self.found(id, copies, rows, self.labels.of(id), now_ms))
    }

    fn found(
        &self,
        id: &'a InstanceId,
        copies: &'a [VmCopy],
        rows: NewestOfVm<'a>,
        labels: Option<&'a Labelled>,
        now_ms: u64,
    ) -> Found<'a> {
        let silent_after_ms = self.measures.map_or(0, |measures| measures.silent_after_ms);
        let is_recent = |row: &Row| now_ms.saturating_sub(row.reported_ms) <= silent_after_ms;
        let unstored = self
            .measures
            .and_then(|measures| measures.rows.unstored(id, now_ms));
        let agent = self.measures.map(|_| match rows.agent {
            // The agent reports, although its samples are not stored.
            _ if unstored.is_some() => Agent::Reporting,
            None => Agent::Never,
            Some(row) if is_recent(row) => Agent::Reporting,
            Some(_) => Agent::Silent,
        });
        Found {
            inventory: self.inventory,
            id,
            copies,
            copy: None,
            labels,
            row: rows.agent,
            measured: rows.hypervisor.filter(|row| is_recent(row)),
            agent,
            unstored,
            over_limits: self.measures.and_then(|measures| measures.rows.over_limits(id)),
            now_ms,
            utc_offset: self
                .measures
                .map_or(UtcOffset::UTC, |measures| measures.utc_offset),
            status: self.measures.and_then(|measures| {
                let status = measures.statuses.get(id)?;
                Some((status, is_older(status.version.as_str(), measures.version)))
            }),
        }
    }

    /// The hypervisors, those that are unreachable or late first. With a limited scope, only those that have VMs in it.
    fn parts(&self, scope: &Scope, now_ms: u64) -> Vec<HypervisorPart> {
        let mut names: Vec<&str> = match scope {
            Scope::All => self.inventory.names().collect(),
            Scope::Only(ids) => {
                let copies = ids.iter().flat_map(|id| self.inventory.copies(id));
                copies.map(|copy| &*copy.hypervisor).collect()
            }
            Scope::Unknown => Vec::new(),
        };
        names.sort_unstable();
        names.dedup();
        let mut parts: Vec<_> = names.into_iter().map(|name| self.part(name, now_ms)).collect();
        parts.sort_by_key(|part| part.reachable && !part.late);
        parts.truncate(MAX_PARTS);
        parts
    }

    fn part(&self, name: &str, now_ms: u64) -> HypervisorPart {
        let state = self.inventory.hypervisor(name);
        let reachable = state.is_some_and(|state| state.reachable);
        HypervisorPart {
            name: name.to_owned(),
            reachable,
            late: reachable && state.is_some_and(|state| state.is_silent(now_ms)),
            listed_at_ms: state.and_then(|state: &InventoryHypervisor| state.listed_at_ms),
        }
    }
}

fn position(cursor: &VmCursor) -> Key<'_> {
    Key {
        value: cursor.value.clone(),
        id: &cursor.id,
    }
}

impl<'a> Found<'a> {
    /// Chooses the copy of the VM to show; `None` if the filter does not select the VM. Of several copies, those that
    /// match the filter come first, then those that are not shut off.
    fn select(mut self, query: &VmQuery, search: Option<&str>) -> Option<Self> {
        let filter = &query.filter;
        let is_wanted = |copy: &&VmCopy| {
            filter.state.is_none_or(|state| copy.vm.state == state)
                && filter
                    .hypervisor
                    .as_deref()
                    .is_none_or(|name| *name == *copy.hypervisor)
        };
        let wanted = self.copies.iter().filter(is_wanted);
        self.copy = wanted.min_by_key(|copy| copy.vm.state == MachineState::ShutOff);
        let is_selected = (self.copy.is_some() || filter.state.is_none() && filter.hypervisor.is_none())
            && filter.agent.is_none_or(|agent| self.has_agent(agent))
            && filter.label.as_ref().is_none_or(|label| self.has_label(label))
            && search.is_none_or(|text| self.contains(text));
        is_selected.then_some(self)
    }

    fn has_agent(&self, wanted: AgentFilter) -> bool {
        match wanted {
            AgentFilter::Reporting => self.agent == Some(Agent::Reporting),
            AgentFilter::Silent => self.agent == Some(Agent::Silent),
            AgentFilter::Never => self.agent == Some(Agent::Never),
            AgentFilter::Faulty => !self.faults().is_empty(),
        }
    }

    fn faults(&self) -> Vec<AgentFault> {
        let faults = self.row.map(|row| row.faults(self.utc_offset, self.now_ms));
        let mut faults = faults.unwrap_or_default();
        faults.extend(self.unstored);
        let over_limits = self.over_limits.into_iter();
        faults.extend(over_limits.flat_map(|over| over.faults(self.now_ms)));
        faults
    }

    fn has_label(&self, label: &LabelFilter) -> bool {
        let is_equal = |found: Option<&str>| {
            found.is_some_and(|found| label.value.as_deref().is_none_or(|wanted| found == wanted))
        };
        match label.key.strip_prefix(HYPERVISOR_LABEL) {
            Some(key) => {
                let mut copies = self.copies.iter();
                copies.any(|copy| is_equal(copy.vm.labels.get(key).map(String::as_str)))
            }
            None => is_equal(
                self.labels
                    .and_then(|found| Some(found.labels.get(&label.key)?.as_str())),
            ),
        }
    }

    /// Whether id, name, hypervisor or a label contains this text, which is in lower case.
    fn contains(&self, text: &str) -> bool {
        self.copies.iter().any(|copy| copy.contains(text))
            || self.labels.is_some_and(|labels| labels.contains(text))
            || self.copies.is_empty() && self.id.as_str().to_lowercase().contains(text)
    }

    fn key(&self, sort: VmSort) -> Key<'a> {
        // A VM without current values comes last.
        let values = self.current_row();
        let values = values.map(|row| row.sample.values).unwrap_or_default();
        let both = |one: Option<f64>, other: Option<f64>| Some(one? + other?);
        let value = match sort {
            VmSort::Id => Some(SortValue::text(self.id.as_str())),
            VmSort::Name => self.copy.map(|copy| SortValue::text(copy.sort_name())),
            VmSort::Hypervisor => self.copy.map(|copy| SortValue::text(&copy.hypervisor)),
            VmSort::State => self.copy.map(|copy| SortValue::text(copy.vm.state.as_str())),
            VmSort::Cpu => values.cpu_util.map(SortValue::float),
            VmSort::Mem => values.mem.map(SortValue::float),
            VmSort::Disk => both(values.disk_read, values.disk_write).map(SortValue::float),
            VmSort::Net => both(values.net_incoming, values.net_outgoing).map(SortValue::float),
            VmSort::LastReport => self.row.map(|row| SortValue::Number(row.reported_ms)),
        };
        Key { value, id: self.id }
    }

    /// The actions that are not allowed without naming a hypervisor.
    fn refused(&self) -> Refused {
        match self.copies {
            [] => all_refused(Refusal::NoHypervisor),
            [only] => only.vm.refused.clone(),
            _ => all_refused(Refusal::SeveralHypervisors),
        }
    }

    /// The VM on each hypervisor that has it, if several have it.
    fn all_copies(&self) -> Vec<CopyOnHypervisor> {
        if self.copies.len() < 2 {
            return Vec::new();
        }
        let shown = |copy: &VmCopy| {
            let others = self.copies.iter();
            let others = others.filter(|other| other.hypervisor != copy.hypervisor);
            let reasons = others.filter_map(|other| self.prevents_start(other));
            let mut refused = copy.vm.refused.clone();
            if let Some(reason) = reasons.min_by_key(|reason| *reason != Refusal::NotOffElsewhere) {
                refused.entry(VmAction::Start).or_insert(reason);
            }
            CopyOnHypervisor {
                hypervisor: copy.hypervisor.to_string(),
                state: copy.vm.state,
                refused,
            }
        };
        self.copies.iter().map(shown).collect()
    }

    /// Why the VM cannot be started elsewhere because of this copy of it, if that is so.
    fn prevents_start(&self, copy: &VmCopy) -> Option<Refusal> {
        let hypervisor = self.inventory.hypervisor(&copy.hypervisor)?;
        if hypervisor.is_reachable(self.now_ms) && !copy.vm.state.is_off() {
            return Some(Refusal::NotOffElsewhere);
        }
        let keep_ms = hypervisor.keep_ms.unwrap_or(USUAL_KEEP_MS);
        let may_run = hypervisor.is_silent(self.now_ms) && hypervisor.may_run(&copy.vm, keep_ms, self.now_ms);
        may_run.then_some(Refusal::FormerHypervisorUnreachable)
    }

    fn listed(&self, now_ms: u64) -> ListedVm {
        let others = self.copies.iter().filter(|other| {
            let shown = self.copy.map(|copy| &copy.hypervisor);
            shown != Some(&other.hypervisor)
        });
        ListedVm {
            instance_id: self.id.clone(),
            name: self.copy.map(|copy| copy.vm.name.clone()),
            hypervisor: self.copy.map(|copy| copy.hypervisor.to_string()),
            also_on: others.map(|copy| copy.hypervisor.to_string()).collect(),
            state: self.copy.map(|copy| copy.vm.state),
            refused: self.refused(),
            copies: self.all_copies(),
            labels: self.all_labels(),
            agent: self.agent,
            last_report_ms: self.row.map(|row| row.reported_ms),
            sample: self.row.map(|row| row.sample),
            hypervisor_sample: self.measured.map(|row| row.sample),
            agent_faults: self.faults(),
            agent_version: self.status.map(|(status, _)| status.version.clone()),
            agent_outdated: self.status.is_some_and(|(_, is_outdated)| is_outdated),
            cpu_sparkline: self.sparkline(now_ms),
        }
    }

    /// The labels of the hypervisor and those that operators have set.
    fn all_labels(&self) -> BTreeMap<String, String> {
        let of_hypervisor = self.copy.into_iter().flat_map(|copy| &copy.vm.labels);
        let mut labels: BTreeMap<_, _> = of_hypervisor
            .map(|(key, value)| (format!("{HYPERVISOR_LABEL}{key}"), value.clone()))
            .collect();
        let own = self.labels.into_iter().flat_map(|found| &found.labels);
        labels.extend(own.map(|(key, value)| (key.as_str().to_owned(), value.as_str().to_owned())));
        labels
    }

    /// The sparkline of the agent's samples, or of the hypervisor's if the agent sent none in the last hour.
    fn sparkline(&self, now_ms: u64) -> Vec<Option<f64>> {
        let of_agent = self.row.map(|row| row.sparkline(now_ms));
        let has_points = |points: &Vec<Option<f64>>| points.iter().any(Option::is_some);
        let of_hypervisor = || self.measured.map(|row| row.sparkline(now_ms));
        match of_agent {
            Some(points) if has_points(&points) => points,
            of_agent => of_hypervisor().or(of_agent).unwrap_or_default(),
        }
    }
}

type SortedRows<'a> = Peekable<btree_map::Iter<'a, InstanceId, Row>>;

/// Merges the tables, which are sorted by id. Yields each VM that a hypervisor has or that has a row.
struct Joined<'a> {
    copies: Peekable<btree_map::Iter<'a, InstanceId, Vec<VmCopy>>>,
    rows: Option<SortedRows<'a>>,
    measured: Option<SortedRows<'a>>,
    labels: Peekable<btree_map::Iter<'a, InstanceId, Labelled>>,
}

/// What the tables have of a VM.
struct Known<'a> {
    id: &'a InstanceId,
    copies: &'a [VmCopy],
    rows: NewestOfVm<'a>,
    labels: Option<&'a Labelled>,
}

/// The newest rows of a VM, by their source.
#[derive(Debug, Clone, Copy, Default)]
struct NewestOfVm<'a> {
    agent: Option<&'a Row>,
    hypervisor: Option<&'a Row>,
}

impl<'a> Iterator for Joined<'a> {
    type Item = Known<'a>;

    fn next(&mut self) -> Option<Known<'a>> {
        let next = |rows: &mut Option<SortedRows<'a>>| {
            let (id, _) = rows.as_mut()?.peek()?;
            Some(*id)
        };
        let listed = self.copies.peek().map(|(id, _)| *id);
        let firsts = [listed, next(&mut self.rows), next(&mut self.measured)];
        let id = firsts.into_iter().flatten().min()?;
        let of = |rows: &mut Option<SortedRows<'a>>| {
            let (_, row) = rows.as_mut()?.next_if(|(next, _)| *next == id)?;
            Some(row)
        };
        let rows = NewestOfVm {
            agent: of(&mut self.rows),
            hypervisor: of(&mut self.measured),
        };
        let copies = self.copies.next_if(|(next, _)| *next == id);
        while self.labels.next_if(|(next, _)| *next < id).is_some() {}
        let labels = self.labels.next_if(|(next, _)| *next == id);
        Some(Known {
            id,
            copies: copies.map_or(&[], |(_, copies)| copies.as_slice()),
            rows,
            labels: labels.map(|(_, labels)| labels),
        })
    }
}

#[cfg(test)]
mod tests;
