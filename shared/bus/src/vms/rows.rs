//! The newest row of each VM in memory, of one source: its agent or its hypervisor.

use std::{
    collections::{BTreeMap, btree_map},
    ops::{
        Bound::{Excluded, Unbounded},
        Range,
    },
};

use vmwatch_api::{
    InstanceId,
    agents::{AgentFault, Sender},
    events::{OverLimitEvent, UnstoredEvent},
    history::{SPARKLINE_POINTS, SPARKLINE_STEP_MS},
    time::UtcOffset,
    vms::NewestSample,
};

use super::{
    over_limit::{LimitsOfVm, OverLimits},
    senders::Senders,
    unstored::Unstored,
};

/// Maximum number of VMs whose newest rows are kept; they take about 40 MB.
pub const MAX_ROWS: usize = 50_000;

/// The newest rows of VMs, sorted by id.
#[derive(Debug, Default)]
pub struct Rows {
    vms: BTreeMap<InstanceId, Row>,
    unstored: Unstored,
    over_limits: OverLimits,
}

/// The newest row of a VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The newest sample.
    pub sample: NewestSample,
    /// When metrics-svc last stored a row of the VM, Unix milliseconds.
    pub reported_ms: u64,
    /// Maximum CPU usage in each three minutes of the last hour.
    cpu: CpuRing,
    /// The processes that sent the VM's recent messages.
    senders: Senders,
}

/// Maxima of the CPU usage in a ring: a slot replaces the slot of an hour before.
#[derive(Debug, Clone, PartialEq)]
struct CpuRing {
    newest: u64,
    points: [Option<f64>; SPARKLINE_POINTS],
}

impl CpuRing {
    fn add(&mut self, slot: u64, cpu: f64) {
        if slot > self.newest {
            let length = SPARKLINE_POINTS as u64;
            for passed in (self.newest + 1..=slot).rev().take(SPARKLINE_POINTS) {
                self.set(passed % length, None);
            }
            self.newest = slot;
        }
        if slot + SPARKLINE_POINTS as u64 > self.newest {
            let position = slot % SPARKLINE_POINTS as u64;
            let known = self.get(position).unwrap_or(cpu);
            self.set(position, Some(known.max(cpu)));
        }
    }

    fn get(&self, position: u64) -> Option<f64> {
        let position = usize::try_from(position).ok()?;
        *self.points.get(position)?
    }

    fn set(&mut self, position: u64, value: Option<f64>) {
        let position = usize::try_from(position).ok();
        if let Some(point) = position.and_then(|position| self.points.get_mut(position)) {
            *point = value;
        }
    }
}

impl Row {
    /// Creates a row whose sparkline has no points.
    pub fn new(sample: NewestSample, reported_ms: u64) -> Self {
        Self {
            sample,
            reported_ms,
            cpu: CpuRing {
                newest: 0,
                points: [None; SPARKLINE_POINTS],
            },
            senders: Senders::default(),
        }
    }

    /// Adds the maximum CPU usage in a three-minute slot to the sparkline.
    pub fn add_cpu(&mut self, slot: u64, cpu: f64) {
        self.cpu.add(slot, cpu);
    }

    /// Takes over what is newer in the other row of the same VM.
    pub fn merge(&mut self, other: &Self) {
        if other.sample.at_ms > self.sample.at_ms {
            self.sample = other.sample;
        }
        self.reported_ms = self.reported_ms.max(other.reported_ms);
        let oldest = other.cpu.newest.saturating_sub(SPARKLINE_POINTS as u64 - 1);
        for slot in oldest..=other.cpu.newest {
            if let Some(cpu) = other.cpu.get(slot % SPARKLINE_POINTS as u64) {
                self.cpu.add(slot, cpu);
            }
        }
    }

    /// The faults of the VM's agent in a deployment with this UTC offset.
    pub(super) fn faults(&self, deployment: UtcOffset, now_ms: u64) -> Vec<AgentFault> {
        self.senders.faults(deployment, now_ms)
    }

    /// The sparkline of the last hour, oldest point first. Slots ahead of the clock are not shown.
    pub(super) fn sparkline(&self, now_ms: u64) -> Vec<Option<f64>> {
        let now = now_ms / SPARKLINE_STEP_MS;
        let length = SPARKLINE_POINTS as u64;
        let slots = (0..length).rev().map(|back| now.checked_sub(back));
        let is_kept = |slot: &u64| *slot <= self.cpu.newest && slot + length > self.cpu.newest;
        slots
            .map(|slot| slot.filter(is_kept).and_then(|slot| self.cpu.get(slot % length)))
            .collect()
    }
}

