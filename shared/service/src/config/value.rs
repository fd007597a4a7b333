//! The types of setting values, in the format that users write.
//!
//! The crates humantime and bytesize are not used, because a default value must be printed as it is written: humantime
//! prints `365d` as `1year`, and bytesize prints `1GiB` as `1.0 GiB`. Sizes accept no decimal units such as MB, which
//! are easily confused with binary units such as MiB.

use std::{fmt, str::FromStr, time::Duration};

/// The type of a setting's value, with the allowed range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// A text, a list or a choice; the setting's help text describes the format.
    Text,
    File,
    Folder,
    Address,
    Flag,
    /// An integer between a minimum and a maximum.
    Number(u64, u64),
    /// One of these integers.
    OneOf(&'static [u64]),
    /// A duration ([`Span`]) between a minimum and a maximum.
    Duration(&'static str, &'static str),
    /// A size ([`ByteSize`]) between a minimum and a maximum.
    Size(&'static str, &'static str),
}

impl Value {
    pub fn span_range(self) -> Option<(Span, Span)> {
        match self {
            Self::Duration(least, most) => Some((least.parse().ok()?, most.parse().ok()?)),
            _ => None,
        }
    }

    pub(super) fn size_range(self) -> Option<(ByteSize, ByteSize)> {
        match self {
            Self::Size(least, most) => Some((least.parse().ok()?, most.parse().ok()?)),
            _ => None,
        }
    }
}

/// Formats the type as in the help text and docs/settings.md.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("text"),
            Self::File => f.write_str("file"),
            Self::Folder => f.write_str("folder"),
            Self::Address => f.write_str("address:port"),
            Self::Flag => f.write_str("true or false"),
            Self::Number(least, most) => write!(f, "{least} to {most}"),
            Self::OneOf(choices) => f.write_str(&listed(choices)),
            Self::Duration(least, most) | Self::Size(least, most) => write!(f, "{least} to {most}"),
        }
    }
}

/// The choices as a sentence lists them: `1, 3 or 5`.
pub(super) fn listed(choices: &[u64]) -> String {
    let texts: Vec<_> = choices.iter().map(ToString::to_string).collect();
    match texts.as_slice() {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        other => other.concat(),
    }
}

/// A duration such as `500ms`, `10s`, `5m`, `12h`, `30d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// The text is not a valid duration ([`Span`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a whole number and a unit: 500ms, 10s, 5m, 12h or 30d")]
pub struct InvalidSpan;

impl FromStr for Span {
    type Err = InvalidSpan;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or(InvalidSpan)?;
        let (number, unit) = text.split_at(unit_at);
        let millis: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(InvalidSpan),
        };
        let number: u64 = number.parse().map_err(|_| InvalidSpan)?;
        number
            .checked_mul(millis)
            .map(|total| Self(Duration::from_millis(total)))
            .ok_or(InvalidSpan)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        for (unit, name) in [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")] {
            if millis > 0 && millis.is_multiple_of(unit) {
                return write!(f, "{}{name}", millis / unit);
            }
        }
        write!(f, "{millis}ms")
    }
}

/// A size such as `512KiB`, `64MiB`, `1GiB`, or a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// The text is not a valid size ([`ByteSize`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a whole number and a unit: 512KiB, 64MiB or 1GiB")]
pub struct InvalidSize;

impl FromStr for ByteSize {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let bytes: u64 = match unit {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(InvalidSize),
        };
        let number: u64 = number.parse().map_err(|_| InvalidSize)?;
        number.checked_mul(bytes).map(Self).ok_or(InvalidSize)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 > 0 && self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_printed_as_users_write_them() {
        for text in ["500ms", "10s", "5m", "12h", "30d"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in ["512KiB", "64MiB", "1GiB", "1B"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
        for bad in ["", "10", "s", "1.5s", "-1s", "99999999999999999999d", "1w"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
