//! The settings of the agent.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use vmwatch_api::{InstanceId, time::UtcOffset};
use vmwatch_bus::BusSettings;
use vmwatch_service::{
    config::{self, ByteSize, DRAIN_DEADLINE, Environment, Invalid, Setting, UTC_OFFSET, Value},
    health,
    telemetry::{self, TelemetrySettings},
};

use crate::select::Selection;

const HEALTH: &str = "127.0.0.1:9084";
/// The file with the VM's UUID as provided by the firmware. Under libvirt and Nova this is the id that the hypervisor
/// uses.
const PRODUCT_UUID: &str = "/sys/class/dmi/id/product_uuid";

const INSTANCE_ID: Setting = Setting {
    name: "VMWATCH_INSTANCE_ID",
    value: Value::Text,
    default: "",
    help: "instance id of this VM; if empty, the agent uses the content of /sys/class/dmi/id/product_uuid, which only root can read",
};
const VM_INTERVAL: Setting = Setting {
    name: "VMWATCH_AGENT_VM_INTERVAL",
    value: Value::Duration("100ms", "1h"),
    default: "10s",
    help: "interval at which the agent samples the VM's own measures, such as CPU and memory usage",
};
const PROCESS_INTERVAL: Setting = Setting {
    name: "VMWATCH_AGENT_PROCESS_INTERVAL",
    value: Value::Duration("100ms", "24h"),
    default: "60s",
    help: "interval at which the agent samples the VM's processes and filesystems; must be a whole multiple of VMWATCH_AGENT_VM_INTERVAL",
};
const PROCESSES: Setting = Setting {
    name: "VMWATCH_AGENT_PROCESSES",
    value: Value::Text,
    default: "all",
    help: "processes to report: `all`, or `top:N` for the N processes with the highest CPU usage, the N with the highest memory usage and the N with the highest disk rate",
};
const PIN: Setting = Setting {
    name: "VMWATCH_AGENT_PIN",
    value: Value::Text,
    default: "",
    help: "comma-separated names of processes that are always reported in addition to `top:N`, such as nginx,postgres",
};
const COMMAND_LINES: Setting = Setting {
    name: "VMWATCH_AGENT_COMMAND_LINES",
    value: Value::Flag,
    default: "false",
    help: "whether the agent reports the command lines of processes, without the secrets that docs/agent.md describes",
};
const SHORT_LIVED_ROWS: Setting = Setting {
    name: "VMWATCH_AGENT_SHORT_LIVED_ROWS",
    value: Value::Number(0, 5000),
    default: "200",
    help: "maximum number of rows per sample for processes that started and ended since the previous sample, those with the most CPU time first; the others are summed by name and user",
};
pub(crate) const SPOOL_DIR: Setting = Setting {
    name: "VMWATCH_AGENT_SPOOL_DIR",
    value: Value::Folder,
    default: "/var/lib/vmwatch-agent",
    help: "path of the folder in which samples wait while NATS is unreachable or the sample stream is full",
};
const SPOOL_SIZE: Setting = Setting {
    name: "VMWATCH_AGENT_SPOOL_SIZE",
    value: Value::Size("4MiB", "16GiB"),
    default: "64MiB",
    help: "maximum size of the folder VMWATCH_AGENT_SPOOL_DIR; when it is reached, the oldest samples are dropped",
};

/// All settings of the agent, as listed by `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        INSTANCE_ID,
        VM_INTERVAL,
        PROCESS_INTERVAL,
        PROCESSES,
        PIN,
        COMMAND_LINES,
        SHORT_LIVED_ROWS,
        SPOOL_DIR,
        SPOOL_SIZE,
        DRAIN_DEADLINE,
        UTC_OFFSET,
        health::setting(HEALTH),
    ],
    vmwatch_bus::SETTINGS,
    telemetry::SETTINGS,
];

