//! Ingestion stores every sample exactly once, whichever part between the stream and the store is killed, frozen or
//! restarted. Each test counts every row.

use std::time::{Duration, Instant};

use testkit::{PATIENCE, Program, Stack, eventually};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};
use vmwatch_api::metrics::{ProcessSample, SAMPLE_STREAM};

use crate::ingest_support::{
    Publisher, count, drained, metric, outage, process, publish_during, resident, stack, waiting,
};

async fn stores(stack: &Stack, rows: u64) {
    eventually("rows are stored", PATIENCE, async || {
        let stored = count(&stack.database).await?;
        (stored >= rows)
            .then_some(())
            .ok_or(format!("{stored} of {rows}"))
    })
    .await;
}

/// Waits until this many more rows are stored, so that ingestion is in progress.
async fn stores_more(stack: &Stack, rows: u64) {
    let before = count(&stack.database).await.unwrap();
    stores(stack, before + rows).await;
}

async fn waits(stack: &Stack, messages: u64) {
    eventually("messages wait in the stream", PATIENCE, async || {
        let waiting = waiting(&stack.bus).await?;
        (waiting >= messages).then_some(()).ok_or(format!("{waiting}"))
    })
    .await;
}

/// Rows are stored and their acknowledgements are lost: NATS is frozen before they are sent, then killed with its
/// unread input. Metrics-svc is killed too, because it would send them again.
#[tokio::test]
async fn stores_rows_once_after_kill_before_acknowledgement() {
    let stack = stack()
        // Longer than a busy machine needs to fill the batch. Otherwise redelivered messages are in the batch twice,
        // and some of the ten samples are not in it.
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "10s")
        .set(Program::Metrics, "VMWATCH_BATCH_ROWS", "110")
        .set(Program::Metrics, "VMWATCH_BATCH_WAIT", "10s")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    stack.database.server.pause();
    publisher.publish_many(10).await;
    eventually("metrics-svc has the batch", PATIENCE, async || {
        let rows = metric(metrics, "vmwatch_ingest_waiting_rows").await;
        (rows > 109.0).then_some(()).ok_or(format!("{rows}"))
    })
    .await;
    stack.nats.server.pause();
    stack.database.server.resume();
    stores(&stack, 110).await;
    metrics.process.kill9();
    stack.nats.server.kill9();
    stack.nats.restart().await;
    waits(&stack, 10).await;
    metrics.restart().await;
    let what = "killed between insert and acknowledgement";
    publisher.rows.settle(what, &stack).await;
}

#[tokio::test]
async fn stores_rows_once_after_kill_of_database() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publish_during(&mut publisher, async {
        for _ in 0..2 {
            stores_more(&stack, 500).await;
            stack.database.server.kill9();
            waits(&stack, 100).await;
            stack.database.restart().await;
        }
        stores_more(&stack, 500).await;
    })
    .await;
    publisher.rows.settle("database killed twice", &stack).await;
}

#[tokio::test]
async fn stores_rows_once_after_kill_of_nats() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    let outages = async {
        for _ in 0..2 {
            stores_more(&stack, 500).await;
            stack.nats.server.kill9();
            stack.nats.restart().await;
        }
        stores_more(&stack, 500).await;
    };
    publish_during(&mut publisher, Box::pin(outages)).await;
    publisher.rows.settle("NATS killed twice", &stack).await;
}

#[tokio::test]
async fn surviving_replica_stores_rows_of_killed_one() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let (first, second) = (
        stack.replica(Program::Metrics, 0),
        stack.replica(Program::Metrics, 1),
    );
    let mut one = Publisher::new(&stack, "vm-1", 10);
    let mut other = Publisher::new(&stack, "vm-2", 10);
    let story = async {
        stores_more(&stack, 1000).await;
        for replica in [first, second] {
            assert!(
                metric(replica, "vmwatch_rows_stored_total").await > 0.0,
                "{}",
                replica.process.name()
            );
        }
        first.process.kill9();
        stores_more(&stack, 1000).await;
        first.restart().await;
        stores_more(&stack, 1000).await;
    };
    publish_during(&mut one, publish_during(&mut other, story)).await;
    one.rows.absorb(other.rows);
    one.rows.settle("two replicas, one killed", &stack).await;
}

/// A stopping service acknowledges what it has stored. Only the other messages wait in the stream.
#[tokio::test]
async fn shutdown_under_load_loses_no_rows() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publish_during(&mut publisher, async {
        stores_more(&stack, 500).await;
        let status = metrics.process.terminate(PATIENCE).await;
        assert!(status.success(), "{status}");
        waits(&stack, 20).await;
    })
    .await;
    let stored = count(&stack.database).await.unwrap();
    let waiting = waiting(&stack.bus).await.unwrap();
    assert_eq!(stored + 11 * waiting, publisher.rows.len() as u64);
    metrics.restart().await;
    publisher.rows.settle("a stop under load", &stack).await;
}

