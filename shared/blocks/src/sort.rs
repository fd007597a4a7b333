//! The order of rows within a block, and which of several rows with the same `_id` is kept.

use std::{cmp::Ordering, collections::HashMap};

use crate::{
    RowId,
    date::Date,
    id::Key,
    rows::Rows,
    value::{Cell, Type},
};

/// The place of a row in the order in which blocks store rows: by process, then by date. Rows with the same computed
/// `_id` have the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub(crate) process: Key,
    pub(crate) date: Date,
}

impl Place {
    /// The places at which to cut a sorted list so that each piece has at most `most` different places. Cuts are between
    /// processes, unless a single process has more places than that.
    pub fn cuts(mut sorted: &[Self], most: usize) -> Vec<Self> {
        let mut cuts = Vec::new();
        while let Some(next) = sorted.get(most) {
            let start = sorted.partition_point(|place| place.process < next.process);
            let at = if start == 0 { most } else { start };
            cuts.extend(sorted.get(at));
            sorted = sorted.get(at..).unwrap_or_default();
        }
        cuts
    }
}

impl Rows {
    /// The rows by process, date and `_id`, so that the values of a process are next to each other. Of rows with the
    /// same `_id`, only the preferred one is in the list.
    pub(crate) fn sorted(&self) -> Vec<usize> {
        if (0..self.len()).all(|row| self.stored_id(row).is_none()) {
            // Computed ids are equal exactly for rows with the same identity and date.
            let mut places: Vec<_> = (0..self.len())
                .map(|row| ((self.key(row), self.date(row)), row))
                .collect();
            places.sort_by(|(a, one), (b, other)| a.cmp(b).then_with(|| self.preference(*one, *other)));
            places.dedup_by_key(|(place, _)| *place);
            return places.into_iter().map(|(_, row)| row).collect();
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        let ids = self.ids();
        let id = |row: usize| ids.get(row).copied().unwrap_or_default();
        let mut kept: HashMap<RowId, usize> = HashMap::new();
        for row in &order {
            let best = kept.entry(id(*row)).or_insert(*row);
            if self.preference(*row, *best) == Ordering::Less {
                *best = *row;
            }
        }
        order.retain(|row| kept.get(&id(*row)) == Some(row));
        order.sort_unstable_by_key(|row| (self.key(*row), self.date(*row), id(*row)));
        order
    }

    /// The number of rows at the front of `order` that make the next block: as many whole processes as fit, but at
    /// least one row.
    pub(crate) fn fitting(&self, order: &[usize], most: usize) -> usize {
        let (Some(last), Some(next)) = (order.get(most - 1), order.get(most)) else {
            return order.len();
        };
        let key = self.key(*next);
        if self.key(*last) != key {
            return most;
        }
        let start = order.partition_point(|row| self.key(*row) < key);
        if start == 0 { most } else { start }
    }

    /// Sorts rows with the same `_id`: first the one that arrived first, and then by their values, so that the choice
    /// does not depend on the order in which they were added.
    fn preference(&self, a: usize, b: usize) -> Ordering {
        self.effective(a)
            .cmp(&self.effective(b))
            .then_with(|| (self.date(a), self.key(a)).cmp(&(self.date(b), self.key(b))))
            .then_with(|| {
                for (_, cells) in self.columns_by_name() {
                    let cell = |row: usize| cells.get(row).copied().unwrap_or(Cell::MISSING);
                    let (a, b) = (cell(a), cell(b));
                    let order = match (a.kind, b.kind) {
                        (Type::Text, Type::Text) => self.text(a.bits).cmp(self.text(b.bits)),
                        _ => (a.kind, a.bits).cmp(&(b.kind, b.bits)),
                    };
                    if order != Ordering::Equal {
                        return order;
                    }
                }
                Ordering::Equal
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_between_processes_unless_one_has_too_many() {
        let places: Vec<Place> = [(1, 3), (2, 2), (3, 9), (4, 1)]
            .into_iter()
            .flat_map(|(pid, rows)| {
                (0..rows).map(move |date| Place {
                    process: (pid, 0),
                    date: Date(date),
                })
            })
            .collect();
        let cuts = Place::cuts(&places, 4);
        let cuts: Vec<_> = cuts.iter().map(|place| (place.process.0, place.date.0)).collect();
        assert_eq!(cuts, [(2, 0), (3, 0), (3, 4), (3, 8)]);
        assert!(Place::cuts(&places, 15).is_empty());
    }
}
