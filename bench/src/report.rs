//! What a bench prints, and what it writes for a script.

use std::{fs, path::Path};

use anyhow::Context;
use e2e::Stack;
use serde_json::{Map, Value, json};

use crate::{machine, usage};

/// The figures of a run, in the order in which they were found.
#[derive(Debug)]
pub(crate) struct Report {
    machine: Value,
    figures: Map<String, Value>,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            machine: machine::description(),
            figures: Map::new(),
        }
    }
}

impl Report {
    /// Adds a figure for `--json`; the name says the unit.
    pub(crate) fn figure(&mut self, name: impl Into<String>, value: f64) {
        self.figures.insert(name.into(), json!(value));
    }

    /// Says what the run is made on, before it is made.
    pub(crate) fn introduce(&mut self, stack: &Stack) -> anyhow::Result<()> {
        let database = usage::program(stack.database.server.id())?;
        let nats_server = stack.bus.client().server_info().version;
        if let Some(machine) = self.machine.as_object_mut() {
            machine.insert("database".to_owned(), json!(database));
            machine.insert("nats_server".to_owned(), json!(nats_server));
        }
        let facts = self.machine.as_object().into_iter().flatten();
        let facts = facts.map(|(name, value)| [name.clone(), value.to_string().replace('"', "")]);
        println!("{}", table(&facts.collect::<Vec<_>>()));
        if cfg!(debug_assertions) {
            println!("\nThis is a debug build: its figures say nothing. Run `./dev bench`.");
        }
        println!();
        Ok(())
    }

    /// Writes the file that was asked for.
    pub(crate) fn finish(self, file: Option<&Path>) -> anyhow::Result<()> {
        let Some(file) = file else { return Ok(()) };
        let whole = json!({ "machine": self.machine, "figures": self.figures });
        let text = format!("{whole:#}\n");
        fs::write(file, text).with_context(|| format!("{} cannot be written", file.display()))
    }
}

/// Rows of cells, aligned: the first column to the left, the others, which are numbers, to the right.
pub(crate) fn table<Row: AsRef<[String]>>(rows: &[Row]) -> String {
    let mut widths = Vec::new();
    for row in rows {
        for (column, cell) in row.as_ref().iter().enumerate() {
            let length = cell.chars().count();
            match widths.get_mut(column) {
                Some(width) => *width = length.max(*width),
                None => widths.push(length),
            }
        }
    }
    let line = |row: &Row| {
        let cells = row.as_ref().iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, &width))| match column {
            0 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A number with thousands separated and this many decimals.
pub(crate) fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place).is_multiple_of(3) && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if !fraction.is_empty() {
        grouped.push('.');
        grouped.push_str(fraction);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let texts = [
            (0.0, 0),
            (999.0, 0),
            (1000.0, 0),
            (1_234_567.25, 1),
            (-123_456.0, 0),
        ]
        .map(|(value, decimals)| number(value, decimals));
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567.2", "-123,456"]);
    }

    #[test]
    fn columns_are_aligned() {
        let cell = |text: &str| text.to_owned();
        let rows = [
            [cell("a"), cell("10"), cell("1")],
            [cell("longer"), cell("9"), cell("100")],
        ];
        assert_eq!(table(&rows), "a       10    1\nlonger   9  100");
    }
}
