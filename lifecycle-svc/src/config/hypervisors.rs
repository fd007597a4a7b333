//! Reads the setting that lists the hypervisors, and the files that the setting names.

use std::{path::PathBuf, str::FromStr};

use vmwatch_service::config::{Environment, Invalid, Setting, Value};

use crate::driver::NovaSettings;

pub(super) const HYPERVISORS: Setting = Setting {
    name: "VMWATCH_HYPERVISORS",
    value: Value::Text,
    default: if cfg!(feature = "libvirt") {
        "test=test:///default"
    } else {
        ""
    },
    help: "comma-separated hypervisors as name=address; an address is a libvirt URI, or nova: followed by the path of a file that describes an OpenStack cloud, such as lab=qemu:///system,cloud=nova:/etc/vmwatch/nova.toml",
};

/// Maximum number of hypervisors. Each hypervisor may use up to `VMWATCH_HYPERVISOR_CALLS` threads (at most 16).
const MAX_HYPERVISORS: usize = 32;

/// A hypervisor listed in [`HYPERVISORS`].
#[derive(Debug, Clone)]
pub(crate) struct HypervisorSpec {
    /// Name of the hypervisor in logs and operation records.
    pub(crate) name: String,
    /// Type and address of the hypervisor.
    pub(crate) endpoint: Endpoint,
}

/// Type and address of a hypervisor.
#[derive(Debug, Clone)]
pub(crate) enum Endpoint {
    /// A libvirt daemon at this URI.
    #[cfg(feature = "libvirt")]
    Libvirt(String),
    /// An OpenStack cloud that is accessed through Nova.
    Nova(Box<NovaSettings>),
}

/// Parsed value of the setting [`HYPERVISORS`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct HypervisorList(Vec<Entry>);

/// An entry of the list of hypervisors.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: String,
    address: Address,
}

/// Address of a hypervisor, as written in the setting.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    #[cfg(feature = "libvirt")]
    Libvirt(String),
    /// Path of the file that describes an OpenStack cloud.
    Nova(PathBuf),
}

/// Why the list of hypervisors is invalid, with the invalid entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct InvalidList(String);

impl FromStr for HypervisorList {
    type Err = InvalidList;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut list: Vec<Entry> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let entry: Entry = part.parse()?;
            if list.iter().any(|other| other.name == entry.name) {
                return Err(InvalidList(format!("the name {} is used twice", entry.name)));
            }
            list.push(entry);
        }
        match list.len() {
            0 => Err(InvalidList("the list names no hypervisor".to_owned())),
            1..=MAX_HYPERVISORS => Ok(Self(list)),
            _ => Err(InvalidList(format!(
                "the list names more than {MAX_HYPERVISORS} hypervisors"
            ))),
        }
    }
}

impl FromStr for Entry {
    type Err = InvalidList;

    fn from_str(entry: &str) -> Result<Self, Self::Err> {
        let well_named = |name: &str| {
            (1..=32).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        };
        match entry.split_once('=') {
            Some((name, address)) if well_named(name) => Ok(Self {
                name: name.to_owned(),
                address: address.parse()?,
            }),
            _ => Err(InvalidList(format!(
                "`{entry}`: write name=address with a name of 1 to 32 characters from a-z, 0-9 and -"
            ))),
        }
    }
}

impl FromStr for Address {
    type Err = InvalidList;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("nova:") {
            return Ok(Self::Nova(path.into()));
        }
        if !text.contains("://") {
            return Err(InvalidList(format!(
                "`{text}` is neither a libvirt URI nor nova:/path/to/file.toml"
            )));
        }
        #[cfg(feature = "libvirt")]
        return Ok(Self::Libvirt(text.to_owned()));
        #[cfg(not(feature = "libvirt"))]
        return Err(InvalidList(format!(
            "`{text}`: this build of vmwatch-lifecycle does not support libvirt"
        )));
    }
}

/// Reads the list of hypervisors and the files that it names, and reports every problem found.
pub(super) fn read(env: &Environment) -> Result<Vec<HypervisorSpec>, Invalid> {
    let list = env.get::<HypervisorList>(&HYPERVISORS)?;
    let specs: Vec<_> = list
        .0
        .into_iter()
        .map(|Entry { name, address }| {
            let endpoint = match address {
                #[cfg(feature = "libvirt")]
                Address::Libvirt(uri) => Endpoint::Libvirt(uri),
                Address::Nova(path) => {
                    Endpoint::Nova(Box::new(NovaSettings::read(&path).map_err(|problem| {
                        env.problem(format!("{}: {name}: {problem}", HYPERVISORS.name))
                    })?))
                }
            };
            Ok(HypervisorSpec { name, endpoint })
        })
        .collect();
    specs.into_iter().collect()
}

#[cfg(all(test, feature = "libvirt"))]
mod tests {
    use super::*;

    #[test]
    fn list_of_several_hypervisors_is_parsed() {
        let list: HypervisorList =
            "lab=qemu:///system, rack2=qemu+tls://rack2/system?no_verify=1,c=nova:/n.toml"
                .parse()
                .unwrap();
        let entry = |name: &str, address| Entry {
            name: name.into(),
            address,
        };
        assert_eq!(
            list.0,
            [
                entry("lab", Address::Libvirt("qemu:///system".into())),
                entry(
                    "rack2",
                    Address::Libvirt("qemu+tls://rack2/system?no_verify=1".into())
                ),
                entry("c", Address::Nova("/n.toml".into())),
            ]
        );
    }

    #[test]
    fn error_for_invalid_hypervisor_list_names_the_invalid_entry() {
        for (text, part) in [
            (",", "names no hypervisor"),
            ("qemu:///system", "write name=address"),
            ("Lab=qemu:///system", "write name=address"),
            ("a=qemu:///system,a=test:///default", "a is used twice"),
            ("a=somewhere", "neither a libvirt URI"),
        ] {
            let error = text.parse::<HypervisorList>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
