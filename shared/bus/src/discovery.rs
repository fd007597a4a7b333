//! Service discovery according to the NATS service convention (ADR-32): answers `$SRV.PING`, `$SRV.INFO` and
//! `$SRV.STATS`, so `nats micro` commands can list the services, and finds all running programs by `$SRV.PING`. The responder of the NATS client library is not used, for two reasons: it
//! aborts handlers when it stops, and it does not expose its subscriptions, so draining it would lose requests.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_nats::{Client, Message};
use bytes::Bytes;
use futures::{StreamExt, stream::SelectAll};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use vmwatch_api::{MethodInfo, wire::Fault};

use super::{Bus, context::random_id};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The requests that services answer.
const VERBS: &[&str] = &["PING", "INFO", "STATS"];
/// How long [`Bus::discover`] waits for the next answer, and for all answers together.
const QUIET: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(2);
/// Maximum number of replicas that are found.
const MAX_FOUND: usize = 1000;
/// Maximum length of a name, id or version that is accepted, in bytes.
const MAX_TEXT: usize = 128;

/// A running replica of a program.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Found {
    /// Name of the program, such as `vmwatch-metrics`.
    pub name: String,
    pub version: String,
    /// Random id of the process.
    pub id: String,
}

/// The running programs could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("there is no connection to NATS")]
    NotConnected,
    #[error("subscribing to the answers failed")]
    Subscribe(#[from] async_nats::SubscribeError),
    #[error("sending the request failed")]
    Publish(#[from] async_nats::PublishError),
}

impl Bus {
    /// Finds the running replicas of all programs that answer in time, sorted by name.
    pub async fn discover(&self) -> Result<Vec<Found>, DiscoveryError> {
        if !self.is_connected() {
            return Err(DiscoveryError::NotConnected);
        }
        let client = self.client();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await?;
        client
            .publish_with_reply("$SRV.PING", inbox, Bytes::new())
            .await?;
        let end = Instant::now() + LONGEST;
        let mut found = Vec::new();
        while found.len() < MAX_FOUND {
            let until = end.min(Instant::now() + QUIET);
            let Ok(Some(answer)) = timeout_at(until, answers.next()).await else {
                break;
            };
            // Without a program that answers, NATS sends an empty message.
            let replica: Option<Found> = serde_json::from_slice(&answer.payload).ok();
            found.extend(replica.filter(Found::is_valid));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Answers `$SRV.PING` for a program without methods until shutdown.
    pub async fn announce(&self, name: &'static str, shutdown: CancellationToken) {
        let discovery = Discovery {
            verbs: &["PING"],
            ..Discovery::new(name, Vec::new())
        };
        discovery.answer(self.client().clone(), shutdown).await;
    }
}

impl Found {
    fn is_valid(&self) -> bool {
        [&self.name, &self.version, &self.id]
            .iter()
            .all(|text| text.len() <= MAX_TEXT)
    }
}

/// Statistics of one method (an "endpoint" in the NATS service convention) since the service started.
pub(super) struct EndpointStats {
    info: MethodInfo,
    requests: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    last_error: Mutex<String>,
}

impl EndpointStats {
    pub(super) fn new(info: MethodInfo) -> Self {
        Self {
            info,
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            last_error: Mutex::default(),
        }
    }

    pub(super) fn record(&self, took: Duration, fault: Option<&Fault>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(
            u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        if let Some(fault) = fault {
            self.errors.fetch_add(1, Ordering::Relaxed);
            let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
            last.clone_from(&fault.message);
        }
    }

    fn snapshot(&self) -> EndpointReport<'_> {
        let requests = self.requests.load(Ordering::Relaxed);
        let processing_time = self.nanoseconds.load(Ordering::Relaxed);
        EndpointReport {
            name: self.info.subject,
            subject: self.info.full_subject(),
            queue_group: self.info.service.name(),
            num_requests: requests,
            num_errors: self.errors.load(Ordering::Relaxed),
            last_error: self
                .last_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            processing_time,
            average_processing_time: processing_time.checked_div(requests).unwrap_or(0),
        }
    }
}

#[derive(Serialize)]
struct EndpointReport<'a> {
    name: &'a str,
    subject: String,
    queue_group: &'a str,
    num_requests: u64,
    num_errors: u64,
    last_error: String,
    processing_time: u64,
    average_processing_time: u64,
}

#[derive(Serialize)]
struct EndpointInfo<'a> {
    name: &'a str,
    subject: String,
    queue_group: &'a str,
}

#[derive(Serialize)]
struct Reply<'a, Extra: Serialize> {
    #[serde(rename = "type")]
    kind: &'a str,
    name: &'a str,
    id: &'a str,
    version: &'a str,
    metadata: Metadata,
    #[serde(flatten)]
    extra: Extra,
}

