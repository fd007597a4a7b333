//! Tests samples of one VM that exceed the VM's rate limit: they wait in the stream and then in the agent's spool, and
//! none is lost.

use std::{
    env, fs,
    time::{Duration, SystemTime},
};

use mongodb::bson::doc;
use testkit::{PATIENCE, Program, THIS_MACHINE, eventually, figure};
use tokio::time::Instant;
use vmwatch_api::time::CreateDate;
use vmwatch_blocks::Encoder;
use vmwatch_service::config::UTC_OFFSET;

use crate::{
    ingest_support::{Publisher, Rows, metric, stack},
    rows::blocks,
};

/// The default of `VMWATCH_VM_MESSAGES_PER_SECOND`. A burst may contain ten times as many messages.
const RATE: u32 = 50;

/// Returns the number of sample parts in the spool. A full spool of 64 MiB holds 16,384 small parts; under `./dev soak`
/// the test uses nearly as many.
fn parts() -> u32 {
    if env::var_os("VMWATCH_TEST_SOAK").is_some() {
        16_000
    } else {
        750
    }
}

#[tokio::test]
async fn agent_sends_a_long_spool_without_loss() {
    let spool = tempfile::tempdir().unwrap();
    let share = if parts() > 1000 { "250" } else { "100" };
    let stack = stack()
        .replicas(Program::Agent, 0)
        .set(Program::Metrics, "VMWATCH_STREAM_MESSAGES_PER_VM", share)
        .set(
            Program::Metrics,
            "VMWATCH_VM_MESSAGES_PER_SECOND",
            &RATE.to_string(),
        )
        .set(Program::Metrics, "VMWATCH_VM_ROWS_PER_SECOND", "1000")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut rows = Rows::default();
    let mut encoder = Encoder::new().unwrap();
    let mut taken = Publisher::new(&stack, THIS_MACHINE, 2);
    for sequence in 0..parts() {
        let mut sample = taken.sample();
        // The agent took one sample every ten seconds, and the last sample is current.
        let at = SystemTime::now() - Duration::from_secs(10) * (parts() - sequence);
        sample.create_date = CreateDate::at(at, UTC_OFFSET.default.parse().unwrap());
        let part = agent::split(sample.clone(), &mut encoder).unwrap().remove(0);
        fs::write(spool.path().join(format!("{sequence:020}.sample")), part.body).unwrap();
        rows.add(&sample);
        if sequence == 0 {
            // The agent was killed after it had sent this part, and before it removed the file.
            taken.send(&sample).await.unwrap();
        }
    }

    let began = Instant::now();
    let spool_dir = spool.path().display().to_string();
    let settings = [
        ("VMWATCH_AGENT_SPOOL_DIR", spool_dir.as_str()),
        ("VMWATCH_AGENT_PROCESSES", "top:2"),
        ("VMWATCH_LOG", "info,agent::ship=trace"),
        ("VMWATCH_LOG_FORMAT", "json"),
    ];
    let agent = stack.start_agent(&settings).await;
    let share_is_full = "this VM has the maximum number of messages in the sample stream";
    eventually(
        "the VM has the maximum number of messages in the stream",
        PATIENCE,
        async || {
            let log = agent.process.log();
            log.contains(share_is_full).then_some(()).ok_or(log)
        },
    )
    .await;
    let mut other = Publisher::new(&stack, "vm-2", 2);
    other.publish().await;
    stored(&stack, "vm-2").await;
    assert!(
        metric(&agent, "vmwatch_agent_spool_parts").await > 0.0,
        "the spool is not empty yet"
    );

    let limit = PATIENCE + Duration::from_secs(3) * parts() / RATE;
    eventually("the spool is empty", limit, async || {
        match metric(&agent, "vmwatch_agent_spool_parts").await {
            0.0 => Ok(()),
            waiting => Err(format!("{waiting} parts are left in the spool")),
        }
    })
    .await;
    figure("spool_drained_parts", parts().into());
    figure("spool_drained_seconds", began.elapsed().as_secs_f64());
    assert!(metric(metrics, "vmwatch_samples_above_rate_total").await > 0.0);
    assert!(metric(&agent, "vmwatch_agent_parts_dropped_total").await < 1.0);
    let status = agent.process.terminate(PATIENCE).await;
    assert!(status.success(), "{status}");
    rows.add_witnessed(&agent.process);
    rows.absorb(other.rows);
    rows.settle("a long spool", &stack).await;
    // The agent logs the cause once, and not at each refused message.
    let log = agent.process.log();
    assert_eq!(log.matches(share_is_full).count(), 1, "{log}");
}

async fn stored(stack: &testkit::Stack, instance: &str) {
    let rows = blocks(&stack.database);
    eventually("a row of another VM is stored", PATIENCE, async || {
        let found = rows.count_documents(doc! { "instance_id": instance }).await;
        match found.map_err(|error| error.to_string())? {
            0 => Err("the row is missing".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
}
