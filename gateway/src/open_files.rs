//! Raises the limit of open files: each connection is one, and most systems start a program with a limit of 1024.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::config::MAX_CONNECTIONS;

/// Files other than client connections: the bus, the health listener, the runtime.
const OTHERS: u64 = 128;

/// Raises the soft limit to the hard one. The low soft limit protects programs that use select(2), which fails beyond
/// 1024.
pub(crate) fn allow(connections: usize) {
    let most = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "raising the limit of open files failed");
    }
    let needed = u64::try_from(connections)
        .unwrap_or(u64::MAX)
        .saturating_add(OTHERS);
    if let Some(most) = most.filter(|&most| most < needed) {
        let setting = MAX_CONNECTIONS.name;
        warn!(
            most,
            connections, "limit of open files is too low for {setting}; further connections will wait"
        );
    }
}
