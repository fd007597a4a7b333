//! State machine that decides the next step of an operation from the VM's state. It is a pure function, so that
//! tests can try every case.
//!
//! ```text
//!                start ──────────────┐
//!   ShutOff ──> Starting ──────> Running <──> Starting      (reboot)
//!      ^  ^                       │    ^
//!      │  └──── ShuttingDown <────┘    │ start
//!      │              stop       Paused, Suspended
//!      │                               │
//!      └──── force_stop, from any ─────┘        Crashed: only force_stop
//! ```
//!
//! An operation reads the state, acts at most [`MAX_ACTS`] times, and reads the state again until the VM is in the
//! wanted state. A successful call to the hypervisor never ends an operation: only a state that was read does.

use std::time::Duration;

use vmwatch_api::{
    actions::{Refusal, Refused, VmAction},
    lifecycle::{MachineState, Verb},
};

use crate::driver::VmState;

/// Maximum number of times that an operation sends its action to the hypervisor.
pub(crate) const MAX_ACTS: u8 = 3;
/// If a VM still runs this long after a shutdown or power-off was sent, the action is sent again, because a guest that
/// is early in its boot ignores a shutdown.
pub(crate) const REPEAT_AFTER: Duration = Duration::from_secs(10);

/// An action on a VM that a driver can carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Start the VM, from any state.
    Start,
    /// Ask the guest to shut down, as the power button does.
    Shutdown,
    /// Reboot the guest. With `hard`, reset the VM without asking the guest.
    Reboot { hard: bool },
    /// Power the VM off without asking the guest.
    Destroy,
}

/// Outcome of the last attempt to send the operation's action to the hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ActOutcome {
    /// The action was not sent to the hypervisor yet.
    NotSent,
    /// The hypervisor accepted the action.
    Accepted,
    /// The hypervisor may have accepted the action: its answer is missing, or the replica that sent the action crashed.
    Unknown,
}

/// Progress of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Outcome of the last attempt to send the action.
    pub(crate) outcome: ActOutcome,
    /// Number of attempts to send the action so far.
    pub(crate) acts: u8,
    /// Time since the last attempt to send the action.
    pub(crate) since: Duration,
}

/// Next step of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// End the operation with success: the VM is in the wanted state.
    Done,
    /// Send the action to the hypervisor.
    Act,
    /// Wait, then read the VM's state again.
    Wait,
    /// End the operation: the VM's state does not allow the action, and nothing was done.
    Refuse(Refusal),
    /// End the operation as failed.
    Fail(&'static str),
    /// End the operation with unknown outcome: the action may or may not have taken effect, and must not be repeated.
    Unknown,
}

/// Returns the driver's action for a verb of the bus.
pub(crate) const fn action(verb: Verb, hard: bool) -> Option<Action> {
    match verb {
        Verb::Start => Some(Action::Start),
        Verb::Stop => Some(Action::Shutdown),
        Verb::Reboot => Some(Action::Reboot { hard }),
        Verb::ForceStop => Some(Action::Destroy),
        Verb::Unknown => None,
    }
}

/// Decides the next step of an operation whose VM is in this state.
pub(crate) fn next(verb: Verb, hard: bool, vm: VmState, progress: Progress) -> Step {
    let step = match verb {
        Verb::Start => start(vm.state, progress.outcome),
        Verb::Stop => stop(vm.state, progress),
        Verb::Reboot => reboot(vm.state, progress.outcome),
        Verb::ForceStop => force_stop(vm.state, progress),
        Verb::Unknown => Step::Refuse(Refusal::UnknownAction),
    };
    let hindrance = vm.hindrance.filter(|hindrance| blocks(*hindrance, verb, hard));
    match (step, hindrance) {
        (Step::Act | Step::Refuse(_), Some(hindrance)) if progress.outcome == ActOutcome::NotSent => {
            Step::Refuse(hindrance)
        }
        (Step::Act, Some(_)) => Step::Wait,
        (Step::Act, None) if progress.acts >= MAX_ACTS => {
            Step::Fail("gave up after several attempts: the VM did not change state")
        }
        (step, _) => step,
    }
}

/// Whether the hypervisor refuses the action because of this hindrance.
const fn blocks(hindrance: Refusal, verb: Verb, hard: bool) -> bool {
    match hindrance {
        Refusal::ErrorState => matches!(verb, Verb::Reboot) && !hard,
        Refusal::ResumeFirst => matches!(verb, Verb::ForceStop),
        _ => true,
    }
}

