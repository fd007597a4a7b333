//! Settings from environment variables. Each is declared once, as a [`Setting`]; all invalid ones are reported
//! together.

mod value;

use std::{cell::RefCell, collections::HashMap, fmt, str::FromStr, time::Duration};

use vmwatch_api::time::UtcOffset;

pub use self::value::{ByteSize, InvalidSize, InvalidSpan, Span, Value};

/// The exit code for wrong settings or arguments: `EX_USAGE` of sysexits.h.
pub const EX_USAGE: i32 = 64;

/// A setting, read from an environment variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Name of the variable.
    pub name: &'static str,
    /// Type and range of the value.
    pub value: Value,
    /// The default in the format that users write; empty if there is none.
    pub default: &'static str,
    /// The text for `--help` and docs/settings.md.
    pub help: &'static str,
}

pub const STREAM_REPLICAS: Setting = Setting {
    name: "VMWATCH_STREAM_REPLICAS",
    value: Value::Number(1, 5),
    default: "1",
    help: "replicas of each stream and KV bucket in a NATS cluster: 1, 3 or 5",
};
pub const DRAIN_DEADLINE: Setting = Setting {
    name: "VMWATCH_DRAIN_DEADLINE",
    value: Value::Duration("0s", "5m"),
    default: "10s",
    help: "maximum time a stop waits for requests in flight",
};
pub const UTC_OFFSET: Setting = Setting {
    name: "VMWATCH_UTC_OFFSET",
    value: Value::Text,
    default: "+00:00",
    help: "UTC offset of every create_date; the same for a whole deployment",
};
pub const LOG: Setting = Setting {
    name: "VMWATCH_LOG",
    value: Value::Text,
    default: "info",
    help: "log filter, such as `info` or `info,async_nats=debug`",
};
pub const LOG_FORMAT: Setting = Setting {
    name: "VMWATCH_LOG_FORMAT",
    value: Value::Text,
    default: "text",
    help: "`text` or `json`; logs go to standard error",
};
pub const OTLP_ENDPOINT: Setting = Setting {
    name: "VMWATCH_OTLP_ENDPOINT",
    value: Value::Text,
    default: "",
    help: "OTLP/HTTP collector of traces, such as http://127.0.0.1:4318; empty: no traces",
};

pub const SILENT_AFTER: Setting = Setting {
    name: "VMWATCH_SILENT_AFTER",
    value: Value::Duration("1s", "24h"),
    default: "60s",
    help: "time without a sample after which an agent counts as silent; must exceed the agents' interval",
};

/// Marks a setting as invalid; its problem was recorded in [`Environment`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalid;

/// The source of settings, with the problems found so far.
#[derive(Debug, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    problems: RefCell<Vec<String>>,
}

