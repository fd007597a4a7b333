//! Each connection is an open file, and most systems start a program with 1024 of them.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::config::MAX_CONNECTIONS;

/// Beside the connections: the bus, the health listener, the runtime's own.
const OTHERS: u64 = 128;

/// Raises the soft limit to the hard one. The low soft limit is for programs that use select(2), which fails beyond it.
pub(crate) fn allow(connections: usize) {
    let most = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "the limit of open files stays as it is");
    }
    let needed = u64::try_from(connections)
        .unwrap_or(u64::MAX)
        .saturating_add(OTHERS);
    if let Some(most) = most.filter(|&most| most < needed) {
        let setting = MAX_CONNECTIONS.name;
        warn!(
            most,
            connections, "the system allows fewer open files than {setting} needs: connections beyond wait"
        );
    }
}
