//! Tests the delivery of samples by a real agent while a real NATS server is unreachable, full, or started late. The
//! agent logs each sample at level `trace`; each sample must be in the stream exactly once and in order.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a panic fails the test"
)]

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use async_nats::jetstream::{
    context::Context,
    stream::{Config, DiscardPolicy, RetentionPolicy, Stream},
};
use futures::StreamExt;
use serde_json::json;
use tempfile::TempDir;
use testkit::{Nats, PATIENCE, Process, Spec, eventually, figure};
use vmwatch_api::metrics::{CONTENT_TYPE, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE, SAMPLE_LIMITS, decode_sample, encode_sample};
use vmwatch_bus::Bus;

const AGENT: &str = env!("CARGO_BIN_EXE_vmwatch-agent");

struct Scene {
    folder: TempDir,
    nats: Nats,
}

impl Scene {
    async fn set() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let nats = Nats::start(folder.path()).await;
        Self { folder, nats }
    }

    async fn bus(&self) -> Bus {
        self.nats.connect("test").await
    }

    fn agent(&self) -> Process {
        Process::start(spec(self.folder.path(), self.nats.url()))
    }

    /// Returns the ids of the spooled sample parts, in order.
    fn spooled(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.folder.path().join("spool"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "sample"))
            .collect();
        names.sort();
        let id = |path: &PathBuf| {
            // If the file is missing, its sample part was acknowledged meanwhile.
            fs::read(path).ok().map(|body| id_of(&body))
        };
        names.iter().filter_map(id).collect()
    }

    async fn spools(&self, count: usize) {
        eventually("the agent spools sample parts", PATIENCE, async || {
            let spooled = self.spooled().len();
            (spooled >= count).then_some(()).ok_or(format!("{spooled}"))
        })
        .await;
    }
}

/// Returns the command and environment with which the agent is started. If the environment lists a setting twice, the
/// later value counts.
fn spec(folder: &Path, nats: &str) -> Spec {
    let env = [
        ("VMWATCH_INSTANCE_ID", "vm-1"),
        ("VMWATCH_AGENT_VM_INTERVAL", "200ms"),
        ("VMWATCH_AGENT_PROCESS_INTERVAL", "400ms"),
        ("VMWATCH_AGENT_PROCESSES", "top:2"),
        (
            "VMWATCH_AGENT_SPOOL_DIR",
            &folder.join("spool").display().to_string(),
        ),
        ("VMWATCH_NATS_URL", nats),
        ("VMWATCH_NATS_PING_INTERVAL", "300ms"),
        // Port 0 selects any free port; these tests do not use the health listener.
        ("VMWATCH_HEALTH_LISTEN", "127.0.0.1:0"),
        ("VMWATCH_LOG", "info,agent::ship=trace"),
        ("VMWATCH_LOG_FORMAT", "json"),
    ];
    Spec {
        name: "agent".to_owned(),
        program: AGENT.into(),
        args: Vec::new(),
        env: env
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        log: folder.join("agent.log"),
    }
}

/// Returns the id of a sample part, from its body.
fn id_of(body: &[u8]) -> String {
    let sample = decode_sample(body, SAMPLE_LIMITS).unwrap();
    assert_eq!(sample.vm.is_some(), sample.part == 0);
    format!("{}:{}:{}", sample.instance_id, sample.create_date, sample.part)
}

/// Returns the sample parts that the agent logged as `sampled`, `spooled` or `acknowledged`: their ids, and their times
/// in seconds of the day.
fn witnessed_at(agent: &Process, what: &str) -> Vec<(String, f64)> {
    let log = agent.log();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let matching = lines.filter(|line| line["message"] == what);
    let id_and_time = |line: serde_json::Value| {
        let time = &line["timestamp"].as_str().unwrap()["2026-11-24T".len()..];
        let parts = time
            .trim_end_matches('Z')
            .split(':')
            .map(|part| part.parse::<f64>().unwrap());
        let seconds = parts.fold(0.0, |sum, part| sum * 60.0 + part);
        (line["id"].as_str().unwrap().to_owned(), seconds)
    };
    matching.map(id_and_time).collect()
}

