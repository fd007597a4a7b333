//! Tests live events of the REST API: immediate delivery, scope, replay after a disconnection or restart, and slow
//! readers.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    pin::Pin,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, MACHINES, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    InstanceId, Role, Scope,
    events::{LiveEvent, MachineEvent},
    time::unix_millis,
};

use super::client::{Api, Reply, publish, sample, stack};

/// A received event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: Option<u64>,
    pub(crate) data: Value,
}

/// A client that reads the stream of live events.
pub(crate) struct Follower {
    bytes: Pin<Box<dyn Stream<Item = reqwest::Result<Vec<u8>>> + Send>>,
    buffer: String,
}

impl Follower {
    pub(crate) async fn of(api: &Api, query: &str, seen: Option<u64>) -> Self {
        let mut request = api
            .request(Method::GET, &format!("/events{query}"))
            .timeout(10 * PATIENCE);
        if let Some(seen) = seen {
            request = request.header("last-event-id", seen);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            bytes: Box::pin(
                response
                    .bytes_stream()
                    .map(|chunk| chunk.map(|chunk| chunk.to_vec())),
            ),
            buffer: String::new(),
        }
    }

    /// Returns the next event, or `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some((block, rest)) = self.buffer.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.buffer = rest;
                let field = |name: &str| {
                    block
                        .lines()
                        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned))
                };
                if let Some(name) = field("event") {
                    return Some(Event {
                        name,
                        id: field("id").map(|id| id.parse().unwrap()),
                        data: serde_json::from_str(&field("data").unwrap()).unwrap(),
                    });
                }
            }
            let chunk = tokio::time::timeout(PATIENCE, self.bytes.next())
                .await
                .expect("the stream sends data in time");
            // A closed connection ends the stream as well.
            self.buffer.push_str(std::str::from_utf8(&chunk?.ok()?).unwrap());
        }
    }

    pub(crate) async fn expect(&mut self, name: &str) -> Event {
        let event = self.next().await.expect("the stream has another event");
        assert_eq!(event.name, name, "{event:?}");
        event
    }

    /// Skips to the next event of this kind about this VM.
    async fn until(&mut self, name: &str, instance: &str) -> Event {
        loop {
            let event = self.next().await.expect("the stream has another event");
            if event.name == name && event.data["instance_id"] == instance {
                return event;
            }
        }
    }
}

