//! Draws `top`.

use jiff::ZonedDateTime;
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Clear, Paragraph},
};

use super::{
    columns,
    state::{Mode, State},
};
use crate::{
    text::{cut, printable, width},
    time::{local_short, rough},
};

/// Maximum number of lines above the table.
const MAX_HEADER: usize = 5;
/// Space between two parts of the header.
const GAP: usize = 2;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

const KEYS: &str = "←→ step  <> 10 min  @ moment  l live  c m d p n sort  g group  / filter  ? help  q quit";

const HELP: &str = "\
← →        previous, next process table
< >        10 minutes earlier, later
@          go to a moment: -2h, 14:03,
           yesterday 14:03
l          live: show new tables
c m d p n  sort by CPU, memory, disk, pid,
           name; again: reverse
g          group by name, unit, user, none
/          only rows that contain a text
↑ ↓        select a row, see its details
q          quit

Any key closes this help.";

/// Styles, with or without colours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Theme {
    pub(super) colours: bool,
}

impl Theme {
    fn colour(self, colour: Color) -> Style {
        if self.colours {
            Style::new().fg(colour)
        } else {
            Style::new()
        }
    }

    pub(super) fn strong() -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub(super) fn faint() -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    /// For values that need attention.
    fn warning(self) -> Style {
        self.colour(Color::Yellow).add_modifier(Modifier::BOLD)
    }

    fn good(self) -> Style {
        self.colour(Color::Green).add_modifier(Modifier::BOLD)
    }

    /// Whether a share in percent needs attention.
    pub(super) fn usage(self, percent: f64) -> Style {
        if percent >= 80.0 {
            self.colour(Color::Red).add_modifier(Modifier::BOLD)
        } else if percent >= 50.0 {
            self.colour(Color::Yellow)
        } else {
            Style::new()
        }
    }
}

pub(super) fn draw(frame: &mut Frame<'_>, state: &mut State, theme: Theme, now: &ZonedDateTime) {
    let area = frame.area();
    let header = flow(
        header(state, theme, now),
        usize::from(area.width),
        header_lines(area.height),
    );
    let header_height = u16::try_from(header.len()).unwrap_or(u16::MAX);
    let has_details = state.selected().is_some() && area.height >= 10;
    let layout = Layout::vertical([
        Constraint::Length(header_height),
        Constraint::Min(0),
        Constraint::Length(u16::from(has_details)),
        Constraint::Length(1),
    ]);
    let [top, middle, details, bottom] = layout.areas(area);
    frame.render_widget(Paragraph::new(header), top);
    columns::draw(frame, middle, state, theme, now);
    if let Some(row) = state.selected().filter(|_| has_details) {
        let text = cut(&printable(&row.details), usize::from(details.width));
        frame.render_widget(Paragraph::new(Line::styled(text, Theme::faint())), details);
    }
    frame.render_widget(
        Paragraph::new(footer(state, theme, usize::from(bottom.width))),
        bottom,
    );
    if state.mode == Mode::Help {
        draw_help(frame, area);
    }
}

/// A low terminal has few lines above the table.
fn header_lines(height: u16) -> usize {
    MAX_HEADER.min(usize::from(height / 3)).max(1)
}

/// The parts of the header, the most important first.
fn header(state: &State, theme: Theme, now: &ZonedDateTime) -> Vec<Span<'static>> {
    let vm = &state.vm;
    let name = Span::styled(printable(vm.title()), Theme::strong());
    let mut parts = vec![name, moment(state, theme, now)];
    if let Some(state) = &vm.state {
        parts.push(Span::raw(printable(state)));
    }
    if let Some(hypervisor) = &vm.hypervisor {
        parts.push(Span::raw(format!("on {}", printable(hypervisor))));
    }
    values(state, theme, &mut parts);
    parts
}

/// Which moment is shown.
fn moment(state: &State, theme: Theme, now: &ZonedDateTime) -> Span<'static> {
    let Some(snapshot) = &state.snapshot else {
        return Span::styled("loading", theme.warning());
    };
    let Some(at) = snapshot.at else {
        let wanted = snapshot
            .wanted
            .map(|wanted| format!(" before {}", local_short(wanted, now)));
        return Span::styled(
            format!("no processes{}", wanted.unwrap_or_default()),
            theme.warning(),
        );
    };
    let age = rough(now.timestamp().duration_since(at));
    let time = local_short(at, now);
    if !state.is_live {
        return Span::styled(format!("PAST {time} ({age} ago)"), theme.warning());
    }
    let word = if state.lost.is_some() {
        "NOT CONNECTED"
    } else {
        "LIVE"
    };
    let style = if state.lost.is_some() {
        theme.warning()
    } else {
        theme.good()
    };
    Span::styled(format!("{word} {time} ({age} ago)"), style)
}

