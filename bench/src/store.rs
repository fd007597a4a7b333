//! The stack that is measured: the way into it, and the store under it.

use std::time::{Duration, Instant};

use agent::Part;
use anyhow::{Context as _, ensure};
use async_nats::jetstream::{Context, message::PublishMessage};
use e2e::{Program, Stack, StackBuilder};
use futures::{StreamExt, TryStreamExt, stream};
use metrics_svc::{
    config::{RetentionSettings, RowSettings},
    store::RowStore,
};
use shared::{
    api::metrics::{SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample},
    config::{Environment, MONGODB_URI, UTC_OFFSET},
    store::StoreSettings,
};

/// Messages published and not yet acknowledged.
const UNACKNOWLEDGED: usize = 256;
/// How often the stream is asked whether it is empty: each costs the server some 20 µs.
const POLL: Duration = Duration::from_millis(5);
/// A round that takes longer has stopped: the longest one known, a million rows, takes minutes.
const LONGEST_ROUND: Duration = Duration::from_mins(15);
/// Rows of any age stay: 50 years, the most that the setting takes.
const FOR_EVER: Duration = Duration::from_hours(24 * 365 * 50);

/// NATS, the database and one metrics-svc.
pub(crate) fn stack() -> StackBuilder {
    [Program::Gateway, Program::Auth, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0))
        .set(Program::Metrics, "VMWATCH_VM_RETENTION", "18250d")
        .set(Program::Metrics, "VMWATCH_PROCESS_RETENTION", "18250d")
}

/// A store of our own in the same database, with the same indexes; the names of its collections start with `prefix`.
pub(crate) async fn open(stack: &Stack, prefix: &str) -> anyhow::Result<RowStore> {
    let env = Environment::of([(MONGODB_URI.name, stack.database.uri())]);
    let settings = StoreSettings::read(&env).map_err(|_| anyhow::anyhow!(env.problems().join("; ")))?;
    let rows = RowSettings {
        vms: format!("{prefix}vm_samples"),
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

/// The messages of a sample, as its agent encodes them, with their subject.
pub(crate) fn parts(sample: Sample) -> anyhow::Result<Vec<(String, Part)>> {
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}{}", sample.instance_id);
    let parts = agent::split(sample, 0)?.into_iter();
    Ok(parts.map(|part| (subject.clone(), part)).collect())
}

/// Publishes messages as agents do, and waits until the stream has acknowledged all of them.
pub(crate) async fn publish(jetstream: &Context, parts: &[(String, Part)]) -> anyhow::Result<()> {
    let publish = |(subject, part): &(String, Part)| {
        let message = PublishMessage::build()
            .payload(part.body.clone())
            .message_id(&part.message_id)
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

/// Waits until everything is stored and acknowledged.
pub(crate) async fn drained(jetstream: &Context) -> anyhow::Result<()> {
    let mut stream = jetstream.get_stream(SAMPLE_STREAM).await?;
    let end = Instant::now() + LONGEST_ROUND;
    loop {
        let left = stream.info().await?.state.messages;
        if left == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{left} samples are still not stored");
        tokio::time::sleep(POLL).await;
    }
}
