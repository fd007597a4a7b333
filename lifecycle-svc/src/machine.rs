//! What to do next for a command, from what the hypervisor says of the machine: pure, so that every case can be tried.
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
//! A command looks, acts at most a few times, and looks again until the hypervisor says that the machine is as it was
//! asked to be. It never concludes from a call's success alone: only from a state that was read.

use std::time::Duration;

use vmwatch_api::lifecycle::{MachineState, Verb};

/// The most times that one command tells the hypervisor the same thing.
pub(crate) const MOST_ACTS: u8 = 3;
/// A machine that still runs this long after it was told to go down is told again: a shutdown that reaches a system
/// early in its boot is lost.
pub(crate) const TELL_AGAIN: Duration = Duration::from_secs(10);

/// What a driver can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Make it run, from whatever state.
    Start,
    /// Press its power button.
    Shutdown,
    /// Start its system anew; `hard` without asking it.
    Reboot { hard: bool },
    /// Cut its power.
    Destroy,
}

/// What is known of the command's last act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// Nothing was done yet.
    Nothing,
    /// The hypervisor took it.
    Accepted,
    /// It may have taken it: no answer came, or who asked died first.
    Unclear,
}

/// How far a command has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// What is known of the last act.
    pub(crate) told: Told,
    /// How many acts there were.
    pub(crate) acts: u8,
    /// How long ago the last one was.
    pub(crate) since: Duration,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The machine is as it was asked to be.
    Done,
    /// Tell the hypervisor.
    Act,
    /// Look again.
    Wait,
    /// The state does not allow the command, and nothing was done.
    Refuse(&'static str),
    /// It did not work.
    Fail(&'static str),
    /// It may or may not have been done, and must not be done twice.
    Unknown,
}

/// What the verb tells a driver.
pub(crate) const fn action(verb: Verb, hard: bool) -> Option<Action> {
    match verb {
        Verb::Start => Some(Action::Start),
        Verb::Stop => Some(Action::Shutdown),
        Verb::Reboot => Some(Action::Reboot { hard }),
        Verb::ForceStop => Some(Action::Destroy),
        Verb::Unknown => None,
    }
}

/// The next step of a command whose machine is in this state.
pub(crate) fn next(verb: Verb, state: MachineState, progress: Progress) -> Step {
    let step = match verb {
        Verb::Start => start(state, progress.told),
        Verb::Stop => stop(state, progress),
        Verb::Reboot => reboot(state, progress.told),
        Verb::ForceStop => force_stop(state, progress),
        Verb::Unknown => Step::Refuse("this version of the service does not know the command"),
    };
    match step {
        Step::Act if progress.acts >= MOST_ACTS => {
            Step::Fail("the hypervisor was told several times, in vain")
        }
        other => other,
    }
}

const fn start(state: MachineState, told: Told) -> Step {
    use MachineState as Is;
    match (state, told) {
        (Is::Running, _) => Step::Done,
        (Is::Starting | Is::ShuttingDown, _) | (Is::Unknown, Told::Accepted | Told::Unclear) => Step::Wait,
        (Is::ShutOff, Told::Accepted) => Step::Fail("it was started, and went off again at once"),
        (Is::Crashed, Told::Accepted) => Step::Fail("it was started, and crashed at once"),
        // Also after an accepted start: a machine saved while it was paused comes back paused.
        (Is::ShutOff | Is::Paused | Is::Suspended, _) => Step::Act,
        (Is::Crashed, _) => Step::Refuse("it has crashed and is kept as it was; force it off first"),
        (Is::Unknown, Told::Nothing) => {
            Step::Refuse("the hypervisor gives a state that nothing can be started from")
        }
    }
}

fn stop(state: MachineState, progress: Progress) -> Step {
    use MachineState as Is;
    match (state, progress.told) {
        (Is::ShutOff, _) => Step::Done,
        (Is::Running, Told::Nothing) => Step::Act,
        (Is::Running, _) if progress.since >= TELL_AGAIN && progress.acts < MOST_ACTS => Step::Act,
        (Is::Crashed, _) => Step::Refuse("it has crashed; force it off"),
        (Is::Paused | Is::Suspended, Told::Nothing) => Step::Refuse(
            "its system cannot hear a shutdown while it does not run; start it first, or force it off",
        ),
        (Is::Unknown, Told::Nothing) => {
            Step::Refuse("the hypervisor gives a state that nothing can be stopped from")
        }
        _ => Step::Wait,
    }
}

const fn reboot(state: MachineState, told: Told) -> Step {
    use MachineState as Is;
    match (state, told) {
        (_, Told::Unclear) => Step::Unknown,
        (Is::Running, Told::Nothing) => Step::Act,
        (Is::Running, Told::Accepted) => Step::Done,
        (Is::ShutOff | Is::Crashed, Told::Accepted) => Step::Fail("it went off and did not come back"),
        (Is::ShutOff, Told::Nothing) => Step::Refuse("it is off; start it"),
        (Is::Crashed, Told::Nothing) => Step::Refuse("it has crashed; force it off, then start it"),
        (Is::Paused | Is::Suspended, Told::Nothing) => Step::Refuse("it does not run; start it"),
        (Is::Unknown, Told::Nothing) => {
            Step::Refuse("the hypervisor gives a state that nothing can be rebooted from")
        }
        _ => Step::Wait,
    }
}

fn force_stop(state: MachineState, progress: Progress) -> Step {
    match (state, progress.told) {
        (MachineState::ShutOff, _) => Step::Done,
        (_, Told::Accepted) if progress.since < TELL_AGAIN => Step::Wait,
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
        let told = prop::sample::select(vec![Told::Accepted, Told::Unclear]);
        prop_oneof![
            Just(Progress {
                told: Told::Nothing,
                acts: 0,
                since: Duration::ZERO
            }),
            (told, 1..=MOST_ACTS, 0_u64..60).prop_map(|(told, acts, since)| Progress {
                told,
                acts,
                since: Duration::from_secs(since)
            }),
        ]
    }

    /// A hypervisor for one machine that may refuse to answer, be slow, or let the machine change by itself.
    #[derive(Debug, Clone, Copy)]
    enum Turn {
        /// The command works, and the answer arrives.
        Works,
        /// It works, and the answer is lost.
        AnswerLost,
        /// Nothing happens, and the answer is lost.
        Lost,
        /// The machine goes where somebody else wants it.
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

    /// How a command on such a machine ends, how often it acted, and what it last saw.
    fn play(verb: Verb, mut state: MachineState, turns: &[Turn]) -> (Step, u8, MachineState) {
        let mut progress = Progress {
            told: Told::Nothing,
            acts: 0,
            since: Duration::ZERO,
        };
        for turn in turns {
            match next(verb, state, progress) {
                Step::Act => {
                    progress.acts += 1;
                    progress.since = Duration::ZERO;
                    progress.told = if matches!(turn, Turn::Works) {
                        Told::Accepted
                    } else {
                        Told::Unclear
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
        fn success_is_only_said_of_the_state_that_was_asked_for(
            verb in prop::sample::select(VERBS.to_vec()),
            state in prop::sample::select(STATES.to_vec()),
            progress in progress(),
        ) {
            if next(verb, state, progress) == Step::Done {
                let wanted = match verb {
                    Verb::Start | Verb::Reboot => MachineState::Running,
                    Verb::Stop | Verb::ForceStop | Verb::Unknown => MachineState::ShutOff,
                };
                prop_assert_eq!(state, wanted);
            }
        }

        #[test]
        fn no_story_makes_it_act_without_end_or_reboot_twice(
            verb in prop::sample::select(VERBS.to_vec()),
            state in prop::sample::select(STATES.to_vec()),
            turns in prop::collection::vec(turn(), 0..60),
        ) {
            let (end, acts, last) = play(verb, state, &turns);
            prop_assert!(acts <= MOST_ACTS);
            if verb == Verb::Reboot {
                prop_assert!(acts <= 1);
            }
            if let Step::Refuse(_) = end {
                prop_assert!(acts == 0 || last == MachineState::Crashed);
            }
        }

        #[test]
        fn a_machine_that_obeys_comes_to_be_as_asked(
            verb in prop::sample::select(vec![Verb::Start, Verb::ForceStop]),
            state in prop::sample::select(vec![MachineState::Running, MachineState::Paused, MachineState::ShutOff]),
        ) {
            let (end, acts, _) = play(verb, state, &[Turn::Works; 4]);
            prop_assert_eq!(end, Step::Done);
            prop_assert!(acts <= 1);
        }

        #[test]
        fn what_is_so_already_is_done_without_an_act(progress in progress()) {
            prop_assert_eq!(next(Verb::Start, MachineState::Running, progress), Step::Done);
            prop_assert_eq!(next(Verb::Stop, MachineState::ShutOff, progress), Step::Done);
            prop_assert_eq!(next(Verb::ForceStop, MachineState::ShutOff, progress), Step::Done);
        }
    }

    #[test]
    fn a_reboot_whose_fate_is_unclear_is_not_repeated() {
        let unclear = Progress {
            told: Told::Unclear,
            acts: 1,
            since: Duration::ZERO,
        };
        for state in STATES {
            assert_eq!(next(Verb::Reboot, state, unclear), Step::Unknown);
        }
    }

    #[test]
    fn a_shutdown_that_nobody_heard_is_told_again() {
        let told = |since, acts| Progress {
            told: Told::Accepted,
            acts,
            since,
        };
        let running = |progress| next(Verb::Stop, MachineState::Running, progress);
        assert_eq!(running(told(TELL_AGAIN / 2, 1)), Step::Wait);
        assert_eq!(running(told(TELL_AGAIN, 1)), Step::Act);
        assert_eq!(running(told(TELL_AGAIN, MOST_ACTS)), Step::Wait);
    }

    #[test]
    fn a_start_that_went_off_again_is_a_failure_and_not_a_success() {
        let accepted = Progress {
            told: Told::Accepted,
            acts: 1,
            since: Duration::ZERO,
        };
        assert!(matches!(
            next(Verb::Start, MachineState::ShutOff, accepted),
            Step::Fail(_)
        ));
    }
}
