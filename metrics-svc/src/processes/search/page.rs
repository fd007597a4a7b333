//! A page of the VMs that a search has found.

use std::collections::{BTreeMap, BTreeSet};

use bson::RawDocument;
use tokio::time::Instant;
use vmwatch_api::{
    InstanceId, PageRoom,
    process_search::{MAX_NAMES_LISTED, ProcessSearchPage, VmThatRan},
};

use super::{HOUR_MILLIS, Search};
use crate::{
    MetricsError,
    names::{self, Collector, Hours, NamesOfDay, Statistics, StoredNames},
    processes::Processes,
    reads::{Budget, Only, Query, Scan, Step},
    store::RowKind,
};

/// The fields that statistics of names need.
const COLUMNS: [&str; 4] = ["cmd", "cpu_util", "mem", "processes"];

/// A page while it is filled.
pub(super) struct Page<'a> {
    processes: &'a Processes,
    search: &'a Search,
    budget: Budget,
    /// Whether no rows were read yet. The first rows may exceed the budget, so that one large hour can be searched.
    may_exceed: bool,
    vm: Option<Vm>,
    /// The last VM that was searched.
    last: Option<InstanceId>,
    room: PageRoom,
    answer: ProcessSearchPage,
}

/// The VM that is being searched.
struct Vm {
    instance: InstanceId,
    /// The first of the names.
    names: BTreeSet<String>,
    /// The hours in which they ran, by day.
    hours: BTreeMap<i64, Hours>,
    ran: Option<Ran>,
    /// Days whose documents are full and lack the name.
    unknown: Vec<i64>,
}

/// When and how the processes ran.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ran {
    first_ms: i64,
    last_ms: i64,
    processes: u32,
    cpu_util: f64,
    mem: f64,
}

impl<'a> Page<'a> {
    pub(super) fn new(processes: &'a Processes, search: &'a Search, most: usize) -> Self {
        Self {
            processes,
            search,
            budget: Budget::of_request(&processes.rows),
            may_exceed: true,
            vm: None,
            last: None,
            room: PageRoom::new(most),
            answer: ProcessSearchPage::default(),
        }
    }

    /// Ends the page after the last VM that was searched.
    fn end_here(&mut self) {
        self.answer.next = self.last.clone();
    }

    /// Ends the page after the last VM that was searched, or after `passed` if that is later. No process of the VMs in
    /// between is known.
    pub(super) fn end_after(&mut self, passed: Option<InstanceId>) {
        self.answer.next = self.last.clone().max(passed);
    }

    /// Adds the document of a VM and day; they must be sorted. Returns `true` if the page ends before this VM.
    pub(super) async fn add(&mut self, document: &RawDocument) -> Result<bool, MetricsError> {
        let Ok(instance) = document.get_str("instance_id")?.parse::<InstanceId>() else {
            return Ok(false);
        };
        if self.vm.as_ref().is_none_or(|vm| vm.instance != instance) {
            if self.end_vm().await? {
                return Ok(true);
            }
            let searched = self.last.is_some();
            if searched && (self.room.items() == 0 || self.is_over()) {
                self.end_here();
                return Ok(true);
            }
        }
        let vm = self.vm.get_or_insert_with(|| Vm {
            instance,
            names: BTreeSet::new(),
            hours: BTreeMap::new(),
            ran: None,
            unknown: Vec::new(),
        });
        match StoredNames::from_document(document) {
            Ok(stored) => vm.add(self.search, &stored),
            Err(error) => {
                names::note_unreadable(document, error);
                vm.unknown.push(document.get_datetime("day")?.timestamp_millis());
            }
        }
        Ok(false)
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.search.ends_at
    }

    /// Ends the search of a VM. Returns `true` if the page ends before it, because it may not decode more rows.
    pub(super) async fn end_vm(&mut self) -> Result<bool, MetricsError> {
        let Some(mut vm) = self.vm.take() else {
            return Ok(false);
        };
        for day_ms in std::mem::take(&mut vm.unknown) {
            if self.read_rows(&mut vm, day_ms).await? {
                continue;
            }
            if self.last.is_some() {
                self.end_here();
                return Ok(true);
            }
            // A page that begins with this VM has as much time and memory as any.
            self.answer.unsearched.push(vm.instance.clone());
            break;
        }
        if let Some(found) = vm.found() {
            if !self.room.take_item(&found) {
                self.end_here();
                return Ok(true);
            }
            self.answer.vms.push(found);
        }
        self.last = Some(vm.instance);
        Ok(false)
    }

