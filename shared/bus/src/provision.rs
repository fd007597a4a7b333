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
    Context, ErrorCode,
    consumer::{PullConsumer, pull},
    context::{ConsumerInfoErrorKind, CreateStreamErrorKind, GetStreamErrorKind},
    kv,
    stream::{Config, DiscardPolicy, StorageType, Stream},
};
use tracing::{info, warn};
use vmwatch_api::Service;

use self::difference::{differences, listed};

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
pub struct Bucket {
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

impl From<Bucket> for Config {
    fn from(bucket: Bucket) -> Self {
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

impl From<Bucket> for Wanted {
    fn from(bucket: Bucket) -> Self {
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

/// Creates the stream if it is missing, and returns it. An existing stream is not changed; if it differs from the
/// configuration, a warning lists the differences.
pub async fn ensure_stream(
    jetstream: &Context,
    owner: Service,
    wanted: &Config,
) -> Result<Stream, ProvisionError> {
    if let Some(found) = find_stream(jetstream, &wanted.name).await? {
        warn_of_difference(
            owner,
            &wanted.name,
            &differences(wanted, &found.cached_info().config)?,
        );
        return Ok(found);
    }
    let stream = create_stream(jetstream, wanted).await?;
    info!(stream = wanted.name, "created a JetStream stream");
    Ok(stream)
}

/// Creates the KV bucket if it is missing, and returns it. An existing bucket is not changed.
pub async fn ensure_bucket(
    jetstream: &Context,
    owner: Service,
    wanted: Bucket,
) -> Result<kv::Store, ProvisionError> {
    ensure_stream(jetstream, owner, &wanted.into()).await?;
    existing_bucket(jetstream, wanted.name).await
}

/// Opens a KV bucket that the service that owns it must have created.
pub async fn existing_bucket(jetstream: &Context, name: &str) -> Result<kv::Store, ProvisionError> {
    let found = within(name, jetstream.get_key_value(name)).await?;
    found.map_err(|error| ProvisionError::Refused(name.to_owned(), error.into()))
}

/// Creates the durable consumer if it is missing, and returns it. An existing consumer is not changed.
pub async fn ensure_consumer(
    stream: &Stream,
    owner: Service,
    wanted: &pull::Config,
) -> Result<PullConsumer, ProvisionError> {
    let name = consumer_name(wanted);
    if let Some(found) = find_consumer(stream, name).await? {
        warn_of_difference(owner, name, &differences(wanted, &found.config)?);
    } else {
        let created = within(name, stream.create_consumer_strict(wanted.clone())).await?;
        created.map_err(|error| refused(name, error))?;
        info!(consumer = name, "created a JetStream consumer");
    }
    let consumer = within(name, stream.get_consumer(name)).await?;
    consumer.map_err(|error| ProvisionError::Refused(name.to_owned(), error))
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

async fn find_stream(jetstream: &Context, name: &str) -> Result<Option<Stream>, ProvisionError> {
    match within(name, jetstream.get_stream(name)).await? {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Ok(None)
            }
            _ => Err(refused(name, error)),
        },
    }
}

async fn create_stream(jetstream: &Context, wanted: &Config) -> Result<Stream, ProvisionError> {
    let name = wanted.name.as_str();
    match within(name, jetstream.create_stream(wanted.clone())).await? {
        Ok(stream) => Ok(stream),
        Err(error) => match error.kind() {
            // Another replica with different settings has just created the stream.
            CreateStreamErrorKind::JetStream(cause) if cause.error_code() == ErrorCode::STREAM_NAME_EXIST => {
                let found = within(name, jetstream.get_stream(name)).await?;
                found.map_err(|error| refused(name, error))
            }
            _ => Err(refused(name, error)),
        },
    }
}

async fn find_consumer(
    stream: &Stream,
    name: &str,
) -> Result<Option<async_nats::jetstream::consumer::Info>, ProvisionError> {
    match within(name, stream.consumer_info(name)).await? {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => Ok(None),
        Err(error) => Err(refused(name, error)),
    }
}

fn consumer_name(config: &pull::Config) -> &str {
    config.durable_name.as_deref().unwrap_or_default()
}

fn refused(name: &str, error: impl Into<async_nats::Error>) -> ProvisionError {
    ProvisionError::Refused(name.to_owned(), error.into())
}

async fn within<T>(name: &str, work: impl Future<Output = T>) -> Result<T, ProvisionError> {
    let answer = tokio::time::timeout(DEADLINE, work).await;
    answer.map_err(|_| ProvisionError::Timeout(name.to_owned()))
}
