//! Tests a guest that sends at full speed: the delay of another VM's samples, and the memory growth of NATS.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use mongodb::bson::{DateTime, doc};
use testkit::{ADMIN, Database, PATIENCE, Program, Stack, THIS_MACHINE, eventually, figure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinHandle,
};
use vmwatch_api::{alerts::evaluation::EVALUATION_STREAM, metrics::CONTENT_TYPE, time::UtcOffset};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE};
use vmwatch_service::config::UTC_OFFSET;

use super::{Agent, Fingerprint, GUEST, OWN, attack_lasts, filter, fingerprint, message, raw::Raw, resident};
use crate::{ingest_support::Publisher, rows::stored_rows};

/// A message that the guest sends repeatedly.
struct Attack {
    name: &'static str,
    chunk: Vec<u8>,
    /// The number of connections that the guest opens. auth-svc ends all but the two newest ones of a key.
    connections: usize,
    /// True if the guest reads the server's answers.
    reads: bool,
}

fn attacks(stack: &Stack, inbox: &str) -> Vec<Attack> {
    let mut own = Publisher::new(stack, GUEST, 5000);
    let part = agent::split(own.sample(), &mut Encoder::new().unwrap())
        .unwrap()
        .remove(0);
    let encoded = [(CONTENT_TYPE, SAMPLE_CONTENT_TYPE)];
    let over = |connections, name, one: Vec<u8>, reads| Attack {
        name,
        // A chunk has about 64 KiB, as much as one system call writes.
        chunk: one.repeat((64 << 10) / one.len() + 1),
        connections,
        reads,
    };
    let of = |name, one, reads| over(1, name, one, reads);
    let asks = message(OWN, Some(inbox), &[], b"{}");
    vec![
        of("malformed", message(OWN, None, &[], b"{}"), true),
        of("malformed_with_replies", asks.clone(), true),
        over(8, "eight_connections_with_replies", asks.clone(), true),
        of("unread_replies", asks, false),
        of("samples", message(OWN, None, &encoded, &part.body), true),
        of(
            "forbidden",
            message("vmwatch.v1.auth.login", None, &[], b"{}"),
            true,
        ),
    ]
}

/// A running attack, and the number of bytes sent so far.
struct Running {
    over: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Attack {
    /// Starts the attack in separate tasks, because the test itself waits for other events.
    async fn start(&self, stack: &Stack, guest: &Agent) -> Running {
        let (over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for _ in 0..self.connections {
            let mut guest = guest.cloned(stack).await;
            guest.log_in(stack.nats.url()).await;
            let inbox = guest.inbox("x");
            guest.raw.send(format!("SUB {inbox} 1\r\n").as_bytes()).await;
            let Raw {
                mut reader,
                mut writer,
            } = guest.raw;
            let (chunk, over, sent) = (self.chunk.clone(), Arc::clone(&over), Arc::clone(&sent));
            tasks.push(tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) && writer.write_all(&chunk).await.is_ok() {
                    sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                }
            }));
            if self.reads {
                tasks.push(tokio::spawn(async move {
                    let mut buffer = vec![0; 64 << 10];
                    while reader.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
                }));
            } else {
                // The connection is kept open, and its input unread, until the attack has ended.
                tasks.push(tokio::spawn(async move {
                    let _reader = reader;
                    std::future::pending::<()>().await;
                }));
            }
        }
        Running { over, sent, tasks }
    }
}

impl Running {
    fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.tasks.iter().for_each(JoinHandle::abort);
        self.sent.load(Ordering::Relaxed)
    }
}

/// Longest time for which a sample of the other VM may wait during an attack. It allows for a slow machine and programs that
/// are not optimized.
const ALLOWED_DELAY: Duration = Duration::from_mins(1);

/// The real agent of another VM, observed by its rows in the database.
struct Other<'a> {
    database: &'a Database,
    offset: UtcOffset,
    newest: String,
}

