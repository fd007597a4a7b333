//! Raises the process's limit of open files: each connection needs one file, and most systems start a program with a
//! limit of 1024.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::config::MAX_CONNECTIONS;

/// Number of open files for purposes other than client connections: the bus, the health listener, the runtime.
const OTHERS: u64 = 128;

/// Raises the soft limit of open files to the hard limit. The low default protects programs that use select(2), which
/// cannot handle file descriptors above 1023; the gateway does not use select(2).
pub(crate) fn allow(connections: usize) {
    let most = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "raising the limit of open files failed; the default limit stays in effect");
    }
    let needed = u64::try_from(connections)
        .unwrap_or(u64::MAX)
        .saturating_add(OTHERS);
    if let Some(most) = most.filter(|&most| most < needed) {
        let setting = MAX_CONNECTIONS.name;
        warn!(
            most,
            connections,
            "the open-file limit of this process is too low for {setting}; connections that exceed the open-file limit will wait"
        );
    }
}
