//! Settings from environment variables: each is named once, as a [`Setting`], and all that are wrong are told at once.

use std::{cell::RefCell, collections::HashMap, fmt, str::FromStr, time::Duration};

use vmwatch_api::time::UtcOffset;

/// The exit code for wrong settings or arguments: `EX_USAGE` of sysexits.h.
pub const EX_USAGE: i32 = 64;

/// A setting: an environment variable, its default, and what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// The environment variable.
    pub name: &'static str,
    /// The default as one would write it; empty where the setting is off unless given.
    pub default: &'static str,
    /// What it is for, with its unit.
    pub help: &'static str,
}

/// The settings of the bus, of every program.
pub const NATS_URL: Setting = Setting {
    name: "VMWATCH_NATS_URL",
    default: "nats://127.0.0.1:4222",
    help: "comma-separated NATS servers; tls:// requires TLS",
};
/// See [`Setting::help`].
pub const NATS_USER: Setting = Setting {
    name: "VMWATCH_NATS_USER",
    default: "",
    help: "user name for NATS",
};
/// See [`Setting::help`].
pub const NATS_PASSWORD_FILE: Setting = Setting {
    name: "VMWATCH_NATS_PASSWORD_FILE",
    default: "",
    help: "file with the password of that user",
};
/// See [`Setting::help`].
pub const NATS_CREDENTIALS_FILE: Setting = Setting {
    name: "VMWATCH_NATS_CREDENTIALS_FILE",
    default: "",
    help: "NATS .creds file, instead of user and password",
};
/// See [`Setting::help`].
pub const NATS_NKEY_SEED_FILE: Setting = Setting {
    name: "VMWATCH_NATS_NKEY_SEED_FILE",
    default: "",
    help: "file with an nkey seed (SU…), instead of user and password",
};
/// See [`Setting::help`].
pub const NATS_CERTIFICATE_FILE: Setting = Setting {
    name: "VMWATCH_NATS_CERTIFICATE_FILE",
    default: "",
    help: "PEM file with this program's certificate, if the NATS servers require one",
};
/// See [`Setting::help`].
pub const NATS_KEY_FILE: Setting = Setting {
    name: "VMWATCH_NATS_KEY_FILE",
    default: "",
    help: "PEM file with the private key of that certificate",
};
/// See [`Setting::help`].
pub const NATS_CA_FILE: Setting = Setting {
    name: "VMWATCH_NATS_CA_FILE",
    default: "",
    help: "PEM file with the authorities that sign the NATS servers' certificates; enables TLS",
};
/// See [`Setting::help`].
pub const NATS_PING_INTERVAL: Setting = Setting {
    name: "VMWATCH_NATS_PING_INTERVAL",
    default: "5s",
    help: "interval between pings; a connection without answers is dropped after at most three intervals",
};
/// See [`Setting::help`].
pub const STREAM_REPLICAS: Setting = Setting {
    name: "VMWATCH_STREAM_REPLICAS",
    default: "1",
    help: "replicas of each stream and KV bucket in a NATS cluster: 1, 3 or 5",
};
/// See [`Setting::help`].
pub const DRAIN_DEADLINE: Setting = Setting {
    name: "VMWATCH_DRAIN_DEADLINE",
    default: "10s",
    help: "maximum time a stop waits for requests in flight",
};
/// See [`Setting::help`].
pub const UTC_OFFSET: Setting = Setting {
    name: "VMWATCH_UTC_OFFSET",
    default: "+00:00",
    help: "UTC offset of every create_date; the same for a whole deployment",
};
/// See [`Setting::help`].
pub const LOG: Setting = Setting {
    name: "VMWATCH_LOG",
    default: "info",
    help: "log filter, such as `info` or `info,async_nats=debug`",
};
/// See [`Setting::help`].
pub const LOG_FORMAT: Setting = Setting {
    name: "VMWATCH_LOG_FORMAT",
    default: "text",
    help: "`text` or `json`; logs go to standard error",
};
/// See [`Setting::help`].
pub const OTLP_ENDPOINT: Setting = Setting {
    name: "VMWATCH_OTLP_ENDPOINT",
    default: "",
    help: "OTLP/HTTP collector of traces, such as http://127.0.0.1:4318; empty: no traces",
};
/// See [`Setting::help`].
pub const MONGODB_URI: Setting = Setting {
    name: "VMWATCH_MONGODB_URI",
    default: "mongodb://127.0.0.1:27017",
    help: "MongoDB connection URI",
};
/// See [`Setting::help`].
pub const MONGODB_URI_FILE: Setting = Setting {
    name: "VMWATCH_MONGODB_URI_FILE",
    default: "",
    help: "file with the connection URI, for one with a password",
};
/// See [`Setting::help`].
pub const MONGODB_CA_FILE: Setting = Setting {
    name: "VMWATCH_MONGODB_CA_FILE",
    default: "",
    help: "PEM file with the authorities that sign the MongoDB servers' certificates; enables TLS",
};
/// See [`Setting::help`].
pub const DATABASE: Setting = Setting {
    name: "VMWATCH_DATABASE",
    default: "vmwatch",
    help: "name of the database",
};
/// See [`Setting::help`].
pub const DATABASE_POOL: Setting = Setting {
    name: "VMWATCH_DATABASE_POOL",
    default: "32",
    help: "maximum connections to each database server",
};

