//! Finds which blocks have only rows that other blocks have too.

use vmwatch_blocks::RowId;

use super::found::{Group, Source};

/// The rows of blocks, and which of them were found in other blocks.
#[derive(Debug)]
pub(super) struct Wanted {
    /// `_id`, effective date and block of each row, sorted.
    rows: Vec<(RowId, i64, u32)>,
    found: Vec<bool>,
    /// Number of rows of each block that were not found yet.
    left: Vec<usize>,
}

impl Wanted {
    /// Takes the rows of blocks. Unreadable blocks are reported and removed from the list.
    pub(super) fn of(group: &Group, sources: &mut Vec<Source>) -> Self {
        let (mut rows, mut left) = (Vec::new(), Vec::new());
        sources.retain(|source| match source.ids(&group.of.instance) {
            Ok(ids) => {
                let block = u32::try_from(left.len()).unwrap_or(u32::MAX);
                left.push(ids.len());
                rows.extend(ids.into_iter().map(|(id, effective)| (id, effective, block)));
                true
            }
            Err(error) => {
                source.note_unreadable(group, error);
                false
            }
        });
        rows.sort_unstable();
        Self {
            found: vec![false; rows.len()],
            rows,
            left,
        }
    }

    /// Marks the rows that another block has with the same or an earlier effective date.
    pub(super) fn find_in(&mut self, others: &[(RowId, i64)]) {
        for (id, effective) in others {
            let start = self.rows.partition_point(|(wanted, ..)| wanted < id);
            for (row, found) in self.rows.iter().zip(&mut self.found).skip(start) {
                if row.0 != *id {
                    break;
                }
                if !*found && effective <= &row.1 {
                    *found = true;
                    if let Some(left) = self.left.get_mut(row.2 as usize) {
                        *left -= 1;
                    }
                }
            }
        }
    }

    /// Whether there are no blocks.
    pub(super) const fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Whether all rows of all blocks were found.
    pub(super) fn is_found(&self) -> bool {
        self.left.iter().all(|left| *left == 0)
    }

    /// Splits the blocks into those with rows that were all found, and the others.
    pub(super) fn split(self, sources: Vec<Source>) -> (Vec<Source>, Vec<Source>) {
        let (mut contained, mut others) = (Vec::new(), Vec::new());
        for (source, left) in sources.into_iter().zip(self.left) {
            if left == 0 { &mut contained } else { &mut others }.push(source);
        }
        (contained, others)
    }
}
