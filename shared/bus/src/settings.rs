//! The settings for the connection to NATS.

use std::{path::PathBuf, time::Duration};

use vmwatch_service::config::{Environment, Invalid, Setting, Value};

pub const NATS_URL: Setting = Setting {
    name: "VMWATCH_NATS_URL",
    value: Value::Text,
    default: "nats://127.0.0.1:4222",
    help: "comma-separated URLs of the NATS servers; tls:// requires TLS",
};
pub const NATS_USER: Setting = Setting {
    name: "VMWATCH_NATS_USER",
    value: Value::Text,
    default: "",
    help: "name of the NATS user that this program logs in as",
};
pub const NATS_PASSWORD_FILE: Setting = Setting {
    name: "VMWATCH_NATS_PASSWORD_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with the password of `VMWATCH_NATS_USER`",
};
pub const NATS_CREDENTIALS_FILE: Setting = Setting {
    name: "VMWATCH_NATS_CREDENTIALS_FILE",
    value: Value::File,
    default: "",
    help: "path of the NATS .creds file, which replaces user and password",
};
pub const NATS_NKEY_SEED_FILE: Setting = Setting {
    name: "VMWATCH_NATS_NKEY_SEED_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with an nkey seed (SU…), which replaces user and password",
};
pub const NATS_CERTIFICATE_FILE: Setting = Setting {
    name: "VMWATCH_NATS_CERTIFICATE_FILE",
    value: Value::File,
    default: "",
    help: "path of the PEM file with this program's client certificate, for NATS servers that require one",
};
pub const NATS_KEY_FILE: Setting = Setting {
    name: "VMWATCH_NATS_KEY_FILE",
    value: Value::File,
    default: "",
    help: "path of the PEM file with the private key of `VMWATCH_NATS_CERTIFICATE_FILE`",
};
pub const NATS_CA_FILE: Setting = Setting {
    name: "VMWATCH_NATS_CA_FILE",
    value: Value::File,
    default: "",
    help: "path of the PEM file with the certificate authorities that sign the NATS servers' certificates; enables TLS",
};
pub const NATS_PING_INTERVAL: Setting = Setting {
    name: "VMWATCH_NATS_PING_INTERVAL",
    value: Value::Duration("100ms", "2m"),
    default: "5s",
    help: "interval between pings to the NATS server; a connection whose pings are not answered is closed after at most three intervals",
};

/// The NATS settings of every program.
pub const SETTINGS: &[Setting] = &[
    NATS_URL,
    NATS_USER,
    NATS_PASSWORD_FILE,
    NATS_CREDENTIALS_FILE,
    NATS_NKEY_SEED_FILE,
    NATS_CA_FILE,
    NATS_CERTIFICATE_FILE,
    NATS_KEY_FILE,
    NATS_PING_INTERVAL,
];

/// The ping interval, which has the same range in all programs.
pub fn ping_interval(env: &Environment) -> Result<Duration, Invalid> {
    env.duration(&NATS_PING_INTERVAL)
}

/// The addresses of the NATS servers and the credentials to log in with.
#[derive(Clone)]
pub struct BusSettings {
    pub(crate) urls: Vec<String>,
    pub(crate) login: Login,
    pub(crate) ca_file: Option<PathBuf>,
    /// The paths of this program's client certificate and private key.
    pub(crate) certificate: Option<(PathBuf, PathBuf)>,
    pub(crate) ping_interval: Duration,
    /// The identity in the inbox prefix, if it is neither the NATS user nor the program.
    pub(crate) inbox: Option<String>,
}

#[derive(Clone)]
pub(crate) enum Login {
    None,
    Password { user: String, password: String },
    CredentialsFile(PathBuf),
    NkeySeed(String),
}

/// The nkey of an enrolled agent. It has no `Debug`, because the seed is secret.
pub struct EnrolledKey {
    pub seed: String,
    pub public_key: String,
}

/// `Debug` is implemented by hand to omit passwords.
impl std::fmt::Debug for BusSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BusSettings")
            .field("ca_file", &self.ca_file)
            .finish_non_exhaustive()
    }
}

impl BusSettings {
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let urls = env.get::<String>(&NATS_URL);
        let user = env.optional::<String>(&NATS_USER);
        let password = env.secret_file(&NATS_PASSWORD_FILE);
        let credentials = env.optional::<PathBuf>(&NATS_CREDENTIALS_FILE);
        let seed = env.secret_file(&NATS_NKEY_SEED_FILE);
        let certificate = env.optional::<PathBuf>(&NATS_CERTIFICATE_FILE);
        let key = env.optional::<PathBuf>(&NATS_KEY_FILE);
        let ca_file = env.optional::<PathBuf>(&NATS_CA_FILE);
        let ping = ping_interval(env);
        let login = match (user?, password?, credentials?, seed?) {
            (None, None, None, None) => Login::None,
            (Some(user), Some(password), None, None) => Login::Password { user, password },
            (None, None, Some(file), None) => Login::CredentialsFile(file),
            (None, None, None, Some(seed)) => Login::NkeySeed(seed),
            _ => {
                return Err(env.problem(format!(
                    "give {} and {} together, or {} or {} alone",
                    NATS_USER.name,
                    NATS_PASSWORD_FILE.name,
                    NATS_CREDENTIALS_FILE.name,
                    NATS_NKEY_SEED_FILE.name
                )));
            }
        };
        let certificate = match (certificate?, key?) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate, key)),
            _ => {
                return Err(env.problem(format!(
                    "give {} and {} together",
                    NATS_CERTIFICATE_FILE.name, NATS_KEY_FILE.name
                )));
            }
        };
        Ok(Self {
            urls: urls?.split(',').map(|url| url.trim().to_owned()).collect(),
            login,
            ca_file: ca_file?,
            certificate,
            ping_interval: ping?,
            inbox: None,
        })
    }

    /// The settings of an enrolled agent, which logs in with an nkey. Its inbox prefix contains the public key.
    pub fn enrolled(
        urls: Vec<String>,
        key: EnrolledKey,
        ca_file: Option<PathBuf>,
        ping_interval: Duration,
    ) -> Self {
        Self {
            urls,
            login: Login::NkeySeed(key.seed),
            ca_file,
            certificate: None,
            ping_interval,
            inbox: Some(key.public_key),
        }
    }

    /// The URLs of the NATS servers.
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// The identity used in the inbox prefix: the public key of an enrolled agent or the NATS user, or the program's name if
    /// neither is set.
    pub(crate) fn identity<'a>(&'a self, program: &'a str) -> &'a str {
        match (&self.inbox, &self.login) {
            (Some(identity), _) | (None, Login::Password { user: identity, .. }) => identity,
            (None, Login::None | Login::CredentialsFile(_) | Login::NkeySeed(_)) => program,
        }
    }

    /// Whether a URL selects NATS over WebSocket.
    pub(crate) fn uses_websocket(&self) -> bool {
        self.urls
            .iter()
            .any(|url| url.starts_with("ws://") || url.starts_with("wss://"))
    }
}
