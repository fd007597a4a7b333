//! The settings of lifecycle-svc.

use std::{net::SocketAddr, str::FromStr, time::Duration};

use shared::{
    bus::{
        self, BusSettings,
        audit::{self, AuditSettings},
        serve::{self, ServeSettings},
    },
    config::{ByteSize, Environment, Invalid, STREAM_REPLICAS, Setting},
    health,
    telemetry::{self, TelemetrySettings},
};

const HEALTH: &str = "127.0.0.1:9083";
const HYPERVISORS: Setting = Setting {
    name: "VMWATCH_HYPERVISORS",
    default: if cfg!(feature = "libvirt") {
        "test=test:///default"
    } else {
        ""
    },
    help: "what runs the VMs: name=libvirt URI, separated by commas, such as \
           lab=qemu:///system,rack2=qemu+tls://rack2/system",
};
const HYPERVISOR_TIMEOUT: Setting = Setting {
    name: "VMWATCH_HYPERVISOR_TIMEOUT",
    default: "10s",
    help: "how long one call to a hypervisor may take",
};
const HYPERVISOR_CALLS: Setting = Setting {
    name: "VMWATCH_HYPERVISOR_CALLS",
    default: "8",
    help: "calls to one hypervisor at once; more wait, within the time above",
};
const OPERATION_LIMIT: Setting = Setting {
    name: "VMWATCH_OPERATION_LIMIT",
    default: "5m",
    help: "how long a command is followed whose caller has given up",
};
const OPERATION_LEASE: Setting = Setting {
    name: "VMWATCH_OPERATION_LEASE",
    default: "15s",
    help: "after a replica died, others wait this long before they carry its commands on",
};
const OPERATIONS_KEEP: Setting = Setting {
    name: "VMWATCH_OPERATIONS_KEEP",
    default: "7d",
    help: "how long records of commands and their idempotency keys are kept, at least 24h",
};
const OPERATIONS_MAX_BYTES: Setting = Setting {
    name: "VMWATCH_OPERATIONS_MAX_BYTES",
    default: "256MiB",
    help: "size of the records (about 1.5 KiB each); when full, commands are refused",
};

/// Each may hold [`HYPERVISOR_CALLS`] threads; tokio has 512 for blocking calls.
const MOST_HYPERVISORS: usize = 32;

/// Every setting, for `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        HYPERVISORS,
        HYPERVISOR_TIMEOUT,
        HYPERVISOR_CALLS,
        OPERATION_LIMIT,
        OPERATION_LEASE,
        OPERATIONS_KEEP,
        OPERATIONS_MAX_BYTES,
        STREAM_REPLICAS,
        health::setting(HEALTH),
    ],
    audit::SETTINGS,
    serve::SETTINGS,
    bus::SETTINGS,
    telemetry::SETTINGS,
];

/// The settings of lifecycle-svc.
#[derive(Debug)]
pub struct LifecycleSettings {
    pub(crate) bus: BusSettings,
    pub(crate) serve: ServeSettings,
    /// For `main`, which starts telemetry first.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) hypervisors: Vec<HypervisorSpec>,
    pub(crate) calls: CallLimits,
    pub(crate) operations: OperationSettings,
}

/// Of commands and their records.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OperationSettings {
    /// How long a command is followed.
    pub(crate) limit: Duration,
    /// How long a replica's claim on a command holds without being renewed.
    pub(crate) lease: Duration,
    /// How long records are kept.
    pub(crate) keep: Duration,
    /// The size of all records.
    pub(crate) max_bytes: i64,
    /// Copies of the bucket in a NATS cluster.
    pub(crate) replicas: usize,
    pub(crate) audit: AuditSettings,
}

impl OperationSettings {
    fn read(env: &Environment) -> Result<Self, Invalid> {
        let limit = env.duration(&OPERATION_LIMIT, Duration::from_secs(1), Duration::from_hours(1));
        let lease = env.duration(&OPERATION_LEASE, Duration::from_secs(1), Duration::from_mins(5));
        let keep = env.duration(
            &OPERATIONS_KEEP,
            Duration::from_hours(24),
            Duration::from_hours(24 * 365),
        );
        let max_bytes = env.within(&OPERATIONS_MAX_BYTES, ByteSize(1 << 20), ByteSize(1 << 40));
        let replicas = env.within(&STREAM_REPLICAS, 1, 5);
        let audit = AuditSettings::read(env);
        Ok(Self {
            limit: limit?,
            lease: lease?,
            keep: keep?,
            max_bytes: i64::try_from(max_bytes?.0).unwrap_or(i64::MAX),
            replicas: replicas?,
            audit: audit?,
        })
    }
}

