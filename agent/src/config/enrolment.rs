//! How the agent gets its login to NATS: by settings, or by enrolment.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use vmwatch_api::InstanceId;
use vmwatch_bus::{
    BusSettings, NATS_CERTIFICATE_FILE, NATS_CREDENTIALS_FILE, NATS_NKEY_SEED_FILE, NATS_PASSWORD_FILE,
    NATS_URL, NATS_USER, ping_interval,
};
use vmwatch_service::config::{Environment, Invalid, Setting, Value};

use super::timing::{GivenTiming, Timing};
use crate::enrol::{Connection, GatewayUrl, IdentityDir};

pub(super) const INSTANCE_ID: Setting = Setting {
    name: "VMWATCH_INSTANCE_ID",
    value: Value::Text,
    default: "",
    help: "instance id of this VM; if empty, the agent uses the content of /sys/class/dmi/id/product_uuid, which only root can read; an enrolled agent uses the id of its enrolment",
};
pub(crate) const IDENTITY_DIR: Setting = Setting {
    name: "VMWATCH_AGENT_IDENTITY_DIR",
    value: Value::Folder,
    default: "/var/lib/vmwatch-agent/identity",
    help: "path of the folder with the key of an enrolled agent; the folder that contains it must exist and belong to the agent's user",
};
pub(super) const GATEWAY_URL: Setting = Setting {
    name: "VMWATCH_GATEWAY_URL",
    value: Value::Text,
    default: "",
    help: "URL of the gateway at which an agent without an identity enrols, such as https://vmwatch.example.com; ignored if a login to NATS is set",
};
pub(super) const JOIN_TOKEN_FILE: Setting = Setting {
    name: "VMWATCH_JOIN_TOKEN_FILE",
    value: Value::File,
    default: "",
    help: "path of the file with the join token for the enrolment at `VMWATCH_GATEWAY_URL`; not read once the agent is enrolled",
};
pub(super) const GATEWAY_CA_FILE: Setting = Setting {
    name: "VMWATCH_GATEWAY_CA_FILE",
    value: Value::File,
    default: "",
    help: "path of the PEM file with the certificate authorities that sign the gateway's certificate; if empty, those of the VM",
};

/// Settings that log the agent in to NATS without an enrolment.
const STATIC_LOGIN: [Setting; 6] = [
    NATS_URL,
    NATS_USER,
    NATS_PASSWORD_FILE,
    NATS_CREDENTIALS_FILE,
    NATS_NKEY_SEED_FILE,
    NATS_CERTIFICATE_FILE,
];

/// How the agent gets its login to NATS.
#[derive(Debug)]
pub(crate) enum Login {
    /// From settings.
    Static(Connection),
    /// From an identity, or by an enrolment.
    Enrolment(EnrolmentSettings),
}

#[derive(Debug)]
pub(crate) struct EnrolmentSettings {
    pub(crate) dir: IdentityDir,
    pub(crate) instance_id: Option<InstanceId>,
    pub(crate) gateway: Option<Gateway>,
    pub(crate) timing: GivenTiming,
    pub(crate) ping_interval: Duration,
}

/// Where the agent enrols itself.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) url: GatewayUrl,
    pub(crate) token_file: PathBuf,
    pub(crate) ca_file: Option<PathBuf>,
}

/// The settings of the command `enroll`.
#[derive(Debug)]
pub struct EnrolCommandSettings {
    pub(crate) dir: IdentityDir,
    pub(crate) instance_id: Option<InstanceId>,
}

impl EnrolCommandSettings {
    /// Reads the settings from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let (dir, instance_id) = (env.get(&IDENTITY_DIR), env.optional(&INSTANCE_ID));
        Ok(Self {
            dir: IdentityDir::new(dir?),
            instance_id: instance_id?,
        })
    }
}

impl Login {
    /// A login that is set counts. Otherwise an identity folder or the URL of a gateway selects the enrolment.
    pub(super) fn read(env: &Environment) -> Result<Self, Invalid> {
        let dir = env.get::<PathBuf>(&IDENTITY_DIR)?;
        let is_enrolled = dir.is_dir() || is_set(env, &GATEWAY_URL);
        if STATIC_LOGIN.iter().any(|setting| is_set(env, setting)) || !is_enrolled {
            return read_static(env, Path::new("/sys")).map(Self::Static);
        }
        let (instance_id, gateway) = (env.optional(&INSTANCE_ID), Gateway::read(env));
        let (timing, ping_interval) = (GivenTiming::read(env), ping_interval(env));
        Ok(Self::Enrolment(EnrolmentSettings {
            dir: IdentityDir::new(dir),
            instance_id: instance_id?,
            gateway: gateway?,
            timing: timing?,
            ping_interval: ping_interval?,
        }))
    }
}

