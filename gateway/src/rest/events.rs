//! REST route that sends live events as server-sent events (HTML Living Standard, "Server-sent events").

use std::{
    collections::{BTreeSet, VecDeque},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use axum::{
    body::Body,
    extract::{FromRequestParts, State},
    http::{HeaderValue, Response, header, request::Parts},
};
use bytes::Bytes;
use futures::stream;
use metrics::{counter, gauge};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, IntoDeserializer},
};
use tokio::{
    sync::watch,
    task::yield_now,
    time::{Instant, Interval, MissedTickBehavior, interval},
};
use utoipa::{IntoParams, ToSchema};
use vmwatch_api::{
    InstanceId, Scope,
    events::{self, LiveEvent},
    lifecycle::MachineState,
    measures::VmValues,
    metrics::Restriction,
};
use vmwatch_bus::limits::Permit;
use vmwatch_service::jitter::jittered;

use super::{
    alerts::Alert,
    caller::{Caller, Recheck},
    extract::Query,
    measures::values_schema,
    operations::Operation,
    problem::Problem,
    time::Timestamp,
};
use crate::{
    Gateway,
    live::{EncodedEvent, Log, Reached, Start},
};

/// Interval of comment lines, which keep proxies from closing the connection and let clients detect a dead connection.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Interval at which a client's session or API token is checked while it receives events.
const SESSION_CHECK: Duration = Duration::from_secs(1);
/// Maximum size in bytes of a chunk, into which several small events are copied. A larger event is sent alone, without
/// copying it.
const CHUNK: usize = 4096;
/// Maximum delay before a disconnected browser reconnects.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Maximum number of ids in `instance_id`: more VMs than a screen can show.
const MAX_SELECTED: usize = 200;

/// Number of the last event that the client has seen. Browsers send it when they reconnect.
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
            .ok_or_else(|| Problem::invalid("Last-Event-ID must be the id of a received event"))
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Send only events of these VMs, and alerts about vmwatch itself: up to 200 ids, separated by commas.
    #[param(style = Form, explode = false, value_type = Option<Vec<InstanceId>>, min_items = 1, max_items = 200)]
    instance_id: Option<Selected>,
    /// Send only events of these kinds, separated by commas.
    #[param(inline, style = Form, explode = false, value_type = Option<Vec<EventKind>>, min_items = 1)]
    kind: Option<Kinds>,
}

/// Ids of the VMs whose events a client receives.
#[derive(Debug)]
struct Selected(BTreeSet<InstanceId>);

impl<'de> Deserialize<'de> for Selected {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.split(',').nth(MAX_SELECTED).is_some() {
            return Err(D::Error::custom(format!("must have at most {MAX_SELECTED} ids")));
        }
        let ids = text.split(',').map(str::parse).collect::<Result<_, _>>();
        ids.map(Self).map_err(D::Error::custom)
    }
}

/// Kinds of the events that a client receives.
#[derive(Debug)]
struct Kinds(Vec<EventKind>);

impl<'de> Deserialize<'de> for Kinds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let kinds = text
            .split(',')
            .map(|kind| EventKind::deserialize(kind.into_deserializer()));
        kinds.collect::<Result<_, _>>().map(Self)
    }
}

/// Kind of a live event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum EventKind {
    /// New values of a VM.
    Sample,
    /// New values that the hypervisor measured of a VM.
    HypervisorSample,
    /// A new process table of a VM.
    Processes,
    /// Progress of an operation on a VM.
    Operation,
    /// A changed state of a VM.
    Machine,
    /// The removal of a VM by an administrator.
    Removed,
    /// A changed alert of a VM, or one about vmwatch itself.
    Alert,
}

impl EventKind {
    /// The kind as [`LiveEvent::kind`] returns it.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Sample => "sample",
            Self::HypervisorSample => "hypervisor_sample",
            Self::Processes => "processes",
            Self::Operation => "operation",
            Self::Machine => "machine",
            Self::Removed => "removed",
            Self::Alert => "alert",
        }
    }
}