fn witnessed(agent: &Process, what: &str) -> Vec<String> {
    witnessed_at(agent, what).into_iter().map(|(id, _)| id).collect()
}

/// Returns the upper quartile, in seconds, of the delay from taking a sample part to writing it to the spool.
fn usual_delay(agent: &Process) -> f64 {
    let sampled: HashMap<_, _> = witnessed_at(agent, "sampled").into_iter().collect();
    let spooled = witnessed_at(agent, "spooled").into_iter();
    let mut delays: Vec<_> = spooled.map(|(id, at)| at - sampled[&id]).collect();
    delays.sort_by(f64::total_cmp);
    delays[delays.len() * 3 / 4]
}

fn config(max_messages: i64) -> Config {
    Config {
        name: SAMPLE_STREAM.to_owned(),
        subjects: vec![format!("{SAMPLE_SUBJECT_PREFIX}*")],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_messages,
        ..Config::default()
    }
}

async fn stream(jetstream: &Context, max_messages: i64) -> Stream {
    let info = jetstream
        .create_or_update_stream(config(max_messages))
        .await
        .unwrap();
    jetstream.get_stream(info.config.name).await.unwrap()
}

/// Returns the ids of this VM's sample parts in the stream, in order.
async fn stored(stream: &Stream) -> Vec<String> {
    let messages = stream.get_info().await.unwrap().state.messages;
    let ids = stored_of(stream, "vm-1").await;
    assert_eq!(ids.len() as u64, messages);
    ids
}

async fn stored_of(stream: &Stream, instance: &str) -> Vec<String> {
    let state = stream.get_info().await.unwrap().state;
    let mut ids = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        if message.subject.strip_prefix(SAMPLE_SUBJECT_PREFIX) != Some(instance) {
            continue;
        }
        // The messages have no message id: all VMs share the ids of a stream, so another guest could use an id first
        // and NATS would discard this sample.
        assert!(message.headers.get("Nats-Msg-Id").is_none());
        let content_type = message.headers.get(CONTENT_TYPE).unwrap();
        assert_eq!(content_type.as_str(), SAMPLE_CONTENT_TYPE);
        ids.push(id_of(&message.payload));
    }
    ids
}

async fn stores(stream: &Stream, count: u64) {
    eventually("the stream receives the sample parts", PATIENCE, async || {
        let messages = stream
            .get_info()
            .await
            .map_err(|error| error.to_string())?
            .state
            .messages;
        (messages >= count).then_some(()).ok_or(format!("{messages}"))
    })
    .await;
}

/// Stops the agent, and asserts that the stream has exactly the samples that it took, in order.
async fn assert_all_stored_in_order(scene: &Scene, agent: &Process, stream: &Stream) {
    let status = agent.terminate(PATIENCE).await;
    assert!(status.success(), "{status}");
    assert_eq!(
        scene.spooled(),
        [""; 0],
        "all spooled parts are sent before the drain deadline"
    );
    let sampled = witnessed(agent, "sampled");
    assert!(sampled.is_sorted(), "{sampled:?}");
    assert_eq!(stored(stream).await, sampled);
    let different: HashSet<_> = sampled.iter().collect();
    assert_eq!(different.len(), sampled.len());
}

#[tokio::test]
async fn disconnected_agent_spools_and_sends_in_order_later() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    let agent = scene.agent();
    stores(&messages, 3).await;
    // While NATS acknowledges in time, the agent writes no sample to disk. The test ignores spooled parts here, because
    // on a busy machine some acknowledgements may be late.
    eventually(
        "parts are acknowledged without being spooled",
        PATIENCE,
        async || {
            let spooled = witnessed(&agent, "spooled");
            let straight = witnessed(&agent, "acknowledged")
                .iter()
                .filter(|id| !spooled.contains(id))
                .count();
            (straight >= 3).then_some(()).ok_or(format!("{straight}"))
        },
    )
    .await;

    scene.nats.server.kill9();
    scene.spools(7).await;
    // While the agent is disconnected it spools each sample part at once, and not after the 250 ms for which a
    // connected agent waits for an acknowledgement.
    assert!(usual_delay(&agent) < 0.2, "{}", usual_delay(&agent));
    scene.nats.restart().await;
    stores(&messages, 12).await;
    assert_all_stored_in_order(&scene, &agent, &messages).await;
    assert!(agent.log().contains("no connection to NATS"));
}

