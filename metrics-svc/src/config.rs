//! Environment settings of metrics-svc.

mod retention_rules;

use std::{net::SocketAddr, time::Duration};

use vmwatch_api::{current::MAX_PROCESS_SERIES, time::UtcOffset};
use vmwatch_bus::{
    BusSettings, audit, limits,
    serve::{self, ServeSettings},
};
use vmwatch_service::{
    config::{self, Environment, Invalid, STREAM_REPLICAS, Setting, Value},
    health,
    telemetry::{self, TelemetrySettings},
};
use vmwatch_store::StoreSettings;

pub use self::retention_rules::RetentionRules;
use crate::row_kind::RowKind;

const HEALTH: &str = "127.0.0.1:9082";
const BLOCK_COLLECTION: Setting = Setting {
    name: "VMWATCH_BLOCK_COLLECTION",
    value: Value::Text,
    default: "blocks",
    help: "name of the MongoDB collection that stores the samples of VMs and processes",
};
const VM_COLLECTION: Setting = Setting {
    name: "VMWATCH_VM_COLLECTION",
    value: Value::Text,
    default: "vm_samples",
    help: "name of the MongoDB collection with samples of VMs that other software has stored, one document per row; also the prefix of the names of collections with derived data",
};
const PROCESS_COLLECTION: Setting = Setting {
    name: "VMWATCH_PROCESS_COLLECTION",
    value: Value::Text,
    default: "process_samples",
    help: "name of the MongoDB collection with samples of processes that other software has stored, one document per row",
};
const FLAT_CHECK_INTERVAL: Setting = Setting {
    name: "VMWATCH_FLAT_CHECK_INTERVAL",
    value: Value::Duration("0s", "1h"),
    default: "1m",
    help: "interval at which an empty collection of samples that other software has stored is checked for new ones; 0s: at every request",
};
const VM_RETENTION: Setting = Setting {
    name: "VMWATCH_VM_RETENTION",
    value: Value::Duration("1s", "18250d"),
    default: "30d",
    help: "time for which samples of VMs and their filesystems are kept, unless VMWATCH_RETENTION_RULES says otherwise",
};
const PROCESS_RETENTION: Setting = Setting {
    name: "VMWATCH_PROCESS_RETENTION",
    value: Value::Duration("1s", "18250d"),
    default: "30d",
    help: "time for which samples of processes are kept, unless VMWATCH_RETENTION_RULES says otherwise",
};
const RETENTION_RULES: Setting = Setting {
    name: "VMWATCH_RETENTION_RULES",
    value: Value::Text,
    default: "",
    help: "comma-separated retention times by label, of which the first that matches a VM applies to its samples from then on, such as `env=prod:365d,env=test:process:7d`: a label (key, key=value, or hv/key=value for one of a hypervisor), optionally vm (which includes filesystems) or process, and a time from 1s to 18250d",
};
const FIVE_MINUTES_RETENTION: Setting = Setting {
    name: "VMWATCH_ROLLUP_5M_RETENTION",
    value: Value::Duration("1d", "18250d"),
    default: "90d",
    help: "time for which five-minute rollups are kept (by default 26,000 documents of 0.5 KiB per VM)",
};
const HOUR_RETENTION: Setting = Setting {
    name: "VMWATCH_ROLLUP_1H_RETENTION",
    value: Value::Duration("2d", "18250d"),
    default: "1095d",
    help: "time for which one-hour rollups are kept; the default amounts to about 26,000 documents per VM",
};
const DAY_RETENTION: Setting = Setting {
    name: "VMWATCH_ROLLUP_1D_RETENTION",
    value: Value::Duration("2d", "18250d"),
    default: "3650d",
    help: "time for which one-day rollups are kept (by default 3,650 documents per VM)",
};
const ROLLUP_INTERVAL: Setting = Setting {
    name: "VMWATCH_ROLLUP_INTERVAL",
    value: Value::Duration("10ms", "10m"),
    default: "10s",
    help: "interval at which rollups and the list of VMs are updated from new samples",
};
const EVENT_BYTES: Setting = Setting {
    name: "VMWATCH_EVENTS_BYTES",
    value: Value::Size("1MiB", "1024GiB"),
    default: "64MiB",
    help: "maximum total size of the live events kept for clients that reconnect (about 0.5 KiB each); when it is reached, the oldest are dropped",
};
const EVENT_MAX_AGE: Setting = Setting {
    name: "VMWATCH_EVENTS_MAX_AGE",
    value: Value::Duration("1s", "30d"),
    default: "1h",
    help: "time for which live events are kept for clients that reconnect",
};
const STREAM_BYTES: Setting = Setting {
    name: "VMWATCH_STREAM_BYTES",
    value: Value::Size("1MiB", "1048576GiB"),
    default: "2GiB",
    help: "maximum total size of the samples that wait in the stream to be stored; when it is reached, agents keep further samples in their spools",
};
const STREAM_MESSAGES_PER_VM: Setting = Setting {
    name: "VMWATCH_STREAM_MESSAGES_PER_VM",
    value: Value::Number(100, 100_000),
    default: "250",
    help: "maximum number of messages (at most 516 KiB each) of one VM that wait in the stream to be stored; when it is reached, the VM's agent keeps further samples in its spool",
};
const VM_MESSAGES_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_MESSAGES_PER_SECOND",
    value: Value::Number(1, 1_000_000),
    default: "50",
    help: "maximum number of messages per second that one replica accepts from one VM, with bursts of up to ten seconds' worth; further messages wait in the stream",
};
const VM_ROWS_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_ROWS_PER_SECOND",
    value: Value::Number(10, 10_000_000),
    default: "1000",
    help: "maximum number of rows (of the VM, its processes and its filesystems) per second that one replica accepts from one VM, with bursts of up to ten seconds' worth",
};
const VM_BYTES_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_BYTES_PER_SECOND",
    value: Value::Size("1KiB", "1GiB"),
    default: "256KiB",
    help: "maximum bytes of sample messages per second that one replica accepts from one VM; a burst may use the allowance of ten seconds",
};
const VM_BUCKETS_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_BUCKETS_PER_SECOND",
    value: Value::Number(1, 1_000_000),
    default: "5",
    help: "maximum number of five-minute rollups per second that the samples of one VM may update; each update costs four database calls",
};
const VM_DEAD_LETTER_INTERVAL: Setting = Setting {
    name: "VMWATCH_VM_DEAD_LETTER_INTERVAL",
    value: Value::Duration("1s", "1d"),
    default: "1m",
    help: "minimum interval between two refused samples of one VM that one replica keeps as dead letters; further refused samples are only counted",
};
const STREAM_MAX_AGE: Setting = Setting {
    name: "VMWATCH_STREAM_MAX_AGE",
    value: Value::Duration("0s", "3650d"),
    default: "0s",
    help: "age after which a sample that still waits to be stored is dropped; 0s: never",
};
const ACK_WAIT: Setting = Setting {
    name: "VMWATCH_ACK_WAIT",
    value: Value::Duration("1s", "10m"),
    default: "30s",
    help: "time after which a sample that a replica has received but not stored is redelivered to any replica",
};
const BATCH_ROWS: Setting = Setting {
    name: "VMWATCH_BATCH_ROWS",
    value: Value::Number(1, 20_000),
    default: "8000",
    help: "number of rows that are collected before they are written to the database together",
};
const BATCH_WAIT: Setting = Setting {
    name: "VMWATCH_BATCH_WAIT",
    value: Value::Duration("1ms", "10s"),
    default: "100ms",
    help: "maximum time for which rows are collected before they are written to the database together",
};

