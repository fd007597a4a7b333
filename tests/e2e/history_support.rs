//! Helpers of the history tests: samples at chosen times, and waiting for their rollups.

use async_nats::jetstream::message::PublishMessage;
use mongodb::bson::{Document, doc};
use testkit::{PATIENCE, Program, Stack, StackBuilder, eventually};
use vmwatch_api::{
    Method, Principal, Role, Scope,
    agents::SENT_AT,
    metrics::{
        CONTENT_TYPE, FilesystemSample, ProcessSample, SAMPLE_STREAM, SAMPLE_SUBJECT_PREFIX, Sample,
        SystemSample, VmSample,
    },
    time::{CreateDate, UtcOffset, unix_millis},
    wire::Fault,
};
use vmwatch_blocks::{Encoder, SAMPLE_CONTENT_TYPE, encode_sample};
use vmwatch_bus::Context;

pub(crate) const SECOND: u64 = 1000;
pub(crate) const MINUTE: u64 = 60 * SECOND;
pub(crate) const HOUR: u64 = 60 * MINUTE;
pub(crate) const DAY: u64 = 24 * HOUR;

/// Builds a test environment with NATS, the database and one metrics-svc that computes rollups every 50 ms.
pub(crate) fn stack() -> StackBuilder {
    [Program::Gateway, Program::Auth, Program::Lifecycle]
        .into_iter()
        .fold(Stack::builder(), |builder, program| builder.replicas(program, 0))
        .without_rates()
        .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "50ms")
        .set(Program::Metrics, "VMWATCH_ACK_WAIT", "2s")
        // The default of one minute is shorter than some tests on a busy machine.
        .set(Program::Metrics, "VMWATCH_COMPACTION_INTERVAL", "1h")
        // vmwatch-auth owns the audit stream and does not run in this test environment.
        .set(Program::Metrics, "VMWATCH_AUDIT_REQUIRED", "false")
}

/// Returns the start of the second-last complete five-minute interval, which is recent and wholly in the past.
pub(crate) fn recent_bucket() -> u64 {
    (unix_millis() / (5 * MINUTE) - 2) * 5 * MINUTE
}

/// Builds a sample of a VM. All values are derived from its CPU utilisation.
pub(crate) fn sample(instance: &str, at_ms: u64, offset: &str, cpu_util: f64) -> Sample {
    let offset: UtcOffset = offset.parse().unwrap();
    Sample {
        instance_id: instance.parse().unwrap(),
        create_date: CreateDate::at_millis(at_ms, offset),
        part: 0,
        net_incoming: cpu_util * 3.0,
        net_outgoing: cpu_util * 5.0,
        vm_cpu: None,
        sums: Vec::new(),
        short_lived: None,
        filesystems: Vec::new(),
        vm: Some(VmSample {
            cpu_util: Some(cpu_util),
            mem: Some(100.0 - cpu_util),
            disk_read: cpu_util / 2.0,
            disk_write: cpu_util * 7.0,
            proc: Some(95),
            // A kernel that does not report the other values.
            system: SystemSample {
                cores: Some(4),
                load: Some(cpu_util / 25.0),
                ..SystemSample::default()
            },
            ..VmSample::default()
        }),
        processes: Vec::new(),
    }
}

/// Builds a filesystem of which half is used.
pub(crate) fn filesystem(mount_point: &str, total_bytes: u64) -> FilesystemSample {
    FilesystemSample {
        mount_point: mount_point.to_owned(),
        filesystem: "ext4".to_owned(),
        used_bytes: total_bytes / 2,
        total_bytes,
    }
}

/// Builds a process that started long ago.
pub(crate) fn process(name: &str, pid: u32, cpu_util: f64) -> ProcessSample {
    ProcessSample {
        cmd: name.to_owned(),
        pid,
        cpu_util,
        mem: 0.2,
        disk_read: 1.5,
        disk_write: 0.3,
        running_time: 1_482_236_515.63,
        ..ProcessSample::default()
    }
}

