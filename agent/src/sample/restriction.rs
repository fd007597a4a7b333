//! Detects that the agent cannot see all processes of its VM.

use std::{fs, io::ErrorKind, path::Path};

use tracing::{info, warn};
use vmwatch_api::metrics::Restriction;

/// The name of the initial pid namespace, which is the same in all kernels (`PROC_PID_INIT_INO`).
const INITIAL_NAMESPACE: &[u8] = b"pid:[4026531836]";

/// Returns why processes are hidden from the agent; `None` if it sees all of them.
///
/// In each pid namespace the process with pid 1 exists as long as the namespace does. If the agent cannot read this
/// process, it cannot read those of other users either.
fn restriction(proc: &Path) -> Option<Restriction> {
    let namespace = fs::read_link(proc.join("self/ns/pid"));
    if namespace.is_ok_and(|name| name.as_os_str().as_encoded_bytes() != INITIAL_NAMESPACE) {
        return Some(Restriction::PidNamespace);
    }
    let error = fs::File::open(proc.join("1/stat")).err()?;
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied).then_some(Restriction::Hidepid)
}

/// The restriction that was last found. A change is logged.
#[derive(Debug, Default)]
pub(super) struct Restricted(Option<Restriction>);

impl Restricted {
    pub(super) fn check(&mut self, proc: &Path) -> Option<Restriction> {
        let found = restriction(proc);
        if found != self.0 {
            match found {
                Some(Restriction::Hidepid) => warn!(
                    "/proc hides processes from the agent, so their rows are missing; run the agent as root or with CAP_SYS_PTRACE, or mount /proc without `hidepid`"
                ),
                Some(Restriction::PidNamespace) => warn!(
                    "the agent runs in a pid namespace of its own and sees only the processes of that namespace; run it in the pid namespace of the VM"
                ),
                None => info!("the agent sees all processes again"),
            }
            self.0 = found;
        }
        found
    }
}