const COMPACTION_INTERVAL: Setting = Setting {
    name: "VMWATCH_COMPACTION_INTERVAL",
    value: Value::Duration("50ms", "1h"),
    default: "1m",
    help: "pause between two passes that merge the stored samples of closed hours into larger blocks; late samples of an hour are merged again after ten such intervals at the earliest",
};
const COMPACTION_DELETE_AFTER: Setting = Setting {
    name: "VMWATCH_COMPACTION_DELETE_AFTER",
    value: Value::Duration("1s", "1d"),
    default: "60s",
    help: "time for which blocks are kept after they were merged; a read of stored samples fails if it takes longer than two fifths of this time",
};
const NEWEST_ROWS_KEPT: Setting = Setting {
    name: "VMWATCH_NEWEST_ROWS_KEPT",
    value: Value::Duration("0s", "1s"),
    default: "1s",
    help: "time for which an answer with the newest samples is reused for equal requests; 0s: every request queries the database",
};
const PROCESS_SERIES: Setting = Setting {
    name: "VMWATCH_PROCESS_SERIES",
    value: Value::Number(0, MAX_PROCESS_SERIES as u64),
    default: "0",
    help: "maximum number of per-process series in /api/v1/metrics, one half for CPU usage and one half for memory usage, by VM and process name; only the greatest of all VMs are listed; 0: none; otherwise, live events of process samples are up to 2 KiB larger",
};