fn values(state: &State, theme: Theme, parts: &mut Vec<Span<'static>>) {
    let Some(snapshot) = &state.snapshot else {
        return;
    };
    if let Some(values) = &snapshot.values {
        let mut percent = |title: &str, value: Option<f64>| {
            parts
                .extend(value.map(|value| Span::styled(format!("{title} {value:.1} %"), theme.usage(value))));
        };
        percent("CPU", values.cpu_util);
        percent("memory", values.mem);
        percent("swap", values.swap);
        percent("steal", values.steal.filter(|steal| *steal >= 0.1));
        parts.extend(values.load.map(|load| Span::raw(format!("load {load:.2}"))));
        parts.extend(values.cores.map(|cores| Span::raw(format!("{cores:.0} cores"))));
        let pairs = [
            ("disk r/w", values.disk_read, values.disk_write),
            ("net in/out", values.net_incoming, values.net_outgoing),
        ];
        for (title, one, other) in pairs {
            if let (Some(one), Some(other)) = (one, other) {
                parts.push(Span::raw(format!(
                    "{title} {}/{}",
                    columns::rate(one),
                    columns::rate(other)
                )));
            }
        }
    }
    if snapshot.sparkline.iter().any(Option::is_some) {
        parts.push(Span::raw(format!(
            "CPU of 1 h {}",
            sparkline(&snapshot.sparkline)
        )));
    }
    parts.push(Span::raw(format!("{} processes", snapshot.total)));
    if let Some(explained) = snapshot.explained {
        parts.push(Span::raw(format!(
            "explain {:.0} % of the CPU time",
            explained * 100.0
        )));
    }
}

/// Draws values of 0 to 100 as bars; a space where there is none.
fn sparkline(values: &[Option<f64>]) -> String {
    let bar = |value: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the value is 0 to 7.99"
        )]
        let index = (value.clamp(0.0, 99.9) / 12.5) as usize;
        BARS.get(index).copied().unwrap_or(' ')
    };
    values.iter().map(|value| value.map_or(' ', bar)).collect()
}

/// Arranges parts in lines of this width. A part that is wider than a line is cut; parts for which there are no more
/// lines are left out.
fn flow(parts: Vec<Span<'static>>, columns: usize, max_lines: usize) -> Vec<Line<'static>> {
    let mut lines: Vec<Line<'static>> = Vec::new();
    let mut used = usize::MAX;
    for part in parts {
        let needed = width(&part.content);
        if used.saturating_add(GAP + needed) > columns {
            if lines.len() == max_lines {
                break;
            }
            lines.push(Line::default());
            used = 0;
        }
        let Some(line) = lines.last_mut() else { break };
        if used > 0 {
            line.push_span(" ".repeat(GAP));
            used += GAP;
        }
        used += needed;
        line.push_span(Span::styled(cut(&part.content, columns), part.style));
    }
    lines
}

/// The last line: a message, what the user enters, or the keys.
fn footer(state: &State, theme: Theme, columns: usize) -> Line<'static> {
    if let Some(message) = &state.message {
        return Line::styled(cut(&printable(message), columns), theme.warning());
    }
    match &state.mode {
        Mode::Filter { .. } => input("filter: ", &state.view.filter, columns),
        Mode::Moment { text } => input("moment: ", text, columns),
        Mode::Table | Mode::Help => match (&state.loading, &state.lost, state.view.filter.as_str()) {
            (Some(_), ..) if !state.is_live => Line::styled("loading", Theme::faint()),
            (_, Some(reason), _) => Line::styled(cut(&printable(reason), columns), theme.warning()),
            (_, None, "") => Line::styled(cut(KEYS, columns), Theme::faint()),
            (_, None, filter) => Line::styled(
                cut(&format!("filter: {}", printable(filter)), columns),
                theme.warning(),
            ),
        },
    }
}

/// What the user enters: its end is visible.
fn input(title: &'static str, text: &str, columns: usize) -> Line<'static> {
    let left = columns.saturating_sub(width(title) + 1);
    let mut visible = printable(text);
    while width(&visible) > left && !visible.is_empty() {
        visible.remove(0);
    }
    Line::raw(format!("{title}{visible}█"))
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(HELP), area);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[Line<'_>]) -> Vec<String> {
        lines.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn header_parts_flow_into_lines() {
        let parts = || {
            ["web-1", "LIVE 14:03:05", "running", "CPU 93.0 %"]
                .map(Span::raw)
                .into()
        };
        assert_eq!(
            texts(&flow(parts(), 80, 5)),
            ["web-1  LIVE 14:03:05  running  CPU 93.0 %"]
        );
        assert_eq!(
            texts(&flow(parts(), 20, 5)),
            ["web-1  LIVE 14:03:05", "running  CPU 93.0 %"]
        );
        assert_eq!(texts(&flow(parts(), 20, 1)), ["web-1  LIVE 14:03:05"]);
        assert_eq!(texts(&flow(parts(), 8, 2)), ["web-1", "LIVE 14…"]);
        assert!(texts(&flow(parts(), 0, 5)).iter().all(String::is_empty));
    }

    #[test]
    fn sparkline_has_a_bar_for_each_value() {
        let values = [
            Some(0.0),
            None,
            Some(12.5),
            Some(50.0),
            Some(100.0),
            Some(-1.0),
            Some(f64::NAN),
        ];
        assert_eq!(sparkline(&values), "▁ ▂▅█▁▁");
    }

    #[test]
    fn end_of_long_input_is_visible() {
        let line = input("moment: ", "yesterday 14:03", 20);
        assert_eq!(line.to_string(), "moment: erday 14:03█");
    }
}