/// Publishes an event as a service does. Returns the event's sequence number.
pub(crate) async fn tell(stack: &Stack, instance: &str) -> u64 {
    let event = LiveEvent::Machine(MachineEvent {
        instance_id: instance.parse().unwrap(),
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
}

#[tokio::test]
async fn live_events_are_delivered_at_once() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let mut follower = Follower::of(&api, "", None).await;
    let ready = follower.expect("ready").await;
    assert!(ready.id.is_some(), "the first event states its position");

    // A busy machine may delay single events, but not all of them.
    let event = eventually("an event arrives within a second", PATIENCE, async || {
        let published = Instant::now();
        publish(&stack, &sample("vm-1", unix_millis(), 42.5)).await;
        let event = follower.until("sample", "vm-1").await;
        let took = published.elapsed();
        println!("delay from publishing a sample to its event: {took:?}");
        (took < Duration::from_secs(1))
            .then_some(event)
            .ok_or_else(|| format!("{took:?}"))
    })
    .await;
    assert_eq!(
        (&event.data["cpu_util"], &event.data["proc"]),
        (&json!(42.5), &json!(2))
    );
    assert!(event.id > ready.id);

    let (off, _) = MACHINES[0];
    let accepted = api
        .post(&format!("/vms/{off}/actions"), json!({ "action": "start" }))
        .await
        .json();
    let mut states = Vec::new();
    while states.last().is_none_or(|state| state != "succeeded") {
        let event = follower.until("operation", off).await;
        assert_eq!(event.data["id"], accepted["id"]);
        states.push(event.data["state"].as_str().unwrap().to_owned());
    }
    assert_eq!(
        states.first().map(String::as_str),
        Some("requested"),
        "{states:?}"
    );
    let record = api
        .read(&format!("/operations/{}", accepted["id"].as_str().unwrap()))
        .await;
    assert_eq!(record["state"], "succeeded");
    let machine = follower.until("machine", off).await;
    assert_eq!(machine.data["state"], "running");
}

#[tokio::test]
async fn live_events_outside_scope_and_filter_are_not_delivered() {
    let stack = stack().start().await;
    let scope = Scope::Only(["a", "b"].map(|id| id.parse::<InstanceId>().unwrap()).into());
    let limited = Api::with(&stack, Role::Viewer, scope).await;
    let mut follower = Follower::of(&limited, "", None).await;
    let mut only_b = Follower::of(&limited, "?instance_id=b", None).await;
    let mut hidden = Follower::of(&limited, "?instance_id=c", None).await;
    let unknown = ",unknown".repeat(198);
    let mut several = Follower::of(&limited, &format!("?instance_id=a,c{unknown}"), None).await;
    let mut operations = Follower::of(&limited, "?kind=operation", None).await;
    for follower in [
        &mut follower,
        &mut only_b,
        &mut hidden,
        &mut several,
        &mut operations,
    ] {
        follower.expect("ready").await;
    }
    for instance in ["c", "a", "b", "c", "a"] {
        tell(&stack, instance).await;
    }
    for instance in ["a", "b", "a"] {
        assert_eq!(follower.expect("machine").await.data["instance_id"], instance);
    }
    assert_eq!(only_b.expect("machine").await.data["instance_id"], "b");
    for instance in ["a", "a"] {
        assert_eq!(several.expect("machine").await.data["instance_id"], instance);
    }
    let too_many = format!("/events?instance_id=a,b,c{unknown}");
    let refused = limited.get(&too_many).await.problem(400, "invalid");
    assert_eq!(refused, "query: instance_id: must have at most 200 ids");
    for bad in [
        "instance_id=",
        "instance_id=a,",
        "instance_id=a,b%20c",
        "instance_id=a&instance_id=b",
        "kind=none",
    ] {
        limited
            .get(&format!("/events?{bad}"))
            .await
            .problem(400, "invalid");
    }
    // The readers that asked for a VM outside the scope or for operations got no event: the next event that they get is
    // `end`.
    let token = limited.token.clone().unwrap();
    assert_eq!(limited.delete("/sessions/current").await.status, 204);
    for mut follower in [hidden, operations] {
        assert_eq!(follower.expect("end").await.data, json!({}), "stream of {token}");
    }
}

#[tokio::test]
async fn missed_live_events_are_replayed_or_reported_as_a_gap() {
    let stack = stack().replicas(Program::Gateway, 2).start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let mut follower = Follower::of(&api, "", None).await;
    follower.expect("ready").await;
    let seen = tell(&stack, "vm-1").await;
    assert_eq!(follower.expect("machine").await.id, Some(seen));
    drop(follower);

    let missed = [
        tell(&stack, "vm-1").await,
        tell(&stack, "vm-2").await,
        tell(&stack, "vm-3").await,
    ];
    // An event has the same number on every gateway, because the NATS stream assigns the numbers. So the other gateway
    // can replay from this number too.
    for index in [0, 1] {
        let mut follower = Follower::of(&api.at(stack.gateway(index)), "", Some(seen)).await;
        assert_eq!(
            follower.expect("ready").await.id,
            None,
            "the replay begins with the first missed event"
        );
        for number in missed {
            assert_eq!(follower.expect("machine").await.id, Some(number));
        }
        let next = tell(&stack, "vm-1").await;
        // In the second turn, the event that was published in the first turn arrives first.
        while follower.expect("machine").await.id != Some(next) {}
    }
    for (seen, name) in [(u64::MAX, "gap"), (seen + 1_000_000, "gap")] {
        let mut follower = Follower::of(&api, "", Some(seen)).await;
        assert!(follower.expect(name).await.id.is_some());
    }
    for bad in ["x", "-1", "1.5", ""] {
        let request = api.request(Method::GET, "/events").header("last-event-id", bad);
        Reply::of(request).await.problem(400, "invalid");
    }
    api.get("/events?user=ann").await.problem(400, "invalid");
}

#[tokio::test]
async fn live_events_continue_after_restart_of_gateway_and_nats() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let mut follower = Follower::of(&api, "", None).await;
    let before = follower.expect("ready").await.id.unwrap();
    let gateway = &stack.gateway(0).replica;
    let stopped = Instant::now();
    gateway.process.terminate(PATIENCE).await;
    assert!(
        stopped.elapsed() < Duration::from_secs(10),
        "event streams end when the gateway stops: {:?}",
        stopped.elapsed()
    );
    assert_eq!(follower.next().await, None);
    let missed = tell(&stack, "vm-1").await;
    gateway.restart().await;
    let mut follower = Follower::of(&api, "", Some(before)).await;
    follower.expect("ready").await;
    assert_eq!(follower.until("machine", "vm-1").await.id, Some(missed));

    stack.nats.server.kill9();
    stack.nats.server.start_again();
    let received = eventually("NATS is reachable again", PATIENCE, async || {
        let event = tell(&stack, "vm-2");
        let received = tokio::time::timeout(Duration::from_secs(2), event).await;
        received.map_err(|late| late.to_string())
    })
    .await;
    // The event stream continues on the same connection: the gateway detects within two seconds that the restarted NATS
    // has lost the gateway's consumer.
    let back = Instant::now();
    assert!(follower.until("machine", "vm-2").await.id <= Some(received));
    println!(
        "delay from NATS being reachable to the event: {:?}",
        back.elapsed()
    );
    assert!(back.elapsed() < Duration::from_secs(15), "{:?}", back.elapsed());
}

