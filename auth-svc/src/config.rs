//! The settings of auth-svc.

mod callout;
mod for_agents;

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

pub(crate) use self::for_agents::{AGENT_NATS_URL, ForAgents};
use crate::callout::CalloutSettings;

const HEALTH: &str = "127.0.0.1:9081";
const USERS_COLLECTION: Setting = Setting {
    name: "VMWATCH_USERS_COLLECTION",
    value: Value::Text,
    default: "users",
    help: "name of the MongoDB collection of users",
};
const SESSION_TTL: Setting = Setting {
    name: "VMWATCH_SESSION_TTL",
    value: Value::Duration("1s", "30d"),
    default: "12h",
    help: "maximum lifetime of a session, counted from its login",
};
const SESSION_IDLE: Setting = Setting {
    name: "VMWATCH_SESSION_IDLE_TIMEOUT",
    value: Value::Duration("1s", "30d"),
    default: "1h",
    help: "idle time-out of a session: time without a request after which the session ends",
};
const SESSIONS_PER_USER: Setting = Setting {
    name: "VMWATCH_SESSIONS_PER_USER",
    value: Value::Number(1, 1000),
    default: "100",
    help: "maximum number of sessions per user; a further login ends the user's oldest session within a second",
};
const RECONCILE_INTERVAL: Setting = Setting {
    name: "VMWATCH_RECONCILE_INTERVAL",
    value: Value::Duration("100ms", "1h"),
    default: "30s",
    help: "interval at which the KV bucket of users is compared with the database and repaired",
};
const LOGIN_PERMITS: Setting = Setting {
    name: "VMWATCH_LOGIN_PERMITS",
    value: Value::Number(1, 64),
    default: "2",
    help: "maximum number of passwords hashed concurrently; each hash uses one CPU core and 19 MiB of memory for about 45 ms",
};
const LOCKOUT_FAILURES: Setting = Setting {
    name: "VMWATCH_LOCKOUT_FAILURES",
    value: Value::Number(1, 1_000_000),
    default: "5",
    help: "number of failed logins of one user from one client address after which further logins of this user from this address are refused",
};
const LOCKOUT_WINDOW: Setting = Setting {
    name: "VMWATCH_LOCKOUT_WINDOW",
    value: Value::Duration("1s", "24h"),
    default: "15m",
    help: "time for which logins are refused after too many failures, and for which failures are counted",
};
const SOURCE_FAILURES: Setting = Setting {
    name: "VMWATCH_SOURCE_FAILURES",
    value: Value::Number(1, 100_000_000),
    default: "100",
    help: "number of failed logins from one client address within VMWATCH_LOCKOUT_WINDOW; once it is reached, each further user is refused from this address after a single failed login",
};
const USER_FAILURES: Setting = Setting {
    name: "VMWATCH_USER_FAILURES",
    value: Value::Number(1, 100_000_000),
    default: "100",
    help: "number of failed logins of one user within VMWATCH_LOCKOUT_WINDOW; once it is reached, this user is refused from each further client address after a single failed login",
};
const ADMIN_USER: Setting = Setting {
    name: "VMWATCH_ADMIN_USER",
    value: Value::Text,
    default: "admin",
    help: "user name of the administrator that is created at the first start",
};
const ADMIN_PASSWORD: Setting = Setting {
    name: "VMWATCH_ADMIN_PASSWORD",
    value: Value::Text,
    default: "",
    help: "initial password of the first administrator; to keep it out of the environment, set VMWATCH_ADMIN_PASSWORD_FILE instead",
};
const ADMIN_PASSWORD_FILE: Setting = Setting {
    name: "VMWATCH_ADMIN_PASSWORD_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with the initial password of the first administrator; if neither this nor VMWATCH_ADMIN_PASSWORD is set, a random password is printed once",
};

/// All settings of auth-svc, as listed by `--help`.
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
    for_agents::SETTINGS,
    callout::SETTINGS,
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
    /// The telemetry settings; `main` uses them to start telemetry before anything else.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) collection: String,
    pub(crate) login_permits: usize,
    pub(crate) sessions: SessionSettings,
    pub(crate) reconcile_interval: Duration,
    pub(crate) throttle: ThrottleSettings,
    pub(crate) audit: AuditSettings,
    /// Whether changes of users are refused while the audit cannot be written.
    pub(crate) audit_required: bool,
    pub(crate) first_admin: FirstAdmin,
    pub(crate) for_agents: ForAgents,
    /// The keys of the auth callout; without them, auth-svc does not answer it.
    pub(crate) callout: Option<CalloutSettings>,
}

/// The limits that apply to sessions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionSettings {
    pub(crate) ttl: Duration,
    pub(crate) idle: Duration,
    pub(crate) per_user: usize,
    pub(crate) replicas: usize,
}

/// The limits that apply to failed logins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThrottleSettings {
    pub(crate) by_pair: u32,
    pub(crate) by_source: u32,
    pub(crate) by_user: u32,
    pub(crate) window: Duration,
}

/// The administrator that is created at the first start.
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
        let for_agents = ForAgents::read(env);
        let callout = callout::callout(env);
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
            for_agents: for_agents?,
            callout: callout?,
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
    // The password is parsed here because the error of `Environment::get` would contain it.
    let password = given
        .map(|text| text.parse::<NewPassword>())
        .transpose()
        .map_err(|rule| {
            env.problem(format!(
                "{} or {}: the initial password {rule}",
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
    fn invalid_initial_password_of_first_administrator_is_rejected() {
        for (password, allowed) in [("1", false), ("1234567", false), ("12345678", true)] {
            let env = Environment::from_variables([(ADMIN_PASSWORD.name, password)]);
            assert_eq!(first_admin(&env).is_ok(), allowed, "{password}");
            let problems = env.problems().concat();
            assert_eq!(problems.contains("at least 8 characters"), !allowed, "{problems}");
        }
    }
}
