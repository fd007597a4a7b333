//! Environment settings of the gateway.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use vmwatch_api::Deadlines;
use vmwatch_bus::{
    BusSettings,
    limits::{self, LimitSettings},
};
use vmwatch_service::{
    config::{DRAIN_DEADLINE, Environment, Invalid, Setting, Value},
    health,
    telemetry::{self, TelemetrySettings},
};

use crate::{
    admission::AdmissionSettings,
    http_server::HttpLimits,
    http_tls::TlsFiles,
    install::InstallSettings,
    legacy::{Documented, TABLE},
    proxies::Proxies,
    sessions::SessionSettings,
    sources::SourceSettings,
};

const HEALTH: &str = "127.0.0.1:9080";
pub(crate) const LISTEN: Setting = Setting {
    name: "VMWATCH_LISTEN",
    value: Value::Address,
    default: "0.0.0.0:8086",
    help: "address and port on which the gateway serves its HTTP APIs and the web page",
};
const TLS_CERTIFICATE_FILE: Setting = Setting {
    name: "VMWATCH_TLS_CERTIFICATE_FILE",
    value: Value::File,
    default: "",
    help: "PEM file with the API's certificate chain, leaf first; enables HTTPS; a renewed file is served within seconds",
};
const TLS_KEY_FILE: Setting = Setting {
    name: "VMWATCH_TLS_KEY_FILE",
    value: Value::File,
    default: "",
    help: "PEM file with the private key of the API's TLS certificate",
};
const TRUSTED_PROXIES: Setting = Setting {
    name: "VMWATCH_TRUSTED_PROXIES",
    value: Value::Text,
    default: "",
    help: "comma-separated addresses or networks of reverse proxies, such as 10.0.0.0/8, from which X-Forwarded-For, X-Forwarded-Host and X-Forwarded-Proto are accepted; empty: none",
};
const QUERY_DEADLINE: Setting = Setting {
    name: "VMWATCH_QUERY_DEADLINE",
    value: Value::Duration("10ms", "1m"),
    default: "5s",
    help: "time limit for answering a read request or a login",
};
const COMMAND_DEADLINE: Setting = Setting {
    name: "VMWATCH_COMMAND_DEADLINE",
    value: Value::Duration("10ms", "10m"),
    default: "30s",
    help: "time limit for answering a VM action (such as start or stop) requested through the API of 2017 (method codes)",
};
pub(crate) const MAX_CONNECTIONS: Setting = Setting {
    name: "VMWATCH_MAX_CONNECTIONS",
    value: Value::Number(1, 1_000_000),
    default: "10000",
    help: "maximum concurrent HTTP connections; an idle one takes about 16 KiB",
};
const MAX_PER_SECOND: Setting = Setting {
    name: "VMWATCH_MAX_REQUESTS_PER_SECOND",
    value: Value::Number(1, 4_294_967_295),
    default: "",
    help: "maximum number of requests per second that this gateway forwards to services, and maximum size of a burst; further requests are refused with 503; logout and user management are exempt; empty: no limit",
};
const REQUEST_TIMEOUT: Setting = Setting {
    name: "VMWATCH_REQUEST_TIMEOUT",
    value: Value::Duration("100ms", "10m"),
    default: "10s",
    help: "time limit for receiving the headers of a request, and again for receiving its body; also the time after which idle connections are closed",
};
const MAX_SESSIONS: Setting = Setting {
    name: "VMWATCH_MAX_SESSIONS",
    value: Value::Number(1, 10_000_000),
    default: "200000",
    help: "maximum number of sessions held in memory; each request of a session beyond this number costs a read of the KV bucket",
};
const SESSIONS_STALE_AFTER: Setting = Setting {
    name: "VMWATCH_SESSIONS_STALE_AFTER",
    value: Value::Duration("3s", "10m"),
    default: "30s",
    help: "time without contact to the KV bucket of sessions after which all requests are refused with 503",
};

const MAX_EVENT_STREAMS: Setting = Setting {
    name: "VMWATCH_MAX_EVENT_STREAMS",
    value: Value::Number(1, 100_000),
    default: "1000",
    help: "maximum concurrent live event streams on this gateway; more are refused with 503",
};
const EVENT_STREAMS_PER_USER: Setting = Setting {
    name: "VMWATCH_EVENT_STREAMS_PER_USER",
    value: Value::Number(1, 100_000),
    default: "20",
    help: "maximum concurrent live event streams per user on this gateway; more are refused with 429",
};
const LOGIN_BURST: Setting = Setting {
    name: "VMWATCH_LOGIN_BURST",
    value: Value::Number(1, 1_000_000),
    default: "20",
    help: "maximum burst of logins and changes of one's own password from one source address; further ones are refused with 429; for IPv6, the limit applies to each /64 network, and eight times the limit to each /48 network; enrolments of agents have the same limit, and so have downloads of their packages; each is counted separately",
};
const LOGIN_INTERVAL: Setting = Setting {
    name: "VMWATCH_LOGIN_INTERVAL",
    value: Value::Duration("1ms", "1h"),
    default: "1s",
    help: "interval at which a source address that has used up VMWATCH_LOGIN_BURST may attempt one more login",
};
const PUBLIC_URL: Setting = Setting {
    name: "VMWATCH_PUBLIC_URL",
    value: Value::Text,
    default: "",
    help: "URL at which VMs and browsers reach this gateway, such as https://vmwatch.example.com, without a path; must begin with https://, except for loopback hosts; /install.sh is served only if it is set",
};
const PACKAGES_DIR: Setting = Setting {
    name: "VMWATCH_PACKAGES_DIR",
    value: Value::Folder,
    default: "",
    help: "folder with the agent's packages (vmwatch-agent.deb, vmwatch-agent.rpm), which /install.sh installs; a package is at most 64 MiB, and a changed one is served within seconds; /install.sh is served only if it is set",
};

