//! Finds faults of a VM's agent by the headers of its recent messages: a wrong clock, another UTC offset, and a second agent
//! that reports as the same VM.

use vmwatch_api::{
    agents::{AgentFault, RunId, Sender},
    time::UtcOffset,
};

/// Number of messages whose clock difference is kept. The median of these is reported, because a message that waited in the
/// network seems to come from a clock that is behind.
const DIFFERENCES: usize = 10;
/// Minimum number of clock differences of which a median is reported.
const MIN_DIFFERENCES: usize = 3;
/// Largest clock difference that is not reported as wrong, in milliseconds.
const MAX_DIFFERENCE_MS: u64 = 2000;
/// Number of recent processes of the agent that are remembered.
const RUNS: usize = 4;
/// A second agent is reported if an earlier process reported again twice within this time. It is ten times the usual interval
/// between samples of processes, so the report does not come and go.
const CONFLICT_MS: u64 = 600_000;

/// What is known of the processes that sent a VM's recent messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Senders {
    /// Arrival of the last message.
    arrived_ms: u64,
    /// A ring of the clock differences of the last messages, in milliseconds.
    differences: [i64; DIFFERENCES],
    /// Number of differences that were ever added.
    added: usize,
    utc_offset: Option<UtcOffset>,
    /// The processes that sent messages, newest first.
    runs: [Option<RunId>; RUNS],
    /// The last two times at which an earlier process sent a message again, newest first, Unix milliseconds.
    returned_ms: [Option<u64>; 2],
}

impl Senders {
    /// Adds a message. A message that arrived before the last added one is ignored, because replicas may process messages in
    /// another order.
    pub(super) fn note(&mut self, sender: &Sender) {
        if sender.arrived_ms <= self.arrived_ms {
            return;
        }
        self.arrived_ms = sender.arrived_ms;
        if let Some(ahead_ms) = sender.clock_ahead_ms {
            let next = self.added % DIFFERENCES;
            if let Some(slot) = self.differences.get_mut(next) {
                *slot = ahead_ms;
            }
            self.added += 1;
        }
        self.utc_offset = sender.utc_offset.or(self.utc_offset);
        if let Some(run) = sender.run_id {
            self.note_run(run, sender.arrived_ms);
        }
    }

    /// A process that was replaced by a restart never reports again, so a process that does runs at the same time as another.
    fn note_run(&mut self, run: RunId, arrived_ms: u64) {
        let before = self.runs.iter().position(|known| *known == Some(run));
        if before == Some(0) {
            return;
        }
        if before.is_some() {
            let [last, _] = self.returned_ms;
            self.returned_ms = [Some(arrived_ms), last];
        }
        let end = before.unwrap_or(RUNS - 1);
        if let Some(moved) = self.runs.get_mut(..=end) {
            moved.rotate_right(1);
        }
        let [first, ..] = &mut self.runs;
        *first = Some(run);
    }

    /// The faults of the agent in a deployment with this UTC offset.
    pub(super) fn faults(&self, deployment: UtcOffset, now_ms: u64) -> Vec<AgentFault> {
        let mut faults = Vec::new();
        if let Some(agent) = self.utc_offset.filter(|agent| *agent != deployment) {
            faults.push(AgentFault::UtcOffset { agent, deployment });
        }
        if let Some(ahead_ms) = self.clock_ahead_ms()
            && ahead_ms.unsigned_abs() > MAX_DIFFERENCE_MS
        {
            faults.push(AgentFault::Clock { ahead_ms });
        }
        let [_, earlier] = self.returned_ms;
        if earlier.is_some_and(|returned_ms| now_ms.saturating_sub(returned_ms) < CONFLICT_MS) {
            faults.push(AgentFault::TwoAgents);
        }
        faults
    }

    /// The median of the last clock differences.
    fn clock_ahead_ms(&self) -> Option<i64> {
        let count = self.added.min(DIFFERENCES);
        if count < MIN_DIFFERENCES {
            return None;
        }
        let mut sorted = self.differences;
        let sorted = sorted.get_mut(..count)?;
        sorted.sort_unstable();
        sorted.get(count / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UTC: UtcOffset = UtcOffset::UTC;

    fn sender(arrived_ms: u64, clock_ahead_ms: i64, run: u64) -> Sender {
        Sender {
            arrived_ms,
            clock_ahead_ms: Some(clock_ahead_ms),
            utc_offset: Some(UTC),
            run_id: Some(RunId(run)),
        }
    }

    fn faults_after(messages: impl IntoIterator<Item = Sender>) -> Vec<AgentFault> {
        let mut senders = Senders::default();
        let mut last = 0;
        for message in messages {
            senders.note(&message);
            last = message.arrived_ms.max(last);
        }
        senders.faults(UTC, last)
    }

    #[test]
    fn clock_fault_is_the_median_of_the_last_ten_differences() {
        let clock = |differences: &[i64]| {
            let differences = differences.iter().enumerate();
            faults_after(differences.map(|(at, ahead)| sender(at as u64 + 1, *ahead, 1)))
        };
        let fault = |ahead_ms| vec![AgentFault::Clock { ahead_ms }];
        assert_eq!(clock(&[-9000, -9000]), [], "two messages are too few");
        assert_eq!(clock(&[-9000, -9000, -9000]), fault(-9000));
        assert_eq!(clock(&[2000, 2000, -2000]), [], "two seconds are allowed");
        assert_eq!(clock(&[2001, 2001, 0]), fault(2001));
        assert_eq!(clock(&[0, -60_000, 0, -60_000, 0]), [], "messages that waited");
        let stepped: Vec<i64> = [28_800_000; 10].into_iter().chain([5; 6]).collect();
        assert_eq!(clock(&stepped), [], "the clock was set");
    }

    #[test]
    fn distinguishes_second_agent_from_restart() {
        let runs = |runs: &[u64]| {
            let runs = runs.iter().enumerate();
            faults_after(runs.map(|(at, run)| sender(at as u64 * 10_000 + 1, 0, *run)))
        };
        assert_eq!(runs(&[1, 1, 2, 2, 3, 4, 5, 6, 7]), [], "restarts");
        assert_eq!(runs(&[1, 2, 1]), [], "one return may be a message that was late");
        assert_eq!(runs(&[1, 2, 1, 2]), [AgentFault::TwoAgents]);
        assert_eq!(runs(&[1, 2, 3, 1, 2, 3]), [AgentFault::TwoAgents], "three agents");
        // A replica processes messages later than another one.
        let late = [(1, 1), (2, 1), (3, 2), (1, 1), (2, 1), (3, 2), (4, 2)];
        assert_eq!(faults_after(late.map(|(at, run)| sender(at, 0, run))), []);
    }

    #[test]
    fn conflict_ends_some_time_after_the_second_agent() {
        let mut senders = Senders::default();
        for (at, run) in [(1, 1), (2, 2), (3, 1), (4, 2)] {
            senders.note(&sender(at, 0, run));
        }
        assert_eq!(senders.faults(UTC, CONFLICT_MS + 2), [AgentFault::TwoAgents]);
        assert_eq!(senders.faults(UTC, CONFLICT_MS + 3), []);
    }

    #[test]
    fn other_utc_offset_is_reported_at_once() {
        let agent = "+08:00".parse().unwrap();
        let other = Sender {
            utc_offset: Some(agent),
            ..sender(1, 0, 1)
        };
        let fault = AgentFault::UtcOffset {
            agent,
            deployment: UTC,
        };
        assert_eq!(faults_after([other]), [fault]);
        assert_eq!(faults_after([other, sender(2, 0, 1)]), []);
    }
}