#[tokio::test]
async fn agent_spools_while_the_stream_is_full() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), 3).await;
    let agent = scene.agent();
    scene.spools(4).await;
    assert_eq!(stored(&messages).await.len(), 3);
    assert!(agent.log().contains("the sample stream is full"));
    let first = stored(&messages).await;

    messages.purge().await.unwrap();
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    stores(&messages, 8).await;
    agent.terminate(PATIENCE).await;
    let all = [first, stored(&messages).await].concat();
    assert_eq!(all, witnessed(&agent, "sampled"));
}

/// The stream refuses only the samples of this VM, because it limits the number of messages per VM, and accepts those
/// of other VMs.
#[tokio::test]
async fn agent_spools_while_stream_has_maximum_number_of_messages_of_its_vm() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    let share = |max_messages_per_subject| Config {
        discard_new_per_subject: true,
        max_messages_per_subject,
        ..config(-1)
    };
    bus.jetstream_for_tests().create_stream(share(3)).await.unwrap();
    let messages = bus.jetstream_for_tests().get_stream(SAMPLE_STREAM).await.unwrap();
    let agent = scene.agent();
    scene.spools(4).await;
    assert_eq!(stored(&messages).await.len(), 3);
    eventually("the agent logs that its share is full", PATIENCE, async || {
        let log = agent.log();
        log.contains("this VM has the maximum number of messages in the sample stream")
            .then_some(())
            .ok_or(log)
    })
    .await;
    // Meanwhile the agent has tried several times.
    scene.spools(20).await;
    let log = agent.log();
    let messages_about_it = log.matches("VMWATCH_AGENT_PROCESS_INTERVAL").count();
    assert_eq!(messages_about_it, 1, "the log has the remedy once: {log}");
    let other = format!("{SAMPLE_SUBJECT_PREFIX}vm-2");
    let taken = bus
        .jetstream_for_tests()
        .publish(other, "{}".into())
        .await
        .unwrap();
    taken.await.unwrap();

    let first = stored_of(&messages, "vm-1").await;
    messages.purge().await.unwrap();
    bus.jetstream_for_tests()
        .update_stream(share(1000))
        .await
        .unwrap();
    stores(&messages, 8).await;
    agent.terminate(PATIENCE).await;
    let all = [first, stored(&messages).await].concat();
    assert_eq!(all, witnessed(&agent, "sampled"));
}

/// An acknowledgement that marks a new sample part as a duplicate refers to another message with the same id. The new
/// part was not stored, so the agent sends it again.
#[tokio::test]
async fn agent_resends_a_new_sample_that_nats_calls_a_duplicate() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    // The test itself answers instead of a stream. A stream would never report a duplicate, because the agent's
    // messages have no ids.
    let mut published = bus
        .client_for_tests()
        .subscribe(format!("{SAMPLE_SUBJECT_PREFIX}*"))
        .await
        .unwrap();
    bus.client_for_tests().flush().await.unwrap();
    let agent = scene.agent();
    let mut seen: Vec<String> = Vec::new();
    while seen.len() < 8 {
        let message = tokio::time::timeout(PATIENCE, published.next())
            .await
            .expect("the agent publishes in time")
            .unwrap();
        let acknowledgement = json!({ "stream": SAMPLE_STREAM, "seq": seen.len() + 1, "duplicate": true });
        let body = acknowledgement.to_string().into();
        let reply = message.reply.expect("the message requests an acknowledgement");
        bus.client_for_tests().publish(reply, body).await.unwrap();
        seen.push(id_of(&message.payload));
    }
    // Every acknowledgement called its message a duplicate, so the agent sent each sample part a second time. It then
    // treated the part as stored, because the second acknowledgement could mean that the first attempt stored it.
    let (first, second): (Vec<_>, Vec<_>) = seen.chunks(2).map(|pair| (&pair[0], &pair[1])).unzip();
    assert_eq!(first, second);
    assert!(first.is_sorted() && first.windows(2).all(|pair| pair[0] != pair[1]));
    assert!(agent.log().contains("treated a new sample as a duplicate"));
}

