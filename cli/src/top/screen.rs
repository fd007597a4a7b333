//! The terminal while `top` runs. It is restored when this value is dropped.

use std::{
    io::{self, Stdout},
    mem::ManuallyDrop,
};

use crossterm::{
    cursor::Show,
    execute,
    terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
};
use ratatui::{Frame, Terminal, backend::CrosstermBackend};

use crate::error::CliError;

/// The terminal is never dropped, because ratatui then prints an error if the terminal was closed, and that panics.
pub(super) struct Screen(ManuallyDrop<Terminal<CrosstermBackend<Stdout>>>);

impl Screen {
    pub(super) fn open() -> Result<Self, CliError> {
        enable_raw_mode().map_err(CliError::Terminal)?;
        let opened = execute!(io::stdout(), EnterAlternateScreen)
            .and_then(|()| Terminal::new(CrosstermBackend::new(io::stdout())));
        match opened {
            Ok(terminal) => Ok(Self(ManuallyDrop::new(terminal))),
            Err(error) => {
                restore();
                Err(CliError::Terminal(error))
            }
        }
    }

    pub(super) fn draw(&mut self, render: impl FnOnce(&mut Frame<'_>)) -> Result<(), CliError> {
        self.0.draw(render).map_err(CliError::Terminal)?;
        Ok(())
    }

    /// Whether the terminal still exists. Reading from a closed terminal reports no error, so this is checked.
    pub(super) fn exists() -> bool {
        rustix::termios::tcgetwinsize(io::stdout()).is_ok()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // A terminal that was closed cannot be restored.
    let _ = disable_raw_mode();
    let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
}
