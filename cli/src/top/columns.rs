//! The table of `top`. A narrow terminal has fewer columns.

use jiff::ZonedDateTime;
use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Rect},
    style::{Modifier, Style},
    text::{Line, Text},
    widgets::{Cell, Row as TableRow, Table},
};

use super::{
    rows::{Row, Sort},
    state::State,
    view::Theme,
};
use crate::{text::printable, time::local_short};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Pid,
    Count,
    User,
    Cpu,
    Mem,
    Read,
    Write,
    Started,
    Unit,
    Name,
}

impl Column {
    /// The columns of single processes, from left to right.
    const OF_PROCESSES: [Self; 9] = [
        Self::Pid,
        Self::User,
        Self::Cpu,
        Self::Mem,
        Self::Read,
        Self::Write,
        Self::Started,
        Self::Unit,
        Self::Name,
    ];
    const OF_GROUPS: [Self; 6] = [
        Self::Count,
        Self::Cpu,
        Self::Mem,
        Self::Read,
        Self::Write,
        Self::Name,
    ];

    const fn title(self) -> &'static str {
        match self {
            Self::Pid => "PID",
            Self::Count => "COUNT",
            Self::User => "USER",
            Self::Cpu => "CPU%",
            Self::Mem => "MEM%",
            Self::Read => "READ",
            Self::Write => "WRITE",
            Self::Started => "STARTED",
            Self::Unit => "UNIT",
            Self::Name => "NAME",
        }
    }

    const fn width(self) -> Constraint {
        match self {
            Self::Pid | Self::Count => Constraint::Length(7),
            Self::User => Constraint::Length(10),
            Self::Cpu | Self::Mem | Self::Read | Self::Write => Constraint::Length(6),
            Self::Started => Constraint::Length(19),
            Self::Unit => Constraint::Length(22),
            Self::Name => Constraint::Min(10),
        }
    }

    /// The width of a terminal from which on the column is shown.
    const fn shown_from(self) -> u16 {
        match self {
            Self::Cpu | Self::Mem | Self::Name => 0,
            Self::Pid | Self::Count => 36,
            Self::Read | Self::Write => 56,
            Self::User => 68,
            Self::Unit => 96,
            Self::Started => 116,
        }
    }

    const fn is_number(self) -> bool {
        matches!(
            self,
            Self::Pid | Self::Count | Self::Cpu | Self::Mem | Self::Read | Self::Write
        )
    }

    const fn is_sorted_by(self, sort: Sort) -> bool {
        matches!(
            (self, sort),
            (Self::Cpu, Sort::Cpu)
                | (Self::Mem, Sort::Mem)
                | (Self::Read | Self::Write, Sort::Disk)
                | (Self::Pid, Sort::Pid)
                | (Self::Name, Sort::Name)
        )
    }

    fn text(self, row: &Row, now: &ZonedDateTime) -> String {
        let or_dash = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), printable);
        match self {
            Self::Pid => match (row.pid, row.count) {
                (Some(pid), _) => pid.to_string(),
                (None, Some(count)) => format!("×{count}"),
                (None, None) => "×?".to_owned(),
            },
            Self::Count => row
                .count
                .map_or_else(|| "?".to_owned(), |count| count.to_string()),
            Self::User => or_dash(&row.user),
            Self::Cpu => format!("{:.1}", row.cpu),
            Self::Mem => format!("{:.1}", row.mem),
            Self::Read => rate(row.read),
            Self::Write => rate(row.write),
            Self::Started => row
                .started_at
                .map_or_else(|| "-".to_owned(), |at| local_short(at.0, now)),
            Self::Unit => or_dash(&row.unit),
            Self::Name if row.has_ended => format!("{} (ended)", printable(&row.name)),
            Self::Name => printable(&row.name),
        }
    }
}

pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, state: &mut State, theme: Theme, now: &ZonedDateTime) {
    let all: &[Column] = match state.view.group {
        None => &Column::OF_PROCESSES,
        Some(_) => &Column::OF_GROUPS,
    };
    let columns: Vec<Column> = all
        .iter()
        .copied()
        .filter(|column| area.width >= column.shown_from())
        .collect();
    // One line has the titles.
    state.page = usize::from(area.height.saturating_sub(1)).max(1);
    let rows = visible(state).map(|row| table_row(row, &columns, theme, now));
    let titles = columns.iter().map(|column| title(*column, state));
    let table = Table::new(
        rows.collect::<Vec<_>>(),
        columns.iter().map(|column| column.width()),
    )
    .header(TableRow::new(titles.collect::<Vec<_>>()))
    .column_spacing(1)
    .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut state.table);
}

/// All rows. Only those on the screen are formatted in full, because a table has up to 10,000.
fn visible(state: &State) -> impl Iterator<Item = Option<&Row>> {
    let selected = state.table.selected().unwrap_or(0);
    let first = selected.min(state.table.offset()).saturating_sub(state.page);
    let last = selected.max(state.table.offset()) + 2 * state.page;
    let rows = state.rows.iter().enumerate();
    rows.map(move |(index, row)| (first..=last).contains(&index).then_some(row))
}

fn table_row(row: Option<&Row>, columns: &[Column], theme: Theme, now: &ZonedDateTime) -> TableRow<'static> {
    let Some(row) = row else {
        return TableRow::default().height(1);
    };
    let cells = columns.iter().map(|column| {
        let style = match column {
            Column::Cpu => theme.usage(row.cpu),
            Column::Mem => theme.usage(row.mem),
            _ => Style::new(),
        };
        cell(column.text(row, now), *column, style)
    });
    let style = if row.has_ended {
        Theme::faint()
    } else {
        Style::new()
    };
    TableRow::new(cells.collect::<Vec<_>>()).style(style)
}

fn title(column: Column, state: &State) -> Cell<'static> {
    let mut style = Theme::strong();
    if column.is_sorted_by(state.view.sort) {
        style = style.add_modifier(Modifier::UNDERLINED);
    }
    let text = match (column, state.view.group) {
        (Column::Name, Some(group)) => group.title().to_uppercase(),
        _ => column.title().to_owned(),
    };
    cell(text, column, style)
}

fn cell(text: String, column: Column, style: Style) -> Cell<'static> {
    let alignment = if column.is_number() {
        Alignment::Right
    } else {
        Alignment::Left
    };
    Cell::from(Text::from(Line::styled(text, style).alignment(alignment)))
}

/// A rate in KiB/s with at most five characters, such as `512K` or `1.5M` (KiB/s, MiB/s, GiB/s).
pub(super) fn rate(kib: f64) -> String {
    let mut value = kib.max(0.0);
    for unit in ["K", "M", "G"] {
        if value < 0.05 {
            return "0".to_owned();
        }
        if value < 9.95 {
            return format!("{value:.1}{unit}");
        }
        if value < 1023.5 {
            return format!("{value:.0}{unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.0}T")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_at_most_five_characters() {
        for (kib, text) in [
            (0.0, "0"),
            (-1.0, "0"),
            (0.04, "0"),
            (0.5, "0.5K"),
            (9.96, "10K"),
            (512.0, "512K"),
            (1023.4, "1023K"),
            (1023.6, "1.0M"),
            (1_572_864.0, "1.5G"),
            (2e9, "2T"),
        ] {
            assert_eq!(rate(kib), text);
            assert!(text.len() <= 5);
        }
    }

    #[test]
    fn forty_columns_show_the_pid_and_the_usage() {
        let shown: Vec<Column> = Column::OF_PROCESSES
            .into_iter()
            .filter(|column| column.shown_from() <= 40)
            .collect();
        assert_eq!(shown, [Column::Pid, Column::Cpu, Column::Mem, Column::Name]);
    }
}
