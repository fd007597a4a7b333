//! Publishes an evaluation record for each sample part that was stored, from which alert-svc evaluates its rules.
//!
//! The records of a batch are published after its rows are stored and before its messages are acknowledged, so a killed
//! replica loses none: the messages are redelivered and their records published again. A record that JetStream does not
//! confirm in time is counted as lost and is not published again, because samples must be stored even if the stream of
//! evaluation records is unavailable.

mod record;
mod watched;

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError, RwLockReadGuard},
    time::Duration,
};

use async_nats::{
    HeaderMap,
    jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
};
use futures::{StreamExt, stream};
use metrics::{counter, histogram};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use vmwatch_api::{
    Service,
    alerts::evaluation::{
        EVALUATION_BYTES, EVALUATION_KEEP_SECONDS, EVALUATION_STREAM, EVALUATION_SUBJECT_PREFIX,
        EvaluationRecord, WATCHED_BUCKET, evaluation_subject,
    },
};
use vmwatch_bus::{Bus, follow::Follower, jetstream::JetStreamError, provision::ensure_stream};

pub(crate) use self::{record::record, watched::WatchedTable};
use crate::{MetricsError, config::StreamSettings};

/// Maximum time for which a batch waits until its records are confirmed; a sixth of the ack wait if that is shorter.
const LIMIT: Duration = Duration::from_secs(5);
/// Time without a confirmation after which the stream counts as unavailable.
const SILENCE: Duration = Duration::from_millis(500);
/// Maximum number of records that are published and not yet confirmed.
const MAX_UNCONFIRMED: usize = 256;
/// Time for which no record is published after the stream was unavailable, which therefore delays the storing of samples by
/// less than a tenth.
const PAUSE: Duration = Duration::from_secs(5);
/// The copy of the watched names counts as stale if it was last confirmed to be current longer ago than this. A stale copy
/// is used nevertheless, because each record names the revision of the list that it is based on.
const STALE_AFTER: Duration = Duration::from_secs(10);
/// JetStream's duplicate window; the minimum that the server accepts, because records have no message ids.
const DUPLICATE_WINDOW: Duration = Duration::from_millis(100);

/// Publishes evaluation records.
pub(crate) struct Evaluations {
    bus: Bus,
    stream: Config,
    watched: Follower<WatchedTable>,
    limit: Duration,
    /// Until when no record is published.
    paused: Mutex<Option<Instant>>,
    /// Notified when the stream did not answer or was missing.
    failed: Notify,
}

/// The configuration of the stream of evaluation records.
pub(crate) fn stream(settings: &StreamSettings) -> Config {
    Config {
        name: EVALUATION_STREAM.to_owned(),
        description: Some("values of stored samples, for the rules of alerts".to_owned()),
        subjects: vec![format!("{EVALUATION_SUBJECT_PREFIX}*")],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_age: Duration::from_secs(EVALUATION_KEEP_SECONDS),
        max_bytes: EVALUATION_BYTES,
        duplicate_window: DUPLICATE_WINDOW,
        storage: StorageType::File,
        num_replicas: settings.replicas,
        ..Config::default()
    }
}

/// How the publication of the records of a batch ended.
#[derive(Debug, Default)]
struct Published {
    confirmed: usize,
    /// The last error, and whether the next records would fail as well.
    failure: Option<(String, bool)>,
}

impl Evaluations {
    /// Starts following the KV bucket of watched names until shutdown, even if it does not exist yet.
    pub(crate) fn new(bus: &Bus, settings: &StreamSettings, shutdown: &CancellationToken) -> Self {
        let table = WatchedTable::default();
        Self {
            bus: bus.clone(),
            stream: stream(settings),
            watched: Follower::start(bus, WATCHED_BUCKET, STALE_AFTER, table, shutdown.clone()),
            limit: LIMIT.min(settings.ack_wait / 6),
            paused: Mutex::new(None),
            failed: Notify::new(),
        }
    }

    /// Creates the stream if it is missing. A failure is logged and keeps nothing else from working.
    pub(crate) async fn prepare(&self) {
        if let Err(error) = ensure_stream(&self.bus, Service::Metrics, &self.stream).await {
            let cause = MetricsError::from(error).cause();
            warn!(
                cause,
                "creating the stream of evaluation records failed; retrying"
            );
            self.failed.notify_one();
        }
    }

    /// Creates the stream again if it was deleted or could not be created, until shutdown.
    pub(crate) async fn keep_stream(self: Arc<Self>, shutdown: CancellationToken) {
        let keeping = async {
            loop {
                self.failed.notified().await;
                self.prepare().await;
                sleep(PAUSE).await;
            }
        };
        let _: Option<Infallible> = shutdown.run_until_cancelled(keeping).await;
    }

    /// The process names that rules are about. Their revision is 0 until they have been read.
    pub(crate) fn watched(&self) -> RwLockReadGuard<'_, WatchedTable> {
        self.watched.read()
    }

    /// Publishes the records of a batch. It takes at most [`LIMIT`], or [`SILENCE`] if the stream is unavailable.
    pub(crate) async fn publish(&self, records: Vec<EvaluationRecord>) {
        let count = records.len();
        if count == 0 {
            return;
        }
        let started = Instant::now();
        if self.paused().is_some_and(|until| started < until) {
            lost(count);
            debug!(
                count,
                "evaluation records were dropped; the stream did not answer"
            );
            return;
        }
        let Published { confirmed, failure } = self.publish_by(started + self.limit, records).await;
        histogram!("vmwatch_evaluation_publish_seconds").record(started.elapsed().as_secs_f64());
        counter!("vmwatch_evaluations_sent_total").increment(confirmed as u64);
        let Some((error, is_lasting)) = failure else {
            return;
        };
        let unconfirmed = count - confirmed;
        lost(unconfirmed);
        warn!(
            error,
            unconfirmed, "publishing evaluation records failed; rules are evaluated without them"
        );
        if is_lasting {
            *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + PAUSE);
            self.failed.notify_one();
        }
    }

    fn paused(&self) -> Option<Instant> {
        *self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn publish_by(&self, end: Instant, records: Vec<EvaluationRecord>) -> Published {
        let sending = stream::iter(records).map(|record| self.send(record));
        let mut sending = Box::pin(sending.buffer_unordered(MAX_UNCONFIRMED));
        let mut published = Published::default();
        loop {
            let patience = end.min(Instant::now() + SILENCE);
            match timeout_at(patience, sending.next()).await {
                Ok(None) => return published,
                Ok(Some(Ok(()))) => published.confirmed += 1,
                Ok(Some(Err(error))) => {
                    let is_lasting = !matches!(
                        error,
                        MetricsError::Encode(_) | MetricsError::Evaluation(JetStreamError::TooLarge)
                    );
                    published.failure = Some((error.cause(), is_lasting));
                    if is_lasting {
                        return published;
                    }
                }
                Err(_) => {
                    published.failure = Some(("JetStream did not confirm them in time".to_owned(), true));
                    return published;
                }
            }
        }
    }

    async fn send(&self, record: EvaluationRecord) -> Result<(), MetricsError> {
        let body = serde_json::to_vec(&record)?;
        let subject = evaluation_subject(&record.instance_id);
        let publishing = self
            .bus
            .publish_stored(subject, HeaderMap::new(), body.into(), self.limit);
        publishing.await.map(drop).map_err(MetricsError::Evaluation)
    }
}

fn lost(count: usize) {
    counter!("vmwatch_evaluations_lost_total").increment(count as u64);
}
