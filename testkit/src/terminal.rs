//! A program in a pseudo-terminal, and what its screen shows.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Read as _, Write as _},
    num::NonZeroU16,
    os::fd::OwnedFd,
    process::{Child, ExitStatus},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags, open},
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::{PATIENCE, Spec, eventually, process::command};

/// Interval at which the output of the program is read.
const READ_INTERVAL: Duration = Duration::from_millis(2);
/// Size of a character in a picture, in pixels.
const CHARACTER: (u16, u16) = (8, 17);

/// A program that runs in a pseudo-terminal of its own. It is killed when this value is dropped.
pub struct Terminal {
    child: Child,
    shared: Arc<Shared>,
}

struct Shared {
    /// Our side of the pseudo-terminal; `None` once it is closed.
    ours: Mutex<Option<File>>,
    screen: Mutex<Screen>,
}

struct Screen {
    parser: vt100::Parser,
    output: Vec<u8>,
}

impl fmt::Debug for Screen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Screen").finish_non_exhaustive()
    }
}

impl Terminal {
    /// Starts a program in a terminal of this size.
    pub fn start(spec: &Spec, columns: u16, rows: u16) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let theirs = open(
            name,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        set_size(&ours, columns, rows);
        rustix::io::ioctl_fionbio(&ours, true).unwrap();
        let shared = Arc::new(Shared {
            ours: Mutex::new(Some(File::from(ours))),
            screen: Mutex::new(Screen {
                parser: vt100::Parser::new(size(rows), size(columns), 0),
                output: Vec::new(),
            }),
        });
        let child = spawn(spec, &theirs);
        let reader = Arc::clone(&shared);
        thread::spawn(move || {
            while reader.read() {
                thread::sleep(READ_INTERVAL);
            }
        });
        Self { child, shared }
    }

    /// The text on the screen, with a line for each row.
    pub fn text(&self) -> String {
        let screen = self.shared.screen.lock().unwrap();
        let columns = screen.parser.screen().size().1;
        screen
            .parser
            .screen()
            .rows(0, columns.get())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// All bytes that the program has written.
    pub fn output(&self) -> String {
        let screen = self.shared.screen.lock().unwrap();
        String::from_utf8_lossy(&screen.output).into_owned()
    }

    /// Whether the program uses the alternate screen, which full-screen programs leave when they end.
    pub fn is_full_screen(&self) -> bool {
        self.shared
            .screen
            .lock()
            .unwrap()
            .parser
            .screen()
            .alternate_screen()
    }

    /// Waits until the screen shows a text.
    pub async fn shows(&self, text: &str) {
        self.shows_that(text, |screen| screen.contains(text)).await;
    }

    /// Waits until the text on the screen meets a condition.
    pub async fn shows_that(&self, what: &str, mut condition: impl FnMut(&str) -> bool) {
        eventually(&format!("the screen shows: {what}"), PATIENCE, async || {
            let text = self.text();
            if condition(&text) {
                Ok(())
            } else {
                Err(format!("the screen is\n{text}"))
            }
        })
        .await;
    }

    /// Sends keys to the program.
    pub fn send(&self, keys: &str) {
        let mut ours = self.shared.ours.lock().unwrap();
        let ours = ours.as_mut().expect("the terminal is open");
        ours.write_all(keys.as_bytes())
            .expect("the terminal accepts a few keys");
    }

    /// Changes the size of the terminal.
    pub fn resize(&self, columns: u16, rows: u16) {
        let ours = self.shared.ours.lock().unwrap();
        self.shared
            .screen
            .lock()
            .unwrap()
            .parser
            .set_size(size(rows), size(columns));
        set_size(ours.as_ref().expect("the terminal is open"), columns, rows);
    }

    /// Closes the terminal, as when the window of a terminal emulator is closed.
    pub fn close(&self) {
        self.shared.ours.lock().unwrap().take();
    }

    /// Waits until the program has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        eventually("the program in the terminal ends", PATIENCE, async || {
            let status = self.child.try_wait().unwrap();
            status.ok_or_else(|| format!("it runs; the screen is\n{}", self.shared.text()))
        })
        .await
    }

    /// The process id of the program.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// A picture of the screen as SVG.
    pub fn svg(&self) -> String {
        svg(self.shared.screen.lock().unwrap().parser.screen())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Killing fails only if the program has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.close();
    }
}

