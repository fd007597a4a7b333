//! Settings of notifications.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc};

use http::Uri;
use ipnet::IpNet;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tracing::warn;
use vmwatch_api::{alerts::channels::SmtpServer, time::UtcOffset};
use vmwatch_bus::BusSettings;
use vmwatch_service::config::{Environment, Invalid, Setting, UTC_OFFSET, Value, utc_offset};
use vmwatch_store::StoreSettings;

use super::addresses::Endpoint;
use crate::{AlertError, seal::Keys};

const KEY_FILE: Setting = Setting {
    name: "VMWATCH_ALERT_KEY_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with the keys that seal the secrets of channels, each a line of 64 hex digits (`openssl rand -hex 32`); the first seals, the others open older secrets until `vmwatch-alert rekey` was run; without the file, channels with a secret send nothing",
};
const DENY: Setting = Setting {
    name: "VMWATCH_ALERT_DENY",
    value: Value::Text,
    default: "",
    help: "comma-separated networks whose addresses are never receivers of notifications, such as 10.0.0.0/8,fd00::/8",
};
const ALLOW: Setting = Setting {
    name: "VMWATCH_ALERT_ALLOW",
    value: Value::Text,
    default: "",
    help: "comma-separated receivers that are exempt from the refused networks, such as 127.0.0.1:25 for a mail server on this machine; never the listeners of NATS, MongoDB and vmwatch",
};
const INTERNAL: Setting = Setting {
    name: "VMWATCH_ALERT_INTERNAL",
    value: Value::Text,
    default: "127.0.0.1:9080,127.0.0.1:9081,127.0.0.1:9082,127.0.0.1:9083,127.0.0.1:8222",
    help: "comma-separated host:port of internal listeners that are never receivers: the health listeners of the other programs and the monitoring port of NATS; NATS, MongoDB and this service's health listener are always included",
};
const CA_FILE: Setting = Setting {
    name: "VMWATCH_ALERT_CA_FILE",
    value: Value::File,
    default: "",
    help: "path of a PEM file with certificate authorities that receivers of notifications may be signed by, besides those of the system",
};
const PUBLIC_URL: Setting = Setting {
    name: "VMWATCH_PUBLIC_URL",
    value: Value::Text,
    default: "",
    help: "URL of the gateway for links in notifications, such as https://vmwatch.example.com, without a path; without it, notifications contain no links",
};

/// The settings of notifications, as listed by `--help`.
pub(crate) const SETTINGS: &[Setting] = &[KEY_FILE, DENY, ALLOW, INTERNAL, CA_FILE, PUBLIC_URL, UTC_OFFSET];

/// The settings of notifications, read and validated.
#[derive(Debug, Clone)]
pub(crate) struct NotifySettings {
    pub(crate) keys: Arc<Keys>,
    deny: Vec<IpNet>,
    allow: Vec<SocketAddr>,
    internal: Vec<SmtpServer>,
    /// Certificate authorities besides those of the system.
    pub(crate) authorities: Vec<CertificateDer<'static>>,
    /// Without a final slash; empty if unknown.
    pub(crate) public_url: String,
    pub(crate) utc_offset: UtcOffset,
}

/// The rules for addresses of receivers.
#[derive(Debug, Clone, Default)]
pub(crate) struct AddressSettings {
    pub(crate) deny: Vec<IpNet>,
    pub(crate) allow: Vec<SocketAddr>,
    /// Endpoints that are never receivers.
    pub(crate) listeners: Vec<Endpoint>,
}

impl NotifySettings {
    pub(crate) fn read(env: &Environment) -> Result<Self, Invalid> {
        let keys = keys(env);
        let deny = env.optional::<List<IpNet>>(&DENY);
        let allow = env.optional::<List<SocketAddr>>(&ALLOW);
        let internal = env.get::<List<SmtpServer>>(&INTERNAL);
        let authorities = authorities(env);
        let public_url = env.optional::<PublicUrl>(&PUBLIC_URL);
        let utc_offset = utc_offset(env);
        Ok(Self {
            keys: Arc::new(keys?),
            deny: deny?.map(|list| list.0).unwrap_or_default(),
            allow: allow?.map(|list| list.0).unwrap_or_default(),
            internal: internal?.0,
            authorities: authorities?,
            public_url: public_url?.map(|url| url.0).unwrap_or_default(),
            utc_offset: utc_offset?,
        })
    }

