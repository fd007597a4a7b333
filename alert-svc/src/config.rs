//! Environment settings of alert-svc.

use std::{net::SocketAddr, time::Duration};

use vmwatch_bus::{
    BusSettings, audit, limits,
    serve::{self, ServeSettings},
};
use vmwatch_service::{
    config::{Environment, Invalid, STREAM_REPLICAS, Setting, Value},
    health,
    telemetry::{self, TelemetrySettings},
};
use vmwatch_store::StoreSettings;

use crate::notify::settings::{self, NotifySettings};

const HEALTH: &str = "127.0.0.1:9085";

const RETENTION: Setting = Setting {
    name: "VMWATCH_ALERT_RETENTION",
    value: Value::Duration("1d", "3650d"),
    default: "90d",
    help: "time after which resolved alerts are deleted; delivered messages are deleted after 30 days",
};

const LEASE: Setting = Setting {
    name: "VMWATCH_ALERT_LEASE",
    value: Value::Duration("1s", "5m"),
    default: "10s",
    help: "time after which another replica takes over the evaluation of rules from a replica that was killed or that NATS no longer reaches",
};

/// All settings of alert-svc, as listed by `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        audit::REQUIRED,
        STREAM_REPLICAS,
        LEASE,
        RETENTION,
        health::setting(HEALTH),
    ],
    settings::SETTINGS,
    vmwatch_store::SETTINGS,
    serve::SETTINGS,
    limits::SETTINGS,
    vmwatch_bus::SETTINGS,
    telemetry::SETTINGS,
];

/// The settings of alert-svc, read and validated.
#[derive(Debug, Clone)]
pub struct AlertSettings {
    pub(crate) bus: BusSettings,
    pub(crate) serve: ServeSettings,
    /// Telemetry settings, for `main`: telemetry starts before the service does.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) store: StoreSettings,
    /// Whether a change is refused if its audit record cannot be written.
    pub(crate) audit_required: bool,
    /// Number of replicas of the KV buckets in a NATS cluster.
    pub(crate) replicas: usize,
    pub(crate) notify: NotifySettings,
    /// Time for which resolved alerts are kept.
    pub(crate) retention: Duration,
    /// Length of the lease on evaluation and notification.
    pub(crate) lease: Duration,
}

impl AlertSettings {
    /// Reads and validates the settings from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let serve = ServeSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let store = StoreSettings::read(env);
        let audit_required = env.get(&audit::REQUIRED);
        let replicas = env.number(&STREAM_REPLICAS);
        let notify = NotifySettings::read(env);
        let retention = env.duration(&RETENTION);
        let lease = env.duration(&LEASE);
        Ok(Self {
            bus: bus?,
            serve: serve?,
            telemetry: telemetry?,
            health: health?,
            store: store?,
            audit_required: audit_required?,
            replicas: replicas?,
            notify: notify?,
            retention: retention?,
            lease: lease?,
        })
    }
}