impl Rows {
    /// The newest row of a VM.
    pub fn get(&self, id: &InstanceId) -> Option<&Row> {
        self.vms.get(id)
    }

    /// Number of VMs.
    pub fn count(&self) -> usize {
        self.vms.len()
    }

    /// Adds a sample, and its sender if it came from the bus. Returns `false` if the VM is not known and there are
    /// [`MAX_ROWS`] others.
    pub fn note(
        &mut self,
        id: &InstanceId,
        sample: NewestSample,
        reported_ms: u64,
        sender: Option<&Sender>,
    ) -> bool {
        let mut row = Row::new(sample, reported_ms);
        if let Some(cpu) = sample.values.cpu_util {
            row.add_cpu(sample.at_ms / SPARKLINE_STEP_MS, cpu);
        }
        let arrived_ms = sender.map_or(reported_ms, |sender| sender.arrived_ms);
        self.unstored.stored(id, arrived_ms);
        let is_kept = self.merge(id, row);
        if let (Some(known), Some(sender)) = (self.vms.get_mut(id), sender) {
            known.senders.note(sender);
        }
        is_kept
    }

    /// Adds a sample that was not stored because of its time. Returns `false` if too many other VMs have such samples.
    pub fn note_unstored(&mut self, event: &UnstoredEvent) -> bool {
        self.unstored.note(event)
    }

    /// Adds that a VM is above a limit. Returns since when it has been, Unix milliseconds; `None` if too many other VMs are.
    pub fn note_over_limit(&mut self, event: &OverLimitEvent) -> Option<u64> {
        self.over_limits.note(event)
    }

    /// The limits that a VM is or was above.
    pub(super) fn over_limits(&self, id: &InstanceId) -> Option<&LimitsOfVm> {
        self.over_limits.get(id)
    }

    /// Number of VMs of which the last sample arrived within this range of Unix milliseconds. VMs whose samples were not
    /// stored recently are left out, because the list shows them as reporting.
    pub fn last_reported_within(&self, range: &Range<u64>, now_ms: u64) -> usize {
        let last = |id: &InstanceId, row: &Row| {
            let unstored = self.unstored.last_arrived_ms(id);
            row.reported_ms.max(unstored.unwrap_or(0))
        };
        let rows = self.vms.iter();
        rows.filter(|&(id, row)| range.contains(&last(id, row)) && self.unstored(id, now_ms).is_none())
            .count()
    }

    /// Why the last sample of a VM was not stored; `None` if it was stored or is not recent.
    pub(super) fn unstored(&self, id: &InstanceId, now_ms: u64) -> Option<AgentFault> {
        self.unstored.fault(id, now_ms)
    }

    /// Adds a row of a VM to what is known. Returns `false` if the VM is not known and there are [`MAX_ROWS`] others.
    pub fn merge(&mut self, id: &InstanceId, row: Row) -> bool {
        if let Some(known) = self.vms.get_mut(id) {
            known.merge(&row);
            return true;
        }
        if self.vms.len() >= MAX_ROWS {
            return false;
        }
        self.vms.insert(id.clone(), row);
        true
    }

    /// Removes the row of a VM.
    pub fn remove(&mut self, id: &InstanceId) {
        self.vms.remove(id);
        self.unstored.remove(id);
        self.over_limits.remove(id);
    }