impl Other<'_> {
    /// Observes the other VM's rows for this time, and if there are none until the first one, at most for
    /// [`ALLOWED_DELAY`]. Returns the delay of each, from sampling to storing. Polls often, because the polling interval
    /// limits the precision.
    async fn delays(&mut self, lasts: Duration) -> Vec<Duration> {
        let (mut delays, start) = (Vec::new(), Instant::now());
        while start.elapsed() < lasts || delays.is_empty() && start.elapsed() < ALLOWED_DELAY {
            let since = self.offset.unix_millis_of(&self.newest).unwrap_or(0);
            let since = DateTime::from_millis(i64::try_from(since).unwrap());
            let newer = doc! { "instance_id": THIS_MACHINE, "from": { "$gte": since } };
            let found = stored_rows(self.database, newer).await.unwrap();
            let dates = found
                .iter()
                .map(|row| row.get_str("create_date").unwrap().to_owned());
            let dates: BTreeSet<_> = dates.filter(|date| *date > self.newest).collect();
            delays.extend(dates.iter().map(|date| self.age(date)));
            if let Some(newest) = dates.into_iter().next_back() {
                self.newest = newest;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        delays
    }

    /// Returns the time since a row with this date was sampled.
    fn age(&self, date: &str) -> Duration {
        let millis = self.offset.unix_millis_of(date).unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        SystemTime::now().duration_since(at).unwrap_or_default()
    }

    /// Waits until the samples taken during an attack are stored.
    async fn catches_up(&mut self) {
        eventually(
            "the other VM's samples are stored without delay again",
            2 * ALLOWED_DELAY,
            async || {
                let delays = self.delays(Duration::from_millis(500)).await;
                let late = delays.iter().max().copied().unwrap_or(Duration::MAX);
                (late < Duration::from_secs(2))
                    .then_some(())
                    .ok_or(format!("{late:?}"))
            },
        )
        .await;
    }
}

/// Returns the median in milliseconds.
fn median(delays: &[Duration]) -> f64 {
    let mut sorted = delays.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2].as_secs_f64() * 1e3
}

/// Returns the state of all streams that agents cannot change. The fingerprint leaves out those of samples and status.
async fn others(stack: &Stack) -> Fingerprint {
    let mut streams = fingerprint(stack).await;
    for stream in ["VMWATCH_EVENTS", EVALUATION_STREAM] {
        streams.remove(stream);
    }
    streams
}

/// A guest that sends as fast as the packet filter permits does not keep other VMs' samples from being stored. The test
/// uses both CPU cores, so it runs alone (see .config/nextest.toml).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_at_full_speed_does_not_block_other_vms() {
    if !filter::is_inside("security::guest::flood::guest_at_full_speed_does_not_block_other_vms") {
        return;
    }
    let stack = Stack::builder()
        .replicas(Program::Agent, 1)
        .set(Program::Agent, "VMWATCH_AGENT_VM_INTERVAL", "500ms")
        .set(Program::Agent, "VMWATCH_AGENT_PROCESS_INTERVAL", "1h")
        .with_permissions()
        .start()
        .await;
    filter::limit_guest(&stack);
    stack.gateway(0).login(ADMIN.0, ADMIN.1).await;
    let mut other = Other {
        database: &stack.database,
        offset: UTC_OFFSET.default.parse().unwrap(),
        newest: String::new(),
    };
    eventually("a row of the other VM is stored", PATIENCE, async || {
        let delays = other.delays(Duration::from_millis(100)).await;
        (!delays.is_empty())
            .then_some(())
            .ok_or("no row is stored".to_owned())
    })
    .await;
    let before = median(&other.delays(attack_lasts()).await);
    figure("hostile_guest_delay_before_ms", before);
    let memory = resident(&stack);
    let mut worst = 0.0_f64;
    let guest = Agent::enrolled(&stack, GUEST).await;
    for attack in attacks(&stack, &guest.inbox("x")) {
        let before_it = others(&stack).await;
        let running = attack.start(&stack, &guest).await;
        let delays = other.delays(attack_lasts()).await;
        let grown = resident(&stack).saturating_sub(memory);
        assert_eq!(others(&stack).await, before_it, "{}", attack.name);
        // An administrator must be able to log in to end the attack.
        stack.gateway(0).login(ADMIN.0, ADMIN.1).await;
        let sent = running.end();
        let name = attack.name;
        assert!(
            !delays.is_empty(),
            "{name}: no sample of the other VM was stored during the attack"
        );
        let ratio = median(&delays) / before;
        figure(
            &format!("hostile_guest_{name}_mib"),
            sent as f64 / f64::from(1 << 20),
        );
        figure(&format!("hostile_guest_{name}_delay_ratio"), ratio);
        figure(
            &format!("hostile_guest_{name}_nats_growth_mib"),
            grown as f64 / 1024.0,
        );
        worst = worst.max(ratio);
        assert!(grown < 64 << 10, "{name}: the memory of NATS grew by {grown} KiB");
        other.catches_up().await;
    }
    figure("hostile_guest_worst_delay_ratio", worst);
    let metrics = stack.replica(Program::Metrics, 0);
    assert!(metrics.process.ended().is_none());
    // No sample of the other VM's agent was dropped.
    let agent = stack.replica(Program::Agent, 0);
    assert!(crate::ingest_support::metric(agent, "vmwatch_agent_parts_dropped_total").await < 1.0);
}
