//! Helpers of the storage benchmarks: publishing samples, and direct access to the row store.

use std::time::{Duration, Instant};

use agent::Part;
use anyhow::{Context as _, ensure};
use async_nats::jetstream::{Context, message::PublishMessage};
use futures::{StreamExt, TryStreamExt, stream};
use metrics_svc::{
    config::{RetentionSettings, RowSettings},
    store::RowStore,
};
use testkit::{Program, Stack, StackBuilder};
use vmwatch_api::metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample};
use vmwatch_service::config::{Environment, UTC_OFFSET};
use vmwatch_store::MONGODB_URI;
use vmwatch_store::StoreSettings;

/// Maximum number of published messages that are not acknowledged yet.
const UNACKNOWLEDGED: usize = 256;
/// Interval at which the stream is checked for being empty. A check costs NATS about 20 µs.
const POLL: Duration = Duration::from_millis(5);
/// Time limit of a round. The longest round stores a million rows and takes minutes.
const LONGEST_ROUND: Duration = Duration::from_mins(15);
/// A retention that deletes no rows: 50 years, the maximum of the setting.
const FOR_EVER: Duration = Duration::from_hours(24 * 365 * 50);

/// Builds a test environment with NATS, the database and one metrics-svc.
pub(crate) fn stack() -> StackBuilder {
    [Program::Gateway, Program::Auth, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder().durable(), |builder, program| {
            builder.replicas(program, 0)
        })
        .without_rates()
        .set(Program::Metrics, "VMWATCH_VM_RETENTION", "18250d")
        .set(Program::Metrics, "VMWATCH_PROCESS_RETENTION", "18250d")
}

/// Opens a row store in the database of vmwatch, with the same indexes. Its collection names begin with `prefix`.
pub(crate) async fn open(stack: &Stack, prefix: &str) -> anyhow::Result<RowStore> {
    let env = Environment::from_variables([(MONGODB_URI.name, stack.database.uri())]);
    let settings = StoreSettings::read(&env).map_err(|_| anyhow::anyhow!(env.problems().join("; ")))?;
    let rows = RowSettings {
        blocks: format!("{prefix}blocks"),
        vms: format!("{prefix}vm_samples"),
        flat_check: std::time::Duration::ZERO,
        processes: format!("{prefix}process_samples"),
        offset: UTC_OFFSET.default.parse()?,
    };
    let retention = RetentionSettings {
        vms: FOR_EVER,
        processes: FOR_EVER,
    };
    let store = RowStore::open(&settings, &rows).await?;
    store.prepare(&retention).await?;
    Ok(store)
}

/// Encodes a sample as an agent does. Returns its messages, each with its subject.
pub(crate) fn parts(sample: Sample) -> anyhow::Result<Vec<(String, Part)>> {
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}{}", sample.instance_id);
    let parts = agent::split(sample)?.into_iter();
    Ok(parts.map(|part| (subject.clone(), part)).collect())
}

/// Publishes messages as agents do and waits for all acknowledgements.
pub(crate) async fn publish(jetstream: &Context, parts: &[(String, Part)]) -> anyhow::Result<()> {
    let publish = |(subject, part): &(String, Part)| {
        let message = PublishMessage::build()
            .payload(part.body.clone())
            .expected_stream(SAMPLE_STREAM);
        jetstream.send_publish(subject.clone(), message)
    };
    stream::iter(parts)
        .map(async |part| publish(part).await?.await)
        .buffer_unordered(UNACKNOWLEDGED)
        .try_for_each(async |_| Ok(()))
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