/// Data of a `sample` event: new values of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SampleEvent<'a> {
    /// Id of the VM.
    instance_id: &'a InstanceId,
    /// Time of the sample, by the clock of the VM.
    at: Timestamp,
    #[serde(flatten)]
    #[schema(schema_with = values_schema)]
    values: VmValues,
    /// Why the agent cannot see all processes of the VM, so that some are missing and `proc` is null; null if it can.
    #[schema(required)]
    restricted: Option<Restriction>,
}

/// Data of a `hypervisor_sample` event: new values that the hypervisor measured of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HypervisorSampleEvent<'a> {
    /// Id of the VM.
    instance_id: &'a InstanceId,
    /// Time of the sample, by the clock of the server.
    at: Timestamp,
    #[serde(flatten)]
    #[schema(schema_with = values_schema)]
    values: VmValues,
}

/// Data of a `processes` event: a new process table of a VM was stored.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProcessesEvent<'a> {
    /// Id of the VM.
    instance_id: &'a InstanceId,
    /// Time of the process table, by the clock of the VM.
    at: Timestamp,
}

/// Data of a `machine` event: the state of a VM changed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MachineEvent<'a> {
    /// Id of the VM.
    instance_id: &'a InstanceId,
    /// Time at which the state change was detected.
    at: Timestamp,
    /// New state of the VM on its hypervisor; null if no hypervisor has the VM any more.
    #[schema(required)]
    state: Option<MachineState>,
}

/// Data of a `removed` event: an administrator removed a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RemovedEvent<'a> {
    /// Id of the VM.
    instance_id: &'a InstanceId,
    /// Time at which the history of the VM had been deleted.
    at: Timestamp,
}