/// The actions that would not be sent to a VM in this state, with the reasons.
pub(crate) fn refused(vm: VmState) -> Refused {
    let not_begun = Progress {
        outcome: ActOutcome::NotSent,
        acts: 0,
        since: Duration::ZERO,
    };
    let refused = VmAction::ALL.into_iter().filter_map(|action| {
        let (verb, hard) = action.verb();
        let reason = match next(verb, hard, vm, not_begun) {
            Step::Act => return None,
            Step::Refuse(reason) => reason,
            Step::Done if verb == Verb::Start => Refusal::AlreadyRunning,
            Step::Done => Refusal::AlreadyOff,
            Step::Wait => Refusal::InTransition,
            // The state machine takes these steps only after an action was sent.
            Step::Fail(_) | Step::Unknown => Refusal::Unknown,
        };
        Some((action, reason))
    });
    refused.collect()
}

/// Describes the state of a VM in words for users.
pub(crate) const fn describe_state(state: MachineState) -> &'static str {
    match state {
        MachineState::Running => "running",
        MachineState::Starting => "starting",
        MachineState::Paused => "paused",
        MachineState::ShuttingDown => "shutting down",
        MachineState::ShutOff => "off",
        MachineState::Crashed => "crashed",
        MachineState::Suspended => "suspended",
        MachineState::Unknown => "in an unknown state",
    }
}

const fn start(state: MachineState, outcome: ActOutcome) -> Step {
    use MachineState as Is;
    match (state, outcome) {
        (Is::Running, _) => Step::Done,
        (Is::Starting | Is::ShuttingDown, _) | (Is::Unknown, ActOutcome::Accepted | ActOutcome::Unknown) => {
            Step::Wait
        }
        (Is::ShutOff, ActOutcome::Accepted) => Step::Fail("the VM shut off immediately after starting"),
        (Is::Crashed, ActOutcome::Accepted) => Step::Fail("the VM crashed immediately after starting"),
        // Start the VM again even if a start was accepted: a VM that was saved while it was paused is restored as
        // paused.
        (Is::ShutOff | Is::Paused | Is::Suspended, _) => Step::Act,
        (Is::Crashed, _) => Step::Refuse(Refusal::Crashed),
        (Is::Unknown, ActOutcome::NotSent) => Step::Refuse(Refusal::UnknownState),
    }
}

fn stop(state: MachineState, progress: Progress) -> Step {
    use MachineState as Is;
    match (state, progress.outcome) {
        (Is::ShutOff, _) => Step::Done,
        (Is::Running, ActOutcome::NotSent) => Step::Act,
        (Is::Running, _) if progress.since >= REPEAT_AFTER && progress.acts < MAX_ACTS => Step::Act,
        (Is::Crashed, _) => Step::Refuse(Refusal::Crashed),
        (Is::Paused | Is::Suspended, ActOutcome::NotSent) => Step::Refuse(Refusal::NotRunning),
        (Is::Unknown, ActOutcome::NotSent) => Step::Refuse(Refusal::UnknownState),
        _ => Step::Wait,
    }
}

const fn reboot(state: MachineState, outcome: ActOutcome) -> Step {
    use MachineState as Is;
    match (state, outcome) {
        (_, ActOutcome::Unknown) => Step::Unknown,
        (Is::Running, ActOutcome::NotSent) => Step::Act,
        (Is::Running, ActOutcome::Accepted) => Step::Done,
        (Is::ShutOff | Is::Crashed, ActOutcome::Accepted) => {
            Step::Fail("the VM shut off and did not come back")
        }
        (Is::ShutOff, ActOutcome::NotSent) => Step::Refuse(Refusal::Off),
        (Is::Crashed, ActOutcome::NotSent) => Step::Refuse(Refusal::Crashed),
        (Is::Paused | Is::Suspended, ActOutcome::NotSent) => Step::Refuse(Refusal::NotRunning),
        (Is::Unknown, ActOutcome::NotSent) => Step::Refuse(Refusal::UnknownState),
        _ => Step::Wait,
    }
}

