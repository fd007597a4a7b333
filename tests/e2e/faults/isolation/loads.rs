//! Overloads for the isolation test. Each continues until the test stops it.

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use serde_json::json;
use testkit::{Gateway, PATIENCE, Program, Stack, THIS_MACHINE, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use vmwatch_api::{
    Role,
    events::{LiveEvent, MachineEvent},
    metrics::SAMPLE_SUBJECT_PREFIX,
    time::unix_millis,
};

use super::super::{
    http::{Connection, address},
    size,
};
use crate::{
    history_support::{process, publish, sample, stored},
    rest::client::Api,
};

/// Maximum number of concurrent requests of a login flood.
const MOST_IN_FLIGHT: usize = 1500;

/// Generates an overload until the token is cancelled.
async fn until(over: &CancellationToken, load: impl Future<Output = ()>) {
    over.run_until_cancelled(load).await;
}

/// Sends logins of users that do not exist, at a fixed rate whatever the gateway answers.
pub(super) async fn login_flood(gateway: &Gateway, rate: u32, over: &CancellationToken) {
    flood(gateway, rate, over, |number| login(number, "")).await;
}

/// Sends a flood of logins like [`login_flood`], but each from a different source address.
pub(super) async fn distributed_login_flood(gateway: &Gateway, rate: u32, over: &CancellationToken) {
    let forwarded = |number: u32| {
        let [_, a, b, c] = number.to_be_bytes();
        login(number, &format!("X-Forwarded-For: 10.{a}.{b}.{c}\r\n"))
    };
    flood(gateway, rate, over, forwarded).await;
}

fn login(number: u32, headers: &str) -> Vec<u8> {
    let body = json!({ "user_name": format!("nobody-{number}"), "password": "a guess" }).to_string();
    let length = body.len();
    let head = "POST /api/v1/sessions HTTP/1.1\r\nHost: vmwatch\r\nContent-Type: application/json\r\n";
    format!("{head}{headers}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// Sends requests in an open loop: each request is sent when it is due, on an idle connection or a new one, without
/// waiting for earlier answers.
async fn flood(gateway: &Gateway, rate: u32, over: &CancellationToken, request: impl Fn(u32) -> Vec<u8>) {
    let (address, began) = (address(gateway), Instant::now());
    let idle: Arc<Mutex<Vec<Connection>>> = Arc::default();
    let in_flight = Arc::new(Semaphore::new(MOST_IN_FLIGHT));
    let mut tasks = JoinSet::new();
    let sending = async {
        for number in 0.. {
            sleep_until(began + Duration::from_secs(1) * number / rate).await;
            let Ok(permit) = Arc::clone(&in_flight).try_acquire_owned() else {
                continue;
            };
            let (idle, address, request) = (Arc::clone(&idle), address.clone(), request(number));
            tasks.spawn(async move {
                let kept = idle.lock().unwrap().pop();
                let opened = match kept {
                    Some(connection) => Ok(connection),
                    None => Connection::open(&address).await,
                };
                if let Ok(mut connection) = opened
                    && connection.ask(&request).await.is_ok()
                {
                    idle.lock().unwrap().push(connection);
                }
                drop(permit);
            });
        }
    };
    until(over, sending).await;
}

/// A user who reads long histories over hundreds of connections, and who waits for `Retry-After` when a read is
/// refused.
pub(super) struct HeavyViewer {
    address: String,
    request: Vec<u8>,
}

impl HeavyViewer {
    const CONNECTIONS: usize = 600;
    const VM: &str = "busy-vm";
    const PROCESSES: u32 = 100;

    pub(super) async fn prepare(stack: &Stack) -> Self {
        let now = unix_millis();
        for turn in 0..size(20_u64, 100) {
            let mut sample = sample(Self::VM, now - 10_000 * turn, "+00:00", 1.5);
            let processes = (0..Self::PROCESSES).map(|pid| process("worker", 1000 + pid, 0.1));
            sample.processes = processes.collect();
            publish(stack, &sample).await;
        }
        stored(stack).await;
        let session = stack.session_as("viewer", Role::Viewer).await;
        Self {
            address: address(stack.gateway(0)),
            request: get(
                &format!("/api/v1/vms/{}/processes/history?name=worker", Self::VM),
                &session,
                "",
            ),
        }
    }

    pub(super) async fn read(&self, over: &CancellationToken) {
        let reading = (0..Self::CONNECTIONS).map(async |_| {
            let mut connection = Connection::open(&self.address).await.unwrap();
            loop {
                let answer = connection.ask(&self.request).await.unwrap();
                match answer.http {
                    200 => {}
                    429 | 503 => sleep(Duration::from_secs(1)).await,
                    _ => panic!("{answer:?}"),
                }
            }
        });
        until(over, async { drop(join_all(reading).await) }).await;
    }
}

fn get(path: &str, session: &str, headers: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: vmwatch\r\nAuthorization: Bearer {session}\r\n{headers}\r\n")
        .into_bytes()
}

/// Publishes as a hostile guest, with the key of its agent: invalid messages, and small and large samples.
/// The guest sends at `rate` bytes per second, or as fast as NATS accepts if there is no rate.
pub(super) async fn hostile_guest(stack: &Stack, rate: Option<u32>, over: &CancellationToken) {
    /// Size of a small message in bytes, including its NATS protocol line.
    const SMALL: usize = 64;
    const SMALL_IN_A_ROUND: usize = 500;
    const LARGE: usize = 32 * 1024;
    let key = stack.enrol(THIS_MACHINE).await;
    let bus = stack.nats.connect_as_agent("hostile-guest", &key).await;
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}{THIS_MACHINE}");
    let bodies = ["{}".to_owned(), "x".repeat(LARGE)];
    let began = Instant::now();
    let publishing = async {
        for round in 1_u32.. {
            let bytes = LARGE + SMALL * SMALL_IN_A_ROUND;
            let small = std::iter::repeat_n(&bodies[0], SMALL_IN_A_ROUND);
            for body in small.chain([&bodies[1]]) {
                let sent = bus
                    .client_for_tests()
                    .publish(subject.clone(), body.clone().into());
                sent.await.expect("the NATS client accepts the message");
            }
            // Flush often, because messages in the client's own buffer do not load the server.
            bus.flush(Duration::from_secs(5)).await;
            if let Some(rate) = rate {
                let round_lasts = Duration::from_secs(1) * u32::try_from(bytes).unwrap() / rate;
                sleep_until(began + round_lasts * round).await;
            }
        }
    };
    until(over, publishing).await;
}

/// Readers of live events. Each user opens the maximum number of streams, and each reader has missed as many events as
/// the gateway can replay.
pub(super) struct EventReaders {
    address: String,
    requests: Vec<Vec<u8>>,
    /// The size in bytes of the events that each reader missed.
    missed: u64,
    /// The number of bytes that each reader received. Counting bytes needs less CPU time than counting events.
    sent: Arc<Vec<AtomicU64>>,
    open: Mutex<JoinSet<()>>,
}

impl EventReaders {
    const OF_A_USER: usize = 20;

    pub(super) async fn prepare(stack: &Stack, readers: usize) -> Self {
        // Stay below the 10,000 events that the gateway keeps, because events during the overload evict the oldest.
        let missed = size(1_000, 9_000);
        let tell = async |number: u64| {
            let event = LiveEvent::Machine(MachineEvent {
                instance_id: format!("vm-{number}").parse().unwrap(),
                at_ms: unix_millis(),
                state: None,
            });
            let body = serde_json::to_vec(&event).unwrap();
            let sent = stack
                .bus
                .jetstream_for_tests()
                .publish(event.subject(), body.into())
                .await;
            sent.unwrap().await.unwrap().sequence
        };
        let seen = tell(0).await;
        let mut bytes = 0;
        for number in 0..missed {
            let id = tell(number).await;
            let data =
                format!(r#"{{"instance_id":"vm-{number}","at":"2017-01-01T13:37:59.001Z","state":null}}"#);
            bytes += format!("id: {id}\nevent: machine\ndata: {data}\n\n").len();
        }
        let mut requests = Vec::new();
        while requests.len() < readers {
            let user = format!("follower-{}", requests.len());
            let session = stack.session_as(&user, Role::Viewer).await;
            let request = get("/api/v1/events", &session, &format!("Last-Event-ID: {seen}\r\n"));
            requests.extend(vec![request; Self::OF_A_USER]);
        }
        Self {
            address: address(stack.gateway(0)),
            sent: Arc::new(requests.iter().map(|_| AtomicU64::new(0)).collect()),
            requests,
            missed: bytes as u64,
            open: Mutex::default(),
        }
    }

    /// Connects all readers, and keeps them connected after the overload has ended.
    pub(super) async fn follow(&self, over: &CancellationToken) {
        for (index, request) in self.requests.iter().enumerate() {
            let mut stream = TcpStream::connect(&self.address).await.unwrap();
            stream.write_all(request).await.unwrap();
            let sent = Arc::clone(&self.sent);
            self.open.lock().unwrap().spawn(async move {
                let mut buffer = vec![0; 16 * 1024];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    sent[index].fetch_add(read as u64, Ordering::Relaxed);
                }
            });
        }
        let mut one_more = Connection::open(&self.address).await.unwrap();
        let refused = one_more.ask(&self.requests[0]).await.unwrap();
        assert_eq!(refused.http, 429, "{refused:?}");
        // Under `./dev soak` the readers receive 1.2 GB, which takes minutes.
        let patience = size(PATIENCE, Duration::from_mins(5));
        eventually("every reader has the missed events", patience, async || {
            let late = self
                .sent
                .iter()
                .filter(|sent| sent.load(Ordering::Relaxed) < self.missed);
            match late.count() {
                0 => Ok(()),
                late => Err(format!("{late} readers still miss events")),
            }
        })
        .await;
        over.cancelled().await;
    }

    /// Returns the number of bytes that all readers received.
    pub(super) fn sent(&self) -> u64 {
        self.sent.iter().map(|sent| sent.load(Ordering::Relaxed)).sum()
    }

    /// Returns the number of readers that are still connected.
    pub(super) fn connected(&self) -> usize {
        let mut open = self.open.lock().unwrap();
        while open.try_join_next().is_some() {}
        open.len()
    }
}

/// Hypervisors that accept connections and never answer.
///
/// With as many hypervisors and calls as the settings allow, 496 calls hang. The Tokio runtime's 512 blocking threads
/// could run all of these calls, so other work would succeed even if libvirt calls had no threads of their own;
/// [`calls_with_own_threads`] checks that they have. The success of other work shows that hypervisors share no permit
/// and no queue.
pub(super) struct DeadHosts {
    port: u16,
    taken: Arc<AtomicUsize>,
    _listening: JoinSet<()>,
}

impl DeadHosts {
    /// The maximum number of hypervisors, without the hypervisor that answers.
    const HOSTS: usize = 31;
    /// The maximum number of concurrent calls to each hypervisor.
    pub(super) const CALLS: &str = "16";

    pub(super) async fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let taken = Arc::new(AtomicUsize::new(0));
        let mut listening = JoinSet::new();
        let counted = Arc::clone(&taken);
        listening.spawn(async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                held.push(stream);
                counted.store(held.len(), Ordering::Relaxed);
            }
        });
        Self {
            port,
            taken,
            _listening: listening,
        }
    }

    /// Returns the hypervisors in the syntax of `VMWATCH_HYPERVISORS`.
    pub(super) fn hypervisors(&self) -> String {
        let one = |number| format!("dead-{number}=qemu+tcp://127.0.0.1:{}/system", self.port);
        (0..Self::HOSTS).map(one).collect::<Vec<_>>().join(",")
    }

    pub(super) fn all_were_asked(&self) -> bool {
        self.taken.load(Ordering::Relaxed) >= Self::HOSTS
    }
}

