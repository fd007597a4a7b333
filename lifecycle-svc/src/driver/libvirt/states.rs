//! Converts the states of libvirt's VMs, and their reasons.
//!
//! A VM that was saved to disk (`managedsave`) is off, because nothing of it is in memory; a start restores it.

use virt::{domain::Domain, error::Error, sys};
use vmwatch_api::lifecycle::MachineState;

pub(super) fn state_of(domain: &Domain) -> Result<MachineState, Error> {
    let (state, reason) = domain.get_state()?;
    Ok(converted(state, reason))
}

/// Converts the state and its reason, as libvirt reports them.
pub(super) fn converted(state: sys::virDomainState, reason: i32) -> MachineState {
    let reason = u32::try_from(reason).unwrap_or_default();
    match state {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => MachineState::Running,
        sys::VIR_DOMAIN_PAUSED if reason == sys::VIR_DOMAIN_PAUSED_STARTING_UP => MachineState::Starting,
        // Resuming a crashed guest would not repair it.
        sys::VIR_DOMAIN_PAUSED if reason == sys::VIR_DOMAIN_PAUSED_CRASHED => MachineState::Crashed,
        sys::VIR_DOMAIN_PAUSED => MachineState::Paused,
        sys::VIR_DOMAIN_SHUTDOWN => MachineState::ShuttingDown,
        sys::VIR_DOMAIN_SHUTOFF => MachineState::ShutOff,
        sys::VIR_DOMAIN_CRASHED => MachineState::Crashed,
        sys::VIR_DOMAIN_PMSUSPENDED => MachineState::Suspended,
        _ => MachineState::Unknown,
    }
}

/// libvirt's reason for the state of a VM, if it matters to users.
pub(super) fn reason_of((state, reason): (sys::virDomainState, i32)) -> Option<String> {
    let words = match (state, u32::try_from(reason).ok()?) {
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_CRASHED)
        | (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_CRASHED) => "the VM crashed",
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_FAILED) => "the VM failed to start",
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN) => "the guest shut down",
        (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_DESTROYED) => "the VM's power was cut",
        (sys::VIR_DOMAIN_CRASHED, sys::VIR_DOMAIN_CRASHED_PANICKED) => "the guest's kernel panicked",
        (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_IOERROR) => "the VM was paused by a disk error",
        _ => return None,
    };
    Some(words.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirt_states_and_reasons_are_converted() {
        use MachineState as Is;
        for (state, reason, expected, words) in [
            (sys::VIR_DOMAIN_NOSTATE, 0, Is::Unknown, None),
            (
                sys::VIR_DOMAIN_RUNNING,
                sys::VIR_DOMAIN_RUNNING_BOOTED,
                Is::Running,
                None,
            ),
            (sys::VIR_DOMAIN_BLOCKED, 0, Is::Running, None),
            (
                sys::VIR_DOMAIN_PAUSED,
                sys::VIR_DOMAIN_PAUSED_USER,
                Is::Paused,
                None,
            ),
            (
                sys::VIR_DOMAIN_PAUSED,
                sys::VIR_DOMAIN_PAUSED_STARTING_UP,
                Is::Starting,
                None,
            ),
            (
                sys::VIR_DOMAIN_PAUSED,
                sys::VIR_DOMAIN_PAUSED_IOERROR,
                Is::Paused,
                Some("the VM was paused by a disk error"),
            ),
            (
                sys::VIR_DOMAIN_PAUSED,
                sys::VIR_DOMAIN_PAUSED_CRASHED,
                Is::Crashed,
                Some("the VM crashed"),
            ),
            (sys::VIR_DOMAIN_SHUTDOWN, 0, Is::ShuttingDown, None),
            (
                sys::VIR_DOMAIN_SHUTOFF,
                sys::VIR_DOMAIN_SHUTOFF_SAVED,
                Is::ShutOff,
                None,
            ),
            (
                sys::VIR_DOMAIN_CRASHED,
                sys::VIR_DOMAIN_CRASHED_PANICKED,
                Is::Crashed,
                Some("the guest's kernel panicked"),
            ),
            (sys::VIR_DOMAIN_PMSUSPENDED, 0, Is::Suspended, None),
            (99, 0, Is::Unknown, None),
        ] {
            let reason = i32::try_from(reason).unwrap();
            assert_eq!(converted(state, reason), expected, "{state} {reason}");
            assert_eq!(reason_of((state, reason)).as_deref(), words, "{state} {reason}");
        }
    }
}
