//! Aligned tables for people.

use crate::text::{cut, pad, printable, width};

/// Space between two columns.
const GAP: &str = "  ";

/// Emphasis of a cell on a terminal with colours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    #[default]
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
    Heading,
}

impl Tone {
    /// Parameters of the escape sequence "Select Graphic Rendition" (ECMA-48).
    const fn code(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::Good => Some("32"),
            Self::Warning => Some("33"),
            Self::Bad => Some("31"),
            Self::Faint => Some("2"),
            Self::Heading => Some("1"),
        }
    }

    /// The text with this emphasis.
    pub(crate) fn paint(self, text: &str, colours: bool) -> String {
        match self.code() {
            Some(code) if colours => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }
}

/// Title of a column, and whether its cells are aligned to the right.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Column {
    Left(&'static str),
    Right(&'static str),
}

impl Column {
    const fn title(self) -> &'static str {
        match self {
            Self::Left(title) | Self::Right(title) => title,
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn new(text: &str, tone: Tone) -> Self {
        Self {
            text: printable(text),
            tone,
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text, Tone::Plain)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<&String> for Cell {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

/// An unknown value is shown as `-`.
impl<T: Into<Self>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or_else(|| Self::from("-"), Into::into)
    }
}

#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(crate) fn new(columns: impl Into<Vec<Column>>) -> Self {
        Self {
            columns: columns.into(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, which has a cell for each column.
    pub(crate) fn row(&mut self, cells: impl Into<Vec<Cell>>) {
        self.rows.push(cells.into());
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Formats the table with a line of titles. Lines are cut after `max_width` terminal columns.
    pub(crate) fn render(&self, max_width: Option<usize>, colours: bool) -> String {
        let titles: Vec<Cell> = self
            .columns
            .iter()
            .map(|column| Cell::new(column.title(), Tone::Heading))
            .collect();
        let widths = self.widths(&titles);
        let mut out = String::new();
        for cells in std::iter::once(&titles).chain(&self.rows) {
            out += &self.line(cells, &widths, max_width.unwrap_or(usize::MAX), colours);
            out.push('\n');
        }
        out
    }

    fn widths(&self, titles: &[Cell]) -> Vec<usize> {
        let mut widths: Vec<usize> = titles.iter().map(|cell| width(&cell.text)).collect();
        for cells in &self.rows {
            for (widest, cell) in widths.iter_mut().zip(cells) {
                *widest = width(&cell.text).max(*widest);
            }
        }
        widths
    }

    fn line(&self, cells: &[Cell], widths: &[usize], max_width: usize, colours: bool) -> String {
        let mut line = String::new();
        let mut left = max_width;
        let last = self.columns.len().saturating_sub(1);
        for (index, ((column, cell), columns)) in self.columns.iter().zip(cells).zip(widths).enumerate() {
            if index > 0 {
                let gap = GAP.len().min(left);
                line += GAP.get(..gap).unwrap_or_default();
                left -= gap;
            }
            let text = match column {
                Column::Left(_) if index == last => cell.text.clone(),
                Column::Left(_) => pad(&cell.text, *columns, false),
                Column::Right(_) => pad(&cell.text, *columns, true),
            };
            let text = cut(&text, left);
            left -= width(&text).min(left);
            line += &cell.tone.paint(&text, colours);
        }
        // Without colours, a line has no spaces at its end.
        if colours { line } else { line.trim_end().to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new([Column::Left("VM"), Column::Right("CPU"), Column::Left("STATE")]);
        table.row([
            Cell::from("web-1"),
            Cell::from("7.5"),
            Cell::new("running", Tone::Good),
        ]);
        table.row([
            Cell::from("数据库"),
            Cell::from(None::<&str>),
            Cell::from("a\u{1b}b"),
        ]);
        table
    }

    #[test]
    fn columns_are_aligned_by_terminal_columns() {
        let expected = "VM      CPU  STATE\nweb-1   7.5  running\n数据库    -  a\u{fffd}b\n";
        assert_eq!(table().render(None, false), expected);
    }

    #[test]
    fn lines_are_cut_to_the_width_of_the_terminal() {
        let lines = table().render(Some(14), false);
        assert_eq!(lines, "VM      CPU  …\nweb-1   7.5  …\n数据库    -  …\n");
        for columns in 0..30 {
            let lines = table().render(Some(columns), false);
            assert!(
                lines.lines().all(|line| width(line) <= columns),
                "{columns}: {lines}"
            );
        }
    }

    #[test]
    fn colours_do_not_change_the_alignment() {
        let line = "web-1   7.5  \x1b[32mrunning\x1b[0m";
        assert_eq!(table().render(None, true).lines().nth(1), Some(line));
    }
}
