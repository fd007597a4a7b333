//! Reads settings from environment variables. Each setting is declared once, as a [`Setting`]. All invalid settings are
//! reported together.

mod value;

use std::{cell::RefCell, collections::HashMap, fmt, str::FromStr, time::Duration};

use vmwatch_api::time::UtcOffset;

pub use self::value::{ByteSize, InvalidSize, InvalidSpan, Span, Value};

/// The exit code for invalid settings or arguments: `EX_USAGE` of sysexits.h.
pub const EX_USAGE: i32 = 64;

/// The declaration of a setting, which is read from an environment variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Name of the environment variable.
    pub name: &'static str,
    /// Type and range of the setting's value.
    pub value: Value,
    /// The default value in the format that users write; empty if there is no default.
    pub default: &'static str,
    /// The help text for `--help` and docs/settings.md.
    pub help: &'static str,
}

pub const STREAM_REPLICAS: Setting = Setting {
    name: "VMWATCH_STREAM_REPLICAS",
    // An even number tolerates the loss of no more servers than the odd number below it.
    value: Value::OneOf(&[1, 3, 5]),
    default: "1",
    help: "number of replicas of each JetStream stream and KV bucket in a NATS cluster",
};
pub const DRAIN_DEADLINE: Setting = Setting {
    name: "VMWATCH_DRAIN_DEADLINE",
    value: Value::Duration("0s", "5m"),
    default: "10s",
    help: "maximum time that a stopping program waits for requests in flight",
};
pub const UTC_OFFSET: Setting = Setting {
    name: "VMWATCH_UTC_OFFSET",
    value: Value::Text,
    default: "+00:00",
    help: "UTC offset of every create_date; must be the same in all programs of a deployment",
};
pub const LOG: Setting = Setting {
    name: "VMWATCH_LOG",
    value: Value::Text,
    default: "info",
    help: "log filter by level and module, such as `info` or `info,async_nats=debug`",
};
pub const LOG_FORMAT: Setting = Setting {
    name: "VMWATCH_LOG_FORMAT",
    value: Value::Text,
    default: "text",
    help: "format of the log, which is written to standard error: `text` or `json`",
};
pub const OTLP_ENDPOINT: Setting = Setting {
    name: "VMWATCH_OTLP_ENDPOINT",
    value: Value::Text,
    default: "",
    help: "URL of the OTLP/HTTP collector that receives traces, such as http://127.0.0.1:4318; if empty, no traces are sent",
};

pub const SILENT_AFTER: Setting = Setting {
    name: "VMWATCH_SILENT_AFTER",
    value: Value::Duration("1s", "24h"),
    default: "60s",
    help: "time without a sample after which an agent counts as silent; must exceed the agents' sampling interval",
};

/// Indicates that a setting is invalid; [`Environment`] has recorded the problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Invalid;

/// The environment variables that settings are read from, and the problems found so far.
#[derive(Debug, Default)]
pub struct Environment {
    variables: HashMap<String, String>,
    problems: RefCell<Vec<String>>,
}

impl Environment {
    /// Takes the environment variables of this process. An empty variable counts as not set.
    pub fn from_process() -> Self {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
        });
        Self {
            variables: variables.collect(),
            problems: RefCell::default(),
        }
    }

    /// Takes the given variables instead of the process environment; for tests.
    pub fn from_variables<const N: usize>(variables: [(&str, &str); N]) -> Self {
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            variables: variables.into(),
            problems: RefCell::default(),
        }
    }

    /// The problems found in the settings, one line each.
    pub fn problems(&self) -> Vec<String> {
        self.problems.borrow().clone()
    }

    /// Records a problem with the settings, such as two settings that exclude each other.
    pub fn problem(&self, text: impl Into<String>) -> Invalid {
        self.problems.borrow_mut().push(text.into());
        Invalid
    }

    fn text(&self, setting: &Setting) -> &str {
        self.variables.get(setting.name).map_or("", |value| value.trim())
    }

    /// Reads a setting that has no default.
    pub fn optional<T: FromStr<Err: fmt::Display>>(&self, setting: &Setting) -> Result<Option<T>, Invalid> {
        match self.text(setting) {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|error| self.problem(format!("{}: `{text}` is invalid: {error}", setting.name))),
        }
    }

    /// Reads a setting that has a default.
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

    /// Reads a setting of the type [`Value::Number`] or [`Value::OneOf`].
    pub fn number<T: TryFrom<u64>>(&self, setting: &Setting) -> Result<T, Invalid> {
        let number = match setting.value {
            Value::Number(least, most) => self.between(setting, least, most)?,
            Value::OneOf(choices) => self.one_of(setting, choices)?,
            _ => return Err(self.wrong_type(setting)),
        };
        T::try_from(number).map_err(|_| self.wrong_type(setting))
    }

    /// Reads a setting of the type [`Value::Duration`].
    pub fn duration(&self, setting: &Setting) -> Result<Duration, Invalid> {
        match setting.value.span_range() {
            Some((least, most)) => self.between(setting, least, most).map(|span: Span| span.0),
            None => Err(self.wrong_type(setting)),
        }
    }

    /// Reads a setting of the type [`Value::Size`], in bytes.
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

    fn one_of(&self, setting: &Setting, choices: &[u64]) -> Result<u64, Invalid> {
        let number = self.get(setting)?;
        if choices.contains(&number) {
            return Ok(number);
        }
        Err(self.problem(format!("{}: {number} is not {}", setting.name, setting.value)))
    }

    /// Records a defect of the program: it reads a setting with a type other than the declared one.
    fn wrong_type(&self, setting: &Setting) -> Invalid {
        self.problem(format!(
            "{}: the program reads this setting with a wrong type; this is a defect",
            setting.name
        ))
    }

    /// Reads the content of the file that the setting names, without the final line break.
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

/// The UTC offset of the `create_date`s in this deployment.
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
        help: "number of retries",
    };
    const WAIT: Setting = Setting {
        name: "WAIT",
        value: Value::Duration("0s", "1d"),
        default: "1s",
        help: "time for which the program waits before it retries",
    };
    const NEEDED: Setting = Setting {
        name: "NEEDED",
        value: Value::Text,
        default: "",
        help: "name that the test program prints",
    };

    #[test]
    fn all_invalid_settings_are_reported_together() {
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
        assert!(
            problems.contains("NEEDED must be set: name that the test program prints"),
            "{problems}"
        );
    }

    #[test]
    fn accepts_only_odd_numbers_of_stream_replicas() {
        let read = |text: &str| {
            let env = Environment::from_variables([(STREAM_REPLICAS.name, text)]);
            (env.number::<usize>(&STREAM_REPLICAS), env.problems())
        };
        for (text, expected) in [("", 1), ("1", 1), ("3", 3), ("5", 5)] {
            assert_eq!(read(text), (Ok(expected), Vec::new()), "{text}");
        }
        for text in ["0", "2", "4", "6"] {
            let problem = format!("VMWATCH_STREAM_REPLICAS: {text} is not 1, 3 or 5");
            assert_eq!(read(text), (Err(Invalid), vec![problem]));
        }
    }

    #[test]
    fn out_of_range_settings_are_rejected_and_empty_ones_count_as_unset() {
        assert_eq!(
            Environment::from_variables([("COUNT", "")]).number(&COUNT),
            Ok(3_u8)
        );
        let env = Environment::from_variables([("COUNT", "10")]);
        assert_eq!(env.number::<u8>(&COUNT), Err(Invalid));
        assert_eq!(env.problems(), ["COUNT: 10 is not from 1 to 9"]);
    }
}
