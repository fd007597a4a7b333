//! Selects the processes that the agent reports.

use std::{cmp::Ordering, collections::HashSet};

use vmwatch_api::metrics::ProcessSample;

/// The kernel truncates process names to 15 bytes (`TASK_COMM_LEN` without the terminating zero byte).
const COMM_BYTES: usize = 15;

/// Which processes the agent reports. A process that was reported once gets a last row when it ends, even if it is no
/// longer selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// The agent reports all processes.
    All,
    /// The agent reports the processes with the highest usage and those with pinned names.
    Top {
        /// Number of processes selected by CPU usage; as many are selected by memory usage, and as many by disk rate. A
        /// process for which a measure is 0 is not selected by that measure.
        count: usize,
        /// Process names that are always reported. A name longer than the kernel's limit is truncated before it is
        /// compared.
        pinned: Vec<String>,
    },
}

impl Selection {
    /// Removes the rows of processes that are not selected, and returns them; keeps the order of the others.
    pub fn split_off_others(&self, rows: &mut Vec<ProcessSample>) -> Vec<ProcessSample> {
        let Self::Top { count, pinned } = self else {
            return Vec::new();
        };
        let mut kept: HashSet<u32> = HashSet::new();
        for measure in [
            |row: &ProcessSample| row.cpu_util,
            |row: &ProcessSample| row.mem,
            |row: &ProcessSample| row.disk_read + row.disk_write,
        ] {
            kept.extend(top_pids(rows, *count, measure));
        }
        let is_kept = |row: &ProcessSample| {
            kept.contains(&row.pid) || pinned.iter().any(|name| matches_name(name, &row.cmd))
        };
        rows.extract_if(.., |row| !is_kept(row)).collect()
    }
}

/// The pids of the processes with the highest values of a measure. If values are equal, the lower pid is selected, so
/// the selection is stable.
fn top_pids(rows: &[ProcessSample], count: usize, measure: impl Fn(&ProcessSample) -> f64) -> Vec<u32> {
    let mut ranked: Vec<(f64, u32)> = rows.iter().map(|row| (measure(row), row.pid)).collect();
    ranked.retain(|(value, _)| *value > 0.0);
    let order = |a: &(f64, u32), b: &(f64, u32)| -> Ordering { b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)) };
    if ranked.len() > count {
        ranked.select_nth_unstable_by(count, order);
        ranked.truncate(count);
    }
    ranked.into_iter().map(|(_, pid)| pid).collect()
}

fn matches_name(pinned: &str, cmd: &str) -> bool {
    cmd == pinned
        || (pinned.len() > COMM_BYTES && pinned.as_bytes().get(..COMM_BYTES) == Some(cmd.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pid: u32, cmd: &str, cpu_util: f64, mem: f64, disk_write: f64) -> ProcessSample {
        ProcessSample {
            cmd: cmd.to_owned(),
            pid,
            cpu_util,
            mem,
            disk_read: 0.0,
            disk_write,
            running_time: 0.0,
            ..ProcessSample::default()
        }
    }

    fn pids(selection: &Selection) -> Vec<u32> {
        let mut rows = vec![
            row(1, "init", 0.0, 0.1, 0.0),
            row(2, "burner", 99.0, 0.1, 0.0),
            row(3, "hoarder", 1.0, 80.0, 0.0),
            row(4, "writer", 1.0, 0.2, 4000.0),
            row(5, "idle", 0.0, 0.0, 0.0),
            row(6, "systemd-journal", 0.0, 0.0, 0.0),
        ];
        let others = selection.split_off_others(&mut rows).len();
        assert_eq!(others + rows.len(), 6);
        rows.iter().map(|row| row.pid).collect()
    }

    fn top(count: usize, pinned: &[&str]) -> Selection {
        Selection::Top {
            count,
            pinned: pinned.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn selection_all_keeps_every_process() {
        assert_eq!(pids(&Selection::All), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn top_selection_includes_processes_with_highest_cpu_memory_and_disk_usage() {
        assert_eq!(pids(&top(1, &[])), [2, 3, 4]);
        // Processes 3 and 4 have equal CPU usage, so the lower pid is selected.
        assert_eq!(pids(&top(2, &[])), [2, 3, 4]);
        // Processes that use no resource are not selected, however large the count is.
        assert_eq!(pids(&top(100, &[])), [1, 2, 3, 4]);
    }

    #[test]
    fn process_with_pinned_name_is_selected_even_if_kernel_truncated_the_name() {
        assert_eq!(pids(&top(1, &["idle"])), [2, 3, 4, 5]);
        assert_eq!(pids(&top(1, &["systemd-journald"])), [2, 3, 4, 6]);
        assert_eq!(pids(&top(1, &["systemd-journ", "idl"])), [2, 3, 4]);
    }
}