/// The settings of the agent.
#[derive(Debug)]
pub struct AgentSettings {
    pub(crate) bus: BusSettings,
    /// The telemetry settings; `main` uses them to start telemetry before anything else.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) instance_id: InstanceId,
    pub(crate) intervals: Intervals,
    pub(crate) selection: Selection,
    pub(crate) command_lines: bool,
    pub(crate) short_lived_rows: usize,
    pub(crate) spool: SpoolSettings,
    pub(crate) utc_offset: UtcOffset,
    pub(crate) drain_deadline: Duration,
}

/// The intervals at which the VM and its processes are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intervals {
    pub(crate) vm: Duration,
    /// Number of samples of the VM per sample of its processes; at least 1.
    pub(crate) vm_per_process: u32,
}

/// The path and the maximum size of the spool folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SpoolSettings {
    pub(crate) dir: PathBuf,
    pub(crate) limit: ByteSize,
}

impl AgentSettings {
    /// Reads the agent's settings from the environment.
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let bus = BusSettings::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let instance_id = instance_id(env, Path::new(PRODUCT_UUID));
        let intervals = intervals(env);
        let kind = env.get::<Reported>(&PROCESSES);
        let pinned = env.optional::<Names>(&PIN);
        let command_lines = env.get(&COMMAND_LINES);
        let short_lived_rows = env.number(&SHORT_LIVED_ROWS);
        let dir = env.get(&SPOOL_DIR);
        // The spool must hold at least a few sample parts of the maximum size. The upper limit of this setting bounds
        // the memory that the index of the spool's files uses.
        let limit = env.size(&SPOOL_SIZE);
        let utc_offset = config::utc_offset(env);
        let drain_deadline = env.duration(&DRAIN_DEADLINE);
        let pinned = pinned?.unwrap_or_default().0;
        Ok(Self {
            bus: bus?,
            telemetry: telemetry?,
            health: health?,
            instance_id: instance_id?,
            intervals: intervals?,
            selection: match kind? {
                Reported::All => Selection::All,
                Reported::Top(count) => Selection::Top { count, pinned },
            },
            command_lines: command_lines?,
            short_lived_rows: short_lived_rows?,
            spool: SpoolSettings {
                dir: dir?,
                limit: limit?,
            },
            utc_offset: utc_offset?,
            drain_deadline: drain_deadline?,
        })
    }
}

fn instance_id(env: &Environment, product_uuid: &Path) -> Result<InstanceId, Invalid> {
    if let Some(given) = env.optional(&INSTANCE_ID)? {
        return Ok(given);
    }
    let read = std::fs::read_to_string(product_uuid).map_err(|error| error.to_string());
    let parsed = read.and_then(|text| {
        // Some firmware provides the UUID in upper case, but hypervisors and the API use lower case.
        let id = text.trim().to_ascii_lowercase();
        id.parse::<InstanceId>()
            .map_err(|error| format!("`{id}` {error}"))
    });
    parsed.map_err(|why| {
        env.problem(format!(
            "{} must be set: {} does not contain the id of this VM: {why}",
            INSTANCE_ID.name,
            product_uuid.display()
        ))
    })
}

fn intervals(env: &Environment) -> Result<Intervals, Invalid> {
    // The kernel accounts CPU time in ticks of 10 ms, so percentages over less than 100 ms would be mostly noise.
    let vm = env.duration(&VM_INTERVAL);
    let process = env.duration(&PROCESS_INTERVAL);
    let (vm, process) = (vm?, process?);
    let multiple = process.as_millis() / vm.as_millis();
    let remainder = process.as_millis() % vm.as_millis();
    match u32::try_from(multiple) {
        Ok(vm_per_process @ 1..) if remainder == 0 => Ok(Intervals { vm, vm_per_process }),
        _ => Err(env.problem(format!(
            "{} must be a whole multiple of {} ({})",
            PROCESS_INTERVAL.name,
            VM_INTERVAL.name,
            config::Span(vm)
        ))),
    }
}

