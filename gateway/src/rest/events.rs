//! Live events by server-sent events (HTML Living Standard, "Server-sent events").

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, State},
    http::{HeaderValue, Response, header, request::Parts},
};
use bytes::Bytes;
use futures::stream;
use metrics::{counter, gauge};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::yield_now,
    time::{Instant, Interval, MissedTickBehavior, interval},
};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Scope,
    auth::Token,
    events::{self, LiveEvent},
    lifecycle::MachineState,
};
use vmwatch_bus::limits::Permit;
use vmwatch_service::jitter::jittered;

use super::{caller::Caller, extract::Query, operations::Operation, problem::Problem, time::Timestamp};
use crate::{
    Gateway,
    live::{Log, Reached, Start, Told},
};

/// A line that says nothing, so that proxies do not take the connection for dead and a client notices when it is.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often it is looked whether the session still lives.
const SESSION_CHECK: Duration = Duration::from_secs(1);
/// Small events go out together up to so many bytes; larger ones alone, without being copied.
const CHUNK: usize = 4096;
/// The longest that a browser waits before it connects again.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// The number of the last event that was seen, as browsers send it by themselves when they connect again.
#[derive(Debug)]
pub(super) struct LastEventId(Option<u64>);

impl FromRequestParts<Arc<Gateway>> for LastEventId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Gateway>) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get("last-event-id") else {
            return Ok(Self(None));
        };
        let number = value.to_str().ok().and_then(|text| text.parse().ok());
        number
            .map(|number| Self(Some(number)))
            .ok_or_else(|| Problem::invalid("Last-Event-ID must be the id of an event"))
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Of this VM only.
    instance_id: Option<InstanceId>,
}

/// Of the event `sample`: a VM reported. Percent and KiB/s.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SampleEvent<'a> {
    /// Which VM.
    instance_id: &'a InstanceId,
    /// When it was sampled, by the VM's own clock.
    at: Timestamp,
    /// Busy share of all cores, 0 to 100.
    cpu_util: f64,
    /// Share of memory in use, percent.
    mem: f64,
    /// Read rate of all whole disks, KiB/s.
    disk_read: f64,
    /// Write rate of all whole disks, KiB/s.
    disk_write: f64,
    /// Receive rate, KiB/s.
    net_incoming: f64,
    /// Transmit rate, KiB/s.
    net_outgoing: f64,
    /// Number of processes.
    proc: u32,
}

/// Of the event `processes`: the process table of a moment can be read.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessesEvent<'a> {
    /// Which VM.
    instance_id: &'a InstanceId,
    /// When they were sampled, by the VM's own clock.
    at: Timestamp,
}

/// Of the event `machine`: a VM's state is another than before.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MachineEvent<'a> {
    /// Which VM.
    instance_id: &'a InstanceId,
    /// When it was seen.
    at: Timestamp,
    /// What the hypervisor says; null where no hypervisor has the VM any more.
    #[schema(required)]
    state: Option<MachineState>,
}

