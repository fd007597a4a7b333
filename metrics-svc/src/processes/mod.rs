//! Processes of a VM: the process table of any moment, the history of processes, and their starts and ends. All of them
//! are computed from the process rows. The rows of one sample share a `create_date`. The search for the VMs in which a
//! process ran uses the process names instead.

mod changes;
mod events;
pub(crate) mod row;
mod search;
mod series;
mod starts;
mod table;
mod top;

use std::sync::Arc;

use vmwatch_api::time::UtcOffset;

pub(crate) use self::series::tidy;
use crate::{names::ProcessNames, store::RowStore};

/// Access to the process rows and the process names in the database.
pub(crate) struct Processes {
    rows: Arc<RowStore>,
    names: ProcessNames,
    offset: UtcOffset,
}

impl Processes {
    /// Opens the process rows of this store.
    pub(crate) fn of(rows: &Arc<RowStore>) -> Self {
        Self {
            offset: rows.offset(),
            names: ProcessNames::new(rows),
            rows: Arc::clone(rows),
        }
    }
}
