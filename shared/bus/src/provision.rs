//! Creates JetStream streams, KV buckets and durable consumers. A service creates missing ones but never changes
//! existing ones.
//!
//! Each stream is owned by one service. Only the owner's `setup` command ([`setup`]) changes an existing stream. The
//! command uses a separate NATS user, because permission to change a stream's limits implies the power to delete its
//! messages.

mod difference;
pub mod setup;

use std::time::Duration;

use async_nats::jetstream::{
    ErrorCode,
    consumer::{self, PullConsumer, pull},
    stream::{Config, DiscardPolicy, Info, StorageType},
};
use tracing::{info, warn};
use vmwatch_api::Service;

use self::difference::{differences, listed};
use super::{
    Bus,
    jetstream::{Existing, JetStreamError},
};

/// JetStream normally answers within milliseconds; after this time it counts as unreachable.
const DEADLINE: Duration = Duration::from_secs(3);

/// A JetStream stream and its durable consumers, as configured by the service that owns them.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The configuration of the stream. JetStream stores a KV bucket as a stream as well.
    pub stream: Config,
    pub consumers: Vec<pull::Config>,
}

impl From<Config> for Wanted {
    fn from(stream: Config) -> Self {
        Self {
            stream,
            consumers: Vec::new(),
        }
    }
}

/// The configuration of a JetStream KV bucket that keeps only the latest value of each key.
#[derive(Debug, Clone, Copy)]
pub struct BucketConfig {
    pub name: &'static str,
    /// The description that `nats stream info` shows.
    pub description: &'static str,
    /// Maximum age of a value; older values are deleted.
    pub max_age: Duration,
    /// Maximum size of the KV bucket; writes beyond it are refused.
    pub max_bytes: i64,
    /// Number of replicas in a NATS cluster.
    pub replicas: usize,
}

impl From<BucketConfig> for Config {
    fn from(bucket: BucketConfig) -> Self {
        Self {
            name: format!("KV_{}", bucket.name),
            description: Some(bucket.description.to_owned()),
            subjects: vec![format!("$KV.{}.>", bucket.name)],
            max_messages_per_subject: 1,
            max_bytes: bucket.max_bytes,
            max_age: bucket.max_age,
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: bucket.replicas,
            allow_direct: true,
            deny_delete: true,
            // Without this flag, a client with permission to write one key could purge the bucket by sending a rollup
            // header.
            deny_purge: true,
            allow_rollup: false,
            ..Self::default()
        }
    }
}

impl From<BucketConfig> for Wanted {
    fn from(bucket: BucketConfig) -> Self {
        Config::from(bucket).into()
    }
}

/// A stream, KV bucket or consumer could not be created, read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    #[error("JetStream refused {0}")]
    Refused(String, #[source] async_nats::Error),
    #[error("JetStream did not answer in time to a request about {0}")]
    Timeout(String),
    #[error("the configuration of a stream could not be encoded")]
    Encode(#[from] serde_json::Error),
}

/// Creates the stream if it is missing, and returns its state. An existing stream is not changed; if it differs from
/// the configuration, a warning lists the differences.
pub async fn ensure_stream(bus: &Bus, owner: Service, wanted: &Config) -> Result<Info, ProvisionError> {
    if let Some(found) = find_stream(bus, &wanted.name).await? {
        warn_of_difference(owner, &wanted.name, &differences(wanted, &found.config)?);
        return Ok(found);
    }
    let made = create_stream(bus, wanted).await?;
    info!(stream = wanted.name, "created a JetStream stream");
    Ok(made)
}

/// Creates the durable consumer if it is missing, and returns it. An existing consumer is not changed.
pub async fn ensure_consumer(
    bus: &Bus,
    stream: &str,
    owner: Service,
    wanted: &pull::Config,
) -> Result<PullConsumer, ProvisionError> {
    let name = consumer_name(wanted);
    let info = if let Some(found) = find_consumer(bus, stream, name).await? {
        warn_of_difference(owner, name, &differences(wanted, &found.config)?);
        found
    } else {
        let creating = bus.create_consumer(stream, wanted.clone(), Existing::Keep, DEADLINE);
        let created = creating.await.map_err(|error| failed(name, error))?;
        info!(consumer = name, "created a JetStream consumer");
        created
    };
    bus.pull_consumer(info).map_err(|error| failed(name, error))
}

fn warn_of_difference(owner: Service, name: &str, differences: &[difference::Difference]) {
    if !differences.is_empty() {
        warn!(
            name,
            differences = listed(differences),
            "a stream or consumer differs from the settings; run `{} setup` to change it",
            owner.name()
        );
    }
}

async fn find_stream(bus: &Bus, name: &str) -> Result<Option<Info>, ProvisionError> {
    match bus.stream_info(name, DEADLINE).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == Some(ErrorCode::STREAM_NOT_FOUND) => Ok(None),
        Err(error) => Err(failed(name, error)),
    }
}

async fn create_stream(bus: &Bus, wanted: &Config) -> Result<Info, ProvisionError> {
    let name = wanted.name.as_str();
    match bus.create_stream(wanted, DEADLINE).await {
        // Another replica with different settings has just created the stream.
        Err(error) if error.code() == Some(ErrorCode::STREAM_NAME_EXIST) => {
            let found = bus.stream_info(name, DEADLINE).await;
            found.map_err(|error| failed(name, error))
        }
        made => made.map_err(|error| failed(name, error)),
    }
}

async fn find_consumer(
    bus: &Bus,
    stream: &str,
    name: &str,
) -> Result<Option<consumer::Info>, ProvisionError> {
    match bus.consumer_info(stream, name, DEADLINE).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == Some(ErrorCode::CONSUMER_NOT_FOUND) => Ok(None),
        Err(error) => Err(failed(name, error)),
    }
}

fn consumer_name(config: &pull::Config) -> &str {
    config.durable_name.as_deref().unwrap_or_default()
}

fn failed(name: &str, error: JetStreamError) -> ProvisionError {
    match error {
        JetStreamError::Timeout => ProvisionError::Timeout(name.to_owned()),
        error => ProvisionError::Refused(name.to_owned(), error.into()),
    }
}