/// Follow live events
///
/// A stream of server-sent events: `sample`, `processes`, `operation` (data: the record as `GET /operations/{id}` answers
/// it) and `machine`, each with JSON as its data and its number as its id. It begins with `ready`, or with `gap` where
/// more was missed since `Last-Event-ID` than can be told again: then read anew what you show. `end` says that the
/// session is over. A comment comes every 15 seconds; a reader that does not keep up is cut off, and connects again with
/// the last id that it saw.
#[utoipa::path(
    get, path = "/events", tag = "events", operation_id = "events",
    params(
        EventsQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "the id of the last event that was seen"),
    ),
    responses((status = OK, description = "events, without end", content_type = "text/event-stream", body = String)),
)]
pub(super) async fn follow(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(EventsQuery { instance_id }): Query<EventsQuery>,
    LastEventId(seen): LastEventId,
) -> Result<Response<Body>, Problem> {
    let permit = gateway.admission.enter_stream(&caller.principal().user).await?;
    let start = gateway.live.reader(seen).await?;
    let filter = Filter {
        scope: caller.principal().scope.clone(),
        instance_id,
    };
    let reader = Reader::new(gateway, caller.token, filter, start, permit);
    let frames = stream::unfold(reader, async |mut reader| {
        let frame = reader.next().await?;
        Some((Ok::<_, Infallible>(frame), reader))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    // Proxies that collect answers would collect this one for ever.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Which events a reader gets.
struct Filter {
    scope: Scope,
    instance_id: Option<InstanceId>,
}

impl Filter {
    fn allows(&self, instance: &InstanceId) -> bool {
        self.instance_id.as_ref().is_none_or(|only| only == instance) && self.scope.allows(instance)
    }
}

/// One client that follows.
struct Reader {
    gateway: Arc<Gateway>,
    token: Token,
    filter: Filter,
    log: Arc<Log>,
    reached: watch::Receiver<Reached>,
    /// The number of the last event that was looked at for it.
    position: u64,
    /// Up to this number events are told again.
    newest: u64,
    /// The first frame, until it is sent.
    begin: Option<Bytes>,
    /// A few events that are about to be sent.
    next: VecDeque<Arc<Told>>,
    session_check: Interval,
    last_frame: Instant,
    ended: bool,
    _permit: Permit,
}

impl Reader {
    fn new(gateway: Arc<Gateway>, token: Token, filter: Filter, start: Start, permit: Permit) -> Self {
        gauge!("vmwatch_event_readers").increment(1.0);
        let begin = if start.gap { "gap" } else { "ready" };
        // In front of what was missed the number would make a client believe that it has seen all of it.
        let id = (start.position == start.newest).then_some(start.newest);
        let mut session_check = interval(SESSION_CHECK);
        session_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            gateway,
            token,
            filter,
            reached: start.log.reached(),
            position: start.position,
            newest: start.newest,
            begin: Some(first_frame(begin, id)),
            log: start.log,
            next: VecDeque::new(),
            session_check,
            last_frame: Instant::now(),
            ended: false,
            _permit: permit,
        }
    }

    /// What is to be sent next; nothing once the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let frame = match self.begin.take() {
            Some(frame) => frame,
            None => self.next_frame().await?,
        };
        self.last_frame = Instant::now();
        Some(frame)
    }

    async fn next_frame(&mut self) -> Option<Bytes> {
        let shutdown = self.gateway.live.shutdown.clone();
        loop {
            if let Some(chunk) = self.next_chunk() {
                return Some(chunk);
            }
            let is_at_end = self.take()?;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return None,
                _ = self.session_check.tick() => {
                    match self.gateway.sessions.check(&self.token).await {
                        Ok(Some(_)) => {}
                        Ok(None) => {
                            self.ended = true;
                            return Some(frame("end", None, "{}"));
                        }
                        // Sessions can't be checked now; a client that comes again is told so.
                        Err(_) => return None,
                    }
                    if self.last_frame.elapsed() >= HEARTBEAT {
                        return Some(Bytes::from_static(b":\n\n"));
                    }
                }
                reached = self.reached.changed(), if is_at_end => reached.ok()?,
                // Other readers have their turn meanwhile.
                () = yield_now(), if !is_at_end => {}
            }
        }
    }

    /// The events that are about to be sent, as many as fit a chunk.
    fn next_chunk(&mut self) -> Option<Bytes> {
        let mut bytes = 0;
        let together = self.next.iter().take_while(|told| {
            bytes += told.frame.len();
            bytes <= CHUNK
        });
        let together = together.count().max(1).min(self.next.len());
        let told: Vec<_> = self.next.drain(..together).collect();
        let again = told.iter().filter(|told| told.number <= self.newest).count();
        counter!("vmwatch_events_replayed_total").increment(again as u64);
        match told.as_slice() {
            [] => None,
            [one] => Some(one.frame.clone()),
            several => {
                let frames: Vec<&[u8]> = several.iter().map(|told| told.frame.as_ref()).collect();
                Some(frames.concat().into())
            }
        }
    }

    /// Takes a few more events from the log. True where there is nothing to do until more come; nothing where the reader
    /// is cut off, or the log is over.
    fn take(&mut self) -> Option<bool> {
        let reached = *self.reached.borrow_and_update();
        let Some(taken) = self
            .log
            .take(self.position, |told| self.filter.allows(&told.instance))
        else {
            counter!("vmwatch_event_readers_cut_off_total").increment(1);
            return None;
        };
        let is_at_end = taken.events.is_empty() && taken.position == self.position;
        self.position = taken.position;
        self.next = taken.events.into();
        if is_at_end && reached.over {
            return None;
        }
        Some(is_at_end)
    }
}

