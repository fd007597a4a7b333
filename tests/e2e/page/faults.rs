//! VMs whose agents have faults or are outdated, for browser tests.

use std::time::Duration;

use testkit::{PATIENCE, Stack, eventually};
use vmwatch_api::{agents::status_subject, time::unix_millis};

use crate::{
    history_support::{DAY, MINUTE, publish_by_clock},
    rest::client::{process, publish, sample},
};

/// Number of messages that the VM with a wrong clock sends at once. Its limit is one per second, with bursts of ten.
const MESSAGES: u32 = 40;

/// The name of a process, as agents report names that are longer than those of the kernel.
const LONG_NAME: &str =
    "unattended-upgrade-shutdown-of-this-machine-and-a-name-that-is-far-longer-than-the-column";

/// Publishes samples of a VM whose clock is ahead and that is above its limit, of one whose samples are older than the
/// retention, and the status of an old agent.
pub(super) async fn publish_faults(stack: &Stack) {
    const AHEAD: u64 = 91 * MINUTE;
    let now = unix_millis();
    for _ in 0..MESSAGES {
        let ahead = sample("faulty", unix_millis() + AHEAD, 12.0);
        publish_by_clock(stack, &ahead, i64::try_from(AHEAD).unwrap()).await;
    }
    publish(stack, &sample("expired", now, 34.0)).await;
    let mut outdated = sample("outdated", now, 56.0);
    // A process that has ended, whose name is longer than the column is wide.
    let mut process = process(LONG_NAME, 411, 7.5, now - MINUTE);
    process.shutdown_time = Some(process.running_time + 30.0);
    outdated.processes.push(process);
    publish(stack, &outdated).await;
    publish(stack, &sample("expired", now - 365 * DAY, 34.0)).await;
    let subject = status_subject(&"outdated".parse().unwrap());
    let client = stack.bus.client_for_tests();
    eventually("the status is stored", PATIENCE, async || {
        let status = r#"{"version":"0.0.9","architecture":"x86_64","kernel":"6.1.0-18-amd64","distribution":"Debian GNU/Linux 12 (bookworm)"}"#;
        let answer = client.request(subject.clone(), status.into());
        let answer = tokio::time::timeout(Duration::from_secs(1), answer).await;
        let answer = answer.map_err(|error| error.to_string())?;
        answer.map(drop).map_err(|error| error.to_string())
    })
    .await;
}
