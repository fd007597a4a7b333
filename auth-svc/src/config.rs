//! The settings of auth-svc.

use std::{net::SocketAddr, time::Duration};

use vmwatch_api::{NewUserName, users::NewPassword};
use vmwatch_bus::{
    BusSettings,
    audit::{self, AuditSettings},
    limits,
    serve::{self, ServeSettings},
};
use vmwatch_service::{
    config::{Environment, Invalid, STREAM_REPLICAS, Setting, Value},
    health,
    telemetry::{self, TelemetrySettings},
};
use vmwatch_store::StoreSettings;

const HEALTH: &str = "127.0.0.1:9081";
const USERS_COLLECTION: Setting = Setting {
    name: "VMWATCH_USERS_COLLECTION",
    value: Value::Text,
    default: "users",
    help: "MongoDB collection of users",
};
const SESSION_TTL: Setting = Setting {
    name: "VMWATCH_SESSION_TTL",
    value: Value::Duration("1s", "30d"),
    default: "12h",
    help: "lifetime of a session from its login",
};
const SESSION_IDLE: Setting = Setting {
    name: "VMWATCH_SESSION_IDLE_TIMEOUT",
    value: Value::Duration("1s", "30d"),
    default: "1h",
    help: "time without a request after which a session ends",
};
const SESSIONS_PER_USER: Setting = Setting {
    name: "VMWATCH_SESSIONS_PER_USER",
    value: Value::Number(1, 1000),
    default: "100",
    help: "maximum sessions per user; a login beyond it ends the oldest within a second",
};
const RECONCILE_INTERVAL: Setting = Setting {
    name: "VMWATCH_RECONCILE_INTERVAL",
    value: Value::Duration("100ms", "1h"),
    default: "30s",
    help: "interval at which the users bucket is compared with the database and repaired",
};
const LOGIN_PERMITS: Setting = Setting {
    name: "VMWATCH_LOGIN_PERMITS",
    value: Value::Number(1, 64),
    default: "2",
    help: "passwords hashed concurrently; each takes one core and 19 MiB for about 45 ms",
};
const LOCKOUT_FAILURES: Setting = Setting {
    name: "VMWATCH_LOCKOUT_FAILURES",
    value: Value::Number(1, 1_000_000),
    default: "5",
    help: "failed logins of one user from one source after which that pair is locked out",
};
const LOCKOUT_WINDOW: Setting = Setting {
    name: "VMWATCH_LOCKOUT_WINDOW",
    value: Value::Duration("1s", "24h"),
    default: "15m",
    help: "duration of a lock-out, and time for which failures are counted",
};
const SOURCE_FAILURES: Setting = Setting {
    name: "VMWATCH_SOURCE_FAILURES",
    value: Value::Number(1, 100_000_000),
    default: "100",
    help: "failed logins from one source after which each further user has a single try from there",
};
const USER_FAILURES: Setting = Setting {
    name: "VMWATCH_USER_FAILURES",
    value: Value::Number(1, 100_000_000),
    default: "100",
    help: "failed logins of one user after which each further source has a single try",
};
const ADMIN_USER: Setting = Setting {
    name: "VMWATCH_ADMIN_USER",
    value: Value::Text,
    default: "admin",
    help: "name of the administrator created at the first start",
};
const ADMIN_PASSWORD: Setting = Setting {
    name: "VMWATCH_ADMIN_PASSWORD",
    value: Value::Text,
    default: "",
    help: "initial password of the first administrator; VMWATCH_ADMIN_PASSWORD_FILE is safer",
};
const ADMIN_PASSWORD_FILE: Setting = Setting {
    name: "VMWATCH_ADMIN_PASSWORD_FILE",
    value: Value::File,
    default: "",
    help: "file with the initial password of the first administrator; without it and VMWATCH_ADMIN_PASSWORD a random password is printed once",
};

/// Every setting, for `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        USERS_COLLECTION,
        SESSION_TTL,
        SESSION_IDLE,
        SESSIONS_PER_USER,
        RECONCILE_INTERVAL,
        STREAM_REPLICAS,
        LOGIN_PERMITS,
        LOCKOUT_FAILURES,
        LOCKOUT_WINDOW,
        SOURCE_FAILURES,
        USER_FAILURES,
        ADMIN_USER,
        ADMIN_PASSWORD,
        ADMIN_PASSWORD_FILE,
        audit::REQUIRED,
        health::setting(HEALTH),
    ],
    audit::SETTINGS,
    vmwatch_store::SETTINGS,
    serve::SETTINGS,
    limits::SETTINGS,
    vmwatch_bus::SETTINGS,
    telemetry::SETTINGS,
];