    /// Reads the rows of a day whose names are not all known. Returns `false` if there are too many for this page.
    async fn read_rows(&mut self, vm: &mut Vm, day_ms: i64) -> Result<bool, MetricsError> {
        if self.is_over() {
            return Ok(false);
        }
        let time_left = self.search.ends_at.saturating_duration_since(Instant::now());
        let deadline = self.search.deadline.at_most(time_left);
        let known = BTreeMap::new();
        let mut names = Collector::new(day_ms, &known);
        let query = Query {
            time: self.search.part_of_day(day_ms),
            ..Query::new(RowKind::Process, &vm.instance, &COLUMNS)
                .oldest_first()
                .durable()
                .only(Only::Names(self.search.wanted.clone()))
        };
        let budget = std::mem::replace(&mut self.budget, Budget::of_background_part(0));
        let mut scan = match Scan::open(&self.processes.rows, query, budget, deadline).await {
            Err(MetricsError::DeadlinePassed) => return Ok(false),
            scan => scan?,
        };
        scan.least_hours = usize::from(std::mem::take(&mut self.may_exceed));
        let is_complete = loop {
            let step = scan
                .hour(|row| names.add_stored(row.effective, &row.create_date, &row.document))
                .await;
            match step {
                Ok(Step::Hour(_)) => names.end_samples(),
                Ok(Step::End) => break true,
                Ok(Step::OverBudget(_)) | Err(MetricsError::DeadlinePassed | MetricsError::TooMuch) => {
                    break false;
                }
                Err(error) => return Err(error),
            }
        };
        self.budget = scan.budget;
        let NamesOfDay { names, .. } = names.finish();
        let hours = self.search.hours(day_ms);
        for (name, statistics) in &names {
            vm.add_name(day_ms, hours, name, statistics);
        }
        Ok(is_complete)
    }

    pub(super) fn finish(self, complete_to_ms: Option<u64>) -> ProcessSearchPage {
        let millis = |micros: i64| u64::try_from(micros.div_euclid(1000)).unwrap_or(0);
        ProcessSearchPage {
            from_ms: millis(self.search.time.start),
            to_ms: millis(self.search.time.end),
            complete_to_ms,
            ..self.answer
        }
    }
}

impl Vm {
    fn add(&mut self, search: &Search, stored: &StoredNames<'_>) {
        let hours = search.hours(stored.day_ms);
        let mut is_known = false;
        for (name, statistics) in stored.iter().filter(|(name, _)| search.wanted.matches(name)) {
            is_known |= search.wanted.is_only(name);
            self.add_name(stored.day_ms, hours, name, &statistics);
        }
        if stored.is_full && !is_known && !hours.is_empty() {
            self.unknown.push(stored.day_ms);
        }
    }

    /// Adds a name of a day, as far as its processes ran within the hours that are searched.
    fn add_name(&mut self, day_ms: i64, searched: Hours, name: &str, statistics: &Statistics) {
        let hours = statistics.hours.and(searched);
        let Some((first, last)) = hours.ends() else {
            return;
        };
        // If the first or last date of the day is outside the searched hours, only the hour is known.
        let first_ms = statistics.first_ms.max(first * HOUR_MILLIS);
        let last_ms = statistics.last_ms.min((last + 1) * HOUR_MILLIS - 1);
        let ran = Ran {
            first_ms: day_ms + i64::from(first_ms),
            last_ms: day_ms + i64::from(last_ms),
            processes: statistics.processes,
            cpu_util: statistics.cpu_util,
            mem: statistics.mem,
        };
        if !self.names.contains(name) {
            self.names.insert(name.to_owned());
            if self.names.len() > MAX_NAMES_LISTED {
                self.names.pop_last();
            }
        }
        let of_day = self.hours.entry(day_ms).or_default();
        *of_day = of_day.or(hours);
        self.ran = Some(match self.ran {
            None => ran,
            Some(before) => before.and(&ran),
        });
    }

    fn found(&mut self) -> Option<VmThatRan> {
        let ran = self.ran?;
        let millis = |millis: i64| u64::try_from(millis).unwrap_or(0);
        Some(VmThatRan {
            instance_id: self.instance.clone(),
            vm_name: None,
            names: std::mem::take(&mut self.names).into_iter().collect(),
            first_ms: millis(ran.first_ms),
            last_ms: millis(ran.last_ms),
            hours: self.hours.values().map(|hours| hours.count()).sum(),
            processes: ran.processes,
            cpu_util: ran.cpu_util,
            mem: ran.mem,
        })
    }
}

impl Ran {
    fn and(self, other: &Self) -> Self {
        Self {
            first_ms: self.first_ms.min(other.first_ms),
            last_ms: self.last_ms.max(other.last_ms),
            processes: self.processes.max(other.processes),
            cpu_util: self.cpu_util.max(other.cpu_util),
            mem: self.mem.max(other.mem),
        }
    }
}
