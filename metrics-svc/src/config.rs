//! The settings of metrics-svc.

use std::{net::SocketAddr, time::Duration};

use vmwatch_api::time::UtcOffset;
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

const HEALTH: &str = "127.0.0.1:9082";
const VM_COLLECTION: Setting = Setting {
    name: "VMWATCH_VM_COLLECTION",
    value: Value::Text,
    default: "vm_samples",
    help: "MongoDB collection of VM samples",
};
const PROCESS_COLLECTION: Setting = Setting {
    name: "VMWATCH_PROCESS_COLLECTION",
    value: Value::Text,
    default: "process_samples",
    help: "MongoDB collection of process samples",
};
const VM_RETENTION: Setting = Setting {
    name: "VMWATCH_VM_RETENTION",
    value: Value::Duration("1s", "18250d"),
    default: "30d",
    help: "how long samples of VMs are kept",
};
const PROCESS_RETENTION: Setting = Setting {
    name: "VMWATCH_PROCESS_RETENTION",
    value: Value::Duration("1s", "18250d"),
    default: "30d",
    help: "how long samples of processes are kept",
};
const FIVE_MINUTES_RETENTION: Setting = Setting {
    name: "VMWATCH_ROLLUP_5M_RETENTION",
    value: Value::Duration("1d", "18250d"),
    default: "90d",
    help: "how long five-minute rollups are kept (26,000 documents of 0.5 KiB per VM)",
};
const HOUR_RETENTION: Setting = Setting {
    name: "VMWATCH_ROLLUP_1H_RETENTION",
    value: Value::Duration("2d", "18250d"),
    default: "1095d",
    help: "how long one-hour rollups are kept (26,000 documents per VM)",
};
const DAY_RETENTION: Setting = Setting {
    name: "VMWATCH_ROLLUP_1D_RETENTION",
    value: Value::Duration("2d", "18250d"),
    default: "3650d",
    help: "how long one-day rollups are kept (3,650 documents per VM)",
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
    help: "maximum size of the live events kept for replay (about 0.5 KiB each); the oldest are dropped",
};
const EVENT_MAX_AGE: Setting = Setting {
    name: "VMWATCH_EVENTS_MAX_AGE",
    value: Value::Duration("1s", "30d"),
    default: "1h",
    help: "how long live events can be replayed",
};
const STREAM_BYTES: Setting = Setting {
    name: "VMWATCH_STREAM_BYTES",
    value: Value::Size("1MiB", "1048576GiB"),
    default: "2GiB",
    help: "maximum size of the samples waiting to be stored; when it is full, agents spool",
};
const STREAM_MESSAGES_PER_VM: Setting = Setting {
    name: "VMWATCH_STREAM_MESSAGES_PER_VM",
    value: Value::Number(100, 100_000),
    default: "2000",
    help: "maximum messages of one VM waiting to be stored (of at most 36 KiB); when reached, its agent spools",
};
const VM_MESSAGES_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_MESSAGES_PER_SECOND",
    value: Value::Number(1, 1_000_000),
    default: "50",
    help: "messages per second that one replica accepts from one VM, with bursts of up to ten seconds' worth; the rest waits in the stream",
};
const VM_ROWS_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_ROWS_PER_SECOND",
    value: Value::Number(10, 10_000_000),
    default: "1000",
    help: "process and VM rows per second that one replica accepts from one VM, with bursts of up to ten seconds' worth",
};
const VM_BYTES_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_BYTES_PER_SECOND",
    value: Value::Size("1KiB", "1GiB"),
    default: "256KiB",
    help: "message bytes per second that one replica accepts from one VM, with bursts of up to ten seconds' worth",
};
const VM_BUCKETS_PER_SECOND: Setting = Setting {
    name: "VMWATCH_VM_BUCKETS_PER_SECOND",
    value: Value::Number(1, 1_000_000),
    default: "5",
    help: "five-minute rollups per second that the samples of one VM may change; each costs four database calls",
};
const STREAM_MAX_AGE: Setting = Setting {
    name: "VMWATCH_STREAM_MAX_AGE",
    value: Value::Duration("0s", "3650d"),
    default: "0s",
    help: "age after which a sample waiting to be stored is dropped; 0s: never",
};
const ACK_WAIT: Setting = Setting {
    name: "VMWATCH_ACK_WAIT",
    value: Value::Duration("1s", "10m"),
    default: "30s",
    help: "time without progress after which a sample is redelivered to another replica",
};
const BATCH_ROWS: Setting = Setting {
    name: "VMWATCH_BATCH_ROWS",
    value: Value::Number(1, 20_000),
    default: "2000",
    help: "number of rows at which a batch is written to the database",
};
const BATCH_WAIT: Setting = Setting {
    name: "VMWATCH_BATCH_WAIT",
    value: Value::Duration("1ms", "10s"),
    default: "100ms",
    help: "maximum time that a batch waits for more rows before it is written",
};

const NEWEST_ROWS_KEPT: Setting = Setting {
    name: "VMWATCH_NEWEST_ROWS_KEPT",
    value: Value::Duration("0s", "1s"),
    default: "1s",
    help: "time for which an answer with newest samples is reused; 0s: every read queries the database",
};

