//! The streams of samples: made here, with every limit stated, and nowhere else.

use std::time::Duration;

use async_nats::jetstream::{
    Context,
    consumer::{AckPolicy, PullConsumer, pull},
    stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
};
use vmwatch_api::{
    Service,
    metrics::{
        DEAD_LETTER_STREAM, DEAD_LETTER_SUBJECT_PREFIX, SAMPLE_MESSAGE_BYTES, SAMPLE_STREAM,
        SAMPLE_SUBJECT_PREFIX,
    },
};
use vmwatch_bus::provision::{Wanted, ensure_consumer, ensure_stream};

use crate::{
    MetricsError,
    config::{MetricsSettings, StreamSettings},
    events,
};

/// The durable consumer that all replicas share.
const CONSUMER: &str = "store";
/// Delivered to all replicas together and not yet stored. Each replica holds three batches at most, whose messages may
/// be of one row; the server keeps some 100 bytes for each.
const MAX_ACK_PENDING: i64 = 50_000;
/// Messages that went back for their VM's rate count as well: so many VMs above their rate leave room for others.
const VMS_ABOVE_RATE: i64 = 25;
/// The least that the server accepts; unset it is two minutes. Agents send no message ids, because the ids of a stream are
/// shared by all VMs: the server would keep those of a guest, 60 KB each, for this long.
const DUPLICATE_WINDOW: Duration = Duration::from_millis(100);
const DEAD_LETTER_BYTES: i64 = 64 << 20;
const DEAD_LETTER_AGE: Duration = Duration::from_hours(720);

/// All streams and consumers of this service, as the settings have them.
pub(crate) fn wanted(settings: &MetricsSettings) -> [Wanted; 3] {
    [
        dead_letters(&settings.stream).into(),
        Wanted {
            stream: samples(&settings.stream),
            consumers: vec![consumer(&settings.stream)],
        },
        events::stream(&settings.events).into(),
    ]
}

/// Opens the streams of samples and their consumer, and makes those that are missing.
pub(crate) async fn prepare(
    jetstream: &Context,
    settings: &StreamSettings,
) -> Result<PullConsumer, MetricsError> {
    ensure_stream(jetstream, Service::Metrics, &dead_letters(settings)).await?;
    let stream = ensure_stream(jetstream, Service::Metrics, &samples(settings)).await?;
    Ok(ensure_consumer(&stream, Service::Metrics, &consumer(settings)).await?)
}

fn consumer(settings: &StreamSettings) -> pull::Config {
    pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: settings.ack_wait,
        // A sample is given up by a decision of ours, with a dead letter, and never by the server in silence.
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING.max(VMS_ABOVE_RATE * settings.messages_per_vm),
        ..pull::Config::default()
    }
}

fn samples(settings: &StreamSettings) -> Config {
    Config {
        name: SAMPLE_STREAM.to_owned(),
        description: Some("samples that wait to be stored".to_owned()),
        subjects: vec![format!("{SAMPLE_SUBJECT_PREFIX}*")],
        retention: RetentionPolicy::WorkQueue,
        // Refuse new samples when full: what was acknowledged is never discarded, and the agent keeps the refused.
        discard: DiscardPolicy::New,
        max_bytes: settings.bytes,
        // And when the VM's own share is full, so that one guest cannot fill it for all.
        max_messages_per_subject: settings.messages_per_vm,
        discard_new_per_subject: true,
        max_age: settings.max_age,
        max_message_size: i32::try_from(SAMPLE_MESSAGE_BYTES).unwrap_or(i32::MAX),
        duplicate_window: DUPLICATE_WINDOW,
        storage: StorageType::File,
        num_replicas: settings.replicas,
        ..Config::default()
    }
}

fn dead_letters(settings: &StreamSettings) -> Config {
    Config {
        name: DEAD_LETTER_STREAM.to_owned(),
        description: Some("samples that were refused, with the reason".to_owned()),
        subjects: vec![format!("{DEAD_LETTER_SUBJECT_PREFIX}*")],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_bytes: DEAD_LETTER_BYTES,
        max_age: DEAD_LETTER_AGE,
        storage: StorageType::File,
        num_replicas: settings.replicas,
        ..Config::default()
    }
}