/// All settings of metrics-svc, as listed by `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        BLOCK_COLLECTION,
        VM_COLLECTION,
        PROCESS_COLLECTION,
        FLAT_CHECK_INTERVAL,
        VM_RETENTION,
        PROCESS_RETENTION,
        RETENTION_RULES,
        FIVE_MINUTES_RETENTION,
        HOUR_RETENTION,
        DAY_RETENTION,
        ROLLUP_INTERVAL,
        EVENT_BYTES,
        EVENT_MAX_AGE,
        STREAM_BYTES,
        STREAM_MESSAGES_PER_VM,
        VM_MESSAGES_PER_SECOND,
        VM_ROWS_PER_SECOND,
        VM_BYTES_PER_SECOND,
        VM_BUCKETS_PER_SECOND,
        VM_DEAD_LETTER_INTERVAL,
        STREAM_MAX_AGE,
        STREAM_REPLICAS,
        ACK_WAIT,
        BATCH_ROWS,
        BATCH_WAIT,
        COMPACTION_INTERVAL,
        COMPACTION_DELETE_AFTER,
        NEWEST_ROWS_KEPT,
        PROCESS_SERIES,
        audit::REQUIRED,
        config::SILENT_AFTER,
        config::UTC_OFFSET,
        health::setting(HEALTH),
    ],
    vmwatch_store::SETTINGS,
    serve::SETTINGS,
    limits::SETTINGS,
    vmwatch_bus::SETTINGS,
    telemetry::SETTINGS,
];

/// The settings of metrics-svc, read and validated.
#[derive(Debug)]
pub struct MetricsSettings {
    /// Settings of the connection to the bus.
    pub bus: BusSettings,
    /// Settings of the connection to the database.
    pub store: StoreSettings,
    pub(crate) serve: ServeSettings,
    /// Telemetry settings, for `main`: telemetry starts before the service does.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    /// Names of the collections of rows.
    pub rows: RowSettings,
    /// Retention of VM rows and process rows.
    pub retention: RetentionSettings,
    /// Retention of rows by the labels of their VM.
    pub(crate) retention_rules: RetentionRules,
    /// Retention and update interval of rollups.
    pub rollups: RollupSettings,
    /// Limits of the stream of live events.
    pub events: EventSettings,
    /// Limits of the stream of samples.
    pub stream: StreamSettings,
    /// Limits of the rate at which samples of each VM are accepted.
    pub(crate) rate: RateSettings,
    /// Size limits of batches of rows.
    pub batch: BatchSettings,
    /// Pace of compaction.
    pub(crate) compaction: CompactionSettings,
    /// Time for which an answer with newest rows is reused.
    pub(crate) newest_kept: Duration,
    /// Maximum number of per-process series in the answers to a request for metrics.
    pub(crate) process_series: usize,
    /// Whether a command that changes data is refused if its audit record cannot be written.
    pub(crate) audit_required: bool,
    /// Time without a report after which a VM counts as silent.
    pub(crate) silent_after: Duration,
}