/// Every setting, for `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        VM_COLLECTION,
        PROCESS_COLLECTION,
        VM_RETENTION,
        PROCESS_RETENTION,
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
        STREAM_MAX_AGE,
        STREAM_REPLICAS,
        ACK_WAIT,
        BATCH_ROWS,
        BATCH_WAIT,
        NEWEST_ROWS_KEPT,
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

/// The settings of metrics-svc.
#[derive(Debug)]
pub struct MetricsSettings {
    /// Connection to the bus.
    pub bus: BusSettings,
    /// Connection to the database.
    pub store: StoreSettings,
    pub(crate) serve: ServeSettings,
    /// Used by `main`, which starts telemetry before the program.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    /// Collections of rows.
    pub rows: RowSettings,
    /// Retention of rows.
    pub retention: RetentionSettings,
    /// Retention and interval of rollups.
    pub rollups: RollupSettings,
    /// Stream of live events.
    pub events: EventSettings,
    /// Stream of samples.
    pub stream: StreamSettings,
    /// Rate limits per VM.
    pub(crate) rate: RateSettings,
    /// Size of batches.
    pub batch: BatchSettings,
    /// Time for which an answer with newest rows is reused.
    pub(crate) newest_kept: Duration,
    /// Whether an operation that cannot be audited is refused.
    pub(crate) audit_required: bool,
    /// Time without a report after which a VM counts as silent.
    pub(crate) silent_after: Duration,
}

/// The collections of rows.
#[derive(Debug, Clone)]
pub struct RowSettings {
    /// Collection of VM rows.
    pub vms: String,
    /// Collection of process rows.
    pub processes: String,
    /// UTC offset of every `create_date`.
    pub offset: UtcOffset,
}

/// Retention of rows.
#[derive(Debug, Clone, Copy)]
pub struct RetentionSettings {
    /// VM rows.
    pub vms: Duration,
    /// Process rows.
    pub processes: Duration,
}

/// Retention of rollups by resolution, and the interval at which they are updated.
#[derive(Debug, Clone, Copy)]
pub struct RollupSettings {
    /// Retention of five-minute rollups.
    pub five_minutes: Duration,
    /// Retention of one-hour rollups.
    pub hours: Duration,
    /// Retention of one-day rollups.
    pub days: Duration,
    /// Interval between two passes.
    pub interval: Duration,
}

/// The stream of live events.
#[derive(Debug, Clone, Copy)]
pub struct EventSettings {
    /// Maximum size.
    pub bytes: i64,
    /// Maximum age.
    pub max_age: Duration,
    /// Number of replicas in a NATS cluster.
    pub replicas: usize,
}

/// The stream of samples.
#[derive(Debug, Clone, Copy)]
pub struct StreamSettings {
    /// Maximum size.
    pub bytes: i64,
    /// Maximum number of messages per VM.
    pub messages_per_vm: i64,
    /// Maximum age; zero: unlimited.
    pub max_age: Duration,
    /// Number of replicas in a NATS cluster.
    pub replicas: usize,
    /// Time after which an unacknowledged sample is redelivered, to any replica. A batch that waits for the database
    /// extends it well before it expires.
    pub ack_wait: Duration,
}

/// What one replica accepts from one VM per second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RateSettings {
    pub(crate) messages: f64,
    pub(crate) rows: f64,
    pub(crate) bytes: f64,
    /// Five-minute buckets that the VM's rows may touch.
    pub(crate) five_minutes: f64,
}

/// Limits of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchSettings {
    /// Number of rows that completes a batch.
    pub rows: usize,
    /// Maximum time a batch waits for more rows.
    pub wait: Duration,
}

impl MetricsSettings {
    /// Reads the settings.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let store = StoreSettings::read(env);
        let serve = ServeSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let offset = env.get(&config::UTC_OFFSET);
        let vms = env.get(&VM_COLLECTION);
        let processes = env.get(&PROCESS_COLLECTION);
        // MongoDB limits expireAfterSeconds to 2^31 - 1, 68 years.
        let keep_vms = env.duration(&VM_RETENTION);
        let keep_processes = env.duration(&PROCESS_RETENTION);
        // A bucket must not expire while it is still being updated.
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
        let max_age = env.duration(&STREAM_MAX_AGE);
        let replicas = env.number(&STREAM_REPLICAS);
        let ack_wait = env.duration(&ACK_WAIT);
        let rows = env.number(&BATCH_ROWS);
        let wait = env.duration(&BATCH_WAIT);
        let audit_required = env.get(&audit::REQUIRED);
        let newest_kept = env.duration(&NEWEST_ROWS_KEPT);
        let silent_after = config::silent_after(env);
        let replicas = replicas?;
        Ok(Self {
            bus: bus?,
            store: store?,
            serve: serve?,
            telemetry: telemetry?,
            health: health?,
            rows: RowSettings {
                vms: vms?,
                processes: processes?,
                offset: offset?,
            },
            retention: RetentionSettings {
                vms: keep_vms?,
                processes: keep_processes?,
            },
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
                // At most 1 GiB, so the conversion is exact.
                bytes: u32::try_from(vm_bytes?.0).unwrap_or(u32::MAX).into(),
            },
            batch: BatchSettings {
                rows: rows?,
                wait: wait?,
            },
            newest_kept: newest_kept?,
            audit_required: audit_required?,
            silent_after: silent_after?,
        })
    }
}