/// Publishes a sample as JSON, without a message id, so that NATS does not discard repetitions and metrics-svc receives
/// each.
pub(crate) async fn publish(stack: &Stack, sample: &Sample) {
    let body = serde_json::to_vec(sample).unwrap();
    publish_message(stack, sample, PublishMessage::build().payload(body.into())).await;
}

/// Publishes a sample like [`publish`], with the headers of an agent whose clock is ahead by this many milliseconds.
pub(crate) async fn publish_by_clock(stack: &Stack, sample: &Sample, ahead_ms: i64) {
    let body = serde_json::to_vec(sample).unwrap();
    let sent_ms = unix_millis().checked_add_signed(ahead_ms).unwrap();
    let message = PublishMessage::build().payload(body.into());
    publish_message(stack, sample, message.header(SENT_AT, sent_ms.to_string())).await;
}

/// Publishes a sample like [`publish`], but in the encoding that agents use.
pub(crate) async fn publish_encoded(stack: &Stack, sample: &Sample) {
    let body = encode_sample(sample, &mut Encoder::new().unwrap()).unwrap();
    let message = PublishMessage::build().payload(body.into());
    publish_message(stack, sample, message.header(CONTENT_TYPE, SAMPLE_CONTENT_TYPE)).await;
}

async fn publish_message(stack: &Stack, sample: &Sample, message: PublishMessage) {
    let subject = format!("{SAMPLE_SUBJECT_PREFIX}{}", sample.instance_id);
    eventually("the stream accepts a sample", PATIENCE, async || {
        let sent = stack
            .bus
            .jetstream_for_tests()
            .send_publish(subject.clone(), message.clone())
            .await;
        let acknowledged = sent.map_err(|error| error.to_string())?.await;
        acknowledged.map(drop).map_err(|error| error.to_string())
    })
    .await;
}

/// Waits until every sample is stored and acknowledged.
pub(crate) async fn stored(stack: &Stack) {
    eventually("all samples are stored", PATIENCE, async || {
        let stream = stack.bus.jetstream_for_tests().get_stream(SAMPLE_STREAM).await;
        match stream
            .map_err(|error| error.to_string())?
            .cached_info()
            .state
            .messages
        {
            0 => Ok(()),
            messages => Err(format!("{messages} messages are left in the stream")),
        }
    })
    .await;
}

/// Returns the number of dirty buckets.
pub(crate) async fn dirty_buckets(stack: &Stack) -> u64 {
    let buckets = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_dirty_buckets");
    buckets.count_documents(doc! {}).await.unwrap()
}

/// Waits until every sample is stored and contained in the rollups.
pub(crate) async fn followed(stack: &Stack) {
    stored(stack).await;
    eventually(
        "all dirty buckets are rolled up",
        PATIENCE,
        async || match dirty_buckets(stack).await {
            0 => Ok(()),
            buckets => Err(format!("{buckets} buckets are dirty")),
        },
    )
    .await;
}

/// Calls a bus method as a viewer of this scope.
pub(crate) async fn call_in<M: Method>(
    stack: &Stack,
    scope: Scope,
    params: &M::Params,
) -> Result<M::Reply, Fault> {
    let principal = Principal {
        user: "test".to_owned(),
        role: Role::Viewer,
        scope,
    };
    stack
        .bus
        .call::<M>(&Context::new(PATIENCE).as_principal(principal), params)
        .await
}

/// Calls a bus method as a viewer of all VMs and panics if the call fails.
pub(crate) async fn call<M: Method>(stack: &Stack, params: &M::Params) -> M::Reply {
    let reply = call_in::<M>(stack, Scope::All, params).await;
    reply.unwrap_or_else(|fault| panic!("{}: {fault}", M::INFO.subject))
}

/// Generates the same pseudo-random numbers in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    /// Returns a number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        // This is Marsaglia's xorshift64 generator.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// Returns a percentage with one decimal, the precision of an agent's values.
    pub(crate) fn percentage(&mut self) -> f64 {
        f64::from(u32::try_from(self.below(1001)).unwrap()) / 10.0
    }
}
