//! Serves methods over NATS and performs the checks that are common to all handlers.
//!
//! ```text
//! message ─ headers ─ permit? ─ past deadline? ─ role ─ decode ─ instance in scope? ─ handler ─ envelope
//!                      │         └ timeout        └ forbidden     └ as if it did not exist
//!                      └ overloaded, throttled
//! ```

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use async_nats::{Message, Subject};
use bytes::Bytes;
use futures::{
    FutureExt, TryFutureExt,
    future::{BoxFuture, MapErr},
};
use metrics::{counter, gauge, histogram};
use opentelemetry::global::get_text_map_propagator;
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, Span, debug, error, field::Empty, info, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use vmwatch_api::{
    Access, Method, MethodInfo, Principal, Service,
    wire::{Envelope, Fault, FaultKind},
};
use vmwatch_service::config::{DRAIN_DEADLINE, Environment, Invalid, Setting};

use super::{
    Bus, BusError, Context, HeaderExtractor,
    call::late,
    codec::{bytes_of, decode, encode, fault_bytes},
    discovery::{Discovery, EndpointStats},
    drain::Counted,
    refusal::Refusals,
};
use crate::limits::{Full, LimitSettings, Limits, Permit};

/// The settings that every service has in addition to [`crate::limits::SETTINGS`].
pub const SETTINGS: &[Setting] = &[DRAIN_DEADLINE];

/// The limits that apply to the requests of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeSettings {
    /// Maximum concurrent requests, by class.
    pub limits: LimitSettings,
    /// How long a stopping service waits for requests in flight.
    pub drain_deadline: Duration,
}

impl ServeSettings {
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let limits = LimitSettings::read(env);
        let drain_deadline = env.duration(&DRAIN_DEADLINE);
        Ok(Self {
            limits: limits?,
            drain_deadline: drain_deadline?,
        })
    }
}

pub use super::refusal::Refused;

type Handler = dyn Fn(Context, Bytes) -> BoxFuture<'static, Result<Vec<u8>, Fault>> + Send + Sync;

struct Endpoint {
    info: MethodInfo,
    handler: Box<Handler>,
    stats: Arc<EndpointStats>,
}

/// Creates a handler from a function and the state that it shares with other handlers.
pub fn bind<S, Params, Reply, E, Answer, F>(
    state: &Arc<S>,
    handler: F,
) -> impl Fn(Context, Params) -> MapErr<Answer, fn(E) -> Fault> + Send + Sync + use<S, Params, Reply, E, Answer, F>
where
    S: Send + Sync + 'static,
    E: Into<Fault>,
    F: Fn(Arc<S>, Context, Params) -> Answer + Send + Sync + 'static,
    Answer: Future<Output = Result<Reply, E>>,
{
    let state = Arc::clone(state);
    move |context, params| handler(Arc::clone(&state), context, params).map_err(E::into as fn(E) -> Fault)
}

#[must_use = "a server serves only once it runs"]
pub struct Server {
    bus: Bus,
    service: Service,
    settings: ServeSettings,
    endpoints: Vec<Endpoint>,
    refusals: Refusals,
}

impl Server {
    /// Creates a server that has no methods yet.
    pub fn new(bus: &Bus, service: Service, settings: ServeSettings) -> Self {
        Self {
            bus: bus.clone(),
            service,
            settings,
            endpoints: Vec::new(),
            refusals: Refusals::default(),
        }
    }

