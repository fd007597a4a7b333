//! Counts the agents of VMs by their state and by what is wrong with them.

use vmwatch_api::{Scope, agents::AgentFault, status::AgentsStatus, vms::Agent};

use super::{Found, Vms};

impl Vms<'_> {
    /// Counts the agents of the VMs in the scope.
    pub fn agents(&self, scope: &Scope, now_ms: u64) -> AgentsStatus {
        let mut status = AgentsStatus::default();
        self.each(scope, now_ms, |found| add(&mut status, &found));
        status
    }
}

fn add(status: &mut AgentsStatus, found: &Found<'_>) {
    match found.agent {
        Some(Agent::Reporting) => status.reporting += 1,
        Some(Agent::Silent) => status.silent += 1,
        Some(Agent::Never) => status.never += 1,
        None => {}
    }
    if found.status.is_some_and(|(_, is_outdated)| is_outdated) {
        status.outdated.add(found.id);
    }
    let (mut is_over, mut has_wrong_clock, mut has_other) = (false, false, false);
    for fault in found.faults() {
        match fault {
            AgentFault::OverLimit { .. } => is_over = true,
            AgentFault::Clock { .. } | AgentFault::UtcOffset { .. } => has_wrong_clock = true,
            AgentFault::TwoAgents
            | AgentFault::ExpiredRows { .. }
            | AgentFault::DateAhead { .. }
            | AgentFault::Unknown => has_other = true,
        }
    }
    for (is_so, group) in [
        (is_over, &mut status.over_limit),
        (has_wrong_clock, &mut status.wrong_clock),
        (has_other, &mut status.other_faults),
    ] {
        if is_so {
            group.add(found.id);
        }
    }
}