/// See [`Setting::help`].
pub const SILENT_AFTER: Setting = Setting {
    name: "VMWATCH_SILENT_AFTER",
    default: "60s",
    help: "time without a sample after which an agent counts as silent; must exceed the agents' interval",
};

/// Proof that a setting was wrong and the problem is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalid;

/// Where settings come from, with the problems found so far.
#[derive(Debug, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    problems: RefCell<Vec<String>>,
}

impl Environment {
    /// The environment of this process. A variable that is empty counts as not given.
    pub fn of_process() -> Self {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        });
        Self {
            variables: variables.collect(),
            problems: RefCell::default(),
        }
    }

    /// Variables given by hand, for tests.
    pub fn of<const N: usize>(variables: [(&str, &str); N]) -> Self {
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            variables: variables.into(),
            problems: RefCell::default(),
        }
    }

    /// What was wrong, a line each.
    pub fn problems(&self) -> Vec<String> {
        self.problems.borrow().clone()
    }

    /// Puts a problem on record that lies between settings.
    pub fn problem(&self, text: impl Into<String>) -> Invalid {
        self.problems.borrow_mut().push(text.into());
        Invalid
    }

    fn text(&self, setting: &Setting) -> &str {
        self.variables.get(setting.name).map_or("", |value| value.trim())
    }

    /// A setting that may be left out.
    pub fn optional<T: FromStr<Err: fmt::Display>>(&self, setting: &Setting) -> Result<Option<T>, Invalid> {
        match self.text(setting) {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|error| self.problem(format!("{}: `{text}` is not usable: {error}", setting.name))),
        }
    }

    /// A setting with a default.
    pub fn get<T: FromStr<Err: fmt::Display>>(&self, setting: &Setting) -> Result<T, Invalid> {
        if let Some(given) = self.optional(setting)? {
            return Ok(given);
        }
        if setting.default.is_empty() {
            return Err(self.problem(format!("{} must be set: {}", setting.name, setting.help)));
        }
        setting.default.parse().map_err(|error| {
            self.problem(format!(
                "{}: its default `{}` is not usable: {error}",
                setting.name, setting.default
            ))
        })
    }

    /// A number with a default, within bounds.
    pub fn within<T>(&self, setting: &Setting, least: T, most: T) -> Result<T, Invalid>
    where
        T: FromStr<Err: fmt::Display> + PartialOrd + fmt::Display + Copy,
    {
        let value: T = self.get(setting)?;
        if value < least || value > most {
            return Err(self.problem(format!("{}: {value} is not from {least} to {most}", setting.name)));
        }
        Ok(value)
    }

    /// A duration with a default, within bounds.
    pub fn duration(&self, setting: &Setting, least: Duration, most: Duration) -> Result<Duration, Invalid> {
        self.within(setting, Span(least), Span(most)).map(|span| span.0)
    }

    /// The content of the file that the setting names, without its last line break.
    pub fn secret_file(&self, setting: &Setting) -> Result<Option<String>, Invalid> {
        let Some(path) = self.optional::<String>(setting)? else {
            return Ok(None);
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned())),
            Err(error) => Err(self.problem(format!("{}: {path} cannot be read: {error}", setting.name))),
        }
    }
}