    /// The rules for addresses, with the servers and the health listener of this service.
    pub(crate) async fn addresses(
        &self,
        bus: &BusSettings,
        store: &StoreSettings,
        health: SocketAddr,
    ) -> Result<AddressSettings, AlertError> {
        let nats = bus.urls().iter().filter_map(|url| {
            // A URL without a scheme is an authority.
            let uri: Option<Uri> = url.parse().ok();
            uri.and_then(|uri| Endpoint::of_uri(&uri))
        });
        let mongodb = store.addresses().await?.into_iter();
        let own = Endpoint {
            host: health.ip().to_string(),
            port: health.port(),
        };
        let internal = self.internal.iter().cloned().map(Endpoint::from);
        let listeners = nats
            .chain(mongodb.map(|(host, port)| Endpoint { host, port }))
            .chain([own])
            .chain(internal);
        Ok(AddressSettings {
            deny: self.deny.clone(),
            allow: self.allow.clone(),
            listeners: listeners.collect(),
        })
    }
}

/// Reads the key file. If the file does not exist, the service runs without keys.
fn keys(env: &Environment) -> Result<Keys, Invalid> {
    let Some(path) = env.optional::<String>(&KEY_FILE)? else {
        return Ok(Keys::default());
    };
    if !std::path::Path::new(&path).exists() {
        warn!(
            path,
            "the key file does not exist; channels with a secret will send nothing"
        );
        return Ok(Keys::default());
    }
    let text = env.secret_file(&KEY_FILE)?.unwrap_or_default();
    let keys = text.parse();
    keys.map_err(|error| env.problem(format!("{}: {path} is invalid: it {error}", KEY_FILE.name)))
}

fn authorities(env: &Environment) -> Result<Vec<CertificateDer<'static>>, Invalid> {
    let Some(pem) = env.secret_file(&CA_FILE)? else {
        return Ok(Vec::new());
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(env.problem(format!(
            "{}: the file contains no valid certificate",
            CA_FILE.name
        ))),
    }
}

/// A comma-separated list.
#[derive(Debug)]
struct List<T>(Vec<T>);

impl<T: FromStr<Err: fmt::Display>> FromStr for List<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let parsed = items.map(|item| item.parse().map_err(|error| format!("`{item}`: {error}")));
        parsed.collect::<Result<_, _>>().map(Self)
    }
}

/// An `http` or `https` URL without a path.
struct PublicUrl(String);

impl FromStr for PublicUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.trim_end_matches('/');
        let uri: Option<Uri> = bare.parse().ok();
        let is_valid = uri.is_some_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.path() == "/" && uri.query().is_none()
        });
        if is_valid {
            Ok(Self(bare.to_owned()))
        } else {
            Err("must be an http or https URL without a path")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lists_and_reports_each_invalid_entry() {
        let env = Environment::from_variables([
            (DENY.name, "10.0.0.0/8, fd00::/8,"),
            (ALLOW.name, "127.0.0.1:25"),
            (PUBLIC_URL.name, "https://vmwatch.example.com/"),
        ]);
        let settings = NotifySettings::read(&env).unwrap();
        assert_eq!((settings.deny.len(), settings.allow.len()), (2, 1));
        assert_eq!(settings.public_url, "https://vmwatch.example.com");
        assert!(!settings.keys.are_known());
        let env = Environment::from_variables([
            (DENY.name, "10.0.0.0/8,tens"),
            (ALLOW.name, "localhost:25"),
            (INTERNAL.name, "x"),
            (PUBLIC_URL.name, "https://a/b"),
        ]);
        assert!(NotifySettings::read(&env).is_err());
        let problems = env.problems().join("\n");
        for name in [DENY.name, ALLOW.name, INTERNAL.name, PUBLIC_URL.name, "`tens`"] {
            assert!(problems.contains(name), "{name}: {problems}");
        }
    }

    #[test]
    fn missing_key_file_is_no_problem_and_an_invalid_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key").display().to_string();
        let read = || {
            let env = Environment::from_variables([(KEY_FILE.name, path.as_str())]);
            NotifySettings::read(&env)
                .map(|settings| settings.keys.are_known())
                .map_err(|_| env.problems())
        };
        assert_eq!(read(), Ok(false));
        std::fs::write(&path, "00".repeat(32) + "\n").unwrap();
        assert_eq!(read(), Ok(true));
        std::fs::write(&path, "s3cret").unwrap();
        let problems = read().unwrap_err().join("\n");
        assert!(
            problems.contains("64 hex digits") && !problems.contains("s3cret"),
            "{problems}"
        );
    }
}
