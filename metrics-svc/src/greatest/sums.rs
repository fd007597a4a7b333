//! Sums the processes of a sample by name.

use std::collections::BTreeMap;

use bson::RawDocumentBuf;
use tracing::warn;
use vmwatch_api::{current::ProcessUse, processes::ProcessName};

use super::NAMES;
use crate::processes::{row::StoredProcess, tidy};

/// Sums the rows by name, and returns the greatest sums and the number of other names. The last row of a process that
/// has ended counts for its CPU usage but not for its memory.
pub(crate) fn sum_by_name(rows: &[RawDocumentBuf]) -> (Vec<ProcessUse>, u32) {
    greatest(rows.iter().filter_map(|row| {
        let stored = StoredProcess::read(row)
            .inspect_err(|error| warn!(cause = error.cause(), "a row of a process cannot be decoded"))
            .ok()?;
        Some(ProcessUse {
            name: ProcessName::new(&stored.row.name)?,
            cpu_util: Some(stored.row.cpu_util),
            mem: Some(if stored.row.ended_ms.is_none() {
                stored.row.mem
            } else {
                0.0
            }),
        })
    }))
}

/// Sums by name. Returns the [`NAMES`] sums with the greatest CPU usage and, of the others, those with the greatest
/// memory usage, and the number of names that are left out.
pub(super) fn greatest(uses: impl Iterator<Item = ProcessUse>) -> (Vec<ProcessUse>, u32) {
    let mut by_name: BTreeMap<ProcessName, (f64, f64)> = BTreeMap::new();
    for one in uses {
        let sum = by_name.entry(one.name).or_default();
        sum.0 += one.cpu_util.unwrap_or(0.0);
        sum.1 += one.mem.unwrap_or(0.0);
    }
    let mut left: Vec<_> = by_name.into_iter().collect();
    let mut kept = take_greatest(&mut left, |sum| sum.0);
    kept.extend(take_greatest(&mut left, |sum| sum.1));
    let kept = kept.into_iter().map(|(name, (cpu_util, mem))| ProcessUse {
        name,
        cpu_util: Some(tidy(cpu_util)),
        mem: Some(tidy(mem)),
    });
    (kept.collect(), u32::try_from(left.len()).unwrap_or(u32::MAX))
}

/// Moves the [`NAMES`] sums with the greatest values out of the list.
fn take_greatest(
    left: &mut Vec<(ProcessName, (f64, f64))>,
    value: impl Fn(&(f64, f64)) -> f64,
) -> Vec<(ProcessName, (f64, f64))> {
    left.sort_by(|(_, one), (_, other)| value(other).total_cmp(&value(one)));
    let taken = NAMES.min(left.len());
    left.drain(..taken).collect()
}
