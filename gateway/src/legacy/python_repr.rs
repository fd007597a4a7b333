//! Writes values like Python's `repr`, which clients of the 2017 API parse.
//!
//! Strings are written in pure ASCII, like `ascii(s)` in `CPython` or like `repr` of a Python 2 `unicode` string with
//! its leading `u`. Floats are written like `repr(x)`: with the fewest digits that parse back to the same value.

use std::fmt::{self, Write as _};

use serde::{
    Deserializer as _,
    de::{DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

/// The value of this key is written as a MongoDB `ObjectId`.
const KEY_OF_OBJECT_ID: &str = "_id";

/// Appends a Python string literal, with Python's choice of quotes and escapes.
pub fn push_text(out: &mut String, text: &str) {
    // Fast path for text without special characters, such as keys, ids, dates and most names.
    let plain = |byte: u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'\'' | b'\\');
    if text.bytes().all(plain) {
        out.push('\'');
        out.push_str(text);
        out.push('\'');
        return;
    }
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            ' '..='~' => out.push(c),
            c => push_escape(out, u32::from(c)),
        }
    }
    out.push(quote);
}

fn push_escape(out: &mut String, code: u32) {
    // Writing to a String cannot fail.
    let _ = match code {
        0..=0xff => write!(out, "\\x{code:02x}"),
        0x100..=0xffff => write!(out, "\\u{code:04x}"),
        _ => write!(out, "\\U{code:08x}"),
    };
}

/// Appends a float as Python would. NaN and infinities have no literal in Python and become `None`.
pub fn push_float(out: &mut String, number: f64) {
    if !number.is_finite() {
        out.push_str("None");
        return;
    }
    if push_hundredths(out, number) {
        return;
    }
    let scientific = shortest(number.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number.is_sign_negative() {
        out.push('-');
    }
    // CPython uses positional notation from 1e-4 to below 1e16.
    if (-4..16).contains(&exponent) {
        push_positional(out, &mantissa.replace('.', ""), exponent);
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{mantissa}e{sign}{:02}", exponent.abs());
    }
}

/// Fast path for numbers with at most two decimals and 15 digits, which is what agents report. Returns whether the
/// number was one of these and was appended.
///
/// No two decimal numbers of at most 15 digits round to the same double. So the digits found here are the shortest that
/// parse back to `number`.
fn push_hundredths(out: &mut String, number: f64) -> bool {
    const MIN_WITH_16_DIGITS: f64 = 1e15;
    let hundredths = (number.abs() * 100.0).round();
    #[expect(clippy::float_cmp, reason = "only the identical double is acceptable")]
    let exact = hundredths < MIN_WITH_16_DIGITS && hundredths / 100.0 == number.abs();
    if !exact {
        return false;
    }
    if number.is_sign_negative() {
        out.push('-');
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the number is an integer from 0 to 10^15"
    )]
    let hundredths = hundredths as u64;
    let (whole, fraction) = (hundredths / 100, hundredths % 100);
    // Writing to a String cannot fail.
    let _ = match fraction % 10 {
        0 => write!(out, "{whole}.{}", fraction / 10),
        _ => write!(out, "{whole}.{fraction:02}"),
    };
    true
}

/// The fewest digits that parse back to the same value, such as `1.48e9`. The result differs from Rust's formatting
/// only when two candidates are equally close to the value: Rust takes the larger one, `CPython` the one with the even
/// last digit.
fn shortest(number: f64) -> String {
    // Two candidates of n digits are equally close only if the value lies halfway between them. Both parse back to the
    // value only if n is at least 15, so a shorter result is never such a tie.
    const MIN_DIGITS_OF_A_TIE: usize = 15;
    let shortest = format!("{number:e}");
    let digits = shortest
        .bytes()
        .take_while(|byte| *byte != b'e')
        .filter(u8::is_ascii_digit)
        .count();
    if digits < MIN_DIGITS_OF_A_TIE {
        return shortest;
    }
    let rounded = format!("{number:.*e}", digits - 1);
    if rounded.parse() == Ok(number) {
        rounded
    } else {
        shortest
    }
}

/// Appends `digits` without an exponent and with at least one decimal. The first digit stands for 10^`exponent`.
fn push_positional(out: &mut String, digits: &str, exponent: i32) {
    let before_point = usize::try_from(exponent + 1).unwrap_or(0);
    let (whole, fraction) = digits.split_at(digits.len().min(before_point));
    out.push_str(if whole.is_empty() { "0" } else { whole });
    out.extend(std::iter::repeat_n('0', before_point - whole.len()));
    out.push('.');
    out.extend(std::iter::repeat_n(
        '0',
        usize::try_from(-exponent - 1).unwrap_or(0),
    ));
    out.push_str(if fraction.is_empty() { "0" } else { fraction });
}

