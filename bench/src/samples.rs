//! Helpers of the storage benchmarks: samples as agents publish them, and direct access to the row store.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::{Context, message::PublishMessage};
use bson::{Document, doc};
use futures::{StreamExt, TryStreamExt, stream};
use metrics_svc::{
    config::{RetentionSettings, RowSettings},
    store::RowStore,
};
use testkit::{Program, Stack, StackBuilder, eventually};
use vmwatch_api::metrics::{CONTENT_TYPE, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE, encode_sample};
use vmwatch_service::config::{Environment, UTC_OFFSET};
use vmwatch_store::MONGODB_URI;
use vmwatch_store::StoreSettings;

use crate::gateway::KEPT_SETTING;

/// Maximum number of published messages that are not acknowledged yet.
const UNACKNOWLEDGED: usize = 256;
/// Interval at which the stream is checked for being empty. A check costs NATS about 20 µs.
const POLL: Duration = Duration::from_millis(5);
/// Time limit of a round. The longest round stores a million rows and takes minutes.
const LONGEST_ROUND: Duration = Duration::from_mins(15);
/// A retention of 50 years, the maximum.
pub(crate) const RETENTION: RetentionSettings = RetentionSettings {
    vms: Duration::from_hours(24 * 365 * 50),
    processes: Duration::from_hours(24 * 365 * 50),
};
/// The settings of that retention.
const FOR_EVER: [(&str, &str); 2] = [
    ("VMWATCH_VM_RETENTION", "18250d"),
    ("VMWATCH_PROCESS_RETENTION", "18250d"),
];

/// A sample as an agent publishes it.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    subject: String,
    pub(crate) body: Vec<u8>,
}

impl Message {
    /// Encodes a sample that fits into one message.
    pub(crate) fn encode(sample: &Sample, encoder: &mut Encoder) -> anyhow::Result<Self> {
        Ok(Self {
            subject: format!("{SAMPLE_SUBJECT_PREFIX}{}", sample.instance_id),
            body: encode_sample(sample, encoder)?,
        })
    }

    /// Publishes the message, and waits until the stream has stored it.
    pub(crate) async fn publish(self, jetstream: &Context) -> anyhow::Result<()> {
        let message = PublishMessage::build()
            .payload(self.body.into())
            .header(CONTENT_TYPE, SAMPLE_CONTENT_TYPE)
            .expected_stream(SAMPLE_STREAM);
        jetstream.send_publish(self.subject, message).await?.await?;
        Ok(())
    }
}

/// Builds a test environment with NATS, the database and one metrics-svc that keeps all rows.
pub(crate) fn stack() -> StackBuilder {
    let stack = [Program::Gateway, Program::Auth, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder().durable(), |builder, program| {
            builder.replicas(program, 0)
        })
        .without_rates();
    keep_rows(stack)
}

/// Builds a test environment for reads through the gateway, without limits of rates, in which metrics-svc reuses no
/// answers.
pub(crate) fn stack_for_reads() -> StackBuilder {
    let stack = Stack::builder()
        .with_permissions()
        .without_read_limit()
        .without_rates();
    keep_rows(stack)
        .set(Program::Metrics, KEPT_SETTING, "0s")
        .set(Program::Gateway, "VMWATCH_NATS_PING_INTERVAL", "10s")
        .set(Program::Metrics, "VMWATCH_NATS_PING_INTERVAL", "10s")
}

/// Waits until rollups and process names contain all stored rows.
pub(crate) async fn summarized(stack: &Stack, limit: Duration) {
    let database = stack.database.handle();
    let dirty = database.collection::<Document>("vm_samples_dirty_buckets");
    eventually("rollups and process names contain all rows", limit, async || {
        let left = dirty
            .count_documents(doc! {})
            .await
            .map_err(|error| error.to_string())?;
        (left == 0)
            .then_some(())
            .ok_or_else(|| format!("{left} entries are left"))
    })
    .await;
}

/// Keeps rows for as long as metrics-svc can.
pub(crate) fn keep_rows(stack: StackBuilder) -> StackBuilder {
    FOR_EVER.into_iter().fold(stack, |builder, (name, value)| {
        builder.set(Program::Metrics, name, value)
    })
}

/// Opens the rows in the database of vmwatch.
pub(crate) async fn open(uri: &str) -> anyhow::Result<RowStore> {
    let env = Environment::from_variables([(MONGODB_URI.name, uri)]);
    let settings = StoreSettings::read(&env).map_err(|_| anyhow::anyhow!(env.problems().join("; ")))?;
    let rows = RowSettings {
        blocks: "blocks".to_owned(),
        vms: "vm_samples".to_owned(),
        flat_check: Duration::ZERO,
        processes: "process_samples".to_owned(),
        offset: UTC_OFFSET.default.parse()?,
    };
    Ok(RowStore::open(&settings, &rows).await?)
}

/// Publishes messages as agents do and waits for all acknowledgements.
pub(crate) async fn publish(jetstream: &Context, messages: Vec<Message>) -> anyhow::Result<()> {
    stream::iter(messages)
        .map(|message| message.publish(jetstream))
        .buffer_unordered(UNACKNOWLEDGED)
        .try_for_each(async |()| Ok(()))
        .await
        .context("the stream refused a message")
}

/// Waits until every message is stored and acknowledged.
pub(crate) async fn drained(jetstream: &Context) -> anyhow::Result<()> {
    let mut stream = jetstream.get_stream(SAMPLE_STREAM).await?;
    let end = Instant::now() + LONGEST_ROUND;
    loop {
        let left = stream.info().await?.state.messages;
        if left == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{left} samples were not stored in time");
        tokio::time::sleep(POLL).await;
    }
}