/// All settings of the gateway, as listed by `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        LISTEN,
        TLS_CERTIFICATE_FILE,
        TLS_KEY_FILE,
        TRUSTED_PROXIES,
        QUERY_DEADLINE,
        COMMAND_DEADLINE,
        MAX_CONNECTIONS,
        MAX_PER_SECOND,
        LOGIN_BURST,
        LOGIN_INTERVAL,
        REQUEST_TIMEOUT,
        DRAIN_DEADLINE,
        MAX_SESSIONS,
        SESSIONS_STALE_AFTER,
        MAX_EVENT_STREAMS,
        EVENT_STREAMS_PER_USER,
        PUBLIC_URL,
        PACKAGES_DIR,
        health::setting(HEALTH),
    ],
    limits::SETTINGS,
    vmwatch_bus::SETTINGS,
    telemetry::SETTINGS,
];

/// The gateway's settings, read and validated.
#[derive(Debug)]
pub struct GatewaySettings {
    pub(crate) bus: BusSettings,
    /// Telemetry settings, for `main`: telemetry starts before the gateway does.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) listen: SocketAddr,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) proxies: Proxies,
    pub(crate) deadlines: Deadlines,
    pub(crate) http: HttpSettings,
    pub(crate) admission: AdmissionSettings,
    pub(crate) sessions: SessionSettings,
    pub(crate) install: InstallSettings,
    /// Methods of the documented API. Tests pass a copy of the table with additional rows.
    pub documented: &'static [Documented],
}

/// Settings of the HTTP listener and its requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HttpSettings {
    pub(crate) limits: HttpLimits,
    pub(crate) body_timeout: Duration,
}

impl GatewaySettings {
    /// Reads and validates all settings from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let listen = env.get(&LISTEN);
        let tls = tls(env);
        let proxies = env.optional(&TRUSTED_PROXIES);
        let query = env.duration(&QUERY_DEADLINE);
        let command = env.duration(&COMMAND_DEADLINE);
        let connections = env.number(&MAX_CONNECTIONS);
        let admission = admission(env);
        let request_timeout = env.duration(&REQUEST_TIMEOUT);
        let drain = env.duration(&DRAIN_DEADLINE);
        let most = env.number(&MAX_SESSIONS);
        let stale_after = env.duration(&SESSIONS_STALE_AFTER);
        let public_url = env.optional(&PUBLIC_URL);
        let packages = env.optional(&PACKAGES_DIR);
        let body_timeout = request_timeout?;
        Ok(Self {
            documented: TABLE,
            bus: bus?,
            telemetry: telemetry?,
            health: health?,
            listen: listen?,
            tls: tls?,
            proxies: proxies?.unwrap_or_default(),
            deadlines: Deadlines {
                query: query?,
                command: command?,
            },
            http: HttpSettings {
                limits: HttpLimits {
                    connections: connections?,
                    header_timeout: body_timeout,
                    drain: drain?,
                },
                body_timeout,
            },
            admission: admission?,
            sessions: SessionSettings {
                most: most?,
                stale_after: stale_after?,
            },
            install: InstallSettings {
                public_url: public_url?,
                packages: packages?,
            },
        })
    }
}

fn admission(env: &Environment) -> Result<AdmissionSettings, Invalid> {
    let limits = LimitSettings::read(env);
    let event_streams = env.number(&MAX_EVENT_STREAMS);
    let event_streams_per_user = env.number(&EVENT_STREAMS_PER_USER);
    let per_second = env.optional::<NonZeroU32>(&MAX_PER_SECOND);
    let burst = env.number(&LOGIN_BURST);
    let interval = env.duration(&LOGIN_INTERVAL);
    Ok(AdmissionSettings {
        limits: limits?,
        event_streams: event_streams?,
        event_streams_per_user: event_streams_per_user?,
        per_second: per_second?,
        logins: SourceSettings {
            burst: burst?,
            interval: interval?,
        },
    })
}

fn tls(env: &Environment) -> Result<Option<TlsFiles>, Invalid> {
    let certificate = env.optional::<PathBuf>(&TLS_CERTIFICATE_FILE);
    let key = env.optional::<PathBuf>(&TLS_KEY_FILE);
    match (certificate?, key?) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Ok(Some(TlsFiles { certificate, key })),
        _ => Err(env.problem(format!(
            "set both {} and {}, or neither",
            TLS_CERTIFICATE_FILE.name, TLS_KEY_FILE.name
        ))),
    }
}
