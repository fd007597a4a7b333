//! Tests that thousands of agents return after a restart of NATS while a user logs in, and measures their logins and the memory
//! that they take in auth-svc. The targets are in docs/performance.md; a busy machine may miss them.

mod agents;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::StreamExt;
use nkeys::KeyPair;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use testkit::{ADMIN, Answer, Gateway, PATIENCE, Program, Stack, agent_record, codes, eventually, figure};
use vmwatch_bus::NATS_PING_INTERVAL;

use self::agents::Fleet;
use super::client::bucket;
use crate::ingest_support::resident;

const AGENTS: usize = 5000;
/// Maximum time until all agents are connected again.
const RETURN_PATIENCE: Duration = Duration::from_mins(2);
/// Default of the gateway's setting `VMWATCH_QUERY_DEADLINE`, which limits a login.
const LOGIN_DEADLINE: Duration = Duration::from_secs(5);
/// Pause of the user between two logins.
const LOGIN_PAUSE: Duration = Duration::from_millis(200);
/// The steady rate of logins of agents, and their number.
const LOGINS_PER_SECOND: u32 = 200;
const STEADY_LOGINS: usize = 1000;
/// Number of records that are written at once.
const WRITES: usize = 256;

/// Raises the limit of open files for this process and NATS, which inherits it.
fn allow_connections() {
    let most = getrlimit(Resource::Nofile).maximum;
    let needed = (AGENTS + STEADY_LOGINS + 1000) as u64;
    assert!(
        most.is_none_or(|most| most >= needed),
        "the test needs {needed} open files, but the limit of this machine is {most:?}; raise it with `ulimit -Hn`"
    );
    let raised = Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// Stores the records of all agents.
async fn enrol_all(stack: &Stack) -> Vec<Arc<KeyPair>> {
    let keys: Vec<_> = (0..AGENTS).map(|_| Arc::new(KeyPair::new_user())).collect();
    let bucket = bucket(stack).await;
    let writes = keys.iter().enumerate().map(async |(number, key)| {
        let value = serde_json::to_vec(&agent_record(key)).unwrap();
        // As long as the ids of real VMs.
        let vm = format!("6abf5a1e-b85c-4e5f-ba02-{number:012}");
        bucket.put(vm, value.into()).await.unwrap();
    });
    futures::stream::iter(writes)
        .buffer_unordered(WRITES)
        .count()
        .await;
    keys
}

async fn try_log_in(gateway: &Gateway) -> Result<Answer, String> {
    let data = json!({ "user_name": ADMIN.0, "password": ADMIN.1 });
    let login = json!({ "method": codes::LOGIN, "data": data }).to_string();
    let sent = gateway
        .send(reqwest::Method::POST, Some("application/json"), login)
        .await;
    let answer = sent.map_err(|error| error.to_string())?;
    if answer.status() == 1 {
        Ok(answer)
    } else {
        Err(format!("{answer:?}"))
    }
}

/// Logs in repeatedly until `over` is set. Each login must succeed in time, except those until auth-svc and the gateway are
/// connected to NATS again. Returns the number of logins and the longest time.
async fn user_logs_in(gateway: &Gateway, over: &AtomicBool) -> (usize, Duration) {
    eventually("the user can log in", PATIENCE, async || {
        try_log_in(gateway).await.map(drop)
    })
    .await;
    let (mut logins, mut longest) = (0, Duration::ZERO);
    loop {
        let answer = try_log_in(gateway).await.unwrap();
        assert!(answer.took < LOGIN_DEADLINE, "{answer:?}");
        logins += 1;
        longest = longest.max(answer.took);
        if over.load(Ordering::Relaxed) {
            return (logins, longest);
        }
        tokio::time::sleep(LOGIN_PAUSE).await;
    }
}

/// Reports the median and the 99th percentile in milliseconds.
fn percentiles(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    for percent in [50, 99] {
        let time = times[(times.len() * percent / 100).min(times.len() - 1)];
        figure(&format!("{name}_p{percent}_ms"), time.as_secs_f64() * 1e3);
    }
}

fn number(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap())
}

/// Reports the growth of auth-svc per agent.
fn memory_per_agent(name: &str, stack: &Stack, before: u64) {
    let grown = resident(&stack.replica(Program::Auth, 0).process).saturating_sub(before);
    figure(name, number(grown) / number(AGENTS as u64));
}

/// The test uses both CPU cores, so it runs alone (see .config/nextest.toml).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fleet_returns_after_a_restart_of_nats_while_a_user_logs_in() {
    allow_connections();
    let stack = Stack::builder()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        // With the short interval of other tests, programs would take a busy NATS server for a frozen one.
        .set(Program::Auth, NATS_PING_INTERVAL.name, NATS_PING_INTERVAL.default)
        .set(
            Program::Gateway,
            NATS_PING_INTERVAL.name,
            NATS_PING_INTERVAL.default,
        )
        .without_login_limit()
        .with_permissions()
        .start()
        .await;
    let gateway = stack.gateway(0);
    for _ in 0..5 {
        gateway.login(ADMIN.0, ADMIN.1).await;
    }
    let before = resident(&stack.replica(Program::Auth, 0).process);
    let keys = enrol_all(&stack).await;
    let fleet = Fleet::connect(stack.nats.url(), keys).await;
    fleet.connected(AGENTS, PATIENCE).await;
    memory_per_agent("callout_kib_per_agent", &stack, before);

    stack.nats.server.kill9();
    fleet.connected(0, PATIENCE).await;
    let (began, is_back) = (Instant::now(), AtomicBool::new(false));
    let returning = async {
        fleet.connected(AGENTS, RETURN_PATIENCE).await;
        is_back.store(true, Ordering::Relaxed);
        began.elapsed()
    };
    let users = user_logs_in(gateway, &is_back);
    let ((), returned, (logins, longest)) = tokio::join!(stack.nats.restart(), returning, users);
    figure("callout_fleet_returned_s", returned.as_secs_f64());
    figure("callout_fleet_user_logins", number(logins as u64));
    figure("callout_fleet_longest_user_login_ms", longest.as_secs_f64() * 1e3);
    let (times, refused) = fleet.logins();
    figure("callout_fleet_refused_logins", number(refused as u64));
    percentiles("callout_fleet_login", times);
    memory_per_agent("callout_kib_per_agent_after_restart", &stack, before);

    let times = fleet.log_in_at_rate(STEADY_LOGINS, LOGINS_PER_SECOND).await;
    percentiles("callout_steady_login", times);
}