/// The processes to report, as written in the setting: `all` or `top:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reported {
    All,
    Top(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write `all`, or `top:N` with N from 1 to 1000")]
struct InvalidReported;

impl FromStr for Reported {
    type Err = InvalidReported;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "all" {
            return Ok(Self::All);
        }
        let count = text.strip_prefix("top:").ok_or(InvalidReported)?;
        match count.parse() {
            Ok(count @ 1..=1000) => Ok(Self::Top(count)),
            _ => Err(InvalidReported),
        }
    }
}

/// A list of names, as written in a setting: separated by commas.
#[derive(Debug, Default, PartialEq, Eq)]
struct Names(Vec<String>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write at most 100 names of at most 64 bytes, separated by commas")]
struct InvalidNames;

impl FromStr for Names {
    type Err = InvalidNames;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names: Vec<_> = text.split(',').map(|name| name.trim().to_owned()).collect();
        let good = names.len() <= 100 && names.iter().all(|name| (1..=64).contains(&name.len()));
        good.then_some(Self(names)).ok_or(InvalidNames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(variables: [(&str, &str); N]) -> Result<AgentSettings, String> {
        let env = Environment::from_variables(variables);
        AgentSettings::read(&env).map_err(|Invalid| env.problems().join("\n"))
    }

    #[test]
    fn default_agent_settings_are_as_documented() {
        let settings = read([("VMWATCH_INSTANCE_ID", "vm-1")]).unwrap();
        assert_eq!(settings.intervals.vm, Duration::from_secs(10));
        assert_eq!(settings.intervals.vm_per_process, 6);
        assert_eq!(settings.selection, Selection::All);
        assert!(!settings.command_lines);
        assert_eq!(settings.spool.limit, ByteSize(64 << 20));
    }

    #[test]
    fn all_invalid_agent_settings_are_reported_together() {
        let problems = read([
            ("VMWATCH_INSTANCE_ID", "a.b"),
            ("VMWATCH_AGENT_PROCESS_INTERVAL", "25s"),
            ("VMWATCH_AGENT_PROCESSES", "top:0"),
            ("VMWATCH_AGENT_PIN", "nginx,,postgres"),
            ("VMWATCH_AGENT_SPOOL_SIZE", "1KiB"),
        ])
        .unwrap_err();
        for expected in [
            "VMWATCH_INSTANCE_ID: `a.b`",
            "VMWATCH_AGENT_PROCESS_INTERVAL must be a whole multiple of VMWATCH_AGENT_VM_INTERVAL (10s)",
            "VMWATCH_AGENT_PROCESSES: `top:0`",
            "VMWATCH_AGENT_PIN: `nginx,,postgres`",
            "VMWATCH_AGENT_SPOOL_SIZE: 1KiB is not from 4MiB to 16GiB",
        ] {
            assert!(
                problems.contains(expected),
                "{expected} is missing in:\n{problems}"
            );
        }
    }

    #[test]
    fn process_selection_and_pinned_names_are_parsed() {
        let settings = read([
            ("VMWATCH_INSTANCE_ID", "vm-1"),
            ("VMWATCH_AGENT_PROCESSES", "top:3"),
            ("VMWATCH_AGENT_PIN", "nginx, postgres"),
        ])
        .unwrap();
        let pinned = vec!["nginx".to_owned(), "postgres".to_owned()];
        assert_eq!(settings.selection, Selection::Top { count: 3, pinned });
    }

    #[test]
    fn instance_id_is_read_from_firmware_and_error_names_the_setting_if_that_fails() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "6ABF5A1E-B85C-4E5F-BA02-F96E22CBD02E\n").unwrap();
        let env = Environment::from_variables([]);
        let id = instance_id(&env, file.path()).unwrap();
        assert_eq!(id.as_str(), "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e");

        std::fs::write(file.path(), "Not Settable.\n").unwrap();
        assert!(instance_id(&env, file.path()).is_err());
        assert!(instance_id(&env, Path::new("/nonexistent/product_uuid")).is_err());
        let problems = env.problems();
        assert_eq!(problems.len(), 2);
        for problem in problems {
            assert!(
                problem.starts_with("VMWATCH_INSTANCE_ID must be set: "),
                "{problem}"
            );
        }
    }
}
