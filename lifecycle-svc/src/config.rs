//! Environment settings of lifecycle-svc.

mod hypervisors;

use std::{net::SocketAddr, time::Duration};

use vmwatch_api::time::UtcOffset;
use vmwatch_bus::{
    BusSettings, audit, limits,
    serve::{self, ServeSettings},
};
use vmwatch_service::{
    config::{self, Environment, Invalid, STREAM_REPLICAS, Setting, UTC_OFFSET, Value},
    health,
    telemetry::{self, TelemetrySettings},
};

pub(crate) use self::hypervisors::{Endpoint, HypervisorSpec};

const HEALTH: &str = "127.0.0.1:9083";
const HYPERVISOR_TIMEOUT: Setting = Setting {
    name: "VMWATCH_HYPERVISOR_TIMEOUT",
    value: Value::Duration("100ms", "5m"),
    default: "10s",
    help: "time limit of one call to a hypervisor",
};
const HYPERVISOR_CALLS: Setting = Setting {
    name: "VMWATCH_HYPERVISOR_CALLS",
    value: Value::Number(1, 16),
    default: "8",
    help: "maximum concurrent calls to one hypervisor; further calls wait, and the wait counts towards VMWATCH_HYPERVISOR_TIMEOUT",
};
const LAST_HYPERVISOR_KEEP: Setting = Setting {
    name: "VMWATCH_LAST_HYPERVISOR_KEEP",
    value: Value::Duration("1s", "365d"),
    default: "10m",
    help: "time for which a VM is not started on another hypervisor after a hypervisor that had the VM has become unreachable, accurate to about a minute; a host that is still running the VM must have been switched off by then",
};
const STATE_INTERVAL: Setting = Setting {
    name: "VMWATCH_STATE_INTERVAL",
    value: Value::Duration("100ms", "1h"),
    default: "5s",
    help: "interval at which one replica lists the VMs of each hypervisor; the list of VMs and live events about VM states lag by at most this time",
};
const SAMPLE_INTERVAL: Setting = Setting {
    name: "VMWATCH_HYPERVISOR_SAMPLE_INTERVAL",
    value: Value::Duration("1s", "1h"),
    default: "10s",
    help: "interval at which one replica reads the counters of the VMs of each hypervisor, for measures that need no agent; OpenStack Nova gives none; must be shorter than VMWATCH_SILENT_AFTER of metrics-svc",
};
const OPERATION_LIMIT: Setting = Setting {
    name: "VMWATCH_OPERATION_LIMIT",
    value: Value::Duration("1s", "1h"),
    default: "5m",
    help: "time after which an unfinished operation is recorded as timed out, counted from its request; the caller usually stops waiting earlier",
};
const OPERATION_LEASE: Setting = Setting {
    name: "VMWATCH_OPERATION_LEASE",
    value: Value::Duration("1s", "5m"),
    default: "15s",
    help: "duration of a replica's lease on an operation and, limited to 10s, on polling a hypervisor; if a replica dies, another one takes over its operations and hypervisors after this time",
};
/// Maximum duration of a lease on polling a hypervisor.
const MAX_POLL_LEASE: Duration = Duration::from_secs(10);
const OPERATIONS_KEEP: Setting = Setting {
    name: "VMWATCH_OPERATIONS_KEEP",
    value: Value::Duration("24h", "365d"),
    default: "7d",
    help: "time for which records of operations and their idempotency keys are kept",
};
const OPERATIONS_MAX_BYTES: Setting = Setting {
    name: "VMWATCH_OPERATIONS_MAX_BYTES",
    value: Value::Size("1MiB", "1024GiB"),
    default: "256MiB",
    help: "maximum size of the KV bucket of operation records (about 1.5 KiB each); when it is nearly full, actions on VMs are refused",
};

/// All settings of lifecycle-svc, as listed by `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        hypervisors::HYPERVISORS,
        HYPERVISOR_TIMEOUT,
        HYPERVISOR_CALLS,
        LAST_HYPERVISOR_KEEP,
        STATE_INTERVAL,
        SAMPLE_INTERVAL,
        OPERATION_LIMIT,
        OPERATION_LEASE,
        OPERATIONS_KEEP,
        OPERATIONS_MAX_BYTES,
        audit::REQUIRED,
        STREAM_REPLICAS,
        UTC_OFFSET,
        health::setting(HEALTH),
    ],
    serve::SETTINGS,
    limits::SETTINGS,
    vmwatch_bus::SETTINGS,
    telemetry::SETTINGS,
];

