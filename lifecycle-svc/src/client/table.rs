//! Formats a table as text with aligned columns.

use std::fmt;

use jiff::Timestamp;

/// A text table with `N` columns.
pub(super) struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(headings: [&str; N]) -> Self {
        Self {
            rows: vec![headings.map(str::to_owned)],
        }
    }

    /// Adds a row to the table. Control characters, which could break lines or affect the terminal, are replaced by
    /// `?`, and an empty cell by `-`.
    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                cell.replace(char::is_control, "?")
            }
        }));
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &self.rows {
            let cells = row
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:width$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Formats Unix milliseconds as UTC date and time, without fractions of a second.
pub(super) fn moment(at_ms: u64) -> String {
    let at = i64::try_from(at_ms)
        .ok()
        .and_then(|millis| Timestamp::from_millisecond(millis).ok());
    at.map_or_else(
        || "-".to_owned(),
        |at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_table_aligns_columns_and_replaces_control_characters() {
        let mut table = Table::new(["WHEN", "WHO"]);
        table.row([moment(1_483_277_879_001), "名\u{1b}[2J".to_owned()]);
        table.row([String::new(), "a".to_owned()]);
        assert_eq!(
            table.to_string(),
            "WHEN                  WHO\n2017-01-01T13:37:59Z  名?[2J\n-                     a\n"
        );
    }
}
