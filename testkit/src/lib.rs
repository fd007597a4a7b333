//! The harness of the end-to-end tests. It runs a complete vmwatch of real processes, on free ports and in a temporary
//! folder.
//!
//! A [`Stack`] consists of NATS, a database and any number of replicas of each program. All of them end with the test,
//! even if the test is killed. Replicas can be killed, stopped, frozen and restarted. The harness waits for conditions
//! with [`eventually`] and never for a fixed time.
//!
//! The programs of vmwatch run as a [`Process`]. NATS and the database run as a [`Server`], which is either a process
//! or a container. `server.rs` selects one of the two; the tests do not depend on the choice.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a panic in the harness fails the test with its message"
)]

mod agents;
mod alertmanager;
mod browser;
mod cli;
mod client;
pub mod cloud;
mod container;
mod database;
mod figures;
mod libvirtd;
mod mail_server;
mod mongo_proxy;
mod nats;
mod nats_proxy;
mod ports;
mod process;
mod secrets;
mod server;
mod stack;
mod terminal;
mod tools;
pub mod webhooks;

use std::time::{Duration, Instant};

pub use agents::agent_record;
pub use alertmanager::Alertmanager;
pub use browser::{no_requests, run_in_browser};
pub use cli::Cli;
pub use client::{Answer, Gateway, codes, failure};
pub use container::Container;
pub use database::Database;
pub use figures::figure;
pub use libvirtd::{Libvirtd, NOBODY};
pub use mail_server::MailServer;
pub use mongo_proxy::{Inserts, MongoProxy};
pub use nats::Nats;
pub use nats_proxy::NatsProxy;
pub use ports::free_port;
pub use process::{Process, Spec};
pub use secrets::Secrets;
pub use server::Server;
pub use stack::{
    ADMIN, CLOCK_FILE, MACHINES, OPERATOR_USER, Power, Program, Replica, SETUP_USER, Stack, StackBuilder,
    THIS_MACHINE,
};
pub use terminal::Terminal;
pub use tools::{fake_time_library, nats_server, nginx, node_and_chromium, prometheus, schemathesis};

/// Default time limit for a condition to become true. It is far longer than a busy two-core machine needs, so only
/// a real fault exceeds it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Retries the probe until it succeeds. After the deadline, fails the test with the probe's last error.
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
            "{what}: timed out after {deadline:?}; last error: {reason}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