/// Names and date format of the collections of rows.
#[derive(Debug, Clone)]
pub struct RowSettings {
    /// Name of the collection of blocks.
    pub blocks: String,
    /// Name of the flat collection of VM rows.
    pub vms: String,
    /// Name of the flat collection of process rows.
    pub processes: String,
    /// Interval at which an empty flat collection is checked for rows.
    pub flat_check: Duration,
    /// UTC offset of every `create_date`.
    pub offset: UtcOffset,
}

/// Retention of rows to which no rule applies.
#[derive(Debug, Clone, Copy)]
pub struct RetentionSettings {
    /// Retention of the rows of VMs and their filesystems.
    pub vms: Duration,
    /// Retention of process rows.
    pub processes: Duration,
}

/// Retention of rollups by resolution, and the interval at which rollups are updated.
#[derive(Debug, Clone, Copy)]
pub struct RollupSettings {
    /// Retention of five-minute rollups.
    pub five_minutes: Duration,
    /// Retention of one-hour rollups.
    pub hours: Duration,
    /// Retention of one-day rollups.
    pub days: Duration,
    /// Interval at which rollups are updated from new rows.
    pub interval: Duration,
}

impl RetentionSettings {
    /// The retention of this kind of rows.
    pub(crate) const fn of(&self, kind: RowKind) -> Duration {
        match kind.retained_as() {
            RowKind::Process => self.processes,
            RowKind::Vm | RowKind::Filesystem | RowKind::Hypervisor => self.vms,
        }
    }
}

/// Limits of the stream of live events.
#[derive(Debug, Clone, Copy)]
pub struct EventSettings {
    /// Maximum total size of the live events in the stream.
    pub bytes: i64,
    /// Age at which a live event is dropped from the stream.
    pub max_age: Duration,
    /// Number of replicas of the stream in a NATS cluster.
    pub replicas: usize,
}

/// Limits of the stream of samples.
#[derive(Debug, Clone, Copy)]
pub struct StreamSettings {
    /// Maximum total size of the samples in the stream.
    pub bytes: i64,
    /// Maximum number of messages of one VM in the stream of samples.
    pub messages_per_vm: i64,
    /// Age at which a sample is dropped from the stream; zero means never.
    pub max_age: Duration,
    /// Number of replicas of the stream in a NATS cluster.
    pub replicas: usize,
    /// Time after which an unacknowledged sample is redelivered, to any replica. While a batch waits for the database,
    /// the writer extends this time well before it is over.
    pub ack_wait: Duration,
}

/// Limits of what one replica accepts from one VM, per second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RateSettings {
    pub(crate) messages: f64,
    pub(crate) rows: f64,
    pub(crate) bytes: f64,
    /// Number of five-minute rollups that the VM's rows may change.
    pub(crate) five_minutes: f64,
    /// Minimum interval between two dead letters of the VM.
    pub(crate) dead_letter_interval: Duration,
}

/// Limits of a batch of rows that are written together.
#[derive(Debug, Clone, Copy)]
pub struct BatchSettings {
    /// Number of rows at which a batch is written to the database.
    pub rows: usize,
    /// Maximum time for which a batch waits for more rows.
    pub wait: Duration,
}

/// Pace of compaction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompactionSettings {
    /// Pause between two passes.
    pub(crate) interval: Duration,
    /// Time for which merged blocks are kept.
    pub(crate) delete_after: Duration,
}

impl CompactionSettings {
    /// How long a cursor of a read may be open. Merged blocks are kept for more than twice this time.
    pub(crate) fn longest_read(&self) -> Duration {
        self.delete_after * 2 / 5
    }
}