/// Follow live events
///
/// An endless stream of server-sent events named `sample`, `hypervisor_sample`, `processes`, `operation` (with the same data
/// as `GET /operations/{id}`), `machine`, `removed` and `alert` (with the same data as `GET /alerts/{id}`). Alerts about
/// vmwatch itself are sent to users with access to all VMs, whichever VMs are selected. Each event has JSON data and a number
/// as its id. The first event is `ready`, or `gap` if more events were missed since `Last-Event-ID` than can be replayed;
/// after `gap`, reload the displayed data. The event `end` means that the session or the API token has ended. A comment line
/// is sent every 15 seconds. A client that reads too slowly is disconnected; it can reconnect with the id of the last event
/// that it received.
#[utoipa::path(
    get, path = "/events", tag = "events", operation_id = "events",
    params(
        EventsQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "id of the last event that the client received"),
    ),
    responses((status = OK, description = "an endless stream of events", content_type = "text/event-stream", body = String)),
)]
pub(super) async fn follow(
    State(gateway): State<Arc<Gateway>>,
    caller: Caller,
    Query(query): Query<EventsQuery>,
    LastEventId(seen): LastEventId,
) -> Result<Response<Body>, Problem> {
    let permit = gateway.admission.enter_stream(&caller.principal().user).await?;
    let start = gateway.live.reader(seen).await?;
    let filter = Filter {
        scope: caller.principal().scope.clone(),
        selected: query.instance_id.map(|Selected(ids)| ids),
        kinds: query
            .kind
            .map(|Kinds(kinds)| kinds.into_iter().map(EventKind::as_str).collect()),
    };
    let reader = Reader::new(gateway, caller, filter, start, permit);
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
    // This header makes proxies such as nginx pass the endless response on without buffering it.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// Selects the events that a client receives.
struct Filter {
    scope: Scope,
    selected: Option<BTreeSet<InstanceId>>,
    kinds: Option<BTreeSet<&'static str>>,
}

impl Filter {
    /// Whether the client receives an event about this VM, or about vmwatch itself, which concerns all VMs.
    fn allows(&self, instance: Option<&InstanceId>, kind: &str) -> bool {
        let is_in_scope = match instance {
            Some(id) => self.selected.as_ref().is_none_or(|ids| ids.contains(id)) && self.scope.allows(id),
            None => self.scope == Scope::All,
        };
        is_in_scope && self.kinds.as_ref().is_none_or(|kinds| kinds.contains(kind))
    }
}

/// A client that is connected to the stream of live events.
struct Reader {
    gateway: Arc<Gateway>,
    caller: Caller,
    filter: Filter,
    log: Arc<Log>,
    reached: watch::Receiver<Reached>,
    /// Number of the last live event that was examined for this client.
    position: u64,
    /// Number of the newest event when the client connected; events up to this number count as replayed.
    newest: u64,
    /// First frame of the event stream; `None` once it was sent.
    begin: Option<Bytes>,
    /// Live events that are sent to the client next.
    next: VecDeque<Arc<EncodedEvent>>,
    session_check: Interval,
    last_frame: Instant,
    ended: bool,
    _permit: Permit,
}

impl Reader {
    fn new(gateway: Arc<Gateway>, caller: Caller, filter: Filter, start: Start, permit: Permit) -> Self {
        gauge!("vmwatch_event_readers").increment(1.0);
        let begin = if start.gap { "gap" } else { "ready" };
        // If the newest event's number were sent before the missed events, the client would believe that it has seen
        // them all.
        let id = (start.position == start.newest).then_some(start.newest);
        let mut session_check = interval(SESSION_CHECK);
        session_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            gateway,
            caller,
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

    /// Waits for the next bytes to send to the client; `None` ends the event stream.
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
                    match self.caller.check_again(&self.gateway).await {
                        Ok(Recheck::Unchanged) => {}
                        Ok(Recheck::Ended) => {
                            self.ended = true;
                            return Some(frame("end", None, "{}"));
                        }
                        // End the stream: when the client reconnects, it gets the events of its new scope, or the error
                        // why its session or API token cannot be checked now.
                        Ok(Recheck::Changed) | Err(_) => return None,
                    }
                    if self.last_frame.elapsed() >= HEARTBEAT {
                        return Some(Bytes::from_static(b":\n\n"));
                    }
                }
                reached = self.reached.changed(), if is_at_end => reached.ok()?,
                // Yield, so that a client with many events to catch up on does not delay other clients.
                () = yield_now(), if !is_at_end => {}
            }
        }
    }

    /// Returns the next events to send, as many as fit into one chunk.
    fn next_chunk(&mut self) -> Option<Bytes> {
        let mut bytes = 0;
        let together = self.next.iter().take_while(|event| {
            bytes += event.frame.len();
            bytes <= CHUNK
        });
        let together = together.count().max(1).min(self.next.len());
        let event: Vec<_> = self.next.drain(..together).collect();
        let again = event.iter().filter(|event| event.number <= self.newest).count();
        counter!("vmwatch_events_replayed_total").increment(again as u64);
        match event.as_slice() {
            [] => None,
            [one] => Some(one.frame.clone()),
            several => {
                let frames: Vec<&[u8]> = several.iter().map(|event| event.frame.as_ref()).collect();
                Some(frames.concat().into())
            }
        }
    }

    /// Takes more events from the log. Returns true if the client has caught up with the log, and `None` if the client
    /// is too far behind or the log has ended.
    fn take(&mut self) -> Option<bool> {
        let reached = *self.reached.borrow_and_update();
        let Some(taken) = self.log.take(self.position, |event| {
            self.filter.allows(event.instance.as_ref(), event.kind)
        }) else {
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

/// The first frame of the stream. It sets a random reconnection delay, so that the clients of a restarted gateway do
/// not all reconnect at once.
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

/// Encodes a live event as a server-sent event, once for all clients; `None` if clients do not receive such events.
pub(crate) fn encode(number: u64, event: &LiveEvent) -> Option<Bytes> {
    Some(frame(event.kind(), Some(number), &data(event)?))
}

/// Formats a server-sent event. JSON data needs no escaping, because encoded JSON contains no line breaks.
fn frame(event: &str, id: Option<u64>, data: &str) -> Bytes {
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    format!("{id}event: {event}\ndata: {data}\n\n").into()
}

fn data(event: &LiveEvent) -> Option<String> {
    let json = match event {
        LiveEvent::Sample(event) => serde_json::to_string(&SampleEvent::from(event)),
        LiveEvent::HypervisorSample(event) => serde_json::to_string(&HypervisorSampleEvent {
            instance_id: &event.instance_id,
            at: Timestamp::of_ms(event.at_ms),
            values: event.values,
        }),
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
        LiveEvent::Removed(event) => serde_json::to_string(&RemovedEvent {
            instance_id: &event.instance_id,
            at: Timestamp::of_ms(event.at_ms),
        }),
        LiveEvent::Alert(event) => serde_json::to_string(&Alert::from(event.alert.clone())),
        LiveEvent::Unstored(_) | LiveEvent::OverLimit(_) => return None,
    };
    // Encoding a flat struct of strings and numbers cannot fail.
    Some(json.unwrap_or_default())
}

impl<'a> From<&'a events::SampleEvent> for SampleEvent<'a> {
    fn from(event: &'a events::SampleEvent) -> Self {
        Self {
            instance_id: &event.instance_id,
            at: Timestamp::of_ms(event.at_ms),
            values: event.values,
            restricted: event.restricted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_event_is_formatted_as_server_sent_event() {
        let event = LiveEvent::Machine(events::MachineEvent {
            instance_id: "vm-1".parse().unwrap(),
            at_ms: 1_483_277_879_001,
            state: Some(MachineState::Running),
        });
        let frame = encode(7, &event).unwrap();
        assert_eq!(
            frame,
            "id: 7\nevent: machine\ndata: {\"instance_id\":\"vm-1\",\"at\":\"2017-01-01T13:37:59.001Z\",\"state\":\"running\"}\n\n"
        );
    }

    #[test]
    fn reconnection_delays_of_clients_are_spread() {
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
    fn event_filter_allows_only_scope_selected_vms_and_kinds() {
        let id = |id: &str| id.parse::<InstanceId>().unwrap();
        let mut filter = Filter {
            scope: Scope::Only(vec![id("a"), id("b"), id("c")]),
            selected: None,
            kinds: None,
        };
        let allowed = |filter: &Filter| {
            let allows = |instance: &&str| filter.allows(Some(&id(instance)), "sample");
            ["a", "b", "c", "d"]
                .into_iter()
                .filter(allows)
                .collect::<Vec<_>>()
        };
        assert_eq!(allowed(&filter), ["a", "b", "c"]);
        filter.selected = Some([id("a"), id("b"), id("d")].into());
        assert_eq!(allowed(&filter), ["a", "b"]);
        filter.kinds = Some(["sample", "machine"].into());
        assert_eq!(allowed(&filter), ["a", "b"]);
        filter.kinds = Some(["operation"].into());
        assert_eq!(allowed(&filter), [""; 0]);
    }

    #[test]
    fn alert_about_vmwatch_itself_is_sent_to_users_with_access_to_all_vms() {
        let mut filter = Filter {
            scope: Scope::All,
            selected: Some(["a".parse().unwrap()].into()),
            kinds: None,
        };
        assert!(filter.allows(None, "alert"));
        filter.kinds = Some(["sample"].into());
        assert!(!filter.allows(None, "alert"));
        filter.kinds = None;
        filter.scope = Scope::Only(vec!["a".parse().unwrap()]);
        assert!(!filter.allows(None, "alert"));
    }

    #[test]
    fn event_kinds_have_the_names_of_live_events() {
        for kind in [
            "sample",
            "hypervisor_sample",
            "processes",
            "operation",
            "machine",
            "removed",
            "alert",
        ] {
            let parsed: EventKind = serde_json::from_value(kind.into()).unwrap();
            assert_eq!(parsed.as_str(), kind);
        }
    }

    #[test]
    fn kinds_of_events_are_separated_by_commas() {
        let read = |kinds: &str| serde_json::from_value::<Kinds>(kinds.into());
        assert_eq!(
            read("operation,machine").unwrap().0,
            [EventKind::Operation, EventKind::Machine]
        );
        for bad in ["", "operation,", "none", "operation machine"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
