//! The report of a run. It is printed, and written as JSON and Markdown.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::{Map, Value, json};
use testkit::Stack;

use crate::{machine, usage};

/// The results of a run in the order of measurement, and the text of the report.
#[derive(Debug)]
pub(crate) struct Report {
    machine: Value,
    figures: Map<String, Value>,
    /// The rows of the table of targets, which is at the beginning of the Markdown file.
    targets: Vec<[String; 4]>,
    /// The rest of the Markdown file.
    body: String,
    /// The files to write.
    json: Option<PathBuf>,
    markdown: Option<PathBuf>,
}

/// The target that a result should reach.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Report {
    /// An empty report that will be written to these files.
    pub(crate) fn new(json: Option<PathBuf>, markdown: Option<PathBuf>) -> Self {
        Self {
            machine: machine::description(),
            figures: Map::new(),
            targets: Vec::new(),
            body: String::new(),
            json,
            markdown,
        }
    }

    /// Adds a result to the JSON file. `name` must include the unit.
    pub(crate) fn figure(&mut self, name: impl Into<String>, value: f64) {
        self.figures.insert(name.into(), json!(value));
    }

    /// Adds a result that has a target.
    pub(crate) fn target(&mut self, name: &str, text: &str, value: f64, decimals: usize, bound: Bound) {
        let (sign, target, met) = match bound {
            Bound::AtLeast(least) => ("at least", least, value >= least),
            Bound::AtMost(most) => ("at most", most, value <= most),
        };
        let value_text = number(value, decimals);
        let target = format!("{sign} {}", number(target, decimals));
        let verdict = if met { "yes" } else { "no" };
        println!("{text}: {value_text} (target {target}: {verdict})");
        self.figure(name, value);
        self.targets
            .push([text.to_owned(), value_text, target, verdict.to_owned()]);
    }

    /// Prints the results that have a target, as a table for a page of the documentation.
    pub(crate) fn print_targets(&self) {
        let mut rows = vec![["figure", "measured", "target"].map(str::to_owned)];
        let targets = self.targets.iter();
        rows.extend(targets.map(|[text, value, target, _]| [text.clone(), value.clone(), target.clone()]));
        let mut out = String::new();
        push_markdown(&mut out, &rows);
        println!("\n{out}");
    }

    /// Starts a section of the report.
    pub(crate) fn section(&mut self, title: &str) {
        println!("\n== {title}");
        let _ = writeln!(self.body, "\n## {title}");
    }

    /// Adds a paragraph to the report.
    pub(crate) fn paragraph(&mut self, text: &str) {
        println!("{text}");
        let _ = writeln!(self.body, "\n{text}");
    }

    /// Adds a table to the report. The first row is the heading.
    pub(crate) fn table<Row: AsRef<[String]>>(&mut self, rows: &[Row]) {
        println!("\n{}\n", table(rows));
        self.body.push('\n');
        push_markdown(&mut self.body, rows);
    }

    /// At the first call, prints a description of the machine and the servers; later calls do nothing.
    pub(crate) fn describe(&mut self, stack: &Stack) -> anyhow::Result<()> {
        if self.machine.get("database").is_some() {
            return Ok(());
        }
        let database = usage::program(stack.database.server.id())?;
        let nats_server = stack.bus.client_for_tests().server_info().version;
        if let Some(machine) = self.machine.as_object_mut() {
            machine.insert("database".to_owned(), json!(database));
            machine.insert("nats_server".to_owned(), json!(nats_server));
            // Benchmarks run NATS with this `sync_interval`, as deployments do; see `StackBuilder::durable`.
            machine.insert("nats_sync_interval".to_owned(), json!("always"));
        }
        let facts = self.machine.as_object().into_iter().flatten();
        let facts = facts.map(|(name, value)| [name.clone(), value.to_string().replace('"', "")]);
        println!("{}", table(&facts.collect::<Vec<_>>()));
        if cfg!(debug_assertions) {
            println!(
                "\nThe results are meaningless, because this is a debug build. Run `./dev bench` instead."
            );
        }
        println!();
        Ok(())
    }

    /// Writes the results so far to the files. It is also called between parts, so that a part that fails loses only its
    /// own results.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let write = |file: &Path, text: String| {
            fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        if let Some(file) = &self.markdown {
            write(file, self.markdown())?;
        }
        if let Some(file) = &self.json {
            let whole = json!({ "machine": self.machine, "figures": self.figures });
            write(file, format!("{whole:#}\n"))?;
        }
        Ok(())
    }

    fn markdown(&self) -> String {
        let mut out = String::from("# Benchmark results of `./dev bench`\n\n");
        let mut machine = vec![["machine".to_owned(), String::new()]];
        for (name, value) in self.machine.as_object().into_iter().flatten() {
            machine.push([name.replace('_', " "), value.to_string().replace('"', "")]);
        }
        push_markdown(&mut out, &machine);
        if !self.targets.is_empty() {
            let mut rows = vec![["result", "measured", "target", "met"].map(str::to_owned)];
            rows.extend(self.targets.iter().cloned());
            out.push('\n');
            push_markdown(&mut out, &rows);
        }
        out.push_str(&self.body);
        out
    }
}

/// Appends rows as a Markdown table.
fn push_markdown<Row: AsRef<[String]>>(out: &mut String, rows: &[Row]) {
    for (index, row) in rows.iter().enumerate() {
        let row = row.as_ref();
        let _ = writeln!(out, "| {} |", row.join(" | "));
        if index == 0 {
            let rest = "---:|".repeat(row.len().saturating_sub(1));
            let _ = writeln!(out, "|---|{rest}");
        }
    }
}

/// Formats rows as a text table. The first column is left-aligned; the others contain numbers and are right-aligned.
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

/// Formats a number with thousands separators.
pub(crate) fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) && !grouped.ends_with('-') {
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
    fn numbers_have_thousands_separators() {
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
    fn table_columns_are_aligned() {
        let cell = |text: &str| text.to_owned();
        let rows = [
            [cell("a"), cell("10"), cell("1")],
            [cell("longer"), cell("9"), cell("100")],
        ];
        assert_eq!(table(&rows), "a       10    1\nlonger   9  100");
        let mut markdown = String::new();
        push_markdown(&mut markdown, &rows);
        assert_eq!(
            markdown,
            "| a | 10 | 1 |\n|---|---:|---:|\n| longer | 9 | 100 |\n"
        );
    }
}