#[tokio::test]
async fn agent_keeps_samples_in_memory_while_spool_is_unwritable() {
    let scene = Scene::set().await;
    // The sample stream does not exist yet, so the agent must spool.
    let agent = scene.agent();
    scene.spools(2).await;
    // A folder with the name of the agent's temporary file makes the spool unwritable.
    fs::create_dir(scene.folder.path().join("spool/unfinished")).unwrap();
    eventually("the agent keeps samples in memory", PATIENCE, async || {
        let waiting = witnessed(&agent, "sampled").len() - witnessed(&agent, "spooled").len();
        (waiting >= 4).then_some(()).ok_or(format!("{waiting}"))
    })
    .await;
    assert!(
        agent
            .log()
            .contains("writing to the spool failed; samples wait in memory")
    );

    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    stores(&messages, 8).await;
    fs::remove_dir(scene.folder.path().join("spool/unfinished")).unwrap();
    assert_all_stored_in_order(&scene, &agent, &messages).await;
}

#[tokio::test]
async fn restarted_agent_sends_spooled_samples() {
    let scene = Scene::set().await;
    // The sample stream does not exist yet, so the agent must spool.
    let agent = scene.agent();
    scene.spools(5).await;
    agent.kill9();
    let spooled = scene.spooled();
    // Simulates an agent that was killed while it wrote a file.
    fs::write(scene.folder.path().join("spool/unfinished"), "VMS\u{1}").unwrap();
    assert!(agent.log().contains("the sample stream does not exist yet"));

    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    agent.start_again();
    stores(&messages, spooled.len() as u64 + 3).await;
    let status = agent.terminate(PATIENCE).await;
    assert!(status.success(), "{status}");
    let stored = stored(&messages).await;
    assert_eq!(stored[..spooled.len()], spooled);
    // The log may mention the last sample before the kill although it never reached the disk.
    let sampled = witnessed(&agent, "sampled");
    let lost: Vec<_> = sampled.iter().filter(|id| !stored.contains(id)).collect();
    assert!(lost.len() <= 1, "{lost:?}");
    assert!(
        lost.iter().all(|id| !witnessed(&agent, "spooled").contains(id)),
        "{lost:?}"
    );
    assert!(stored.is_sorted());
    assert!(agent.log().contains("skipped a half-written file in the spool"));
}

/// Metrics of agents are not collected, because guests cannot be reached. Therefore the agent reports the number of
/// dropped sample parts in the next sample, and only in that one.
#[tokio::test]
async fn next_sample_reports_the_number_of_dropped_parts() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    // This file is a sample part that was being spooled when the VM crashed.
    fs::create_dir(scene.folder.path().join("spool")).unwrap();
    fs::write(scene.folder.path().join("spool/unfinished"), "{").unwrap();
    let _agent = scene.agent();
    stores(&messages, 2).await;
    let mut dropped = Vec::new();
    for sequence in 1..=2 {
        let message = messages.get_raw_message(sequence).await.unwrap();
        let sample = decode_sample(&message.payload, SAMPLE_LIMITS).unwrap();
        dropped.push(sample.vm.map(|vm| vm.dropped_parts));
    }
    assert_eq!(dropped, [Some(1), Some(0)]);
}

/// Compares messages with the rows of all processes of this machine with messages that have none.
#[tokio::test]
async fn process_row_takes_at_most_25_bytes_in_the_stream() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    let mut spec = spec(scene.folder.path(), scene.nats.url());
    spec.env
        .push(("VMWATCH_AGENT_PROCESSES".to_owned(), "all".to_owned()));
    let agent = Process::start(spec);
    stores(&messages, 6).await;
    agent.terminate(PATIENCE).await;

    let state = messages.get_info().await.unwrap().state;
    let (mut payloads, mut plain, mut samples, mut rows, mut as_json) = (0, 0, 0, 0, 0);
    for sequence in state.first_sequence..=state.last_sequence {
        let message = messages.get_raw_message(sequence).await.unwrap();
        let mut sample = decode_sample(&message.payload, SAMPLE_LIMITS).unwrap();
        let length = |sample: &Sample| serde_json::to_vec(sample).unwrap().len();
        let mut encoder = Encoder::new().unwrap();
        payloads += message.payload.len();
        rows += sample.processes.len();
        as_json += length(&sample);
        sample.processes.clear();
        as_json -= length(&sample);
        plain += encode_sample(&sample, &mut encoder).unwrap().len();
        samples += 1;
    }
    let per_row = |bytes: usize| bytes as f64 / rows as f64;
    let bytes = per_row(payloads - plain);
    figure("sample_stream_bytes_per_process_row", bytes);
    figure("sample_stream_bytes_per_process_row_as_json", per_row(as_json));
    let stored = usize::try_from(state.bytes).unwrap();
    let overhead = (stored - (payloads - plain)) as f64 / f64::from(samples);
    figure("sample_stream_bytes_per_sample_without_processes", overhead);
    assert!(rows >= 20, "there are {rows} process rows");
    assert!(bytes <= 25.0, "{bytes} bytes per process row");
}