    /// Sets a callback for requests whose principal lacks permission. The callback runs before the caller receives the
    /// fault.
    pub fn on_refusal<Done>(self, hook: impl Fn(Refused) -> Done + Send + Sync + 'static) -> Self
    where
        Done: Future<Output = ()> + Send + 'static,
    {
        self.refusals.call(hook);
        self
    }

    /// Adds a method to the server. [`bind`] creates a handler from a function with shared state.
    pub fn method<M, F, Answer>(mut self, _: M, handler: F) -> Self
    where
        M: Method,
        F: Fn(Context, M::Params) -> Answer + Send + Sync + 'static,
        Answer: Future<Output = Result<M::Reply, Fault>> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let refusals = self.refusals.clone();
        let decoded = move |context: Context, body: Bytes| -> BoxFuture<'static, Result<Vec<u8>, Fault>> {
            let handler = Arc::clone(&handler);
            let refusals = refusals.clone();
            Box::pin(async move {
                if let Err(fault) = check_role(M::INFO.access, context.principal.as_ref()) {
                    return Err(refusals.note(M::INFO, context, body, fault).await);
                }
                let params: M::Params = decode(&body)?;
                let reply = match (M::instance(&params), &context.principal) {
                    (Some(instance), Some(principal)) if !principal.scope.allows(instance) => {
                        match M::hidden() {
                            Ok(reply) => reply,
                            Err(fault) => return Err(refusals.note(M::INFO, context, body, fault).await),
                        }
                    }
                    _ => handler(context, params).await?,
                };
                encode(&Envelope::success(reply))
            })
        };
        self.endpoints.push(Endpoint {
            info: M::INFO,
            handler: Box::new(decoded),
            stats: Arc::new(EndpointStats::new(M::INFO)),
        });
        self
    }

    /// Serves requests until `shutdown`, then drains: it receives requests that were already sent, completes them, and
    /// flushes the replies. Calls `subscribed` once NATS delivers requests to this server; until then the program is
    /// not ready.
    pub async fn run(self, shutdown: CancellationToken, subscribed: impl FnOnce()) -> Result<(), BusError> {
        let limits = Limits::new(self.settings.limits);
        let work = TaskTracker::new();
        let discovery = Discovery::new(
            self.service.name(),
            self.endpoints.iter().map(|e| Arc::clone(&e.stats)).collect(),
        );
        let mut loops = tokio::task::JoinSet::new();
        for endpoint in self.endpoints {
            let subject = endpoint.info.full_subject();
            let queue = self.service.name().to_owned();
            let subscription = Counted::subscribe(&self.bus, subject.into(), queue).await?;
            let worker = Worker {
                bus: self.bus.clone(),
                endpoint: Arc::new(endpoint),
                limits: limits.clone(),
                work: work.clone(),
            };
            loops.spawn(worker.take(subscription, shutdown.clone(), self.settings.drain_deadline));
        }
        if shutdown.run_until_cancelled(self.bus.settled()).await.is_some() {
            subscribed();
        }
        // Discovery starts last, so a service that can be discovered already answers requests.
        loops.spawn(discovery.answer(self.bus.client().clone(), shutdown.clone()));
        info!(service = self.service.name(), "serving requests on the bus");
        let stopped_at = async {
            shutdown.cancelled().await;
            Instant::now()
        };
        let (stopped_at, _) = tokio::join!(stopped_at, loops.join_all());
        work.close();
        let left = self.settings.drain_deadline.saturating_sub(stopped_at.elapsed());
        if tokio::time::timeout(left, work.wait()).await.is_err() {
            warn!(
                unfinished = work.len(),
                "the drain deadline passed with unfinished requests"
            );
        }
        self.bus.flush(Duration::from_secs(2)).await;
        info!("all requests on the bus have finished");
        Ok(())
    }
}

/// The task that receives the requests of one method.
struct Worker {
    bus: Bus,
    endpoint: Arc<Endpoint>,
    limits: Limits,
    work: TaskTracker,
}

impl Worker {
    async fn take(self, mut subscription: Counted, shutdown: CancellationToken, drain_deadline: Duration) {
        let mut outages = self.bus.outages();
        loop {
            tokio::select! {
                biased;
                Ok(()) = outages.changed() => {
                    let renewal = subscription.renewed(|message| self.start(message));
                    // If the client's queue is full, the renewal waits until NATS is connected again.
                    match shutdown.run_until_cancelled(renewal).await {
                        Some(Ok(renewed)) => subscription = renewed,
                        Some(Err(error)) => {
                            let method = self.endpoint.info.subject;
                            error!(%error, method, "resubscription failed; this method is no longer served");
                            return;
                        }
                        // Without a connection no request can arrive, so there is nothing to drain.
                        None => return,
                    }
                }
                () = shutdown.cancelled() => break,
                message = subscription.next() => match message {
                    Some(message) => self.start(message),
                    None => break,
                },
            }
        }
        subscription
            .drain(drain_deadline, |message| self.start(message))
            .await;
    }

