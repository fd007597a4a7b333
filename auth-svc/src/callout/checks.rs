//! The queue of keys whose connections must be checked.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc, mpsc::error::TrySendError};
use vmwatch_api::enrollment::AgentKey;

/// Maximum number of keys whose connections wait to be checked. If there are more, all connections are checked.
const MAX_CHECKS: usize = 1024;

/// Takes keys whose connections must be checked. They are dropped if there is no callout, and by commands.
#[derive(Debug, Clone)]
pub(crate) struct Checks {
    keys: mpsc::Sender<AgentKey>,
    too_many: Arc<Notify>,
}

/// Receives the keys of [`Checks`].
#[derive(Debug)]
pub(crate) struct CheckQueue {
    pub(crate) keys: mpsc::Receiver<AgentKey>,
    /// Notified if the connections of all keys must be checked.
    pub(super) too_many: Arc<Notify>,
}

impl Checks {
    pub(crate) fn new() -> (Self, CheckQueue) {
        let (sender, keys) = mpsc::channel(MAX_CHECKS);
        let too_many = Arc::new(Notify::new());
        let checks = Self {
            keys: sender,
            too_many: Arc::clone(&too_many),
        };
        (checks, CheckQueue { keys, too_many })
    }

    /// Has the connections of this key checked.
    pub(crate) fn request(&self, key: AgentKey) {
        if let Err(TrySendError::Full(_)) = self.keys.try_send(key) {
            self.too_many.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use nkeys::KeyPair;

    use super::*;

    #[test]
    fn all_connections_are_checked_if_too_many_keys_wait() {
        let (checks, queue) = Checks::new();
        let key: AgentKey = KeyPair::new_user().public_key().parse().unwrap();
        for _ in 0..MAX_CHECKS {
            checks.request(key.clone());
        }
        let notified = || futures::FutureExt::now_or_never(queue.too_many.notified()).is_some();
        assert!(!notified());
        checks.request(key);
        assert!(notified());
    }
}