/// The first frame, with the time after which a browser may connect again: at random, so that the clients of a gateway
/// that restarted do not all come at once.
fn first_frame(name: &str, id: Option<u64>) -> Bytes {
    let retry = jittered(LONGEST_RETRY, 0.2).as_millis();
    let begin = frame(name, id, "{}");
    [format!("retry: {retry}\n").as_bytes(), &begin].concat().into()
}

impl Drop for Reader {
    fn drop(&mut self) {
        gauge!("vmwatch_event_readers").decrement(1.0);
    }
}

/// An event as readers get it.
pub(crate) fn encode(number: u64, event: &LiveEvent) -> Bytes {
    frame(event.kind(), Some(number), &data(event))
}

/// An event as it goes over the wire; JSON has no line breaks.
fn frame(event: &str, id: Option<u64>, data: &str) -> Bytes {
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    format!("{id}event: {event}\ndata: {data}\n\n").into()
}

fn data(event: &LiveEvent) -> String {
    let json = match event {
        LiveEvent::Sample(event) => serde_json::to_string(&SampleEvent::from(event)),
        LiveEvent::Processes(event) => serde_json::to_string(&ProcessesEvent {
            instance_id: &event.instance_id,
            at: Timestamp::of_ms(event.at_ms),
        }),
        LiveEvent::Operation(operation) => {
            serde_json::to_string(&Operation::from(operation.as_ref().clone()))
        }
        LiveEvent::Machine(event) => serde_json::to_string(&MachineEvent {
            instance_id: &event.instance_id,
            at: Timestamp::of_ms(event.at_ms),
            state: event.state,
        }),
    };
    // Flat records of texts and numbers always encode.
    json.unwrap_or_default()
}

impl<'a> From<&'a events::SampleEvent> for SampleEvent<'a> {
    fn from(event: &'a events::SampleEvent) -> Self {
        Self {
            instance_id: &event.instance_id,
            at: Timestamp::of_ms(event.at_ms),
            cpu_util: event.cpu_util,
            mem: event.mem,
            disk_read: event.disk_read,
            disk_write: event.disk_write,
            net_incoming: event.net_incoming,
            net_outgoing: event.net_outgoing,
            proc: event.proc,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_frame_of_its_own() {
        let event = LiveEvent::Machine(events::MachineEvent {
            instance_id: "vm-1".parse().unwrap(),
            at_ms: 1_483_277_879_001,
            state: Some(MachineState::Running),
        });
        let frame = encode(7, &event);
        assert_eq!(
            frame,
            "id: 7\nevent: machine\ndata: {\"instance_id\":\"vm-1\",\"at\":\"2017-01-01T13:37:59.001Z\",\"state\":\"running\"}\n\n"
        );
    }

    #[test]
    fn clients_are_told_to_come_again_at_different_moments() {
        let retry = |frame: Bytes| {
            let text = String::from_utf8(frame.to_vec()).unwrap();
            let (line, rest) = text.split_once('\n').unwrap();
            assert_eq!(rest, "id: 7\nevent: ready\ndata: {}\n\n");
            line.strip_prefix("retry: ").unwrap().parse::<u64>().unwrap()
        };
        let waits: Vec<_> = (0..100).map(|_| retry(first_frame("ready", Some(7)))).collect();
        assert!(waits.iter().all(|wait| (1000..=5000).contains(wait)), "{waits:?}");
        assert!(waits.iter().any(|wait| *wait != waits[0]), "{waits:?}");
    }

    #[test]
    fn a_reader_gets_what_is_in_its_scope_and_what_it_asked_for() {
        let id = |id: &str| id.parse::<InstanceId>().unwrap();
        let mut filter = Filter {
            scope: Scope::Only(vec![id("a"), id("b")]),
            instance_id: None,
        };
        assert!(filter.allows(&id("a")) && filter.allows(&id("b")) && !filter.allows(&id("c")));
        filter.instance_id = Some(id("a"));
        assert!(filter.allows(&id("a")) && !filter.allows(&id("b")));
        filter.instance_id = Some(id("c"));
        assert!(!filter.allows(&id("c")));
    }
}
