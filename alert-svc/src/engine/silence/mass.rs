//! Detects that most agents fell silent at once, which indicates a fault of vmwatch or of the network instead of the VMs.

/// Agents that fell silent within this time did so at once.
const WINDOW_MS: u64 = 60_000;
/// Minimum number of agents that fell silent.
const MIN_AGENTS: usize = 5;
/// An agent is silent after this time, and after [`INTERVALS`] times its usual interval.
const SILENT_MS: u64 = 60_000;
const INTERVALS: u64 = 3;
/// Agents that fell silent longer ago than this are not taken for a new mass silence.
const RECENT_MS: u64 = 900_000;
/// While other agents report, a mass silence ends after this time: the silent VMs are then really gone.
const LONGEST_MS: u64 = 1_800_000;

/// The arrivals of an agent's samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Agent {
    /// When its newest sample arrived, Unix milliseconds.
    pub(in crate::engine) arrived_ms: u64,
    /// Its usual interval in milliseconds; 0 if unknown.
    pub(in crate::engine) interval_ms: u64,
}

impl Agent {
    const fn is_silent(self, now_ms: u64) -> bool {
        let usual = self.interval_ms.saturating_mul(INTERVALS);
        let longest = if usual > SILENT_MS { usual } else { SILENT_MS };
        now_ms.saturating_sub(self.arrived_ms) > longest
    }
}

/// Whether most agents are silent since the same minute.
#[derive(Debug, Default)]
pub(in crate::engine) struct Mass {
    /// Beginning of the minute in which they fell silent.
    since_ms: Option<u64>,
}

impl Mass {
    /// Returns the beginning of the mass silence, if there is one now.
    pub(in crate::engine) fn check(&mut self, agents: &[Agent], now_ms: u64) -> Option<u64> {
        let lasting = self.since_ms.filter(|since_ms| {
            let still = is_mass(agents, *since_ms, now_ms);
            let some_report = agents.iter().any(|agent| !agent.is_silent(now_ms));
            still && (!some_report || now_ms.saturating_sub(*since_ms) <= LONGEST_MS)
        });
        self.since_ms = lasting.or_else(|| begun(agents, now_ms));
        self.since_ms
    }
}

/// Whether more than half of the agents that reported at or after `since_ms` fell silent in the minute that began then.
fn is_mass(agents: &[Agent], since_ms: u64, now_ms: u64) -> bool {
    let reported = agents.iter().filter(|agent| agent.arrived_ms >= since_ms);
    let (mut all, mut silent) = (0, 0);
    for agent in reported {
        all += 1;
        let in_window = agent.arrived_ms - since_ms <= WINDOW_MS;
        silent += usize::from(in_window && agent.is_silent(now_ms));
    }
    silent >= MIN_AGENTS && silent * 2 > all
}

/// The beginning of the minute in which the most agents fell silent, if it is a mass silence.
fn begun(agents: &[Agent], now_ms: u64) -> Option<u64> {
    let is_recent =
        |agent: &&Agent| agent.is_silent(now_ms) && now_ms.saturating_sub(agent.arrived_ms) <= RECENT_MS;
    let mut silent: Vec<u64> = agents
        .iter()
        .filter(is_recent)
        .map(|agent| agent.arrived_ms)
        .collect();
    silent.sort_unstable();
    let in_window = |since_ms: &u64| {
        let from = silent.partition_point(|arrived| arrived < since_ms);
        let to = silent.partition_point(|arrived| *arrived <= since_ms + WINDOW_MS);
        to - from
    };
    let since_ms = silent.iter().copied().max_by_key(in_window)?;
    is_mass(agents, since_ms, now_ms).then_some(since_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn agents(count: usize, arrived_ms: u64) -> Vec<Agent> {
        let agent = |index| Agent {
            arrived_ms: arrived_ms + index as u64 * 10,
            interval_ms: 10_000,
        };
        (0..count).map(agent).collect()
    }

    #[test]
    fn most_agents_falling_silent_within_a_minute_are_a_mass_silence_until_most_are_back() {
        let mut all = agents(6, NOW - 100_000);
        all.extend(agents(5, NOW - 1000));
        let mut mass = Mass::default();
        assert_eq!(mass.check(&all, NOW), Some(NOW - 100_000));
        // One of the silent agents is back, so it is no longer more than half.
        all[0].arrived_ms = NOW + 1000;
        assert_eq!(mass.check(&all, NOW + 2000), None);
    }

    #[test]
    fn few_agents_or_agents_that_fall_silent_one_by_one_are_no_mass_silence() {
        assert_eq!(Mass::default().check(&agents(4, NOW - 100_000), NOW), None);
        let half = [agents(5, NOW - 100_000), agents(5, NOW - 1000)].concat();
        assert_eq!(Mass::default().check(&half, NOW), None);
        let one_by_one: Vec<_> = (1..9)
            .flat_map(|minute| agents(1, NOW - minute * 100_000))
            .collect();
        assert_eq!(Mass::default().check(&one_by_one, NOW), None);
    }

    #[test]
    fn agents_with_a_long_interval_are_not_silent_between_their_samples() {
        let slow: Vec<_> = agents(9, NOW - 250_000)
            .into_iter()
            .map(|agent| Agent {
                interval_ms: 300_000,
                ..agent
            })
            .collect();
        assert_eq!(Mass::default().check(&slow, NOW), None);
    }

    #[test]
    fn mass_silence_ends_after_half_an_hour_if_other_agents_report() {
        let gone = agents(6, NOW);
        let mut mass = Mass::default();
        let all = |now: u64| [gone.clone(), agents(3, now - 1000)].concat();
        assert_eq!(mass.check(&all(NOW + 120_000), NOW + 120_000), Some(NOW));
        let later = NOW + LONGEST_MS + 1000;
        assert_eq!(mass.check(&all(later), later), None);
        // If no agent reports, it lasts.
        let mut mass = Mass::default();
        assert_eq!(mass.check(&gone, NOW + 120_000), Some(NOW));
        assert_eq!(mass.check(&gone, later), Some(NOW));
    }
}
