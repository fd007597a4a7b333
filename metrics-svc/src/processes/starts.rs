//! When a VM and its agent were started, as process tables show it.

use vmwatch_api::{
    history::TimeRange,
    processes::{ProcessRow, ProcessRowKind},
    starts::{Start, StartList, Started, StartsQuery},
};

use super::Processes;
use crate::{MetricsError, blocks::HOUR_MICROS, deadline::Deadline, reads::micros, store::RowKind};

/// Maximum number of samples that a request reads. Each shows at most one earlier start of the VM and one of the
/// agent. It is greater than the number of weeks of the longest time range, so a range without samples is read whole.
const MAX_SAMPLES: usize = 60;
/// A sample is looked for in this time before a moment, in microseconds: one week.
const WEEK_MICROS: i64 = 7 * 24 * HOUR_MICROS;
/// Two starts of one process may differ by this much in milliseconds, because an agent computes them from the time of
/// the boot, which the kernel corrects when the clock is set.
pub(super) const SAME_START_MS: u64 = 10_000;
/// The pid of the first process of a system.
const FIRST_PID: u32 = 1;
/// The name of the agent's process.
const AGENT: &str = "vmwatch-agent";

impl Processes {
    /// Lists the starts of a VM and its agent in a time range, the newest first.
    ///
    /// A process table shows the start of the current boot and of the current agent. So the newest table of the range
    /// is read, then the one before the start that it shows, and so on.
    pub(crate) async fn starts(
        &self,
        query: &StartsQuery,
        deadline: Deadline,
    ) -> Result<StartList, MetricsError> {
        let (instance, range) = (&query.instance_id, query.range());
        let mut found = Found::new(range);
        let mut end = self.end_of_next_sample(instance, range, deadline).await?;
        for _ in 0..MAX_SAMPLES {
            if end <= micros(range.from_ms()) {
                return Ok(found.into_list(false));
            }
            let sample = self
                .rows
                .sample_before(RowKind::Process, instance, end, deadline)
                .await?;
            let Some(sample) = sample else {
                end = end.saturating_sub(WEEK_MICROS);
                continue;
            };
            let rows = self.rows_of(instance, &sample, None, deadline).await?;
            let Some(newest_ms) = found.add(rows.iter().map(|stored| &stored.row)) else {
                // A later request would find the same table.
                return Ok(found.into_list(true));
            };
            end = micros(newest_ms).min(sample.effective);
        }
        Ok(found.into_list(true))
    }
}

/// The start of the VM that a process table shows; `None` if the table lacks the first process.
pub(super) fn boot<'a>(rows: impl IntoIterator<Item = &'a ProcessRow>) -> Option<u64> {
    let first = rows.into_iter().find(|row| row.has_pid(FIRST_PID));
    first
        .map(|row| row.started_ms)
        .filter(|&started_ms| started_ms > 0)
}

/// Whether two starts of processes with the same pid are those of one process.
pub(super) const fn is_same_start(one_ms: u64, other_ms: u64) -> bool {
    one_ms.abs_diff(other_ms) <= SAME_START_MS
}

/// The starts that were found.
struct Found {
    range: TimeRange,
    starts: Vec<Start>,
}

impl Found {
    const fn new(range: TimeRange) -> Self {
        Self {
            range,
            starts: Vec::new(),
        }
    }

    /// Adds the starts that a process table shows. Returns the newest of them, whether or not it is in the time range.
    fn add<'a>(&mut self, rows: impl Iterator<Item = &'a ProcessRow> + Clone) -> Option<u64> {
        let agents = rows.clone().filter(|row| is_agent(row));
        // While the agent runs, its program may also be run as a command.
        let agent = agents.map(|row| row.started_ms).min();
        let vm = boot(rows);
        for (what, at_ms) in [(Started::Agent, agent), (Started::Vm, vm)] {
            if let Some(at_ms) = at_ms {
                self.add_start(Start { at_ms, what });
            }
        }
        agent.max(vm)
    }

    fn add_start(&mut self, start: Start) {
        let is_in_range = (self.range.from_ms()..self.range.to_ms()).contains(&start.at_ms);
        let is_known = |known: &Start| known.what == start.what && is_same_start(known.at_ms, start.at_ms);
        if is_in_range && !self.starts.iter().any(is_known) {
            self.starts.push(start);
        }
    }

    fn into_list(mut self, cut: bool) -> StartList {
        self.starts
            .sort_unstable_by_key(|start| std::cmp::Reverse(*start));
        StartList {
            starts: self.starts,
            cut,
        }
    }
}

fn is_agent(row: &ProcessRow) -> bool {
    row.kind == ProcessRowKind::Process && row.name == AGENT && row.ended_ms.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, pid: u32, started_ms: u64) -> ProcessRow {
        ProcessRow {
            name: name.to_owned(),
            pid,
            started_ms,
            ..ProcessRow::default()
        }
    }

    fn found(tables: &[&[ProcessRow]]) -> (Vec<(Started, u64)>, Vec<Option<u64>>) {
        let mut found = Found::new(TimeRange::new(1_000_000, 2_000_000).unwrap());
        let newest = tables.iter().map(|rows| found.add(rows.iter())).collect();
        let list = found.into_list(false);
        let starts = list.starts.iter().map(|start| (start.what, start.at_ms));
        (starts.collect(), newest)
    }

    #[test]
    fn start_that_differs_by_a_correction_of_the_clock_is_listed_once() {
        let newer = [row("init", 1, 1_100_000), row(AGENT, 9, 1_500_000)];
        let older = [row("init", 1, 1_099_200), row(AGENT, 7, 1_120_000)];
        let (starts, newest) = found(&[&newer, &older]);
        let expected = [
            (Started::Agent, 1_500_000),
            (Started::Agent, 1_120_000),
            (Started::Vm, 1_100_000),
        ];
        assert_eq!(starts, expected);
        assert_eq!(newest, [Some(1_500_000), Some(1_120_000)]);
    }

    #[test]
    fn start_outside_the_time_range_is_not_listed_but_continues_the_search() {
        let later = [row("init", 1, 2_000_000)];
        let earlier = [row("init", 1, 999_999), row(AGENT, 7, 1_000_000)];
        let (starts, newest) = found(&[&later, &earlier]);
        assert_eq!(starts, [(Started::Agent, 1_000_000)]);
        assert_eq!(newest, [Some(2_000_000), Some(1_000_000)]);
    }

    #[test]
    fn running_agent_is_not_taken_for_a_command_of_its_program() {
        let ended = ProcessRow {
            ended_ms: Some(1_900_000),
            ..row(AGENT, 8, 1_150_000)
        };
        let command = row(AGENT, 20, 1_900_000);
        let (starts, newest) = found(&[&[ended, row(AGENT, 9, 1_200_000), command]]);
        assert_eq!(starts, [(Started::Agent, 1_200_000)]);
        assert_eq!(newest, [Some(1_200_000)]);
        let (starts, newest) = found(&[&[row("nginx", 7, 1_200_000)]]);
        assert_eq!((starts, newest), (Vec::new(), vec![None]));
    }
}
