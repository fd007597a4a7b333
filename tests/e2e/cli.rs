//! Tests the command line `vmwatch` with the real gateway.

mod actions;
mod commands;
mod failures;
mod login;
mod picture;
mod tokens;
mod top;

use testkit::{Cli, PATIENCE, Stack, eventually};
use vmwatch_api::{Role, Scope, metrics::Sample, time::unix_millis};

use crate::rest::client::{Api, process, publish, sample};

/// A user of the command line with a session of this role.
async fn user(stack: &Stack, role: Role) -> Cli {
    Cli::with_token(stack.gateway(0), &stack.session(role, Scope::All).await)
}

/// A sample of `vm-1` with a process for each name, which are busier in this order.
fn running(at_ms: u64, names: &[&str]) -> Sample {
    let mut sample = sample("vm-1", at_ms, 40.0);
    let numbered = (100_u32..).zip(names.iter().rev());
    let processes = numbered.map(|(pid, name)| process(name, pid, f64::from(pid - 99), at_ms / 1000 * 1000));
    sample.processes = processes.collect();
    sample
}

/// Publishes the samples, oldest first, and waits until the newest is stored. Returns a client of the REST API.
async fn stored(stack: &Stack, samples: &[Sample]) -> Api {
    let api = Api::with(stack, Role::Viewer, Scope::All).await;
    for sample in samples {
        publish(stack, sample).await;
    }
    let newest = samples.last().and_then(|sample| sample.processes.last()).unwrap();
    eventually("the newest process table is stored", PATIENCE, async || {
        let reply = api.get("/vms/vm-1/processes").await;
        let found = reply
            .body
            .contains(&format!("\"name\":{}", serde_json::json!(newest.cmd)));
        found.then_some(()).ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    api
}

/// The time that many seconds ago, at a whole second.
fn ago(seconds: u64) -> u64 {
    (unix_millis() / 1000 - seconds) * 1000
}
