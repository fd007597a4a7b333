//! Prints tables, or JSON for programs.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
};

use jiff::{Timestamp, ZonedDateTime, tz::TimeZone};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    answers,
    args::{Color, Global},
    error::CliError,
    table::Table,
    text::printable,
    time::{InvalidMoment, local, parse_moment},
};

#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) colours: bool,
    /// Width to which lines are cut.
    width: Option<usize>,
    pub(crate) zone: TimeZone,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        let is_terminal = io::stdout().is_terminal();
        Self {
            json: global.json,
            colours: has_colours(global.color, is_terminal),
            width: (is_terminal && !global.wide).then(columns).flatten(),
            zone: TimeZone::system(),
        }
    }

    pub(crate) fn now(&self) -> ZonedDateTime {
        Timestamp::now().to_zoned_datetime(self.zone.clone())
    }

    /// Reads a moment that the user has written.
    pub(crate) fn moment(&self, text: Option<&str>) -> Result<Option<Timestamp>, InvalidMoment> {
        text.map(|text| parse_moment(text, &self.now())).transpose()
    }

    /// A time in the time zone of the user.
    pub(crate) fn time(&self, at: answers::Timestamp) -> String {
        local(at.0, &self.zone)
    }

    /// Prints a value as indented JSON.
    pub(crate) fn print_json(&self, value: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Output(error.into()))?;
        self.print(&format!("{text}\n"))
    }

    /// Prints a table or, if it is empty, a note to the standard error.
    pub(crate) fn print_table(&self, table: &Table, if_empty: &str) -> Result<(), CliError> {
        if table.is_empty() {
            note(if_empty);
            return Ok(());
        }
        self.print(&table.render(self.width, self.colours))
    }

    /// Prints a text, which must not contain control characters of others.
    #[expect(clippy::unused_self, reason = "all output goes through this type")]
    pub(crate) fn print(&self, text: &str) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(CliError::Output)
    }
}

/// Prints a note for people to the standard error.
pub(crate) fn note(text: &str) {
    // Without a standard error the note cannot be shown anywhere.
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

/// Converts the items of a list.
pub(crate) fn typed<T: DeserializeOwned>(items: Vec<Value>) -> Result<Vec<T>, CliError> {
    let converted = items
        .into_iter()
        .map(serde_json::from_value)
        .collect::<Result<_, _>>();
    converted.map_err(|error| CliError::Answer(error.to_string()))
}

fn has_colours(when: Color, is_terminal: bool) -> bool {
    let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = env::var_os("TERM").is_some_and(|value| value == "dumb");
    match when {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => is_terminal && !is_set("NO_COLOR") && !is_dumb,
    }
}

fn columns() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}