/// Lists VMs repeatedly as one user. Each list queries every hypervisor.
pub(super) async fn ask_dead_hosts(stack: &Stack, over: &CancellationToken) {
    let session = stack.session_as("curious", Role::Viewer).await;
    let curious = Api::of(stack.gateway(0)).holding(&session);
    let asking = (0..24).map(async |_| {
        loop {
            curious.get("/vms").await;
        }
    });
    until(over, async { drop(join_all(asking).await) }).await;
}

/// Waits until libvirt calls hang in threads of their own instead of the runtime's thread pool, with at least one such
/// thread per hypervisor. Returns the number of these threads.
pub(super) async fn calls_with_own_threads(stack: &Stack) -> usize {
    let lifecycle = stack.replica(Program::Lifecycle, 0).process.id();
    eventually("each hung call has a thread", PATIENCE, async || {
        let tasks = fs::read_dir(format!("/proc/{lifecycle}/task")).map_err(|error| error.to_string())?;
        // The name of a thread that has ended meanwhile cannot be read.
        let names = tasks
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        let names: Vec<_> = names.collect();
        let calls = names.iter().filter(|name| name.trim() == "libvirt-call").count();
        (calls >= DeadHosts::HOSTS)
            .then_some(calls)
            .ok_or_else(|| format!("{calls}: {names:?}"))
    })
    .await
}
