//! The state of `top`: which moment and rows are shown, and what a key changes. It does no I/O.

use std::collections::BTreeMap;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use jiff::{SignedDuration, Timestamp, ZonedDateTime};
use ratatui::widgets::TableState;

use super::{
    fetch::{Load, Snapshot},
    rows::{Group, Row, Sort, View},
};
use crate::{answers::Vm, error::CliError, time::parse_moment};

/// Interval between process tables, until two neighbouring ones were loaded.
const USUAL_INTERVAL: SignedDuration = SignedDuration::from_secs(60);
/// Step of the keys `<` and `>`.
const LONG_STEP: SignedDuration = SignedDuration::from_mins(10);
/// Maximum number of neighbouring tables that are remembered.
const MAX_NEIGHBOURS: usize = 10_000;
/// Maximum length of a filter or time that the user enters.
const MAX_INPUT: usize = 64;

/// What the keys do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mode {
    Table,
    Help,
    /// The user enters a filter. Esc restores the one before.
    Filter {
        before: String,
    },
    /// The user enters a moment.
    Moment {
        text: String,
    },
}

/// What the caller has to do after a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Nothing,
    Load(Load),
    Quit,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) vm: Vm,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) view: View,
    pub(crate) rows: Vec<Row>,
    pub(crate) table: TableState,
    /// Number of rows that the screen shows, for the keys that scroll by pages.
    pub(crate) page: usize,
    pub(crate) mode: Mode,
    /// A note or an error, until the next key.
    pub(crate) message: Option<String>,
    /// The load that is in progress.
    pub(crate) loading: Option<Load>,
    /// Whether new tables are shown when they are stored.
    pub(crate) is_live: bool,
    /// Why live events are not received.
    pub(crate) lost: Option<String>,
    /// The table after each table from which the user stepped back.
    following: BTreeMap<Timestamp, Timestamp>,
    interval: SignedDuration,
}

impl State {
    pub(crate) fn new(vm: Vm) -> Self {
        Self {
            vm,
            snapshot: None,
            view: View::default(),
            rows: Vec::new(),
            table: TableState::default(),
            page: 1,
            mode: Mode::Table,
            message: None,
            loading: None,
            is_live: true,
            lost: None,
            following: BTreeMap::new(),
            interval: USUAL_INTERVAL,
        }
    }

    /// Takes the result of a load.
    pub(crate) fn loaded(&mut self, load: Load, result: Result<Option<Snapshot>, CliError>) {
        self.loading = None;
        let snapshot = match result {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => {
                self.message = Some("no earlier processes are stored in the seven days before".to_owned());
                return;
            }
            Err(error) => {
                self.message = Some(error.to_string());
                return;
            }
        };
        if let (Load::Before(later), Some(at)) = (load, snapshot.at) {
            self.remember(at, later);
        }
        self.is_live = snapshot.wanted.is_none();
        if let Some(vm) = &snapshot.vm {
            self.vm = vm.clone();
        }
        self.snapshot = Some(snapshot);
        self.refresh();
    }

    fn remember(&mut self, at: Timestamp, later: Timestamp) {
        if self.following.len() == MAX_NEIGHBOURS {
            self.following.clear();
        }
        self.following.insert(at, later);
        self.interval = later.duration_since(at);
    }

    /// Computes the rows again and keeps the selected one.
    fn refresh(&mut self) {
        let selected = self.selected().map(|row| row.id.clone());
        let processes = self
            .snapshot
            .as_ref()
            .map_or(&[][..], |snapshot| &snapshot.processes);
        self.rows = self.view.rows(processes);
        let index = selected.and_then(|id| self.rows.iter().position(|row| row.id == id));
        self.table.select(index);
    }

    /// The row that the user has selected.
    pub(crate) fn selected(&self) -> Option<&Row> {
        self.rows.get(self.table.selected()?)
    }