/// The settings of lifecycle-svc, read and validated.
#[derive(Debug)]
pub struct LifecycleSettings {
    pub(crate) bus: BusSettings,
    pub(crate) serve: ServeSettings,
    /// Telemetry settings, for `main`: telemetry starts before the service does.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) hypervisors: Vec<HypervisorSpec>,
    pub(crate) calls: CallLimits,
    pub(crate) operations: OperationSettings,
    pub(crate) polling: PollSettings,
}

/// Settings of the polling of hypervisors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PollSettings {
    /// Interval at which the VMs of a hypervisor are listed.
    pub(crate) interval: Duration,
    pub(crate) measures: MeasureSettings,
    /// How long an unreachable hypervisor that had a VM prevents its start elsewhere.
    pub(crate) last_hypervisor_keep: Duration,
    /// Time after which a replica's lease on the polling of a hypervisor expires if it is not renewed.
    pub(crate) lease: Duration,
    /// Number of replicas of the KV buckets in a NATS cluster.
    pub(crate) replicas: usize,
}

/// Settings of the measures that hypervisors give.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MeasureSettings {
    /// Interval at which the counters of a hypervisor are read.
    pub(crate) interval: Duration,
    /// UTC offset of the time in the samples.
    pub(crate) utc_offset: UtcOffset,
}

/// Settings of the `setup` command, which needs no hypervisors.
#[derive(Debug)]
pub struct SetupSettings {
    pub(crate) bus: BusSettings,
    pub(crate) operations: OperationSettings,
}

impl SetupSettings {
    /// Reads and validates the settings of the `setup` command from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let operations = OperationSettings::read(env);
        Ok(Self {
            bus: bus?,
            operations: operations?,
        })
    }
}

/// Settings of operations and of the KV bucket that stores their records.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OperationSettings {
    /// Time after which an unfinished operation is recorded as timed out, counted from its request.
    pub(crate) limit: Duration,
    /// Time after which a replica's lease on an operation expires if it is not renewed.
    pub(crate) lease: Duration,
    /// How long operation records are kept.
    pub(crate) keep: Duration,
    /// Maximum total size of the operation records.
    pub(crate) max_bytes: i64,
    /// Number of replicas of the KV bucket in a NATS cluster.
    pub(crate) replicas: usize,
    /// Whether an operation is refused if its audit record cannot be written.
    pub(crate) audit_required: bool,
}

impl OperationSettings {
    fn read(env: &Environment) -> Result<Self, Invalid> {
        let limit = env.duration(&OPERATION_LIMIT);
        let lease = env.duration(&OPERATION_LEASE);
        let keep = env.duration(&OPERATIONS_KEEP);
        let max_bytes = env.size(&OPERATIONS_MAX_BYTES);
        let replicas = env.number(&STREAM_REPLICAS);
        let audit_required = env.get(&audit::REQUIRED);
        Ok(Self {
            limit: limit?,
            lease: lease?,
            keep: keep?,
            max_bytes: i64::try_from(max_bytes?.0).unwrap_or(i64::MAX),
            replicas: replicas?,
            audit_required: audit_required?,
        })
    }
}

/// Limits for calls to one hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallLimits {
    /// Time limit of one call to the hypervisor.
    pub(crate) timeout: Duration,
    /// Maximum number of concurrent calls to the hypervisor.
    pub(crate) at_once: usize,
}

impl LifecycleSettings {
    /// Reads and validates all settings from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let serve = ServeSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let hypervisors = hypervisors::read(env);
        let timeout = env.duration(&HYPERVISOR_TIMEOUT);
        let at_once = env.number(&HYPERVISOR_CALLS);
        let operations = OperationSettings::read(env);
        let last_hypervisor_keep = env.duration(&LAST_HYPERVISOR_KEEP);
        let state_interval = env.duration(&STATE_INTERVAL);
        let sample_interval = env.duration(&SAMPLE_INTERVAL);
        let utc_offset = config::utc_offset(env);
        let operations = operations?;
        Ok(Self {
            bus: bus?,
            serve: serve?,
            telemetry: telemetry?,
            health: health?,
            hypervisors: hypervisors?,
            calls: CallLimits {
                timeout: timeout?,
                at_once: at_once?,
            },
            polling: PollSettings {
                interval: state_interval?,
                measures: MeasureSettings {
                    interval: sample_interval?,
                    utc_offset: utc_offset?,
                },
                last_hypervisor_keep: last_hypervisor_keep?,
                lease: operations.lease.min(MAX_POLL_LEASE),
                replicas: operations.replicas,
            },
            operations,
        })
    }
}