/// A duration as one writes it: `500ms`, `10s`, `5m`, `12h`, `30d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A text that is no [`Span`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a whole number and a unit: 500ms, 10s, 5m, 12h or 30d")]
pub struct InvalidSpan;

impl FromStr for Span {
    type Err = InvalidSpan;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or(InvalidSpan)?;
        let (number, unit) = text.split_at(unit_at);
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(InvalidSpan),
        };
        let number: u64 = number.parse().map_err(|_| InvalidSpan)?;
        number
            .checked_mul(millis)
            .map(|total| Self(Duration::from_millis(total)))
            .ok_or(InvalidSpan)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        for (unit, name) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")] {
            if millis > 0 && millis.is_multiple_of(unit) {
                return write!(f, "{}{name}", millis / unit);
            }
        }
        write!(f, "{millis}ms")
    }
}

/// A size as one writes it: `512KiB`, `64MiB`, `1GiB`, or a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text that is no [`ByteSize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a whole number and a unit: 512KiB, 64MiB or 1GiB")]
pub struct InvalidSize;

impl FromStr for ByteSize {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let bytes: u64 = match unit {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(InvalidSize),
        };
        let number: u64 = number.parse().map_err(|_| InvalidSize)?;
        number.checked_mul(bytes).map(Self).ok_or(InvalidSize)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 > 0 && self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// When a VM that does not report counts as silent.
pub fn silent_after(env: &Environment) -> Result<Duration, Invalid> {
    env.duration(&SILENT_AFTER, Duration::from_secs(1), Duration::from_hours(24))
}

/// The offset of `create_date`.
pub fn utc_offset(env: &Environment) -> Result<UtcOffset, Invalid> {
    env.get(&UTC_OFFSET)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: Setting = Setting {
        name: "COUNT",
        default: "3",
        help: "a count",
    };
    const WAIT: Setting = Setting {
        name: "WAIT",
        default: "1s",
        help: "a wait",
    };
    const NEEDED: Setting = Setting {
        name: "NEEDED",
        default: "",
        help: "a name",
    };

    #[test]
    fn every_problem_is_told_at_once() {
        let env = Environment::of([("COUNT", "many"), ("WAIT", "5 minutes")]);
        let count = env.within::<u32>(&COUNT, 1, 9);
        let wait = env.duration(&WAIT, Duration::ZERO, Duration::MAX);
        let needed = env.get::<String>(&NEEDED);
        assert!(count.is_err() && wait.is_err() && needed.is_err());
        let problems = env.problems().join("\n");
        assert!(problems.contains("COUNT: `many`"), "{problems}");
        assert!(
            problems.contains("WAIT: `5 minutes` is not usable: write a whole number"),
            "{problems}"
        );
        assert!(problems.contains("NEEDED must be set: a name"), "{problems}");
    }

    #[test]
    fn bounds_are_kept_and_empty_means_not_given() {
        assert_eq!(Environment::of([("COUNT", "")]).within(&COUNT, 1, 9), Ok(3));
        let env = Environment::of([("COUNT", "10")]);
        assert_eq!(env.within(&COUNT, 1, 9), Err(Invalid));
        assert_eq!(env.problems(), ["COUNT: 10 is not from 1 to 9"]);
    }

    #[test]
    fn spans_and_sizes_read_as_they_are_written() {
        for text in ["500ms", "10s", "5m", "12h", "30d"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["512KiB", "64MiB", "1GiB", "1B"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
        for bad in ["", "10", "s", "1.5s", "-1s", "99999999999999999999d", "1w"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
