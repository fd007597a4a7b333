//! Ranks values of processes: greater values first, and equal ones by the VM's id and then by name.

use std::cmp::Ordering;

use vmwatch_api::{
    InstanceId,
    current::{ProcessUse, Smallest},
    processes::ProcessName,
};

/// A value of the processes with one name in one VM.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranked<'a> {
    pub(super) value: f64,
    id: &'a InstanceId,
    name: &'a ProcessName,
}

impl<'a> Ranked<'a> {
    pub(super) const fn new(value: f64, id: &'a InstanceId, name: &'a ProcessName) -> Self {
        Self { value, id, name }
    }

    /// Whether the value ranks at least as high as the smallest listed one; `None` lists all values.
    pub(super) fn is_listed(&self, smallest: Option<&Smallest>) -> bool {
        smallest.is_none_or(|smallest| {
            let smallest = Ranked::new(smallest.value, &smallest.instance_id, &smallest.name);
            self.compare(&smallest).is_le()
        })
    }

    fn compare(&self, other: &Ranked<'_>) -> Ordering {
        let values = other.value.total_cmp(&self.value);
        let ids = || self.id.cmp(other.id);
        values.then_with(ids).then_with(|| self.name.cmp(other.name))
    }
}

/// Returns the value with this rank, counted from one; `None` if there are no more values than that.
pub(super) fn smallest_listed(
    uses: &[(&InstanceId, &ProcessUse)],
    value: impl Fn(&ProcessUse) -> Option<f64>,
    rank: usize,
) -> Option<Smallest> {
    let values = uses.iter().filter_map(|(id, one)| {
        let value = value(one)?;
        Some(Ranked::new(value, id, &one.name))
    });
    let mut values: Vec<_> = values.collect();
    if values.len() <= rank {
        return None;
    }
    let (_, last, _) = values.select_nth_unstable_by(rank.saturating_sub(1), Ranked::compare);
    Some(Smallest {
        value: last.value,
        instance_id: last.id.clone(),
        name: last.name.clone(),
    })
}
