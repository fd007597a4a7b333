//! Texts from guests and hypervisors, prepared for a terminal.

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// Replaces control characters and characters that change the direction of text. Guests choose the names of processes,
/// so a name could otherwise send commands to the terminal or make a line look like another one.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|char| if is_harmful(char) { '\u{fffd}' } else { char })
        .collect()
}

fn is_harmful(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Number of terminal columns of a text.
pub(crate) fn width(text: &str) -> usize {
    text.width()
}

/// Shortens the text to a number of terminal columns. The last one is `…` if something is left out.
pub(crate) fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut left = columns.saturating_sub(1);
    let mut shortened = String::new();
    for char in text.chars() {
        let needed = char.width().unwrap_or(0);
        if needed > left {
            break;
        }
        left -= needed;
        shortened.push(char);
    }
    if columns > 0 {
        shortened.push('…');
    }
    shortened
}

/// Pads the text with spaces to a number of terminal columns.
pub(crate) fn pad(text: &str, columns: usize, align_right: bool) -> String {
    let spaces = " ".repeat(columns.saturating_sub(width(text)));
    if align_right {
        spaces + text
    } else {
        format!("{text}{spaces}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_send_commands_to_the_terminal() {
        for (given, shown) in [
            ("nginx: worker", "nginx: worker"),
            ("数据库", "数据库"),
            ("\u{1b}[2Jroot", "\u{fffd}[2Jroot"),
            ("a\nb\tc\u{9b}1m", "a\u{fffd}b\u{fffd}c\u{fffd}1m"),
            ("evil\u{202e}txt", "evil\u{fffd}txt"),
        ] {
            assert_eq!(printable(given), shown);
        }
    }

    #[test]
    fn texts_are_cut_and_padded_by_terminal_columns() {
        for (text, columns, shown) in [
            ("nginx", 5, "nginx"),
            ("nginx", 4, "ngi…"),
            ("nginx", 0, ""),
            ("数据库", 6, "数据库"),
            ("数据库", 5, "数据…"),
            ("数据库", 4, "数…"),
        ] {
            assert_eq!(cut(text, columns), shown, "{text} in {columns} columns");
        }
        assert_eq!(pad("数据", 6, false), "数据  ");
        assert_eq!(pad("1.5", 6, true), "   1.5");
        assert_eq!(pad("too long", 3, true), "too long");
    }
}