impl Shared {
    /// Reads what the program has written; false once the terminal is closed.
    fn read(&self) -> bool {
        let mut buffer = [0; 16 * 1024];
        loop {
            let mut ours = self.ours.lock().unwrap();
            let Some(file) = ours.as_mut() else {
                return false;
            };
            let read = file.read(&mut buffer);
            drop(ours);
            match read {
                Ok(0) => return false,
                Ok(bytes) => {
                    let mut screen = self.screen.lock().unwrap();
                    screen.parser.process(&buffer[..bytes]);
                    screen.output.extend_from_slice(&buffer[..bytes]);
                }
                // The program has not written more, or has ended (EIO).
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().parser.screen().contents()
    }
}

fn spawn(spec: &Spec, theirs: &OwnedFd) -> Child {
    let mut in_session = spec.clone();
    // A new session with this terminal as its controlling terminal, so that the kernel signals resizing and closing.
    in_session.program = "setsid".into();
    in_session.args = vec!["--ctty".to_owned(), spec.program.display().to_string()];
    in_session.args.extend(spec.args.iter().cloned());
    let side = || theirs.try_clone().unwrap();
    let mut command = command(&in_session);
    command.stdin(side()).stdout(side()).stderr(side());
    command.spawn().expect("setsid (from util-linux) runs")
}

fn size(cells: u16) -> NonZeroU16 {
    NonZeroU16::new(cells).expect("a terminal has at least one row and one column")
}

fn set_size(terminal: impl std::os::fd::AsFd, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

/// Draws each run of equal cells as a text of its width.
fn svg(screen: &vt100::Screen) -> String {
    let (rows, columns) = screen.size();
    let (width, height) = (columns.get() * CHARACTER.0 + 24, rows.get() * CHARACTER.1 + 24);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"6\" fill=\"#15181c\"/>\n\
         <g font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"13\" fill=\"#d5d9de\">\n"
    );
    for row in 0..rows.get() {
        let mut column = 0;
        while column < columns.get() {
            let (text, cells) = run(screen, row, column);
            let shown = text.trim_matches(' ');
            if !shown.is_empty() {
                let before = u16::try_from(text.find(shown).unwrap()).unwrap();
                let blanks = u16::try_from(text.len() - shown.len()).unwrap();
                let cell = screen.cell(row, column).unwrap();
                let (x, y) = (12 + (column + before) * CHARACTER.0, 12 + row * CHARACTER.1 + 13);
                let (length, style) = ((cells - blanks) * CHARACTER.0, style(cell));
                // Browsers collapse spaces, but not these.
                let shown = shown
                    .replace('&', "&amp;")
                    .replace('<', "&lt;")
                    .replace(' ', "\u{a0}");
                let _ = writeln!(
                    out,
                    "<text x=\"{x}\" y=\"{y}\" textLength=\"{length}\"{style}>{shown}</text>"
                );
            }
            column += cells;
        }
    }
    out + "</g>\n</svg>\n"
}

/// The text of the cells from this one on that look the same, and their number.
fn run(screen: &vt100::Screen, row: u16, first: u16) -> (String, u16) {
    let mut text = String::new();
    let mut cells = 0;
    let look = screen.cell(row, first).map(style);
    while let Some(cell) = screen
        .cell(row, first + cells)
        .filter(|cell| Some(style(cell)) == look)
    {
        text += match cell.contents() {
            "" if cell.is_wide_continuation() => "",
            "" => " ",
            contents => contents,
        };
        cells += 1;
    }
    (text, cells.max(1))
}

fn style(cell: &vt100::Cell) -> String {
    let mut style = String::new();
    let colour = match cell.fgcolor() {
        vt100::Color::Idx(1 | 9) => Some("#ff6b6b"),
        vt100::Color::Idx(2 | 10) => Some("#7bd88f"),
        vt100::Color::Idx(3 | 11) => Some("#f0c674"),
        _ => cell.dim().then_some("#8a929b"),
    };
    if let Some(colour) = colour {
        let _ = write!(style, " fill=\"{colour}\"");
    }
    if cell.bold() {
        style += " font-weight=\"bold\"";
    }
    if cell.underline() {
        style += " text-decoration=\"underline\"";
    }
    style
}
