//! Which processes are reported.

use std::{cmp::Ordering, collections::HashSet};

use shared::api::metrics::ProcessSample;

/// The kernel keeps 15 bytes of a process's name (`TASK_COMM_LEN` without the final zero).
const COMM_BYTES: usize = 15;

/// Which processes are reported. A process that was reported gets its last row when it ends, whatever its rank then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All of them.
    All,
    /// The greatest consumers and some names.
    Top {
        /// So many by CPU, so many by memory and so many by disk; who uses nothing is not among the greatest.
        count: usize,
        /// Names reported in any case. A longer name than the kernel keeps matches by what the kernel keeps of it.
        pinned: Vec<String>,
    },
}

impl Selection {
    /// Keeps the rows that are to be reported, in their order.
    pub fn keep(&self, rows: &mut Vec<ProcessSample>) {
        let Self::Top { count, pinned } = self else {
            return;
        };
        let mut kept: HashSet<u32> = HashSet::new();
        for measure in [
            |row: &ProcessSample| row.cpu_util,
            |row: &ProcessSample| row.mem,
            |row: &ProcessSample| row.disk_read + row.disk_write,
        ] {
            kept.extend(greatest(rows, *count, measure));
        }
        rows.retain(|row| kept.contains(&row.pid) || pinned.iter().any(|name| names(name, &row.cmd)));
    }
}

/// The pids of the greatest by a measure; among equals the older pid, so that the choice is steady.
fn greatest(rows: &[ProcessSample], count: usize, measure: impl Fn(&ProcessSample) -> f64) -> Vec<u32> {
    let mut ranked: Vec<(f64, u32)> = rows.iter().map(|row| (measure(row), row.pid)).collect();
    ranked.retain(|(value, _)| *value > 0.0);
    let order = |a: &(f64, u32), b: &(f64, u32)| -> Ordering { b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)) };
    if ranked.len() > count {
        ranked.select_nth_unstable_by(count, order);
        ranked.truncate(count);
    }
    ranked.into_iter().map(|(_, pid)| pid).collect()
}

fn names(pinned: &str, cmd: &str) -> bool {
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
            shutdown_time: None,
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
        selection.keep(&mut rows);
        rows.iter().map(|row| row.pid).collect()
    }

    fn top(count: usize, pinned: &[&str]) -> Selection {
        Selection::Top {
            count,
            pinned: pinned.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn all_keeps_all() {
        assert_eq!(pids(&Selection::All), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn top_is_the_union_of_the_greatest_by_cpu_by_memory_and_by_disk() {
        assert_eq!(pids(&top(1, &[])), [2, 3, 4]);
        // By CPU 3 and 4 are equal: the older pid comes second.
        assert_eq!(pids(&top(2, &[])), [2, 3, 4]);
        // Who uses nothing is never among the greatest, however many are asked for.
        assert_eq!(pids(&top(100, &[])), [1, 2, 3, 4]);
    }

    #[test]
    fn pinned_names_come_in_any_case_and_long_ones_by_what_the_kernel_keeps() {
        assert_eq!(pids(&top(1, &["idle"])), [2, 3, 4, 5]);
        assert_eq!(pids(&top(1, &["systemd-journald"])), [2, 3, 4, 6]);
        assert_eq!(pids(&top(1, &["systemd-journ", "idl"])), [2, 3, 4]);
    }
}