#[derive(Debug)]
pub struct AuthSettings {
    pub(crate) bus: BusSettings,
    pub(crate) store: StoreSettings,
    pub(crate) serve: ServeSettings,
    /// Read by `main`, which starts telemetry first.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) collection: String,
    pub(crate) login_permits: usize,
    pub(crate) sessions: SessionSettings,
    pub(crate) reconcile_interval: Duration,
    pub(crate) throttle: ThrottleSettings,
    pub(crate) audit: AuditSettings,
    /// Whether changes are refused while the audit cannot be appended to.
    pub(crate) audit_required: bool,
    pub(crate) first_admin: FirstAdmin,
}

/// Limits of sessions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionSettings {
    pub(crate) ttl: Duration,
    pub(crate) idle: Duration,
    pub(crate) per_user: usize,
    pub(crate) replicas: usize,
}

/// Limits of failed logins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThrottleSettings {
    pub(crate) by_pair: u32,
    pub(crate) by_source: u32,
    pub(crate) by_user: u32,
    pub(crate) window: Duration,
}

/// The administrator to create at the first start.
#[derive(Debug)]
pub(crate) struct FirstAdmin {
    pub(crate) name: NewUserName,
    pub(crate) password: Option<NewPassword>,
}

impl AuthSettings {
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let store = StoreSettings::read(env);
        let serve = ServeSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let collection = env.get(&USERS_COLLECTION);
        let login_permits = env.number(&LOGIN_PERMITS);
        let ttl = env.duration(&SESSION_TTL);
        let idle = env.duration(&SESSION_IDLE);
        let reconcile_interval = env.duration(&RECONCILE_INTERVAL);
        let per_user = env.number(&SESSIONS_PER_USER);
        let replicas = env.number(&STREAM_REPLICAS);
        let throttle = throttle(env);
        let audit = AuditSettings::read(env);
        let audit_required = env.get(&audit::REQUIRED);
        let first_admin = first_admin(env);
        Ok(Self {
            bus: bus?,
            store: store?,
            serve: serve?,
            telemetry: telemetry?,
            health: health?,
            collection: collection?,
            login_permits: login_permits?,
            sessions: SessionSettings {
                ttl: ttl?,
                idle: idle?,
                per_user: per_user?,
                replicas: replicas?,
            },
            reconcile_interval: reconcile_interval?,
            throttle: throttle?,
            audit: audit?,
            audit_required: audit_required?,
            first_admin: first_admin?,
        })
    }
}

fn throttle(env: &Environment) -> Result<ThrottleSettings, Invalid> {
    let by_pair = env.number(&LOCKOUT_FAILURES);
    let by_source = env.number(&SOURCE_FAILURES);
    let by_user = env.number(&USER_FAILURES);
    let window = env.duration(&LOCKOUT_WINDOW);
    Ok(ThrottleSettings {
        by_pair: by_pair?,
        by_source: by_source?,
        by_user: by_user?,
        window: window?,
    })
}

fn first_admin(env: &Environment) -> Result<FirstAdmin, Invalid> {
    let name = env.get(&ADMIN_USER);
    let given = env
        .secret_file(&ADMIN_PASSWORD_FILE)?
        .or(env.optional::<String>(&ADMIN_PASSWORD)?);
    // `Environment::get` would repeat the password in its message.
    let password = given
        .map(|text| text.parse::<NewPassword>())
        .transpose()
        .map_err(|rule| {
            env.problem(format!(
                "{} or {}: the password {rule}",
                ADMIN_PASSWORD_FILE.name, ADMIN_PASSWORD.name
            ))
        })?;
    Ok(FirstAdmin {
        name: name?,
        password,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_first_administrator_with_invalid_password() {
        for (password, allowed) in [("1", false), ("1234567", false), ("12345678", true)] {
            let env = Environment::from_variables([(ADMIN_PASSWORD.name, password)]);
            assert_eq!(first_admin(&env).is_ok(), allowed, "{password}");
            let problems = env.problems().concat();
            assert_eq!(problems.contains("at least 8 characters"), !allowed, "{problems}");
        }
    }
}