#[tokio::test]
async fn stopping_agent_saves_its_unacknowledged_sample() {
    let scene = Scene::set().await;
    let bus = scene.bus().await;
    let messages = stream(bus.jetstream_for_tests(), -1).await;
    let mut spec = spec(scene.folder.path(), scene.nats.url());
    spec.env
        .push(("VMWATCH_DRAIN_DEADLINE".to_owned(), "0s".to_owned()));
    let agent = Process::start(spec);
    stores(&messages, 1).await;
    // A frozen NATS server acknowledges nothing, but for a while the agent still regards it as connected.
    scene.nats.server.pause();
    let kept = || [witnessed(&agent, "acknowledged"), witnessed(&agent, "spooled")].concat();
    eventually(
        "a sample is neither acknowledged nor spooled",
        PATIENCE,
        async || {
            let kept = kept();
            let sampled = witnessed(&agent, "sampled");
            sampled
                .iter()
                .any(|id| !kept.contains(id))
                .then_some(())
                .ok_or_else(|| format!("{kept:?}"))
        },
    )
    .await;
    let status = agent.terminate(PATIENCE).await;
    scene.nats.server.resume();
    assert!(status.success(), "{status}");
    let (kept, spooled) = (kept(), scene.spooled());
    for id in witnessed(&agent, "sampled") {
        assert!(kept.contains(&id), "sample {id} is lost");
        let acknowledged = witnessed(&agent, "acknowledged").contains(&id);
        assert!(
            acknowledged || spooled.contains(&id),
            "sample {id} is not in the spool"
        );
    }
}

#[tokio::test]
async fn agent_that_cannot_start_logs_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let first = Process::start(spec(folder.path(), "nats://127.0.0.1:1"));
    eventually("the first agent has locked the spool", PATIENCE, async || {
        let lock = folder.path().join("spool/lock");
        lock.exists().then_some(()).ok_or_else(|| first.log())
    })
    .await;
    let ends_with = async |what: &str, change: (&str, String), code: i32| {
        let mut spec = spec(folder.path(), "nats://127.0.0.1:1");
        spec.log = folder.path().join(format!("{}.log", change.0));
        spec.env.retain(|(name, _)| name != change.0);
        spec.env.push((change.0.to_owned(), change.1));
        let agent = Process::start(spec);
        let status = eventually("the second agent ends", PATIENCE, async || {
            agent.ended().ok_or("still running".to_owned())
        })
        .await;
        assert_eq!(status.code(), Some(code), "{}", agent.log());
        assert!(agent.log().contains(what), "{}", agent.log());
    };
    ends_with("another agent uses", ("VMWATCH_NONE", String::new()), 1).await;
    let file = folder.path().join("agent.log").display().to_string();
    ends_with("VMWATCH_AGENT_SPOOL_DIR: ", ("VMWATCH_AGENT_SPOOL_DIR", file), 1).await;
    let interval = "VMWATCH_AGENT_PROCESS_INTERVAL must be a whole multiple";
    ends_with(interval, ("VMWATCH_AGENT_VM_INTERVAL", "300ms".to_owned()), 64).await;

    // An agent that never reached NATS stops at once when it is terminated; its samples stay in the spool.
    let status = first.terminate(Duration::from_secs(5)).await;
    assert!(status.success());
}