fn force_stop(state: MachineState, progress: Progress) -> Step {
    match (state, progress.outcome) {
        (MachineState::ShutOff, _) => Step::Done,
        (_, ActOutcome::Accepted) if progress.since < REPEAT_AFTER => Step::Wait,
        _ => Step::Act,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATES: [MachineState; 8] = [
        MachineState::Running,
        MachineState::Starting,
        MachineState::Paused,
        MachineState::ShuttingDown,
        MachineState::ShutOff,
        MachineState::Crashed,
        MachineState::Suspended,
        MachineState::Unknown,
    ];
    const VERBS: [Verb; 4] = [Verb::Start, Verb::Stop, Verb::Reboot, Verb::ForceStop];

    fn progress() -> impl Strategy<Value = Progress> {
        let outcome = prop::sample::select(vec![ActOutcome::Accepted, ActOutcome::Unknown]);
        prop_oneof![
            Just(Progress {
                outcome: ActOutcome::NotSent,
                acts: 0,
                since: Duration::ZERO
            }),
            (outcome, 1..=MAX_ACTS, 0_u64..60).prop_map(|(outcome, acts, since)| Progress {
                outcome,
                acts,
                since: Duration::from_secs(since)
            }),
        ]
    }

    /// What a simulated hypervisor does in one polling cycle.
    #[derive(Debug, Clone, Copy)]
    enum Turn {
        /// The action takes effect, and the answer arrives.
        Works,
        /// The action takes effect, but the answer is lost.
        AnswerLost,
        /// The action has no effect, and the answer is lost.
        Lost,
        /// Another client changes the VM to this state.
        Moves(MachineState),
    }

    fn turn() -> impl Strategy<Value = Turn> {
        prop_oneof![
            4 => Just(Turn::Works),
            1 => Just(Turn::AnswerLost),
            1 => Just(Turn::Lost),
            1 => prop::sample::select(STATES.to_vec()).prop_map(Turn::Moves),
        ]
    }

    const fn after(action: Action) -> MachineState {
        match action {
            Action::Start | Action::Reboot { .. } => MachineState::Running,
            Action::Shutdown | Action::Destroy => MachineState::ShutOff,
        }
    }

    /// Runs an operation on a simulated hypervisor; returns the last step, the number of attempts and the last state of
    /// the VM.
    fn play(verb: Verb, mut state: MachineState, turns: &[Turn]) -> (Step, u8, MachineState) {
        let mut progress = Progress {
            outcome: ActOutcome::NotSent,
            acts: 0,
            since: Duration::ZERO,
        };
        for turn in turns {
            match next(verb, false, state.into(), progress) {
                Step::Act => {
                    progress.acts += 1;
                    progress.since = Duration::ZERO;
                    progress.outcome = if matches!(turn, Turn::Works) {
                        ActOutcome::Accepted
                    } else {
                        ActOutcome::Unknown
                    };
                    if matches!(turn, Turn::Works | Turn::AnswerLost) {
                        state = after(action(verb, false).unwrap());
                    }
                }
                Step::Wait => progress.since += Duration::from_secs(2),
                end => return (end, progress.acts, state),
            }
            if let Turn::Moves(to) = turn {
                state = *to;
            }
        }
        (Step::Wait, progress.acts, state)
    }

    proptest! {
        #[test]
        fn operation_succeeds_only_if_vm_is_in_wanted_state(
            verb in prop::sample::select(VERBS.to_vec()),
            state in prop::sample::select(STATES.to_vec()),
            progress in progress(),
        ) {
            if next(verb, false, state.into(), progress) == Step::Done {
                let wanted = match verb {
                    Verb::Start | Verb::Reboot => MachineState::Running,
                    Verb::Stop | Verb::ForceStop | Verb::Unknown => MachineState::ShutOff,
                };
                prop_assert_eq!(state, wanted);
            }
        }

        #[test]
        fn attempts_are_bounded_and_reboot_is_never_sent_twice(
            verb in prop::sample::select(VERBS.to_vec()),
            state in prop::sample::select(STATES.to_vec()),
            turns in prop::collection::vec(turn(), 0..60),
        ) {
            let (end, acts, last) = play(verb, state, &turns);
            prop_assert!(acts <= MAX_ACTS);
            if verb == Verb::Reboot {
                prop_assert!(acts <= 1);
            }
            if let Step::Refuse(_) = end {
                prop_assert!(acts == 0 || last == MachineState::Crashed);
            }
        }

        #[test]
        fn vm_reaches_wanted_state_on_working_hypervisor(
            verb in prop::sample::select(vec![Verb::Start, Verb::ForceStop]),
            state in prop::sample::select(vec![MachineState::Running, MachineState::Paused, MachineState::ShutOff]),
        ) {
            let (end, acts, _) = play(verb, state, &[Turn::Works; 4]);
            prop_assert_eq!(end, Step::Done);
            prop_assert!(acts <= 1);
        }

        #[test]
        fn action_is_not_sent_if_vm_is_already_in_wanted_state(progress in progress()) {
            prop_assert_eq!(next(Verb::Start, false, MachineState::Running.into(), progress), Step::Done);
            prop_assert_eq!(next(Verb::Stop, false, MachineState::ShutOff.into(), progress), Step::Done);
            prop_assert_eq!(next(Verb::ForceStop, false, MachineState::ShutOff.into(), progress), Step::Done);
        }
    }

    /// Describes the refused actions, in the order start, stop, reboot, reset, `force_stop`; `-` stands for an allowed one.
    fn described(vm: VmState) -> String {
        let refused = refused(vm);
        let reasons = VmAction::ALL.map(|action| match refused.get(&action) {
            None => "-".to_owned(),
            Some(reason) => serde_json::to_value(reason).unwrap().as_str().unwrap().to_owned(),
        });
        reasons.join(" ")
    }

    #[test]
    fn every_state_has_a_reason_for_each_refused_action() {
        for (state, expected) in [
            ("running", "already_running - - - -"),
            (
                "starting",
                "in_transition in_transition in_transition in_transition -",
            ),
            ("paused", "- not_running not_running not_running -"),
            ("suspended", "- not_running not_running not_running -"),
            (
                "shutting_down",
                "in_transition in_transition in_transition in_transition -",
            ),
            ("shut_off", "- already_off off off already_off"),
            ("crashed", "crashed crashed crashed crashed -"),
            (
                "unknown",
                "unknown_state unknown_state unknown_state unknown_state -",
            ),
        ] {
            let state: MachineState = serde_json::from_value(state.into()).unwrap();
            assert_eq!(described(state.into()), expected, "{state}");
        }
    }

    #[test]
    fn hindrance_refuses_actions_that_the_state_allows() {
        let hindered = |state, hindrance| {
            described(VmState {
                state,
                hindrance: Some(hindrance),
            })
        };
        let (running, off) = (MachineState::Running, MachineState::ShutOff);
        assert_eq!(
            hindered(running, Refusal::Locked),
            "already_running locked locked locked locked"
        );
        assert_eq!(
            hindered(off, Refusal::HostDown),
            "host_down already_off host_down host_down already_off"
        );
        assert_eq!(
            hindered(running, Refusal::ErrorState),
            "already_running - error_state - -"
        );
        assert_eq!(
            hindered(MachineState::Paused, Refusal::ResumeFirst),
            "- not_running not_running not_running resume_first"
        );
        // An action that was sent is not given up because the VM is locked afterwards.
        let sent = Progress {
            outcome: ActOutcome::Accepted,
            acts: 1,
            since: REPEAT_AFTER,
        };
        let locked = VmState {
            state: running,
            hindrance: Some(Refusal::Locked),
        };
        assert_eq!(next(Verb::Stop, false, locked, sent), Step::Wait);
    }

    #[test]
    fn reboot_with_unknown_outcome_is_not_repeated() {
        let unclear = Progress {
            outcome: ActOutcome::Unknown,
            acts: 1,
            since: Duration::ZERO,
        };
        for state in STATES {
            assert_eq!(next(Verb::Reboot, false, state.into(), unclear), Step::Unknown);
        }
    }

    #[test]
    fn shutdown_ignored_by_guest_is_repeated() {
        let outcome = |since, acts| Progress {
            outcome: ActOutcome::Accepted,
            acts,
            since,
        };
        let running = |progress| next(Verb::Stop, false, MachineState::Running.into(), progress);
        assert_eq!(running(outcome(REPEAT_AFTER / 2, 1)), Step::Wait);
        assert_eq!(running(outcome(REPEAT_AFTER, 1)), Step::Act);
        assert_eq!(running(outcome(REPEAT_AFTER, MAX_ACTS)), Step::Wait);
    }

    #[test]
    fn start_fails_if_vm_shuts_off_again() {
        let accepted = Progress {
            outcome: ActOutcome::Accepted,
            acts: 1,
            since: Duration::ZERO,
        };
        assert!(matches!(
            next(Verb::Start, false, MachineState::ShutOff.into(), accepted),
            Step::Fail(_)
        ));
    }
}
