//! Tests live events: metrics-svc publishes one for each stored VM row, after the row is stored. A failure to publish
//! never delays rows.

use std::time::Instant;

use async_nats::jetstream::consumer::{DeliverPolicy, pull::OrderedConfig};
use futures::StreamExt;
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    InstanceId,
    events::{EVENT_STREAM, LiveEvent, event_filter},
};

use crate::{
    history_support::{SECOND, process, publish, recent_bucket, sample, stack, stored},
    rows::stored_vms,
};

/// Reads `count` events of a VM from the events stream, beginning with the given sequence number.
async fn events(stack: &Stack, instance: Option<&str>, from: u64, count: usize) -> Vec<(u64, LiveEvent)> {
    let instance: Option<InstanceId> = instance.map(|instance| instance.parse().unwrap());
    let reading = async {
        let stream = stack
            .bus
            .jetstream_for_tests()
            .get_stream(EVENT_STREAM)
            .await
            .unwrap();
        let consumer = stream
            .create_consumer(OrderedConfig {
                deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: from },
                filter_subject: event_filter(instance.as_ref()),
                ..OrderedConfig::default()
            })
            .await
            .unwrap();
        let messages = consumer.messages().await.unwrap().take(count);
        messages
            .map(|message| {
                let message = message.unwrap();
                let event: LiveEvent = serde_json::from_slice(&message.payload).unwrap();
                assert_eq!(message.subject.as_str(), event.subject());
                (message.info().unwrap().stream_sequence, event)
            })
            .collect()
            .await
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("all events arrive in time")
}

async fn count(stack: &Stack) -> Result<u64, String> {
    let stream = stack.bus.jetstream_for_tests().get_stream(EVENT_STREAM).await;
    Ok(stream
        .map_err(|error| error.to_string())?
        .cached_info()
        .state
        .messages)
}

#[tokio::test]
async fn each_stored_sample_is_published_once_as_live_event() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    let started = Instant::now();
    let mut first = sample("vm-1", from_ms, "+00:00", 12.5);
    first.processes = vec![process("nginx", 1, 5.0), process("sh", 2, 0.0)];
    publish(&stack, &first).await;
    let received = events(&stack, Some("vm-1"), 1, 2).await;
    println!(
        "events received {:?} after the sample was published",
        started.elapsed()
    );
    // The row must be stored already, because its event is published after it.
    assert_eq!(stored_vms(&stack.database).await.len(), 1);
    let LiveEvent::Sample(row) = &received[0].1 else {
        panic!("{received:?}")
    };
    assert_eq!(
        (
            row.instance_id.as_str(),
            row.at_ms,
            row.values.cpu_util,
            row.values.proc
        ),
        ("vm-1", from_ms, Some(12.5), Some(95))
    );
    assert_eq!(
        (row.values.mem, row.values.disk_read, row.values.disk_write),
        (Some(87.5), Some(6.25), Some(87.5))
    );
    assert_eq!(
        (row.values.net_incoming, row.values.net_outgoing),
        (Some(37.5), Some(62.5))
    );
    let LiveEvent::Processes(rows) = &received[1].1 else {
        panic!("{received:?}")
    };
    assert_eq!((rows.at_ms, rows.rows), (from_ms, 2));

    // The message is published again. Its row is stored and its event is published already, so no second event may
    // follow.
    publish(&stack, &first).await;
    publish(&stack, &sample("vm-2", from_ms, "+00:00", 1.0)).await;
    for second in 1..20 {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 1.0)).await;
    }
    stored(&stack).await;
    let (seen, _) = received[1];
    let replayed = events(&stack, Some("vm-1"), seen + 1, 19).await;
    let moments: Vec<_> = replayed
        .iter()
        .map(|(_, event)| match event {
            LiveEvent::Sample(row) => row.at_ms,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        moments,
        (1..20)
            .map(|second| from_ms + second * SECOND)
            .collect::<Vec<_>>()
    );
    assert_eq!(count(&stack).await, Ok(2 + 1 + 19));
    assert_eq!(events(&stack, None, 1, 22).await.len(), 22);
}

/// While the stream of events is missing, events are lost and counted, and rows are still stored. metrics-svc creates
/// the stream again.
#[tokio::test]
async fn missing_events_stream_does_not_delay_rows() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    stack
        .bus
        .jetstream_for_tests()
        .delete_stream(EVENT_STREAM)
        .await
        .unwrap();
    for second in 0..50 {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 1.0)).await;
    }
    stored(&stack).await;
    assert_eq!(stored_vms(&stack.database).await.len(), 50);
    let metrics = stack.replica(Program::Metrics, 0);
    eventually("the lost events are counted", PATIENCE, async || {
        let text = metrics.metrics().await;
        let line = text
            .lines()
            .find(|line| line.starts_with("vmwatch_events_lost_total"));
        line.map(str::to_owned).ok_or(text.clone())
    })
    .await;
    let mut second = 50;
    eventually("metrics-svc recreates the events stream", PATIENCE, async || {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 1.0)).await;
        second += 1;
        match count(&stack).await? {
            0 => Err("no event is stored".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
}
