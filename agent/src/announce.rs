//! Announces the agent: publishes its status message after each connection, once more within a minute, and about once per
//! hour.

use std::{path::Path, time::Duration};

use async_nats::HeaderMap;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};
use vmwatch_api::{
    InstanceId,
    agents::{AgentStatus, AgentText, status_subject},
};
use vmwatch_bus::Bus;
use vmwatch_service::jitter::jittered;

use crate::sample::Roots;

/// Longest time between two status messages while the connection lasts; the shortest is three quarters of it.
const INTERVAL: Duration = Duration::from_secs(4000);
/// Longest time from the status message after a connection to the next one; the shortest is half of it. The first one is lost
/// if metrics-svc restarts at that time, for example together with NATS.
const SECOND_AFTER: Duration = Duration::from_mins(1);
/// Time limit for the client to accept a message.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Publishes the status until the task is dropped. The message is not acknowledged: if it is lost, or if the NATS user may not
/// publish it, only the status of this VM is out of date.
pub(crate) async fn run(bus: Bus, instance_id: InstanceId, roots: Roots) {
    let mut connected = bus.reconnections();
    let subject = status_subject(&instance_id);
    let mut wait = jittered(SECOND_AFTER, 0.5);
    loop {
        if bus.is_connected() {
            publish(&bus, &subject, &read_status(&roots)).await;
        }
        tokio::select! {
            changed = connected.changed() => {
                if changed.is_err() {
                    return;
                }
                wait = jittered(SECOND_AFTER, 0.5);
            }
            () = sleep(wait) => wait = jittered(INTERVAL, 0.75),
        }
    }
}

async fn publish(bus: &Bus, subject: &str, status: &AgentStatus) {
    let Ok(json) = serde_json::to_vec(status) else {
        return;
    };
    let publishing = bus.publish(subject.to_owned(), HeaderMap::new(), json.into());
    match timeout(SEND_LIMIT, publishing).await {
        Ok(Ok(())) => debug!("published the status"),
        Ok(Err(error)) => warn!(%error, "the status was not published"),
        Err(_) => warn!("publishing the status timed out"),
    }
}

/// Reads the status; files that cannot be read leave a value absent.
fn read_status(roots: &Roots) -> AgentStatus {
    let read = |folder: &Path, name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let line = |name: &str| AgentText::shortened(&read(&roots.proc, name)?);
    let release = read(&roots.root, "etc/os-release").or_else(|| read(&roots.root, "usr/lib/os-release"));
    AgentStatus {
        version: known(env!("CARGO_PKG_VERSION")),
        architecture: known(std::env::consts::ARCH),
        kernel: line("sys/kernel/osrelease"),
        distribution: release.and_then(|text| AgentText::shortened(&pretty_name(&text)?)),
        boot_id: line("sys/kernel/random/boot_id"),
    }
}

fn known(text: &str) -> AgentText {
    AgentText::shortened(text).unwrap_or_default()
}

/// The value of `PRETTY_NAME`, without quotes.
fn pretty_name(os_release: &str) -> Option<String> {
    let line = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(line.trim().trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn status_has_kernel_distribution_and_boot_and_lacks_what_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let roots = Roots {
            proc: folder.path().join("proc"),
            sys: folder.path().join("sys"),
            root: folder.path().to_owned(),
        };
        let empty = read_status(&roots);
        assert_eq!(
            (&empty.kernel, &empty.distribution, &empty.boot_id),
            (&None, &None, &None)
        );
        assert_eq!(empty.version.as_str(), env!("CARGO_PKG_VERSION"));

        fs::create_dir_all(roots.proc.join("sys/kernel/random")).unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        fs::write(roots.proc.join("sys/kernel/osrelease"), "6.1.0-18-amd64\n").unwrap();
        fs::write(roots.proc.join("sys/kernel/random/boot_id"), "1b4e28ba\n").unwrap();
        let text = "NAME=\"Debian\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n";
        fs::write(folder.path().join("etc/os-release"), text).unwrap();
        let status = read_status(&roots);
        let texts = [status.kernel, status.distribution, status.boot_id].map(Option::unwrap);
        let texts = texts.each_ref().map(AgentText::as_str);
        assert_eq!(
            texts,
            ["6.1.0-18-amd64", "Debian GNU/Linux 12 (bookworm)", "1b4e28ba"]
        );
    }
}
