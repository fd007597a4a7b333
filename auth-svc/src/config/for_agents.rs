//! The settings for what agents need in order to report, which they get when they enrol.

use std::time::Duration;

use async_nats::ServerAddr;
use vmwatch_api::{InstanceId, enrollment::Enrolled, time::UtcOffset};
use vmwatch_service::config::{self, Environment, Invalid, Setting, Span, UTC_OFFSET, Value};

use crate::AuthError;

/// Maximum number of URLs in [`AGENT_NATS_URL`], and maximum size of the file [`AGENT_NATS_CA_FILE`].
const MAX_URLS: usize = 16;
const MAX_CA_BYTES: usize = 64 * 1024;
pub(crate) const AGENT_NATS_URL: Setting = Setting {
    name: "VMWATCH_AGENT_NATS_URL",
    value: Value::Text,
    default: "",
    help: "comma-separated URLs, up to 16, at which agents reach the NATS servers, such as tls://bus.example.com:4222; agents get them when they enrol; if empty, no agent can enrol",
};
const AGENT_NATS_CA_FILE: Setting = Setting {
    name: "VMWATCH_AGENT_NATS_CA_FILE",
    value: Value::File,
    default: "",
    help: "path of the PEM file, up to 64 KiB, with the certificate authorities that sign the certificates of the servers in VMWATCH_AGENT_NATS_URL; agents get it when they enrol; if empty, agents use the authorities of their VM",
};
const AGENT_VM_INTERVAL: Setting = Setting {
    name: "VMWATCH_AGENT_VM_INTERVAL",
    value: Value::Duration("100ms", "1h"),
    default: "10s",
    help: "interval at which agents sample the VM's own measures; agents get it when they enrol",
};
const AGENT_PROCESS_INTERVAL: Setting = Setting {
    name: "VMWATCH_AGENT_PROCESS_INTERVAL",
    value: Value::Duration("100ms", "24h"),
    default: "60s",
    help: "interval at which agents sample the VM's processes and filesystems; agents get it when they enrol; must be a whole multiple of VMWATCH_AGENT_VM_INTERVAL",
};

pub(super) const SETTINGS: &[Setting] = &[
    AGENT_NATS_URL,
    AGENT_NATS_CA_FILE,
    AGENT_VM_INTERVAL,
    AGENT_PROCESS_INTERVAL,
    UTC_OFFSET,
];

/// What agents need in order to report.
#[derive(Debug, Clone)]
pub(crate) struct ForAgents {
    nats_urls: Vec<String>,
    ca_certificates: String,
    utc_offset: UtcOffset,
    vm_interval: Duration,
    process_interval: Duration,
}

impl ForAgents {
    pub(super) fn read(env: &Environment) -> Result<Self, Invalid> {
        let urls = nats_urls(env);
        let ca_certificates = ca_certificates(env);
        let utc_offset = config::utc_offset(env);
        let vm_interval = env.duration(&AGENT_VM_INTERVAL);
        let process_interval = env.duration(&AGENT_PROCESS_INTERVAL);
        let (vm_interval, process_interval) = (vm_interval?, process_interval?);
        if !process_interval
            .as_millis()
            .is_multiple_of(vm_interval.as_millis())
        {
            return Err(env.problem(format!(
                "{} must be a whole multiple of {} ({})",
                AGENT_PROCESS_INTERVAL.name,
                AGENT_VM_INTERVAL.name,
                Span(vm_interval)
            )));
        }
        Ok(Self {
            nats_urls: urls?,
            ca_certificates: ca_certificates?,
            utc_offset: utc_offset?,
            vm_interval,
            process_interval,
        })
    }

    /// Fails if agents cannot enrol.
    pub(crate) const fn check(&self) -> Result<(), AuthError> {
        if self.nats_urls.is_empty() {
            return Err(AuthError::EnrollmentOff);
        }
        Ok(())
    }

    /// The answer to an agent that has enrolled.
    pub(crate) fn enrolled(&self, instance_id: InstanceId) -> Result<Enrolled, AuthError> {
        self.check()?;
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        Ok(Enrolled {
            instance_id,
            nats_urls: self.nats_urls.clone(),
            ca_certificates: self.ca_certificates.clone(),
            utc_offset: self.utc_offset,
            vm_interval_ms: millis(self.vm_interval),
            process_interval_ms: millis(self.process_interval),
        })
    }
}

/// The URLs of the NATS servers for agents. Errors do not repeat a URL, because it may contain a password.
fn nats_urls(env: &Environment) -> Result<Vec<String>, Invalid> {
    let Some(text) = env.optional::<String>(&AGENT_NATS_URL)? else {
        return Ok(Vec::new());
    };
    let urls: Vec<_> = text.split(',').map(|url| url.trim().to_owned()).collect();
    let is_url = |url: &String| {
        let address = url.parse::<ServerAddr>();
        let has_user = |address: &ServerAddr| address.username().is_some() || address.password().is_some();
        url.contains("://") && address.is_ok_and(|address| !address.host().is_empty() && !has_user(&address))
    };
    if urls.len() <= MAX_URLS && urls.iter().all(is_url) {
        return Ok(urls);
    }
    Err(env.problem(format!(
        "{}: write 1 to {MAX_URLS} URLs that begin with nats://, tls://, ws:// or wss:// and contain no user and no password",
        AGENT_NATS_URL.name
    )))
}

fn ca_certificates(env: &Environment) -> Result<String, Invalid> {
    let Some(text) = env.secret_file(&AGENT_NATS_CA_FILE)? else {
        return Ok(String::new());
    };
    let is_public = text.contains("-----BEGIN CERTIFICATE-----") && !text.contains("PRIVATE KEY");
    if is_public && text.len() <= MAX_CA_BYTES {
        return Ok(text + "\n");
    }
    Err(env.problem(format!(
        "{}: the file must contain PEM certificates and no private key, at most {MAX_CA_BYTES} bytes",
        AGENT_NATS_CA_FILE.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_for_agents_contain_no_credentials() {
        for (urls, allowed) in [
            ("tls://bus.example.com:4222, wss://bus.example.com", true),
            ("nats://192.0.2.1:4222", true),
            ("", true),
            ("bus.example.com:4222", false),
            ("https://bus.example.com", false),
            ("tls://", false),
            ("tls://agent:hunter2@bus.example.com", false),
            ("tls://a,,tls://b", false),
        ] {
            let env = Environment::from_variables([(AGENT_NATS_URL.name, urls)]);
            assert_eq!(ForAgents::read(&env).is_ok(), allowed, "{urls}");
            assert!(!env.problems().concat().contains("hunter2"));
        }
    }

    #[test]
    fn file_for_agents_must_not_contain_a_private_key() {
        let certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        let key = "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n";
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let read = |text: &str| {
            std::fs::write(path, text).unwrap();
            ca_certificates(&Environment::from_variables([(AGENT_NATS_CA_FILE.name, path)]))
        };
        assert_eq!(read(certificate).unwrap(), certificate);
        for wrong in [
            key.to_owned(),
            format!("{certificate}{key}"),
            certificate.repeat(2000),
        ] {
            assert!(read(&wrong).is_err());
        }
    }

    #[test]
    fn intervals_for_agents_must_match() {
        let variables = [
            (AGENT_VM_INTERVAL.name, "10s"),
            (AGENT_PROCESS_INTERVAL.name, "25s"),
        ];
        let env = Environment::from_variables(variables);
        assert!(ForAgents::read(&env).is_err());
        assert!(env.problems().concat().contains("whole multiple"));
    }
}