impl Environment {
    /// The environment of this process. An empty variable counts as not set.
    pub fn from_process() -> Self {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        });
        Self {
            variables: variables.collect(),
            problems: RefCell::default(),
        }
    }

    /// Variables for tests.
    pub fn from_variables<const N: usize>(variables: [(&str, &str); N]) -> Self {
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            variables: variables.into(),
            problems: RefCell::default(),
        }
    }

    /// The problems, one line each.
    pub fn problems(&self) -> Vec<String> {
        self.problems.borrow().clone()
    }

    /// Records a problem, such as two settings that exclude each other.
    pub fn problem(&self, text: impl Into<String>) -> Invalid {
        self.problems.borrow_mut().push(text.into());
        Invalid
    }

    fn text(&self, setting: &Setting) -> &str {
        self.variables.get(setting.name).map_or("", |value| value.trim())
    }

    /// Reads a setting without a default.
    pub fn optional<T: FromStr<Err: fmt::Display>>(&self, setting: &Setting) -> Result<Option<T>, Invalid> {
        match self.text(setting) {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|error| self.problem(format!("{}: `{text}` is invalid: {error}", setting.name))),
        }
    }

    /// Reads a setting with a default.
    pub fn get<T: FromStr<Err: fmt::Display>>(&self, setting: &Setting) -> Result<T, Invalid> {
        if let Some(given) = self.optional(setting)? {
            return Ok(given);
        }
        if setting.default.is_empty() {
            return Err(self.problem(format!("{} must be set: {}", setting.name, setting.help)));
        }
        setting.default.parse().map_err(|error| {
            self.problem(format!(
                "{}: its default `{}` is invalid: {error}",
                setting.name, setting.default
            ))
        })
    }

    /// Reads a [`Value::Number`].
    pub fn number<T: TryFrom<u64>>(&self, setting: &Setting) -> Result<T, Invalid> {
        let number = match setting.value {
            Value::Number(least, most) => self.between(setting, least, most)?,
            _ => return Err(self.wrong_type(setting)),
        };
        T::try_from(number).map_err(|_| self.wrong_type(setting))
    }

    /// Reads a [`Value::Duration`].
    pub fn duration(&self, setting: &Setting) -> Result<Duration, Invalid> {
        match setting.value.span_range() {
            Some((least, most)) => self.between(setting, least, most).map(|span: Span| span.0),
            None => Err(self.wrong_type(setting)),
        }
    }

    /// Reads a [`Value::Size`] in bytes.
    pub fn size(&self, setting: &Setting) -> Result<ByteSize, Invalid> {
        match setting.value.size_range() {
            Some((least, most)) => self.between(setting, least, most),
            None => Err(self.wrong_type(setting)),
        }
    }

    fn between<T>(&self, setting: &Setting, least: T, most: T) -> Result<T, Invalid>
    where
        T: FromStr<Err: fmt::Display> + PartialOrd + fmt::Display + Copy,
    {
        let value: T = self.get(setting)?;
        if value < least || value > most {
            return Err(self.problem(format!("{}: {value} is not from {least} to {most}", setting.name)));
        }
        Ok(value)
    }

    /// Records a defect: the program reads a setting with another type than the declared one.
    fn wrong_type(&self, setting: &Setting) -> Invalid {
        self.problem(format!(
            "{}: the program reads this setting with a wrong type; this is a defect",
            setting.name
        ))
    }

    /// Reads the file named by the setting, without its last line break.
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

/// The time without samples after which a VM's agent counts as silent.
pub fn silent_after(env: &Environment) -> Result<Duration, Invalid> {
    env.duration(&SILENT_AFTER)
}

/// The UTC offset of `create_date`.
pub fn utc_offset(env: &Environment) -> Result<UtcOffset, Invalid> {
    env.get(&UTC_OFFSET)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: Setting = Setting {
        name: "COUNT",
        value: Value::Number(1, 9),
        default: "3",
        help: "a count",
    };
    const WAIT: Setting = Setting {
        name: "WAIT",
        value: Value::Duration("0s", "1d"),
        default: "1s",
        help: "a wait",
    };
    const NEEDED: Setting = Setting {
        name: "NEEDED",
        value: Value::Text,
        default: "",
        help: "a name",
    };

    #[test]
    fn reports_every_problem_at_once() {
        let env = Environment::from_variables([("COUNT", "many"), ("WAIT", "5 minutes")]);
        let count = env.number::<u32>(&COUNT);
        let wait = env.duration(&WAIT);
        let needed = env.get::<String>(&NEEDED);
        assert!(count.is_err() && wait.is_err() && needed.is_err());
        let problems = env.problems().join("\n");
        assert!(problems.contains("COUNT: `many`"), "{problems}");
        assert!(
            problems.contains("WAIT: `5 minutes` is invalid: write a whole number"),
            "{problems}"
        );
        assert!(problems.contains("NEEDED must be set: a name"), "{problems}");
    }

    #[test]
    fn rejects_values_outside_the_range_and_treats_empty_as_not_set() {
        assert_eq!(
            Environment::from_variables([("COUNT", "")]).number(&COUNT),
            Ok(3_u8)
        );
        let env = Environment::from_variables([("COUNT", "10")]);
        assert_eq!(env.number::<u8>(&COUNT), Err(Invalid));
        assert_eq!(env.problems(), ["COUNT: 10 is not from 1 to 9"]);
    }
}
