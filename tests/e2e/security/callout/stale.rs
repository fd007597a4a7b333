//! Tests replicas of auth-svc whose copy of the agents is stale.

use testkit::{NatsProxy, PATIENCE, Program, Replica, eventually};
use vmwatch_api::enrollment::AGENT_BUCKET;
use vmwatch_bus::NATS_URL;

use super::{
    builder,
    client::{Agent, make_bucket},
    start,
};

/// The request that confirms the copy.
const CONFIRMATION: &str = "PUB $JS.API.STREAM.INFO.KV_vmwatch_agents ";

async fn answers_logins(auth: &Replica, wanted: bool) {
    let what = if wanted {
        "the replica is in the queue group"
    } else {
        "the replica has left the queue group"
    };
    eventually(what, PATIENCE, async || {
        let answering = auth.metric("vmwatch_callout_answering").await;
        let is_wanted = answering == Some(f64::from(u8::from(wanted)));
        is_wanted.then_some(()).ok_or(format!("{answering:?}"))
    })
    .await;
}

/// Without a current copy of the KV bucket of agents, auth-svc cannot let agents in.
#[tokio::test]
async fn auth_svc_is_not_ready_while_its_copy_of_the_agents_is_stale() {
    let stack = start().await;
    let auth = stack.replica(Program::Auth, 0);
    auth.ready().await;
    let jetstream = stack.bus.jetstream_for_tests();
    jetstream.delete_key_value(AGENT_BUCKET).await.unwrap();
    let reported = async || {
        let reason = auth.readiness().await.err().ok_or("the service is ready")?;
        let is_reported = reason.contains("copy of the KV bucket of agents is stale");
        is_reported.then_some(()).ok_or(reason)
    };
    eventually("auth-svc is not ready", PATIENCE, reported).await;
    make_bucket(&stack).await;
    auth.ready().await;
}

/// A replica that cannot confirm its copy does not receive logins that another replica can answer.
#[tokio::test]
async fn stale_replica_leaves_logins_to_others_until_it_is_current() {
    let stack = builder().replicas(Program::Auth, 2).start().await;
    let [current, stale] = [0, 1].map(|index| stack.replica(Program::Auth, index));
    let proxy = NatsProxy::start(stack.nats.url(), CONFIRMATION).await;
    proxy.release();
    stale.process.set(NATS_URL.name, proxy.url());
    stale.process.kill9();
    stale.restart().await;
    answers_logins(stale, true).await;

    proxy.arm();
    proxy.held().await;
    answers_logins(stale, false).await;
    assert!(stale.readiness().await.is_err());
    // With the stale replica in the queue group, about half of these logins would be refused.
    for number in 0..20 {
        let mut agent = Agent::enrolled(&stack, &format!("vm-{number}")).await;
        agent.log_in(stack.nats.url()).await;
    }

    proxy.release();
    stale.ready().await;
    answers_logins(stale, true).await;
    current.process.kill9();
    let mut agent = Agent::enrolled(&stack, "vm-last").await;
    agent.log_in(stack.nats.url()).await;
}
