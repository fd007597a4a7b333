//! Tests real agents on this machine while NATS is unreachable or its stream is full, and when NATS returns after an
//! agent was killed. Every row that an agent sampled must be stored exactly once.

use testkit::{PATIENCE, Program, Replica, Stack, StackBuilder, eventually};

use crate::ingest_support::{Publisher, Rows, count, metric, outage, stack};

/// Builds a test environment whose agents log each sample that they take.
fn agents(number: usize) -> StackBuilder {
    stack()
        .replicas(Program::Agent, number)
        .set(Program::Agent, "VMWATCH_LOG", "info,agent::ship=trace")
        .set(Program::Agent, "VMWATCH_LOG_FORMAT", "json")
}

async fn spools(agent: &Replica, parts: f64) {
    eventually("the agent spools samples", PATIENCE + outage(), async || {
        let waiting = metric(agent, "vmwatch_agent_spool_parts").await;
        (waiting >= parts).then_some(()).ok_or(format!("{waiting}"))
    })
    .await;
}

/// Waits until the agent's spool is empty and stops the agent, which sends its last sample.
async fn sends_everything(agent: &Replica) {
    eventually(
        "the agent's spool is empty",
        PATIENCE + outage(),
        async || match metric(agent, "vmwatch_agent_spool_parts").await {
            0.0 => Ok(()),
            waiting => Err(format!("{waiting}")),
        },
    )
    .await;
    assert!(metric(agent, "vmwatch_agent_parts_dropped_total").await < 1.0);
    let status = agent.process.terminate(PATIENCE).await;
    assert!(status.success(), "{status}");
}

async fn stores_rows(stack: &Stack) {
    eventually("rows of every agent are stored", PATIENCE, async || {
        let stored = count(&stack.database).await?;
        (stored > 0).then_some(()).ok_or("none".to_owned())
    })
    .await;
}

#[tokio::test]
async fn agents_lose_no_sample_in_a_nats_outage() {
    let stack = agents(3).start().await;
    let agents: Vec<_> = (0..3).map(|index| stack.replica(Program::Agent, index)).collect();
    stores_rows(&stack).await;

    stack.nats.server.kill9();
    tokio::time::sleep(outage()).await;
    for agent in &agents {
        spools(agent, 3.0).await;
    }
    stack.nats.restart().await;

    let mut rows = Rows::default();
    for agent in agents {
        sends_everything(agent).await;
        rows.add_witnessed(&agent.process);
    }
    rows.settle("NATS unreachable, three agents", &stack).await;
}

#[tokio::test]
async fn restarted_agent_sends_the_spool_of_its_killed_predecessor() {
    let stack = agents(1).start().await;
    let agent = stack.replica(Program::Agent, 0);
    stores_rows(&stack).await;
    stack.nats.server.kill9();
    spools(agent, 4.0).await;
    agent.process.kill9();
    stack.nats.restart().await;
    agent.restart().await;
    sends_everything(agent).await;

    let mut rows = Rows::default();
    rows.add_witnessed(&agent.process);
    rows.settle("agent killed with a spool", &stack).await;
}

/// The stream has the smallest size limit and becomes full, because metrics-svc is stopped. The stream keeps the
/// samples that it has acknowledged, and the agent's spool keeps the samples that the stream refuses.
#[tokio::test]
async fn agents_lose_no_sample_while_the_stream_is_full() {
    let stack = agents(1)
        .set(Program::Metrics, "VMWATCH_STREAM_BYTES", "1MiB")
        .start()
        .await;
    let (agent, metrics) = (
        stack.replica(Program::Agent, 0),
        stack.replica(Program::Metrics, 0),
    );
    stores_rows(&stack).await;
    let status = metrics.process.terminate(PATIENCE).await;
    assert!(status.success(), "{status}");

    let mut publisher = Publisher::new(&stack, "vm-1", 100);
    let taken = publisher.publish_until_full().await;
    assert!(taken > 10, "the stream accepted only {taken} samples of 15 KB");
    spools(agent, 3.0).await;
    assert!(agent.process.log().contains("the sample stream is full"));

    metrics.restart().await;
    sends_everything(agent).await;
    publisher.publish_many(10).await;
    let mut rows = publisher.rows;
    rows.add_witnessed(&agent.process);
    rows.settle("a full stream", &stack).await;
}