#[tokio::test]
async fn live_event_stream_ends_with_its_session() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let other = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let (mut ending, mut staying) = (
        Follower::of(&admin, "", None).await,
        Follower::of(&other, "", None).await,
    );
    ending.expect("ready").await;
    staying.expect("ready").await;
    let ended = Instant::now();
    assert_eq!(admin.delete("/sessions/current").await.status, 204);
    ending.until_end().await;
    assert!(ended.elapsed() < Duration::from_secs(10), "{:?}", ended.elapsed());
    tell(&stack, "vm-1").await;
    staying.until("machine", "vm-1").await;
}

impl Follower {
    async fn until_end(&mut self) {
        loop {
            match self.next().await {
                Some(event) if event.name == "end" => break,
                Some(_) => {}
                None => panic!("the stream ended without an `end` event"),
            }
        }
        assert_eq!(self.next().await, None);
    }
}

/// A client that reads nothing is disconnected. Other clients continue, and the gateway's memory use is bounded by its
/// log of events.
#[tokio::test]
async fn slow_reader_of_live_events_is_disconnected() {
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_REQUEST_TIMEOUT", "2s")
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let mut healthy = Follower::of(&api, "", None).await;
    healthy.expect("ready").await;
    let address = stack.gateway(0).url("").replace("http://", "");
    let mut slow = TcpStream::connect(&address).unwrap();
    let token = api.token.clone().unwrap();
    write!(
        slow,
        "GET /api/v1/events HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\r\n"
    )
    .unwrap();
    let readers = async || {
        let metrics = stack.replica(Program::Gateway, 0).metrics().await;
        let line = metrics
            .lines()
            .find(|line| line.starts_with("vmwatch_event_readers "))
            .map(str::to_owned);
        line.unwrap_or_default()
    };
    eventually("both readers of events are connected", PATIENCE, async || {
        let line = readers().await;
        if line.ends_with(" 2") { Ok(()) } else { Err(line) }
    })
    .await;

    // The events have 40 MB in total, more than the kernel buffers for a connection.
    let text = "x".repeat(200_000);
    // Each event is published after the healthy reader has received the previous event. Otherwise the healthy reader
    // could fall 16 MiB behind on a busy machine and would be disconnected too.
    for _ in 0..200 {
        let event = json!({ "kind": "operation", "id": "00000000000000000000000000000000", "verb": "start",
            "instance_id": "vm-1", "user": text, "request_id": "r", "requested_at_ms": 1, "deadline_ms": 1,
            "state": "running", "history": [] });
        let subject = "vmwatch.v1.events.operation.vm-1";
        let sent = stack
            .bus
            .jetstream_for_tests()
            .publish(subject, event.to_string().into())
            .await;
        sent.unwrap().await.unwrap();
        healthy.until("operation", "vm-1").await;
    }
    eventually("the slow reader is disconnected", PATIENCE, async || {
        let line = readers().await;
        if line.ends_with(" 1") { Ok(()) } else { Err(line) }
    })
    .await;
    // The data in the kernel's buffer still arrives, then the connection ends.
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match slow.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => received += count,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(
        received < 200 * 200_000,
        "the slow reader must not receive everything: {received} bytes"
    );
    tell(&stack, "vm-9").await;
    healthy.until("machine", "vm-9").await;
}

#[tokio::test]
async fn concurrent_live_event_streams_are_limited() {
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_MAX_EVENT_STREAMS", "2")
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let first = Follower::of(&api, "", None).await;
    let _second = Follower::of(&api, "", None).await;
    api.get("/events").await.problem(503, "overloaded");
    drop(first);
    eventually("another event stream is accepted", PATIENCE, async || {
        let request = api.request(Method::GET, "/events").send().await.unwrap();
        if request.status() == 200 {
            Ok(())
        } else {
            Err(request.status().to_string())
        }
    })
    .await;
}