    /// The rows of the VMs after `after`, up to and including `until`; `None` means no bound.
    pub fn between<'a>(
        &'a self,
        after: Option<&'a InstanceId>,
        until: Option<&'a InstanceId>,
    ) -> impl Iterator<Item = (&'a InstanceId, &'a Row)> {
        let begin = after.map_or(Unbounded, Excluded);
        let rows = self.vms.range::<InstanceId, _>((begin, Unbounded));
        rows.take_while(move |(id, _)| until.is_none_or(|until| *id <= until))
    }

    pub(super) fn entry(&self, id: &InstanceId) -> Option<(&InstanceId, &Row)> {
        self.vms.get_key_value(id)
    }

    /// All rows, sorted by id.
    pub(super) fn sorted(&self) -> btree_map::Iter<'_, InstanceId, Row> {
        self.vms.iter()
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::{events::UnstoredReason, measures::VmValues};

    use super::*;

    const HOUR: u64 = SPARKLINE_STEP_MS * SPARKLINE_POINTS as u64;

    fn sample(at_ms: u64, cpu_util: f64) -> NewestSample {
        NewestSample {
            at_ms,
            values: VmValues {
                cpu_util: Some(cpu_util),
                ..VmValues::default()
            },
            restricted: None,
        }
    }

    #[test]
    fn older_sample_changes_only_report_time_and_sparkline() {
        let id = "vm-1".parse().unwrap();
        let mut rows = Rows::default();
        let now = 5 * HOUR;
        for (at, cpu, reported) in [
            (now, 50.0, 1),
            (now - 1000, 60.0, 2),
            (now - 2 * SPARKLINE_STEP_MS, 70.0, 3),
            (now - 2 * SPARKLINE_STEP_MS, 20.0, 4),
            (now - HOUR, 80.0, 5),
        ] {
            assert!(rows.note(&id, sample(at, cpu), reported, None));
        }
        let row = rows.get(&id).unwrap();
        assert_eq!((row.sample, row.reported_ms), (sample(now, 50.0), 5));
        let points = row.sparkline(now);
        let shown: Vec<_> = points.iter().flatten().copied().collect();
        assert_eq!((points.len(), shown), (SPARKLINE_POINTS, vec![70.0, 60.0, 50.0]));
        assert_eq!(points[SPARKLINE_POINTS - 1], Some(50.0));
        // Later, the points move to the left and leave the sparkline.
        assert_eq!(
            row.sparkline(now + SPARKLINE_STEP_MS)[SPARKLINE_POINTS - 2],
            Some(50.0)
        );
        assert!(row.sparkline(now + HOUR).iter().all(Option::is_none));
        // Points ahead of the clock are not shown.
        assert!(row.sparkline(now - HOUR).iter().all(Option::is_none));

        let mut other = Rows::default();
        other.note(&id, sample(now + HOUR, 1.0), 1, None);
        other.merge(&id, row.clone());
        let merged = other.get(&id).unwrap();
        assert_eq!((merged.sample, merged.reported_ms), (sample(now + HOUR, 1.0), 5));
        assert_eq!(
            merged.sparkline(now + HOUR).iter().flatten().collect::<Vec<_>>(),
            [&1.0]
        );
    }

    #[test]
    fn vm_whose_samples_are_not_stored_is_silent_only_after_the_last_of_them() {
        let (mut rows, now) = (Rows::default(), 5 * HOUR);
        let (one, other) = ("vm-1".parse().unwrap(), "vm-2".parse().unwrap());
        for id in [&one, &other] {
            rows.note(id, sample(now, 1.0), now, None);
        }
        let silent = |rows: &Rows, now_ms: u64| {
            let range = now_ms - HOUR..now_ms - 90_000;
            rows.last_reported_within(&range, now_ms)
        };
        assert_eq!(silent(&rows, now + 90_000), 0);
        assert_eq!(silent(&rows, now + 90_001), 2);
        assert_eq!(silent(&rows, now + HOUR + 1), 0, "they fell silent long ago");
        let unstored = UnstoredEvent {
            instance_id: one,
            at_ms: 1,
            arrived_ms: now + HOUR,
            reason: UnstoredReason::Expired,
        };
        assert!(rows.note_unstored(&unstored));
        rows.note(&other, sample(now + HOUR, 1.0), now + HOUR, None);
        assert_eq!(silent(&rows, now + HOUR + 90_001), 1);
        assert_eq!(silent(&rows, now + HOUR + HOUR / 2), 2);
    }

    #[test]
    fn number_of_rows_is_limited() {
        let mut rows = Rows::default();
        let id = |index: usize| format!("vm-{index}").parse().unwrap();
        for index in 0..MAX_ROWS {
            assert!(rows.note(&id(index), sample(1, 1.0), 1, None));
        }
        assert!(!rows.note(&id(MAX_ROWS), sample(1, 1.0), 1, None));
        assert!(
            rows.note(&id(0), sample(2, 1.0), 1, None),
            "known VMs are still updated"
        );
        rows.remove(&id(1));
        assert!(rows.note(&id(MAX_ROWS), sample(1, 1.0), 1, None) && rows.count() == MAX_ROWS);
        let (first, last) = (id(20), id(22));
        let between: Vec<_> = rows
            .between(Some(&first), Some(&last))
            .map(|(id, _)| id.as_str())
            .collect();
        assert_eq!(
            (between.first(), between.last()),
            (Some(&"vm-200"), Some(&"vm-22"))
        );
        assert_eq!(rows.between(None, None).count(), MAX_ROWS);
    }
}