    /// Handles a key.
    pub(crate) fn press(&mut self, key: KeyEvent, now: &ZonedDateTime) -> Outcome {
        self.message = None;
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return if key.code == KeyCode::Char('c') {
                Outcome::Quit
            } else {
                Outcome::Nothing
            };
        }
        match self.mode.clone() {
            Mode::Table => self.press_in_table(key.code, now),
            Mode::Help => {
                self.mode = Mode::Table;
                Outcome::Nothing
            }
            Mode::Filter { before } => self.press_in_filter(key.code, before),
            Mode::Moment { text } => self.press_in_moment(key.code, text, now),
        }
    }

    fn press_in_table(&mut self, code: KeyCode, now: &ZonedDateTime) -> Outcome {
        match code {
            KeyCode::Char('q') => return Outcome::Quit,
            KeyCode::Left => return self.step_back(),
            KeyCode::Right => return self.step_forward(),
            KeyCode::Char('<') => return go(self.shown_moment(now).checked_sub(LONG_STEP).ok(), now),
            KeyCode::Char('>') => return go(self.shown_moment(now).checked_add(LONG_STEP).ok(), now),
            KeyCode::Char('l') => return Outcome::Load(Load::Live),
            KeyCode::Char('@') => self.mode = Mode::Moment { text: String::new() },
            KeyCode::Char('/') => {
                self.mode = Mode::Filter {
                    before: self.view.filter.clone(),
                }
            }
            KeyCode::Char('?' | 'h') => self.mode = Mode::Help,
            KeyCode::Char('c') => self.sort_by(Sort::Cpu),
            KeyCode::Char('m') => self.sort_by(Sort::Mem),
            KeyCode::Char('d') => self.sort_by(Sort::Disk),
            KeyCode::Char('p') => self.sort_by(Sort::Pid),
            KeyCode::Char('n') => self.sort_by(Sort::Name),
            KeyCode::Char('g') => {
                self.view.group = Group::next(self.view.group);
                self.refresh();
            }
            KeyCode::Esc => self.table.select(None),
            _ => self.scroll(code),
        }
        Outcome::Nothing
    }

    /// The same key again reverses the order.
    fn sort_by(&mut self, sort: Sort) {
        self.view.reversed = self.view.sort == sort && !self.view.reversed;
        self.view.sort = sort;
        self.refresh();
    }

    fn scroll(&mut self, code: KeyCode) {
        let last = self.rows.len().saturating_sub(1);
        let selected = self.table.selected();
        let index = match code {
            KeyCode::Up => selected.map_or(last, |index| index.saturating_sub(1)),
            KeyCode::Down => selected.map_or(0, |index| index + 1),
            KeyCode::PageUp => selected.unwrap_or(0).saturating_sub(self.page),
            KeyCode::PageDown => selected.unwrap_or(0) + self.page,
            KeyCode::Home => 0,
            KeyCode::End => last,
            _ => return,
        };
        self.table
            .select((!self.rows.is_empty()).then_some(index.min(last)));
    }

    fn press_in_filter(&mut self, code: KeyCode, before: String) -> Outcome {
        match code {
            KeyCode::Enter => self.mode = Mode::Table,
            KeyCode::Esc => {
                self.view.filter = before;
                self.mode = Mode::Table;
            }
            _ => edit(&mut self.view.filter, code),
        }
        self.refresh();
        Outcome::Nothing
    }

    fn press_in_moment(&mut self, code: KeyCode, mut text: String, now: &ZonedDateTime) -> Outcome {
        match code {
            KeyCode::Esc => self.mode = Mode::Table,
            KeyCode::Enter => match parse_moment(&text, now) {
                Ok(moment) => {
                    self.mode = Mode::Table;
                    return go(Some(moment), now);
                }
                Err(error) => self.message = Some(error.to_string()),
            },
            _ => {
                edit(&mut text, code);
                self.mode = Mode::Moment { text };
            }
        }
        Outcome::Nothing
    }

    /// The moment that is shown, from which the keys `<` and `>` step.
    fn shown_moment(&self, now: &ZonedDateTime) -> Timestamp {
        let wanted = self.snapshot.as_ref().and_then(|snapshot| snapshot.wanted);
        wanted.unwrap_or_else(|| now.timestamp())
    }

    fn step_back(&mut self) -> Outcome {
        match self.snapshot.as_ref().and_then(|snapshot| snapshot.at) {
            Some(at) => Outcome::Load(Load::Before(at)),
            None => Outcome::Nothing,
        }
    }

    fn step_forward(&mut self) -> Outcome {
        let Some(at) = self.snapshot.as_ref().and_then(|snapshot| snapshot.at) else {
            return Outcome::Nothing;
        };
        if self.is_live {
            self.message = Some("this is the newest table".to_owned());
            return Outcome::Nothing;
        }
        Outcome::Load(match self.following.get(&at) {
            Some(next) => Load::At(*next),
            None => Load::After(at, self.interval),
        })
    }
}

/// Shows a moment; one that is not past means live.
fn go(moment: Option<Timestamp>, now: &ZonedDateTime) -> Outcome {
    match moment {
        Some(moment) if moment < now.timestamp() => Outcome::Load(Load::At(moment)),
        Some(_) => Outcome::Load(Load::Live),
        None => Outcome::Nothing,
    }
}

fn edit(text: &mut String, code: KeyCode) {
    match code {
        KeyCode::Char(char) if text.chars().count() < MAX_INPUT => text.push(char),
        KeyCode::Backspace => {
            text.pop();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
