//! The harness of the end-to-end tests: a whole vmwatch of real processes, on free ports and in a temporary folder.
//!
//! A [`Stack`] is NATS, the database and any number of replicas of each program, all started by the test and all
//! ended with it, whatever way it ends. Each replica can be killed, stopped, frozen and started again. Everything
//! waits by [`eventually`], for a condition, and nothing for a fixed time.
//!
//! [`Process`] is how anything of ours is started. NATS and the database are a [`Server`], which is a process or a
//! container: the test says nothing of it, `server.rs` chooses.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "what fails in the harness fails the test, and the text says why"
)]

mod client;
mod container;
mod database;
mod figures;
mod libvirtd;
mod mongo_proxy;
mod nats;
mod ports;
mod process;
mod secrets;
mod server;
mod stack;
mod tools;

use std::time::{Duration, Instant};

pub use client::{Answer, Gateway, codes, failure};
pub use container::Container;
pub use database::Database;
pub use figures::figure;
pub use libvirtd::Libvirtd;
pub use mongo_proxy::{Inserts, MongoProxy};
pub use nats::Nats;
pub use ports::free_port;
pub use process::{Process, Spec};
pub use secrets::Secrets;
pub use server::Server;
pub use stack::{
    ADMIN, GUEST, MACHINES, OPERATOR_USER, Power, Program, Replica, SETUP_USER, Stack, StackBuilder,
    THIS_MACHINE,
};
pub use tools::{nats_server, node_and_chromium, schemathesis};

/// How long anything may take to happen that has no deadline of its own: far above what a busy machine of two cores
/// needs, so that only a real fault reaches it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the probe answers well, or fails the test with the probe's last reason.
pub async fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let end = Instant::now() + deadline;
    loop {
        let reason = match probe().await {
            Ok(value) => return value,
            Err(reason) => reason,
        };
        assert!(
            Instant::now() < end,
            "{what}: not within {deadline:?}; the last try: {reason}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
