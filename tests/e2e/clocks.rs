//! Tests wrong clocks. A service whose clock is wrong is not ready, so that it gets no requests that it would answer with 504.
//! A VM whose clock is wrong is shown as such, and samples that only arrive late are not.

use std::fs;

use testkit::{PATIENCE, Program, Stack, THIS_MACHINE, eventually, fake_time_library};
use vmwatch_api::{agents::AgentFault, time::unix_millis};
use vmwatch_blocks::Encoder;

use crate::{
    agent_faults::{faults, listed},
    history_support::{HOUR, MINUTE, SECOND, publish_by_clock, sample, stack},
    ingest_support::drained,
    rows::stored_vms,
};

#[tokio::test]
async fn service_with_wrong_clock_is_not_ready_and_reports_the_reason() {
    let library = fake_time_library().expect("`./dev test` installs libfaketime");
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let auth = stack.replica(Program::Auth, 0);
    auth.ready().await;
    let restart = |clock: &str| {
        auth.process.kill9();
        auth.process.set("LD_PRELOAD", &library.display().to_string());
        auth.process.set("FAKETIME", clock);
        auth.process.set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        auth.process.start_again();
    };
    restart("+10s");
    eventually(
        "the service reports that its clock is wrong",
        PATIENCE,
        async || {
            let reason = auth.readiness().await.err().ok_or("the service is ready")?;
            let is_reported = reason.contains("s ahead of the clock of NATS");
            is_reported.then_some(()).ok_or(reason)
        },
    )
    .await;
    restart("+0s");
    auth.ready().await;
}

/// The rows of a clock that is ahead are stored with their arrival as their date, so the newest row is right as soon as the
/// clock is.
#[tokio::test]
async fn guest_clock_that_is_8_hours_ahead_is_shown_until_it_is_set_back() {
    let stack = stack().start().await;
    let report = async |ahead_ms: u64, cpu_util: f64| {
        let sample = sample("vm-1", unix_millis() + ahead_ms, "+00:00", cpu_util);
        publish_by_clock(&stack, &sample, i64::try_from(ahead_ms).unwrap()).await;
        listed(&stack, "vm-1").await
    };
    let fault = eventually("the VM shows the wrong clock", PATIENCE, async || {
        let vm = report(8 * HOUR, 5.0).await?;
        let is_ahead = vm.sample.is_some_and(|sample| sample.at_ms > unix_millis());
        assert!(!is_ahead, "{vm:?}");
        vm.agent_faults.first().copied().ok_or(format!("{vm:?}"))
    })
    .await;
    let AgentFault::Clock { ahead_ms } = fault else {
        panic!("{fault:?}");
    };
    assert!((28_740_000..=28_800_000).contains(&ahead_ms), "{ahead_ms}");

    let vm = eventually("the fault ends", PATIENCE, async || {
        let vm = report(0, 7.0).await?;
        vm.agent_faults
            .is_empty()
            .then_some(vm.clone())
            .ok_or(format!("{vm:?}"))
    })
    .await;
    let newest = vm.sample.unwrap();
    assert_eq!(newest.values.cpu_util, Some(7.0), "the newest row is shown");
}

#[tokio::test]
async fn spool_that_is_sent_half_an_hour_late_shows_no_wrong_clock() {
    const PARTS: u64 = 20;
    let spool = tempfile::tempdir().unwrap();
    let stack = stack().replicas(Program::Agent, 0).start().await;
    let mut encoder = Encoder::new().unwrap();
    let began = unix_millis() - 30 * MINUTE;
    for sequence in 0..PARTS {
        let sample = sample(THIS_MACHINE, began + sequence * SECOND, "+00:00", 5.0);
        let part = agent::split(sample, &mut encoder).unwrap().remove(0);
        fs::write(spool.path().join(format!("{sequence:020}.sample")), part.body).unwrap();
    }
    // The agent adds only its first sample to the spooled ones.
    let folder = spool.path().display().to_string();
    let settings = [
        ("VMWATCH_AGENT_SPOOL_DIR", folder.as_str()),
        ("VMWATCH_AGENT_VM_INTERVAL", "1h"),
        ("VMWATCH_AGENT_PROCESS_INTERVAL", "1h"),
    ];
    let _agent = stack.start_agent(&settings).await;
    eventually("all spooled samples are stored", PATIENCE, async || {
        let stored = stored_vms(&stack.database).await.len() as u64;
        (stored >= PARTS).then_some(()).ok_or(format!("{stored}"))
    })
    .await;
    drained(&stack.bus).await;
    assert_eq!(faults(&stack, THIS_MACHINE).await, Ok(vec![]));
}
