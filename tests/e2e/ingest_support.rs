//! Helpers of the ingestion tests: samples as agents publish them, and the comparison of expected and stored rows.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    env, fs,
    time::{Duration, SystemTime},
};

use async_nats::jetstream::message::PublishMessage;
use mongodb::bson::{Bson, Document, doc};
use serde_json::Value;
use testkit::{Database, PATIENCE, Process, Program, Replica, Stack, StackBuilder, eventually};
use vmwatch_api::{
    InstanceId,
    metrics::{CONTENT_TYPE, ProcessSample, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample, VmSample},
    time::CreateDate,
};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE};
use vmwatch_bus::Bus;
use vmwatch_service::config::{Span, UTC_OFFSET};

/// Returns the duration of outages: `VMWATCH_TEST_OUTAGE` (`./dev soak` sets 30s), or a few seconds by default.
pub(crate) fn outage() -> Duration {
    let given = env::var("VMWATCH_TEST_OUTAGE").unwrap_or_else(|_| "3s".to_owned());
    given
        .parse::<Span>()
        .expect("VMWATCH_TEST_OUTAGE is a duration such as 30s")
        .0
}

/// Builds a test environment with NATS, the database and one metrics-svc. A short ack wait lets a restarted metrics-svc
/// soon receive the messages that its predecessor did not acknowledge.
pub(crate) fn stack() -> StackBuilder {
    [Program::Gateway, Program::Auth, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0))
        .without_rates()
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "2s")
}

/// The identity of a row: VM, date, and what it is about.
type Identity = (String, String, Subject);

/// What a row is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Vm,
    /// A process, by its pid and the bits of its start time.
    Process(i64, u64),
    /// Several processes, by their name and user.
    Sum(String, Option<String>),
    /// A filesystem, by its mount point.
    Filesystem(String),
}

/// The rows that must be stored. No other rows may be stored.
#[derive(Debug, Default)]
pub(crate) struct Rows(BTreeSet<Identity>);

impl Rows {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn add(&mut self, sample: &Sample) {
        let processes = sample.processes.iter();
        let processes =
            processes.map(|process| Subject::Process(process.pid.into(), process.running_time.to_bits()));
        let sums = sample.sums.iter();
        let sums = sums.map(|sum| Subject::Sum(sum.cmd.clone(), sum.owner.user.clone()));
        let filesystems = sample.filesystems.iter();
        let filesystems = filesystems.map(|filesystem| Subject::Filesystem(filesystem.mount_point.clone()));
        let vm = sample.vm.iter().map(|_| Subject::Vm);
        let subjects = vm.chain(processes).chain(sums).chain(filesystems);
        self.0.extend(subjects.map(|subject| {
            let date = sample.create_date.to_string();
            (sample.instance_id.to_string(), date, subject)
        }));
    }