    fn start(&self, message: Message) {
        let Some(reply_to) = message.reply.clone() else {
            debug!(
                method = self.endpoint.info.subject,
                "ignored a request without a reply subject"
            );
            return;
        };
        let (bus, endpoint) = (self.bus.clone(), Arc::clone(&self.endpoint));
        let limits = self.limits.clone();
        // Refusals are also sent from the task of their request, so a full write buffer does not block the task that
        // receives requests.
        self.work.spawn(async move {
            let context = Context::from_headers(message.headers.as_ref());
            let permit = match &context {
                // A request whose deadline has passed needs no permit. A replica that was frozen receives many of them
                // at once, which would otherwise use up the user's share of the permits.
                Ok(context) if context.remaining().is_zero() => Ok(None),
                Ok(context) => {
                    let user = context.principal.as_ref();
                    let user = user.map(|principal| principal.user.as_str());
                    limits.for_class(endpoint.info.class).enter(user).await.map(Some)
                }
                Err(_) => limits.for_class(endpoint.info.class).enter(None).await.map(Some),
            };
            match permit {
                Ok(permit) => endpoint.answer(&bus, context, message, reply_to, permit).await,
                Err(full) => send(&bus, reply_to, fault_bytes(&endpoint.shed(full))).await,
            }
        });
    }
}

impl Endpoint {
    fn shed(&self, full: Full) -> Fault {
        let (method, limit) = (self.info.subject, full.label());
        counter!("vmwatch_requests_shed_total", "method" => method, "limit" => limit).increment(1);
        full.fault("the service", self.info.class.as_str())
    }

    async fn answer(
        &self,
        bus: &Bus,
        context: Result<Context, Fault>,
        message: Message,
        reply_to: Subject,
        permit: Option<Permit>,
    ) {
        let span = info_span!(
            "request",
            otel.name = self.info.subject,
            otel.kind = "server",
            rpc.system = "nats",
            rpc.method = self.info.subject,
            request_id = Empty,
            user = Empty,
            otel.status_code = Empty,
        );
        let parent = get_text_map_propagator(|p| p.extract(&HeaderExtractor(message.headers.as_ref())));
        // This call fails only without an OpenTelemetry layer, in which case there is no trace to continue.
        let _ = span.set_parent(parent);
        let answered = self.answer_in_span(bus, context, message.payload, reply_to);
        answered.instrument(span).await;
        drop(permit);
    }

    async fn answer_in_span(
        &self,
        bus: &Bus,
        context: Result<Context, Fault>,
        body: Bytes,
        reply_to: Subject,
    ) {
        let started = Instant::now();
        gauge!("vmwatch_requests_in_flight", "method" => self.info.subject).increment(1.0);
        let finished = |outcome: &Result<Vec<u8>, Fault>| self.note(outcome, started.elapsed());
        match context.and_then(|context| self.admit(context)) {
            Err(fault) => {
                let outcome = Err(fault);
                finished(&outcome);
                send(bus, reply_to, bytes_of(outcome)).await;
            }
            Ok(context) => {
                let deadline = Instant::now() + context.remaining();
                let handled = AssertUnwindSafe((self.handler)(context, body)).catch_unwind();
                tokio::pin!(handled);
                if let Ok(outcome) = tokio::time::timeout_at(deadline, &mut handled).await {
                    let outcome = outcome.unwrap_or_else(|_| Err(panicked()));
                    let outcome = outcome.and_then(|reply| self.fitting(bus, reply));
                    finished(&outcome);
                    send(bus, reply_to, bytes_of(outcome)).await;
                } else {
                    let outcome = Err(late());
                    finished(&outcome);
                    send(bus, reply_to, bytes_of(outcome)).await;
                    // The handler continues after the deadline and keeps its permit. It must not be cancelled:
                    // cancelling a call of the MongoDB driver is unsafe, and an operation must reach its final state.
                    if handled.await.is_err() {
                        error!("the handler panicked after its deadline");
                    }
                }
            }
        }
        gauge!("vmwatch_requests_in_flight", "method" => self.info.subject).decrement(1.0);
    }