/// Publishes a message repeatedly, as after lost acknowledgements: within a short time, and again after a restart, when
/// only the rows' ids identify it.
#[tokio::test]
async fn stores_message_delivered_ten_times_once() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    let sample = publisher.sample();
    for _ in 0..10 {
        publisher.send(&sample).await.unwrap();
    }
    publisher.rows.add(&sample);
    let sample = publisher.sample();
    let body = serde_json::to_vec(&sample).unwrap();
    for _ in 0..10 {
        publisher.send_raw(body.clone()).await.unwrap();
    }
    publisher.rows.add(&sample);
    drained(&stack.bus).await;
    // Repeats the message also after a restart, in another batch.
    stack.replica(Program::Metrics, 0).process.kill9();
    stack.replica(Program::Metrics, 0).restart().await;
    publisher.send_raw(body).await.unwrap();
    publisher.rows.add(&sample);
    publisher
        .rows
        .settle("the same messages again and again", &stack)
        .await;
    assert_eq!(publisher.rows.len(), 22);
}

/// A process ended and its pid was reused before the next sample: the rows of both are stored.
#[tokio::test]
async fn stores_both_processes_of_reused_pid() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 0);
    let mut sample = publisher.sample();
    let running = process(1);
    let ended = ProcessSample {
        // The kernel counts start times in hundredths of a second.
        running_time: running.running_time - 0.01,
        shutdown_time: Some(running.running_time),
        ..running.clone()
    };
    sample.processes = vec![ended, running];
    publisher.send(&sample).await.unwrap();
    publisher.rows.add(&sample);
    publisher.rows.settle("a reused pid", &stack).await;
    assert_eq!(publisher.rows.len(), 3);
}

/// A proxy in front of the database. On a signal it drops its connections silently, like a network that loses packets.
/// Later connections work again.
async fn relay(listener: TcpListener, database: String, cut: watch::Receiver<()>) {
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(&database).await.unwrap();
        let mut cut = cut.clone();
        cut.mark_unchanged();
        tokio::spawn(async move {
            tokio::select! {
                _ = copy_bidirectional(&mut client, &mut server) => {}
                _ = cut.changed() => std::future::pending().await,
            }
        });
    }
}

/// The database host disappears without closing its connections: the current insert is never answered.
#[tokio::test]
async fn recovers_from_database_that_vanished_silently() {
    let stack = stack().start().await;
    let metrics = stack.replica(Program::Metrics, 0);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let database = stack
        .database
        .uri()
        .strip_prefix("mongodb://")
        .unwrap()
        .to_owned();
    let (cut, cuts) = watch::channel(());
    let relaying = tokio::spawn(relay(listener, database, cuts));
    metrics
        .process
        .set("VMWATCH_MONGODB_URI", &format!("mongodb://{address}"));
    metrics.process.kill9();
    metrics.restart().await;

    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publish_during(&mut publisher, async {
        stores_more(&stack, 500).await;
        cut.send(()).unwrap();
        stores_more(&stack, 500).await;
    })
    .await;
    publisher.rows.settle("a database that disappears", &stack).await;
    relaying.abort();
}

/// The samples stream is recreated after its loss, or after an operator ran `nats stream rm`.
#[tokio::test]
async fn recreates_deleted_stream() {
    let stack = stack().start().await;
    let mut publisher = Publisher::new(&stack, "vm-1", 10);
    publisher.publish_many(5).await;
    drained(&stack.bus).await;
    stack.bus.jetstream().delete_stream(SAMPLE_STREAM).await.unwrap();
    publisher.publish_many(5).await;
    publisher.rows.settle("a deleted stream", &stack).await;
}

/// While the database is frozen, a replica holds three batches and one pull of a backlog, whatever the backlog's size.
#[tokio::test]
async fn bounds_memory_while_database_is_frozen() {
    const BACKLOG_BYTES: usize = 96 << 20;
    const MOST_KIB: u64 = 32 << 10;
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "30s")
        .start()
        .await;
    let metrics = &stack.replica(Program::Metrics, 0).process;
    let mut publisher = Publisher::new(&stack, "vm-1", 250);
    publisher.publish_many(60).await;
    drained(&stack.bus).await;
    let before = resident(metrics);

    stack.database.server.pause();
    let (mut sent, mut most) = (0, 0);
    let template = publisher.sample();
    let body = serde_json::to_string(&template).unwrap();
    while sent < BACKLOG_BYTES {
        let date = publisher.sample().create_date;
        let body = body.replacen(template.create_date.as_str(), date.as_str(), 1);
        sent += body.len();
        publisher.send_raw(body.into()).await.unwrap();
        most = most.max(resident(metrics));
    }
    let end = Instant::now() + outage();
    while Instant::now() < end {
        most = most.max(resident(metrics));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("resident: {before} KiB after 15,000 rows, at most {most} KiB with 96 MiB waiting");
    assert!(most < before + MOST_KIB, "{before} KiB grew to {most} KiB");

    // Storing the rest of the backlog would only take time.
    stack.database.server.resume();
    stores(&stack, 120 * 251).await;
}
