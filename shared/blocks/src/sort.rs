//! The order of rows within a block, and which of several rows with the same `_id` is kept.

use std::{cmp::Ordering, collections::HashMap};

use crate::{
    RowId,
    rows::Rows,
    value::{Cell, Type},
};

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