impl Gateway {
    fn read(env: &Environment) -> Result<Option<Self>, Invalid> {
        let (url, token_file) = (env.optional(&GATEWAY_URL), env.optional(&JOIN_TOKEN_FILE));
        let ca_file = env.optional(&GATEWAY_CA_FILE);
        match (url?, token_file?, ca_file?) {
            (None, _, _) => Ok(None),
            (Some(url), Some(token_file), ca_file) => Ok(Some(Self {
                url,
                token_file,
                ca_file,
            })),
            (Some(_), None, _) => Err(env.problem(format!(
                "set {} as well as {}",
                JOIN_TOKEN_FILE.name, GATEWAY_URL.name
            ))),
        }
    }
}

/// Reads the settings of an agent that is not enrolled.
fn read_static(env: &Environment, sys: &Path) -> Result<Connection, Invalid> {
    let bus = BusSettings::read(env);
    let instance_id = match env.optional(&INSTANCE_ID) {
        Ok(None) => product_uuid(sys).map_err(|why| env.problem(why)),
        Ok(Some(id)) => Ok(id),
        Err(invalid) => Err(invalid),
    };
    let timing = Timing::read(env);
    Ok(Connection {
        bus: bus?,
        instance_id: instance_id?,
        timing: timing?,
    })
}

pub(super) fn is_set(env: &Environment, setting: &Setting) -> bool {
    env.optional::<String>(setting).is_ok_and(|text| text.is_some())
}

/// Whether the text is the URL of a NATS server, of reasonable length.
pub(crate) fn is_nats_url(text: &str) -> bool {
    text.len() <= 512 && text.contains("://") && text.parse::<async_nats::ServerAddr>().is_ok()
}

/// Reads the VM's UUID as provided by the firmware. Under libvirt and Nova this is the id that the hypervisor uses.
pub(crate) fn product_uuid(sys: &Path) -> Result<InstanceId, String> {
    let file = sys.join("class/dmi/id/product_uuid");
    let read = std::fs::read_to_string(&file).map_err(|error| error.to_string());
    let parsed = read.and_then(|text| {
        // Some firmware provides the UUID in upper case, but hypervisors and the API use lower case.
        let id = text.trim().to_ascii_lowercase();
        id.parse::<InstanceId>()
            .map_err(|error| format!("`{id}` {error}"))
    });
    parsed.map_err(|why| {
        format!(
            "{} must be set: {} does not contain the id of this VM: {why}",
            INSTANCE_ID.name,
            file.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_id_is_read_from_firmware_and_error_names_the_setting_if_that_fails() {
        let sys = tempfile::tempdir().unwrap();
        let folder = sys.path().join("class/dmi/id");
        std::fs::create_dir_all(&folder).unwrap();
        let problem = |problem: String| {
            assert!(
                problem.starts_with("VMWATCH_INSTANCE_ID must be set: "),
                "{problem}"
            );
        };
        problem(product_uuid(sys.path()).unwrap_err());
        let file = folder.join("product_uuid");
        std::fs::write(&file, "6ABF5A1E-B85C-4E5F-BA02-F96E22CBD02E\n").unwrap();
        let id = product_uuid(sys.path()).unwrap();
        assert_eq!(id.as_str(), "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e");
        std::fs::write(&file, "Not Settable.\n").unwrap();
        problem(product_uuid(sys.path()).unwrap_err());
    }

    #[test]
    fn login_that_is_set_counts_more_than_an_identity() {
        let folder = tempfile::tempdir().unwrap();
        let (here, missing) = (folder.path().to_str().unwrap(), "/nonexistent/identity");
        let is_static = |dir: &str, url: &str, gateway: &str| {
            let env = Environment::from_variables([
                (INSTANCE_ID.name, "vm-1"),
                (IDENTITY_DIR.name, dir),
                (NATS_URL.name, url),
                (GATEWAY_URL.name, gateway),
                (JOIN_TOKEN_FILE.name, "/token"),
            ]);
            matches!(Login::read(&env).unwrap(), Login::Static(_))
        };
        assert!(is_static(missing, "", ""));
        assert!(is_static(here, "nats://a", "https://b.example"));
        assert!(!is_static(here, "", ""));
        assert!(!is_static(missing, "", "https://b.example"));
    }

    #[test]
    fn invalid_settings_of_the_enrolment_are_reported() {
        let problems = |url: &str, token: &str| {
            let env = Environment::from_variables([(GATEWAY_URL.name, url), (JOIN_TOKEN_FILE.name, token)]);
            assert!(Login::read(&env).is_err());
            env.problems().join("\n")
        };
        assert!(
            problems("https://a.example", "")
                .contains("set VMWATCH_JOIN_TOKEN_FILE as well as VMWATCH_GATEWAY_URL")
        );
        assert!(problems("http://a.example", "/token").contains("http:// only for this machine"));
    }
}
