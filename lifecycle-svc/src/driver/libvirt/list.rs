//! Lists the VMs of a libvirt connection with a few calls, however many VMs there are.
//!
//! All VMs in the list of a single state have that state. Only VMs in other states are asked for it one by one: paused
//! ones, because a VM that is being started is paused as well, and those whose state changed between the lists.

use std::collections::HashSet;

use uuid::Uuid;
use virt::{
    connect::Connect,
    domain::Domain,
    error::{Error, ErrorNumber},
    sys,
};
use vmwatch_api::lifecycle::MachineState;

use super::{labels::LabelReads, state_of};
use crate::driver::{Found, MAX_LISTED};

/// Lists the VMs, at most [`MAX_LISTED`], and reads the labels of some.
pub(super) fn read(connect: &Connect, label_reads: &LabelReads) -> Result<Vec<Found>, Error> {
    let states = States {
        running: in_state(connect, sys::VIR_CONNECT_LIST_DOMAINS_RUNNING)?,
        shut_off: in_state(connect, sys::VIR_CONNECT_LIST_DOMAINS_SHUTOFF)?,
    };
    // This list decides which VMs there are, because a VM that changes its state may be missing from the lists of single
    // states.
    let domains = connect.list_all_domains(0)?;
    let found = domains.iter().take(MAX_LISTED).filter_map(|domain| {
        let found = found(domain, &states).transpose()?;
        Some(found.map(|(uuid, found)| (uuid, domain, found)))
    });
    let found = found.collect::<Result<Vec<_>, _>>()?;
    let listed: Vec<_> = found.iter().map(|(uuid, domain, _)| (*uuid, *domain)).collect();
    let mut labels = label_reads.read(&listed);
    let found = found.into_iter().map(|(uuid, _, found)| Found {
        labels: labels.remove(&uuid),
        ..found
    });
    Ok(found.collect())
}

/// The VMs in states that need no further call.
struct States {
    running: HashSet<Uuid>,
    shut_off: HashSet<Uuid>,
}

impl States {
    /// The state of a VM; `None` if it must be read, because no list or more than one has the VM.
    fn get(&self, uuid: &Uuid) -> Option<MachineState> {
        match (self.running.contains(uuid), self.shut_off.contains(uuid)) {
            (true, false) => Some(MachineState::Running),
            (false, true) => Some(MachineState::ShutOff),
            _ => None,
        }
    }
}

/// The VMs in a state. Their UUIDs are part of libvirt's answer, so reading them takes no further call.
fn in_state(connect: &Connect, state: sys::virConnectListAllDomainsFlags) -> Result<HashSet<Uuid>, Error> {
    let domains = connect.list_all_domains(state)?;
    domains.iter().map(Domain::get_uuid).collect()
}

/// Reads the details of a listed VM; `None` if the VM was removed after it was listed. Any other error makes the whole
/// list fail, because a VM that is missing from the list counts as removed.
fn found(domain: &Domain, states: &States) -> Result<Option<(Uuid, Found)>, Error> {
    let read = || -> Result<_, Error> {
        let uuid = domain.get_uuid()?;
        let state = states.get(&uuid).map_or_else(|| state_of(domain), Ok)?;
        Ok((uuid, domain.get_name()?, state))
    };
    match read() {
        Ok((uuid, name, state)) => {
            let id = uuid.hyphenated().to_string().parse().ok();
            let found = id.map(|id| Found {
                id,
                name,
                state: state.into(),
                labels: None,
            });
            Ok(found.map(|found| (uuid, found)))
        }
        Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_vm_that_moved_between_lists_is_read() {
        let [running, shut_off, both, neither] = [1, 2, 3, 4].map(Uuid::from_u128);
        let states = States {
            running: [running, both].into(),
            shut_off: [shut_off, both].into(),
        };
        assert_eq!(states.get(&running), Some(MachineState::Running));
        assert_eq!(states.get(&shut_off), Some(MachineState::ShutOff));
        assert_eq!(states.get(&both), None);
        assert_eq!(states.get(&neither), None);
    }
}
