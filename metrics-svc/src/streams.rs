//! Defines the streams of samples and of dead letters, with every limit explicit. No other code creates them.

use std::time::Duration;

use async_nats::jetstream::{
    consumer::{AckPolicy, PullConsumer, pull},
    stream::{Config, DiscardPolicy, RetentionPolicy, StorageType},
};
use vmwatch_api::{
    Service,
    hypervisor_samples::HYPERVISOR_SAMPLE_SUBJECT_PREFIX,
    metrics::{
        DEAD_LETTER_STREAM, DEAD_LETTER_SUBJECT_PREFIX, SAMPLE_MESSAGE_BYTES, SAMPLE_STREAM,
        SAMPLE_SUBJECT_PREFIX,
    },
};
use vmwatch_bus::{
    Bus,
    provision::{Wanted, ensure_consumer, ensure_stream},
};

use crate::{
    MetricsError, agent_status,
    config::{MetricsSettings, StreamSettings},
    evaluation, events,
};

/// Name of the JetStream consumer through which all replicas receive samples.
const CONSUMER: &str = "store";
/// Maximum number of delivered but unacknowledged messages of all replicas together. It suffices for the three batches
/// that each replica may hold, even if each message has only one row. The NATS server needs about 100 bytes per
/// message.
const MAX_ACK_PENDING: i64 = 50_000;
/// Number of VMs that can be above their rate without blocking the other VMs. Messages that were returned because of
/// their VM's rate count as unacknowledged, so the maximum must allow for all messages of this many VMs.
const VMS_ABOVE_RATE: i64 = 25;
/// JetStream's duplicate window: how long the server remembers message ids. Agents send no ids, because all VMs would
/// share the ids of the stream. The window is the minimum that the server accepts (the default is two minutes), so that
/// ids from a malicious guest, up to 60 KB each, do not fill the server's memory.
const DUPLICATE_WINDOW: Duration = Duration::from_millis(100);
const DEAD_LETTER_BYTES: i64 = 64 << 20;
const DEAD_LETTER_AGE: Duration = Duration::from_hours(720);

/// Returns the configuration of all streams and consumers of metrics-svc, according to the settings.
pub(crate) fn wanted(settings: &MetricsSettings) -> [Wanted; 5] {
    [
        dead_letters(&settings.stream).into(),
        Wanted {
            stream: samples(&settings.stream),
            consumers: vec![consumer(&settings.stream)],
        },
        events::stream(&settings.events).into(),
        evaluation::stream(&settings.stream).into(),
        agent_status::bucket(&settings.stream).into(),
    ]
}

/// Opens the stream of dead letters, the stream of samples and its consumer; creates whichever is missing.
pub(crate) async fn prepare(bus: &Bus, settings: &StreamSettings) -> Result<PullConsumer, MetricsError> {
    ensure_stream(bus, Service::Metrics, &dead_letters(settings)).await?;
    ensure_stream(bus, Service::Metrics, &samples(settings)).await?;
    Ok(ensure_consumer(bus, SAMPLE_STREAM, Service::Metrics, &consumer(settings)).await?)
}

fn consumer(settings: &StreamSettings) -> pull::Config {
    pull::Config {
        durable_name: Some(CONSUMER.to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: settings.ack_wait,
        // Deliveries are not limited: the server must never drop a sample silently. The service itself decides when to
        // give up on a sample and publish it as a dead letter.
        max_deliver: -1,
        max_ack_pending: MAX_ACK_PENDING.max(VMS_ABOVE_RATE * settings.messages_per_vm),
        ..pull::Config::default()
    }
}

fn samples(settings: &StreamSettings) -> Config {
    Config {
        name: SAMPLE_STREAM.to_owned(),
        description: Some("samples waiting to be stored".to_owned()),
        // The subject shows the source of a sample: agents may publish only on their own subjects.
        subjects: vec![
            format!("{SAMPLE_SUBJECT_PREFIX}*"),
            format!("{HYPERVISOR_SAMPLE_SUBJECT_PREFIX}*"),
        ],
        retention: RetentionPolicy::WorkQueue,
        // Refuse new samples when the stream is full: samples in the stream are never discarded, and agents keep
        // samples that were refused.
        discard: DiscardPolicy::New,
        max_bytes: settings.bytes,
        // Refuse samples of a VM also when its own share of the stream is full, so that one guest cannot fill the
        // stream for all. Samples of its hypervisor have a share of their own.
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
        description: Some("refused samples, with the reason".to_owned()),
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