#[derive(Serialize)]
struct Metadata {}

#[derive(Serialize)]
struct InfoExtra<'a> {
    description: &'a str,
    endpoints: Vec<EndpointInfo<'a>>,
}

#[derive(Serialize)]
struct StatsExtra<'a> {
    started: String,
    endpoints: Vec<EndpointReport<'a>>,
}

#[derive(Serialize)]
struct PingExtra {}

/// Answers discovery requests for one running replica of a program.
pub(super) struct Discovery {
    name: &'static str,
    verbs: &'static [&'static str],
    id: String,
    started: SystemTime,
    endpoints: Vec<Arc<EndpointStats>>,
}

impl Discovery {
    pub(super) fn new(name: &'static str, endpoints: Vec<Arc<EndpointStats>>) -> Self {
        Self {
            name,
            verbs: VERBS,
            id: random_id(),
            started: SystemTime::now(),
            endpoints,
        }
    }

    /// Answers discovery requests until shutdown. If NATS refuses the subscriptions, the service runs without
    /// discovery.
    pub(super) async fn answer(self, client: Client, shutdown: CancellationToken) {
        let mut messages = SelectAll::new();
        for &verb in self.verbs {
            let (name, id) = (self.name, &self.id);
            for subject in [
                format!("$SRV.{verb}"),
                format!("$SRV.{verb}.{name}"),
                format!("$SRV.{verb}.{name}.{id}"),
            ] {
                match client.subscribe(subject).await {
                    Ok(subscription) => messages.push(subscription.map(move |message| (verb, message))),
                    Err(error) => {
                        warn!(%error, "service discovery subscription failed; the service runs without discovery");
                    }
                }
            }
        }
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                next = messages.next() => match next {
                    Some((verb, message)) => self.reply(&client, verb, message).await,
                    None => return,
                },
            }
        }
    }

    async fn reply(&self, client: &Client, verb: &str, message: Message) {
        let Some(reply_to) = message.reply else { return };
        let body = match verb {
            "PING" => self.encode("io.nats.micro.v1.ping_response", PingExtra {}),
            "INFO" => self.encode(
                "io.nats.micro.v1.info_response",
                InfoExtra {
                    description: "a service of vmwatch",
                    endpoints: self.endpoint_infos(),
                },
            ),
            _ => self.encode(
                "io.nats.micro.v1.stats_response",
                StatsExtra {
                    started: jiff::Timestamp::try_from(self.started)
                        .unwrap_or_default()
                        .to_string(),
                    endpoints: self.endpoints.iter().map(|stats| stats.snapshot()).collect(),
                },
            ),
        };
        if let Err(error) = client.publish(reply_to, body.into()).await {
            warn!(%error, "sending a discovery reply failed");
        }
    }

    fn endpoint_infos(&self) -> Vec<EndpointInfo<'_>> {
        let info = |stats: &Arc<EndpointStats>| EndpointInfo {
            name: stats.info.subject,
            subject: stats.info.full_subject(),
            queue_group: stats.info.service.name(),
        };
        self.endpoints.iter().map(info).collect()
    }

    fn encode<Extra: Serialize>(&self, kind: &str, extra: Extra) -> Vec<u8> {
        let reply = Reply {
            kind,
            name: self.name,
            id: &self.id,
            version: VERSION,
            metadata: Metadata {},
            extra,
        };
        // Encoding cannot fail, because the discovery reply has only text and number fields.
        serde_json::to_vec(&reply).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmwatch_api::{Method, Service, metrics::VmLatest, wire::FaultKind};

    #[test]
    fn service_statistics_follow_the_nats_convention() {
        let stats = Arc::new(EndpointStats::new(VmLatest::INFO));
        stats.record(Duration::from_nanos(100), None);
        stats.record(
            Duration::from_nanos(300),
            Some(&Fault::new(FaultKind::Backend, "no store")),
        );
        let discovery = Discovery::new(Service::Metrics.name(), vec![stats]);
        let snapshot: Vec<_> = discovery.endpoints.iter().map(|stats| stats.snapshot()).collect();
        let body = discovery.encode(
            "t",
            StatsExtra {
                started: String::new(),
                endpoints: snapshot,
            },
        );
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let endpoint = json.pointer("/endpoints/0").unwrap();
        assert_eq!(endpoint["num_requests"], 2);
        assert_eq!(endpoint["num_errors"], 1);
        assert_eq!(endpoint["average_processing_time"], 200);
        assert_eq!(endpoint["last_error"], "no store");
        assert_eq!(json["name"], "vmwatch-metrics");
        assert_eq!(json["metadata"], serde_json::json!({}));
    }
}
