//! Browser test of the marks on charts, and of what changed between two moments.

use testkit::{MACHINES, Stack, no_requests, run_in_browser};
use vmwatch_api::{metrics::ProcessSample, time::unix_millis};

use crate::{
    history_support::{MINUTE, SECOND, stored},
    rest::client::{self, process, publish, sample},
};

/// The age of each sample in minutes, and for how many minutes the VM and its agent had run by now.
const SAMPLES: [(u64, u64, u64); 4] = [(50, 55, 54), (29, 30, 29), (15, 30, 29), (0, 30, 10)];

/// Publishes samples of a VM that was rebooted. Its processes changed later. Returns the time of the last one.
async fn publish_history(stack: &Stack, vm: &str) -> u64 {
    let now = unix_millis() / SECOND * SECOND;
    for (age, boot, agent) in SAMPLES {
        let mut sample = sample(vm, now - age * MINUTE, 20.0);
        let booted = now - boot * MINUTE;
        let mut processes = vec![
            process("systemd", 1, 0.0, booted),
            process("vmwatch-agent", 300, 1.0, now - agent * MINUTE),
        ];
        processes.extend(workload(age, now, booted));
        sample.processes = processes;
        publish(stack, &sample).await;
    }
    stored(stack).await;
    now
}

/// The processes of a sample of this age in minutes. A job ran only before the reboot, and a backup only after it; in
/// the end the web server uses more, and a busy process runs instead of the backup.
fn workload(age: u64, now: u64, booted: u64) -> [ProcessSample; 2] {
    let web = |cpu_util| process("nginx", 400, cpu_util, booted);
    match age {
        0 => [web(50.0), process("burner", 500, 99.0, now - 5 * MINUTE)],
        50 => [web(2.0), process("job", 450, 1.0, booted)],
        _ => [web(2.0), process("backup", 450, 1.0, booted)],
    }
}

#[tokio::test]
async fn browser_shows_marks_and_what_changed() {
    let stack = client::stack().start().await;
    let vm = MACHINES[0].0;
    run_in_browser(
        &stack,
        "changes",
        &[("VMWATCH_PAGE_VM", vm)],
        async |demand| match demand {
            "report" => publish_history(&stack, vm).await.to_string(),
            other => no_requests(other).await,
        },
    )
    .await;
}