    pub(crate) fn absorb(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Adds the samples that an agent took, from its log at level `trace`. Samples that a killed agent had neither
    /// spooled nor published with an acknowledgement are left out, because an agent may lose these.
    pub(crate) fn add_witnessed(&mut self, agent: &Process) {
        let log = agent.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut sampled = BTreeMap::new();
        let mut kept = BTreeSet::new();
        for line in lines {
            let Some(id) = line["id"].as_str().map(str::to_owned) else {
                continue;
            };
            if line["message"] == "sampled" {
                let body = line["body"].as_str().unwrap();
                sampled.insert(id, serde_json::from_str::<Sample>(body).unwrap());
            } else {
                kept.insert(id);
            }
        }
        sampled
            .iter()
            .filter(|(id, _)| kept.contains(*id))
            .for_each(|(_, sample)| self.add(sample));
    }

    /// Waits until the samples stream is empty, then asserts that every expected row is stored exactly once and that no
    /// other row is stored.
    pub(crate) async fn settle(&self, what: &str, stack: &Stack) {
        drained(&stack.bus).await;
        let stored = stored(&stack.database).await;
        let distinct: BTreeSet<_> = stored.iter().cloned().collect();
        let lost: Vec<_> = self.0.difference(&distinct).collect();
        let foreign: Vec<_> = distinct.difference(&self.0).collect();
        let doubled = stored.len() - distinct.len();
        println!(
            "{what}: {} rows sampled, {} stored, {} lost, {doubled} doubled",
            self.0.len(),
            stored.len(),
            lost.len()
        );
        let first = |rows: &[&Identity]| format!("{:?}", &rows[..rows.len().min(3)]);
        assert!(
            lost.is_empty(),
            "{what}: {} rows were lost: {} ...",
            lost.len(),
            first(&lost)
        );
        assert!(
            foreign.is_empty(),
            "{what}: {} stored rows were not expected: {} ...",
            foreign.len(),
            first(&foreign)
        );
        assert_eq!(doubled, 0, "{what}: rows were stored twice");
        assert!(!self.0.is_empty(), "{what}: nothing was sampled");
    }
}

/// Returns the identity of every row, as often as it is stored.
async fn stored(database: &Database) -> Vec<Identity> {
    let rows = crate::rows::stored_rows(database, doc! {}).await.unwrap();
    let identity = |row: &Document| {
        let text = |key| row.get_str(key).unwrap().to_owned();
        let subject = if let Some(pid) = row.get("pid") {
            let pid = pid.as_i32().map(i64::from).or_else(|| pid.as_i64()).unwrap();
            let started = row.get("running_time").and_then(Bson::as_f64).unwrap();
            Subject::Process(pid, started.to_bits())
        } else if row.contains_key("processes") {
            Subject::Sum(text("cmd"), row.get_str("user").ok().map(str::to_owned))
        } else if row.contains_key("mount_point") {
            Subject::Filesystem(text("mount_point"))
        } else {
            Subject::Vm
        };
        (text("instance_id"), text("create_date"), subject)
    };
    rows.iter().map(identity).collect()
}

/// Returns the number of stored rows.
pub(crate) async fn count(database: &Database) -> Result<u64, String> {
    let rows = crate::rows::stored_rows(database, doc! {}).await;
    Ok(rows.map_err(|error| error.to_string())?.len() as u64)
}

/// Returns the number of messages in the samples stream.
pub(crate) async fn waiting(bus: &Bus) -> Result<u64, String> {
    let stream = bus.jetstream_for_tests().get_stream(SAMPLE_STREAM).await;
    let stream = stream.map_err(|error| error.to_string())?;
    Ok(stream.cached_info().state.messages)
}

/// Waits until every message of the samples stream is stored and acknowledged.
pub(crate) async fn drained(bus: &Bus) {
    // The time limit grows with the duration of the outage.
    eventually(
        "the samples stream is empty",
        PATIENCE + 4 * outage(),
        async || match waiting(bus).await? {
            0 => Ok(()),
            messages => Err(format!("{messages} messages are left in the stream")),
        },
    )
    .await;
}

/// Returns the resident memory of a process in KiB, from `/proc/<pid>/status`.
pub(crate) fn resident(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Returns the value of a metric, summed over its labels.
pub(crate) async fn metric(replica: &Replica, name: &str) -> f64 {
    let text = replica.metrics().await;
    let lines = text.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    lines
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum()
}

/// Publishes samples in place of an agent. Each sample has generated values for a VM row and for the given processes.
#[derive(Debug)]
pub(crate) struct Publisher {
    bus: Bus,
    instance: InstanceId,
    processes: u32,
    start: SystemTime,
    taken: u32,
    /// The rows of samples that the stream has acknowledged.
    pub(crate) rows: Rows,
}

impl Publisher {
    pub(crate) fn new(stack: &Stack, instance: &str, processes: u32) -> Self {
        Self {
            bus: stack.bus.clone(),
            instance: instance.parse().unwrap(),
            processes,
            start: SystemTime::now() - Duration::from_mins(10),
            taken: 0,
            rows: Rows::default(),
        }
    }

    /// Returns the next sample, dated one millisecond after the previous one.
    pub(crate) fn sample(&mut self) -> Sample {
        self.taken += 1;
        let moment = self.start + Duration::from_millis(1) * self.taken;
        Sample {
            instance_id: self.instance.clone(),
            create_date: CreateDate::at(moment, UTC_OFFSET.default.parse().unwrap()),
            part: 0,
            net_incoming: 0.6,
            net_outgoing: 5.7,
            vm_cpu: None,
            sums: Vec::new(),
            short_lived: None,
            filesystems: Vec::new(),
            vm: Some(VmSample {
                cpu_util: Some(1.5),
                mem: Some(8.6),
                disk_read: 0.0,
                disk_write: 128.8,
                proc: Some(self.processes),
                ..VmSample::default()
            }),
            processes: (0..self.processes).map(process).collect(),
        }
    }

    /// Publishes the next sample repeatedly until it is acknowledged, as an agent does.
    pub(crate) async fn publish(&mut self) {
        let sample = self.sample();
        eventually("the stream accepts a sample", PATIENCE + outage(), async || {
            // A message that was lost in an outage is sent again soon.
            match tokio::time::timeout(Duration::from_secs(1), self.send(&sample)).await {
                Ok(sent) => sent,
                Err(_) => Err("no acknowledgement".to_owned()),
            }
        })
        .await;
        self.rows.add(&sample);
    }

    pub(crate) async fn publish_many(&mut self, samples: u32) {
        for _ in 0..samples {
            self.publish().await;
        }
    }

    /// Publishes samples as JSON, which fills the stream with fewer rows, until the stream refuses one. Returns the number
    /// of accepted samples.
    pub(crate) async fn publish_until_full(&mut self) -> u32 {
        for taken in 0.. {
            let sample = self.sample();
            if let Err(refusal) = self.send_json(&sample).await {
                assert!(refusal.contains("maximum bytes exceeded"), "{refusal}");
                return taken;
            }
            self.rows.add(&sample);
        }
        unreachable!("the stream has a limit")
    }

    /// Publishes a sample once, as an agent does. The sample must fit into one message.
    pub(crate) async fn send(&self, sample: &Sample) -> Result<(), String> {
        let parts = agent::split(sample.clone(), &mut Encoder::new().unwrap()).unwrap();
        let [part] = parts.as_slice() else {
            panic!("the sample needs {} messages instead of one", parts.len());
        };
        self.send_encoded(part.body.to_vec()).await
    }

    /// Publishes a sample once as JSON, as other reporters may.
    pub(crate) async fn send_json(&self, sample: &Sample) -> Result<(), String> {
        self.send_raw(serde_json::to_vec(sample).unwrap()).await
    }

    /// Publishes a message body once.
    pub(crate) async fn send_raw(&self, body: Vec<u8>) -> Result<(), String> {
        self.send_message(PublishMessage::build().payload(body.into()))
            .await
    }

    /// Publishes a message body once, as one in the encoding of blocks.
    pub(crate) async fn send_encoded(&self, body: Vec<u8>) -> Result<(), String> {
        let message = PublishMessage::build().payload(body.into());
        self.send_message(message.header(CONTENT_TYPE, SAMPLE_CONTENT_TYPE))
            .await
    }

    async fn send_message(&self, message: PublishMessage) -> Result<(), String> {
        let subject = format!("{SAMPLE_SUBJECT_PREFIX}{}", self.instance);
        let published = async {
            self.bus
                .jetstream_for_tests()
                .send_publish(subject, message)
                .await?
                .await
        };
        match tokio::time::timeout(PATIENCE, published).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("{error:?}")),
            Err(_) => Err("no acknowledgement".to_owned()),
        }
    }
}

/// Publishes samples one after the other while `story` runs.
pub(crate) async fn publish_during(publisher: &mut Publisher, story: impl Future<Output = ()>) {
    let over = Cell::new(false);
    let publishing = async {
        while !over.get() {
            publisher.publish().await;
            // The pause limits the rate to a few hundred samples per second, so that ingestion is always in progress.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let telling = async {
        story.await;
        over.set(true);
    };
    tokio::join!(publishing, telling);
}

/// Returns a process with generated values.
pub(crate) fn process(index: u32) -> ProcessSample {
    ProcessSample {
        cmd: format!("process-{index}"),
        pid: 1000 + index,
        cpu_util: 0.1,
        mem: 0.2,
        disk_read: 0.0,
        disk_write: 0.3,
        running_time: 1_482_236_515.63,
        ..ProcessSample::default()
    }
}