/// The bounds of calls to one hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallLimits {
    /// How long one may take.
    pub(crate) timeout: Duration,
    /// How many at once.
    pub(crate) at_once: usize,
}

/// One of [`HYPERVISORS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HypervisorSpec {
    /// What we call it, in logs and records.
    pub(crate) name: String,
    /// What it is and where.
    pub(crate) endpoint: Endpoint,
}

/// What a hypervisor is and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// By libvirt, at this URI.
    #[cfg(feature = "libvirt")]
    Libvirt(String),
}

/// The text of [`HYPERVISORS`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct HypervisorList(Vec<HypervisorSpec>);

impl LifecycleSettings {
    /// Reads the settings.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let serve = ServeSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let hypervisors = env.get::<HypervisorList>(&HYPERVISORS);
        let timeout = env.duration(
            &HYPERVISOR_TIMEOUT,
            Duration::from_millis(100),
            Duration::from_mins(5),
        );
        let at_once = env.within(&HYPERVISOR_CALLS, 1, 16);
        let operations = OperationSettings::read(env);
        Ok(Self {
            bus: bus?,
            serve: serve?,
            telemetry: telemetry?,
            health: health?,
            hypervisors: hypervisors?.0,
            calls: CallLimits {
                timeout: timeout?,
                at_once: at_once?,
            },
            operations: operations?,
        })
    }
}

/// A text that names no hypervisors; says which entry is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct InvalidList(String);

impl FromStr for HypervisorList {
    type Err = InvalidList;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut list: Vec<HypervisorSpec> = Vec::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let spec: HypervisorSpec = entry.parse()?;
            if list.iter().any(|other| other.name == spec.name) {
                return Err(InvalidList(format!("the name {} is used twice", spec.name)));
            }
            list.push(spec);
        }
        match list.len() {
            0 => Err(InvalidList("it names none".to_owned())),
            1..=MOST_HYPERVISORS => Ok(Self(list)),
            _ => Err(InvalidList(format!("it names more than {MOST_HYPERVISORS}"))),
        }
    }
}

impl FromStr for HypervisorSpec {
    type Err = InvalidList;

    fn from_str(entry: &str) -> Result<Self, Self::Err> {
        let well_named = |name: &str| {
            (1..=32).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        };
        match entry.split_once('=') {
            Some((name, endpoint)) if well_named(name) => Ok(Self {
                name: name.to_owned(),
                endpoint: endpoint.parse()?,
            }),
            _ => Err(InvalidList(format!(
                "`{entry}`: write name=address, the name of at most 32 of a-z, 0-9 and -"
            ))),
        }
    }
}

impl FromStr for Endpoint {
    type Err = InvalidList;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.contains("://") {
            return Err(InvalidList(format!("`{text}` is no libvirt URI")));
        }
        #[cfg(feature = "libvirt")]
        return Ok(Self::Libvirt(text.to_owned()));
        #[cfg(not(feature = "libvirt"))]
        return Err(InvalidList(format!("`{text}`: this build is without libvirt")));
    }
}

#[cfg(all(test, feature = "libvirt"))]
mod tests {
    use super::*;

    #[test]
    fn several_hypervisors_are_named_in_one_setting() {
        let list: HypervisorList = "lab=qemu:///system, rack2=qemu+tls://rack2/system?no_verify=1"
            .parse()
            .unwrap();
        let uris: Vec<_> = list
            .0
            .iter()
            .map(|spec| (spec.name.as_str(), spec.endpoint.clone()))
            .collect();
        assert_eq!(
            uris,
            [
                ("lab", Endpoint::Libvirt("qemu:///system".into())),
                (
                    "rack2",
                    Endpoint::Libvirt("qemu+tls://rack2/system?no_verify=1".into())
                ),
            ]
        );
    }

    #[test]
    fn a_wrong_list_says_which_entry_is_wrong() {
        for (text, part) in [
            (",", "names none"),
            ("qemu:///system", "write name=address"),
            ("Lab=qemu:///system", "write name=address"),
            ("a=qemu:///system,a=test:///default", "a is used twice"),
            ("a=somewhere", "no libvirt URI"),
        ] {
            let error = text.parse::<HypervisorList>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