/// Converts a JSON array of row objects to a JSON array of strings. Each string is the Python 2 `repr` of its row.
pub fn rows_to_python(rows: &str) -> Result<String, serde_json::Error> {
    // The Python `repr` of the rows is about as long as their JSON, plus a `u` before each string.
    let mut out = String::with_capacity(rows.len() + rows.len() / 4);
    let mut json = serde_json::Deserializer::from_str(rows);
    json.deserialize_seq(Rows { out: &mut out })?;
    json.end()?;
    Ok(out)
}

struct Rows<'a> {
    out: &'a mut String,
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        let mut row = String::new();
        self.out.push('[');
        let mut first = true;
        while rows.next_element_seed(Row { out: &mut row })?.is_some() {
            if !std::mem::take(&mut first) {
                self.out.push(',');
            }
            push_json_string(self.out, &row);
            row.clear();
        }
        self.out.push(']');
        Ok(())
    }
}

/// Appends a string of printable ASCII characters as a JSON string.
fn push_json_string(out: &mut String, ascii: &str) {
    out.push('"');
    if !ascii.bytes().any(|byte| matches!(byte, b'"' | b'\\')) {
        out.push_str(ascii);
        out.push('"');
        return;
    }
    for c in ascii.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
}

struct Row<'a> {
    out: &'a mut String,
}

impl<'de> DeserializeSeed<'de> for Row<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a row")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut row: A) -> Result<(), A::Error> {
        self.out.push('{');
        let mut first = true;
        while let Some(key) = row.next_key::<std::borrow::Cow<'de, str>>()? {
            if !std::mem::take(&mut first) {
                self.out.push_str(", ");
            }
            self.out.push('u');
            push_text(self.out, &key);
            self.out.push_str(": ");
            row.next_value_seed(Scalar {
                out: self.out,
                object_id: key == KEY_OF_OBJECT_ID,
            })?;
        }
        self.out.push('}');
        Ok(())
    }
}

struct Scalar<'a> {
    out: &'a mut String,
    object_id: bool,
}

impl<'de> DeserializeSeed<'de> for Scalar<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Scalar<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a number, true, false or null")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.object_id && text.len() == 24 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let _ = write!(self.out, "ObjectId('{text}')");
        } else {
            self.out.push('u');
            push_text(self.out, text);
        }
        Ok(())
    }

    fn visit_i64<E>(self, number: i64) -> Result<(), E> {
        let _ = write!(self.out, "{number}");
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        let _ = write!(self.out, "{number}");
        Ok(())
    }

    fn visit_f64<E>(self, number: f64) -> Result<(), E> {
        push_float(self.out, number);
        Ok(())
    }

    fn visit_bool<E>(self, truth: bool) -> Result<(), E> {
        self.out.push_str(if truth { "True" } else { "False" });
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.out.push_str("None");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> String {
        let mut out = String::new();
        push_text(&mut out, s);
        out
    }

    fn float(x: f64) -> String {
        let mut out = String::new();
        push_float(&mut out, x);
        out
    }

    #[test]
    fn python_repr_quotes_strings_like_python() {
        assert_eq!(text(""), "''");
        assert_eq!(text("it's"), r#""it's""#);
        assert_eq!(text(r#"it's "so""#), r#"'it\'s "so"'"#);
        assert_eq!(text("a\\b\n\t\r\0\u{7f}"), r"'a\\b\n\t\r\x00\x7f'");
        assert_eq!(text("é中😀"), r"'\xe9\u4e2d\U0001f600'");
    }

    #[test]
    fn python_repr_formats_floats_like_python() {
        for (number, written) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (128.8, "128.8"),
            (0.05, "0.05"),
            (10.0, "10.0"),
            (-2.5, "-2.5"),
            (0.29, "0.29"),
            (9_999_999_999_999.99, "9999999999999.99"),
            (10_000_000_000_000.01, "10000000000000.01"),
            (1.005, "1.005"),
            (1_482_236_516.07, "1482236516.07"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (5e-324, "5e-324"),
            // The first number lies halfway between two decimals of 16 digits. The other two are powers of two, at
            // which the spacing of floats changes.
            (-82_902_859_155_638.62, "-82902859155638.62"),
            (9_007_199_254_740_992.0, "9007199254740992.0"),
            (5.960_464_477_539_063e-8, "5.960464477539063e-08"),
            (f64::NAN, "None"),
            (f64::NEG_INFINITY, "None"),
        ] {
            assert_eq!(float(number), written);
        }
    }

    #[test]
    fn python_repr_formats_rows_as_dictionaries() {
        let rows =
            r#"[{"mem":8.6,"proc":95,"cmd":"é\"","shutdown_time":null,"_id":"58690637594c10403e25b049"},{}]"#;
        let python = r#"["{u'mem': 8.6, u'proc': 95, u'cmd': u'\\xe9\"', u'shutdown_time': None, u'_id': ObjectId('58690637594c10403e25b049')}","{}"]"#;
        assert_eq!(rows_to_python(rows).unwrap(), python);
        assert_eq!(rows_to_python("[]").unwrap(), "[]");
    }
}
