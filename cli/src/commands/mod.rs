//! The commands.

pub(crate) mod actions;
pub(crate) mod alerts;
pub(crate) mod changed;
pub(crate) mod contexts;
pub(crate) mod events;
pub(crate) mod history;
pub(crate) mod login;
pub(crate) mod operations;
pub(crate) mod ps;
pub(crate) mod status;
pub(crate) mod vms;
pub(crate) mod who_ran;

use crate::{output::note, table::Tone};

/// Emphasis of a state of a VM.
pub(crate) fn state_tone(state: &str) -> Tone {
    match state {
        "running" => Tone::Good,
        "starting" | "shutting_down" | "paused" => Tone::Warning,
        "crashed" => Tone::Bad,
        _ => Tone::Plain,
    }
}

/// A number with one decimal.
pub(crate) fn decimal(value: f64) -> String {
    format!("{value:.1}")
}

/// Says that a list was cut.
pub(crate) fn note_more(shown: usize, has_more: bool) {
    if has_more {
        note(&format!(
            "only the first {shown} are shown; set another number with --limit"
        ));
    }
}
