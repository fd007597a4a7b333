//! Tests real agents on this machine with a bus that is unreachable, full, or returns after an agent was killed: every
//! sampled row must be stored exactly once.

use testkit::{PATIENCE, Program, Replica, Stack, StackBuilder, eventually};

use crate::ingest_support::{Publisher, Rows, count, metric, outage, stack};

/// Agents that log what they sample.
fn agents(number: usize) -> StackBuilder {
    stack()
        .replicas(Program::Agent, number)
        .set(Program::Agent, "VMWATCH_LOG", "info,agent::ship=trace")
        .set(Program::Agent, "VMWATCH_LOG_FORMAT", "json")
}

async fn spools(agent: &Replica, parts: f64) {
    eventually("samples wait on disk", PATIENCE + outage(), async || {
        let waiting = metric(agent, "vmwatch_agent_spool_parts").await;
        (waiting >= parts).then_some(()).ok_or(format!("{waiting}"))
    })
    .await;
}

/// Waits until the spool is empty, then ends the agent, which sends its last sample.
async fn sends_everything(agent: &Replica) {
    eventually(
        "nothing waits on disk",
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
    eventually("rows of the agents are stored", PATIENCE, async || {
        let stored = count(&stack.database).await?;
        (stored > 0).then_some(()).ok_or("none".to_owned())
    })
    .await;
}

#[tokio::test]
async fn stores_all_samples_of_agents_after_nats_outage() {
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
async fn stores_spool_of_killed_agent() {
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

/// A stream of the smallest size is full while no service stores samples: acknowledged samples stay in the stream, and
/// refused samples stay with the agent.
#[tokio::test]
async fn stores_all_samples_after_full_stream() {
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
    assert!(taken > 10, "{taken} samples of 15 KB");
    spools(agent, 3.0).await;
    assert!(agent.process.log().contains("the stream of samples is full"));

    metrics.restart().await;
    sends_everything(agent).await;
    publisher.publish_many(10).await;
    let mut rows = publisher.rows;
    rows.add_witnessed(&agent.process);
    rows.settle("a full stream", &stack).await;
}