impl MetricsSettings {
    /// Reads and validates all settings from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let store = StoreSettings::read(env);
        let serve = ServeSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let offset = env.get(&config::UTC_OFFSET);
        let blocks = env.get(&BLOCK_COLLECTION);
        let vms = env.get(&VM_COLLECTION);
        let flat_check = env.duration(&FLAT_CHECK_INTERVAL);
        let processes = env.get(&PROCESS_COLLECTION);
        // MongoDB limits `expireAfterSeconds` to 2^31 - 1, which is 68 years.
        let keep_vms = env.duration(&VM_RETENTION);
        let keep_processes = env.duration(&PROCESS_RETENTION);
        let retention_rules = env.optional(&RETENTION_RULES);
        // A rollup must not expire while rows of its time bucket may still arrive.
        let keep_five_minutes = env.duration(&FIVE_MINUTES_RETENTION);
        let keep_hours = env.duration(&HOUR_RETENTION);
        let keep_days = env.duration(&DAY_RETENTION);
        let interval = env.duration(&ROLLUP_INTERVAL);
        let event_bytes = env.size(&EVENT_BYTES);
        let event_max_age = env.duration(&EVENT_MAX_AGE);
        let bytes = env.size(&STREAM_BYTES);
        let messages_per_vm = env.number(&STREAM_MESSAGES_PER_VM);
        let vm_messages = env.number::<u32>(&VM_MESSAGES_PER_SECOND);
        let vm_rows = env.number::<u32>(&VM_ROWS_PER_SECOND);
        let vm_bytes = env.size(&VM_BYTES_PER_SECOND);
        let vm_buckets = env.number::<u32>(&VM_BUCKETS_PER_SECOND);
        let dead_letter_interval = env.duration(&VM_DEAD_LETTER_INTERVAL);
        let max_age = env.duration(&STREAM_MAX_AGE);
        let replicas = env.number(&STREAM_REPLICAS);
        let ack_wait = env.duration(&ACK_WAIT);
        let rows = env.number(&BATCH_ROWS);
        let wait = env.duration(&BATCH_WAIT);
        let compaction_interval = env.duration(&COMPACTION_INTERVAL);
        let delete_after = env.duration(&COMPACTION_DELETE_AFTER);
        let audit_required = env.get(&audit::REQUIRED);
        let newest_kept = env.duration(&NEWEST_ROWS_KEPT);
        let process_series = env.number(&PROCESS_SERIES);
        let silent_after = config::silent_after(env);
        let replicas = replicas?;
        Ok(Self {
            bus: bus?,
            store: store?,
            serve: serve?,
            telemetry: telemetry?,
            health: health?,
            rows: RowSettings {
                blocks: blocks?,
                vms: vms?,
                processes: processes?,
                flat_check: flat_check?,
                offset: offset?,
            },
            retention: RetentionSettings {
                vms: keep_vms?,
                processes: keep_processes?,
            },
            retention_rules: retention_rules?.unwrap_or_default(),
            rollups: RollupSettings {
                five_minutes: keep_five_minutes?,
                hours: keep_hours?,
                days: keep_days?,
                interval: interval?,
            },
            events: EventSettings {
                bytes: i64::try_from(event_bytes?.0).unwrap_or(i64::MAX),
                max_age: event_max_age?,
                replicas,
            },
            stream: StreamSettings {
                bytes: i64::try_from(bytes?.0).unwrap_or(i64::MAX),
                messages_per_vm: messages_per_vm?,
                max_age: max_age?,
                replicas,
                ack_wait: ack_wait?,
            },
            rate: RateSettings {
                messages: vm_messages?.into(),
                rows: vm_rows?.into(),
                five_minutes: vm_buckets?.into(),
                // The setting allows at most 1 GiB, so the conversion is exact.
                bytes: u32::try_from(vm_bytes?.0).unwrap_or(u32::MAX).into(),
                dead_letter_interval: dead_letter_interval?,
            },
            batch: BatchSettings {
                rows: rows?,
                wait: wait?,
            },
            compaction: CompactionSettings {
                interval: compaction_interval?,
                delete_after: delete_after?,
            },
            newest_kept: newest_kept?,
            process_series: process_series?,
            audit_required: audit_required?,
            silent_after: silent_after?,
        })
    }
}
