//! The settings of the agent.

mod enrolment;
mod timing;

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use vmwatch_service::{
    config::{ByteSize, DRAIN_DEADLINE, Environment, Invalid, Setting, UTC_OFFSET, Value},
    health,
    telemetry::{self, TelemetrySettings},
};

pub use self::enrolment::EnrolCommandSettings;
pub(crate) use self::{
    enrolment::{EnrolmentSettings, Gateway, IDENTITY_DIR, Login, is_nats_url, product_uuid},
    timing::{Intervals, Timing},
};
use self::{
    enrolment::{GATEWAY_CA_FILE, GATEWAY_URL, INSTANCE_ID, JOIN_TOKEN_FILE},
    timing::{PROCESS_INTERVAL, VM_INTERVAL},
};
use crate::select::Selection;

const HEALTH: &str = "127.0.0.1:9084";

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
    help: "maximum size of the samples that wait in VMWATCH_AGENT_SPOOL_DIR; when it is reached, the oldest are dropped; refused samples (up to 8 MiB) and the samples of a cloned VM (up to twice this size) are stored in addition",
};

/// All settings of the agent, as listed by `--help`.
pub const SETTINGS: &[&[Setting]] = &[
    &[
        INSTANCE_ID,
        IDENTITY_DIR,
        GATEWAY_URL,
        JOIN_TOKEN_FILE,
        GATEWAY_CA_FILE,
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
    pub(crate) login: Login,
    /// The telemetry settings; `main` uses them to start telemetry before anything else.
    pub telemetry: TelemetrySettings,
    pub(crate) health: SocketAddr,
    pub(crate) selection: Selection,
    pub(crate) command_lines: bool,
    pub(crate) short_lived_rows: usize,
    pub(crate) spool: SpoolSettings,
    pub(crate) drain_deadline: Duration,
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
        let login = Login::read(env);
        let telemetry = TelemetrySettings::read(env);
        let health = health::read(env, HEALTH);
        let kind = env.get::<Reported>(&PROCESSES);
        let pinned = env.optional::<Names>(&PIN);
        let command_lines = env.get(&COMMAND_LINES);
        let short_lived_rows = env.number(&SHORT_LIVED_ROWS);
        let dir = env.get(&SPOOL_DIR);
        // The spool must hold at least a few sample parts of the maximum size. The upper limit of this setting bounds
        // the memory that the index of the spool's files uses.
        let limit = env.size(&SPOOL_SIZE);
        let drain_deadline = env.duration(&DRAIN_DEADLINE);
        let pinned = pinned?.unwrap_or_default().0;
        Ok(Self {
            login: login?,
            telemetry: telemetry?,
            health: health?,
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
            drain_deadline: drain_deadline?,
        })
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
    use crate::enrol::Connection;

    fn read<const N: usize>(variables: [(&str, &str); N]) -> Result<AgentSettings, String> {
        let env = Environment::from_variables(variables);
        AgentSettings::read(&env).map_err(|Invalid| env.problems().join("\n"))
    }

    #[test]
    fn default_agent_settings_are_as_documented() {
        let settings = read([("VMWATCH_INSTANCE_ID", "vm-1")]).unwrap();
        let Login::Static(Connection { timing, .. }) = settings.login else {
            panic!("without an identity, the login is static");
        };
        assert_eq!(timing.intervals.vm, Duration::from_secs(10));
        assert_eq!(timing.intervals.vm_per_process, 6);
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
}