    /// Refuses requests whose deadline has passed, before their parameters are decoded.
    fn admit(&self, context: Context) -> Result<Context, Fault> {
        let span = Span::current();
        span.record("request_id", context.request_id.as_str());
        if let Some(principal) = &context.principal {
            span.record("user", principal.user.as_str());
        }
        if context.remaining().is_zero() {
            counter!("vmwatch_requests_late_total", "method" => self.info.subject).increment(1);
            return Err(late());
        }
        Ok(context)
    }

    /// Replaces a reply that exceeds the payload limit of NATS with a fault. Otherwise the caller would wait until its
    /// deadline.
    fn fitting(&self, bus: &Bus, reply: Vec<u8>) -> Result<Vec<u8>, Fault> {
        let (bytes, most) = (reply.len(), bus.client().max_payload());
        if bytes <= most {
            return Ok(reply);
        }
        counter!("vmwatch_replies_too_large_total", "method" => self.info.subject).increment(1);
        warn!(
            method = self.info.subject,
            bytes, most, "reply exceeds the payload limit of the bus"
        );
        Err(Fault::new(
            FaultKind::Internal,
            "the reply is larger than the message bus allows; request fewer items or a shorter time range",
        ))
    }

    fn note(&self, outcome: &Result<Vec<u8>, Fault>, took: Duration) {
        self.stats.record(took, outcome.as_ref().err());
        let result = outcome.as_ref().err().map_or("ok", |fault| fault.kind.as_str());
        counter!("vmwatch_requests_total", "method" => self.info.subject, "result" => result).increment(1);
        histogram!("vmwatch_request_seconds", "method" => self.info.subject).record(took.as_secs_f64());
        let Err(fault) = outcome else { return };
        let cause = fault.cause_chain();
        match fault.kind {
            FaultKind::Internal | FaultKind::Backend | FaultKind::Timeout => {
                Span::current().record("otel.status_code", "ERROR");
                warn!(method = self.info.subject, kind = %fault.kind, cause, "{}", fault.logged());
            }
            _ => debug!(method = self.info.subject, kind = %fault.kind, cause, "{}", fault.logged()),
        }
    }
}

/// Checks that the principal has the role that a method requires.
pub fn check_role(access: Access, principal: Option<&Principal>) -> Result<(), Fault> {
    match (access, principal) {
        (Access::Public, _) => Ok(()),
        (Access::Role(needed), Some(principal)) if principal.role >= needed => Ok(()),
        (Access::Role(needed), _) => Err(Fault::new(
            FaultKind::Forbidden,
            format!("this request requires the role {needed}"),
        )),
    }
}

fn panicked() -> Fault {
    Fault::new(
        FaultKind::Internal,
        "the service failed to process this request; the cause is in its log",
    )
}

async fn send(bus: &Bus, reply_to: Subject, envelope: Vec<u8>) {
    if let Err(error) = bus.client().publish(reply_to, envelope.into()).await {
        warn!(%error, "sending a reply failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmwatch_api::{Role, Scope};

    #[test]
    fn principal_may_call_methods_up_to_its_role() {
        let as_role = |role| {
            Some(Principal {
                user: "u".into(),
                role,
                scope: Scope::All,
            })
        };
        let needs_operator = Access::Role(Role::Operator);
        assert!(check_role(needs_operator, None).is_err());
        assert!(check_role(needs_operator, as_role(Role::Viewer).as_ref()).is_err());
        assert!(check_role(needs_operator, as_role(Role::Operator).as_ref()).is_ok());
        assert!(check_role(needs_operator, as_role(Role::Admin).as_ref()).is_ok());
        assert!(check_role(Access::Public, None).is_ok());
    }
}
