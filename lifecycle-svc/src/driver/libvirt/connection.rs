//! Connection to a libvirt daemon, opened on first use and reopened after it has failed.

use std::{
    fmt,
    sync::{Arc, Mutex, Once, PoisonError},
    thread,
    time::Duration,
};

use tracing::{debug, info, warn};
use virt::{
    connect::Connect,
    error::{Error, clear_error_callback},
    event::{event_register_default_impl, event_run_default_impl},
};

/// Interval and number of keep-alive messages: a host that answers none of them counts as dead, and calls to it fail.
const KEEPALIVE_SECONDS: i32 = 5;
const KEEPALIVE_COUNT: u32 = 3;

/// Why a libvirt call failed.
pub(super) enum CallError {
    /// The connection to libvirt could not be opened, or failed during the call.
    Lost(Error),
    /// libvirt answered the call with an error.
    Refused(Error),
}

/// The connection to one hypervisor, shared by all calls to it.
pub(super) struct Shared {
    uri: String,
    open: Mutex<Option<Arc<Open>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl Shared {
    pub(super) fn new(uri: String) -> Self {
        start_event_loop();
        Self {
            uri,
            open: Mutex::new(None),
        }
    }

    /// Calls libvirt and blocks the thread until it answers.
    pub(super) fn call<T>(&self, work: impl FnOnce(&Connect) -> Result<T, Error>) -> Result<T, CallError> {
        let open = self.connect().map_err(CallError::Lost)?;
        work(&open.0).map_err(|error| {
            if open.is_alive() {
                CallError::Refused(error)
            } else {
                CallError::Lost(error)
            }
        })
    }

    /// Returns the open connection, or opens one. Callers that wait here block only threads of this hypervisor.
    fn connect(&self) -> Result<Arc<Open>, Error> {
        let mut slot = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = slot.as_ref().filter(|open| open.is_alive()) {
            return Ok(Arc::clone(open));
        }
        if slot.take().is_some() {
            warn!(uri = %self.uri, "libvirt connection lost; reconnecting");
        }
        let connect = Connect::open(Some(&self.uri))?;
        // `set_keep_alive` fails for libvirt's test driver, which runs in this process and needs no keep-alive.
        if let Err(error) = connect.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT) {
            debug!(uri = %self.uri, %error, "libvirt does not support keep-alive messages on this connection");
        }
        info!(uri = %self.uri, "connected to libvirt");
        let open = Arc::new(Open(connect));
        *slot = Some(Arc::clone(&open));
        Ok(open)
    }
}

/// An open connection that is closed when dropped; libvirt's [`Connect`] does not close itself.
struct Open(Connect);

impl Open {
    fn is_alive(&self) -> bool {
        self.0.is_alive().unwrap_or(false)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Err(error) = self.0.close() {
            debug!(%error, "closing the libvirt connection failed");
        }
    }
}

/// Starts libvirt's event loop, without which libvirt does not detect a dead or frozen host. It must run before the
/// first connection is opened.
fn start_event_loop() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // Remove libvirt's default error callback, which prints every error to standard error in its own format.
        clear_error_callback();
        if let Err(error) = event_register_default_impl() {
            warn!(%error, "registering the libvirt event loop failed; hanging hosts are detected only by timeouts");
            return;
        }
        let spawned = thread::Builder::new()
            .name("libvirt-events".to_owned())
            .spawn(|| {
                loop {
                    if let Err(error) = event_run_default_impl() {
                        warn!(%error, "libvirt event loop failed; retrying");
                        thread::sleep(Duration::from_secs(1));
                    }
                }
            });
        if let Err(error) = spawned {
            warn!(%error, "starting the libvirt event loop thread failed");
        }
    });
}
