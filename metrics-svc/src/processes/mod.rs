//! Processes of a VM: the process table of any moment, the history of processes, and their starts and ends. All of them
//! are computed from the process rows. The rows of one sample share a `create_date`.

mod events;
pub(crate) mod row;
mod series;
mod table;

use std::sync::Arc;

use vmwatch_api::time::UtcOffset;

use crate::store::RowStore;

/// Access to the process rows in the database.
pub(crate) struct Processes {
    rows: Arc<RowStore>,
    offset: UtcOffset,
}

impl Processes {
    /// Opens the process rows of this store.
    pub(crate) fn of(rows: &Arc<RowStore>) -> Self {
        Self {
            offset: rows.offset(),
            rows: Arc::clone(rows),
        }
    }
}
