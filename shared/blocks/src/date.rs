//! The `create_date` of a row as an integer.

use jiff::{Timestamp, civil::DateTime, tz::Offset};
use vmwatch_api::time::CreateDate;

use crate::RowError;

/// A `create_date` as an integer: twice its microseconds since 1970 in its own local time, plus 1 if the text has a
/// fraction of a second. Texts and integers sort alike, and each integer stands for exactly one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Date(pub(crate) i64);

impl Date {
    pub(crate) fn parse(text: &str) -> Result<Self, RowError> {
        let date: CreateDate = text.parse().map_err(|_| RowError::Date)?;
        let local: DateTime = date.as_str().parse().map_err(|_| RowError::Date)?;
        let micros = Offset::UTC
            .to_timestamp(local)
            .map_err(|_| RowError::Date)?
            .as_microsecond();
        Ok(Self(
            micros * 2 + i64::from(text.len() > "2017-01-01T21:37:59".len()),
        ))
    }

    /// Microseconds since 1970 in local time.
    pub(crate) const fn local_micros(self) -> i64 {
        self.0 >> 1
    }

    /// Returns whether the integer stands for a date with four digits for the year.
    pub(crate) fn is_valid(self) -> bool {
        let seconds = self.local_micros().div_euclid(1_000_000);
        // From the start of the year 0 to the last second that `parse` accepts.
        (-62_167_219_200..=253_402_207_200).contains(&seconds)
            && (self.0 & 1 == 1 || self.local_micros() % 1_000_000 == 0)
    }

    /// The text of the date; `None` if the integer is not that of a date with four digits for the year.
    pub(crate) fn text(self) -> Option<String> {
        let micros = self.local_micros();
        let local = Offset::UTC.to_datetime(Timestamp::from_microsecond(micros).ok()?);
        let year = u16::try_from(local.year()).ok()?;
        let (month, day) = (local.month(), local.day());
        let (hour, minute, second) = (local.hour(), local.minute(), local.second());
        let whole = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
        let fraction = micros.rem_euclid(1_000_000);
        match (self.0 & 1, fraction) {
            (1, _) => Some(format!("{whole}.{fraction:06}")),
            (_, 0) => Some(whole),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_round_trip_with_and_without_fraction_and_sort_like_their_texts() {
        let texts = [
            "0000-01-01T00:00:00.000001",
            "1969-12-31T23:59:59",
            "2017-01-01T21:37:58.999999",
            "2017-01-01T21:37:59",
            "2017-01-01T21:37:59.000000",
            "2017-01-01T21:37:59.001065",
            "9999-12-30T00:00:00",
        ];
        let dates: Vec<Date> = texts.iter().map(|text| Date::parse(text).unwrap()).collect();
        assert!(dates.is_sorted());
        for (text, date) in texts.into_iter().zip(dates) {
            assert_eq!(date.text().as_deref(), Some(text));
        }
        for bad in [
            "2017-1-01T21:37:58.999841",
            "2017-02-30T00:00:00",
            "",
            "9999-12-31T23:59:59",
        ] {
            assert_eq!(Date::parse(bad), Err(RowError::Date), "{bad}");
        }
        let first = Date::parse("0000-01-01T00:00:00").unwrap();
        let last = Date::parse("9999-12-30T21:59:59.999999").unwrap();
        for good in [first, last] {
            assert!(good.is_valid() && good.text().is_some(), "{good:?}");
        }
        for bad in [i64::MAX, i64::MIN, 2, first.0 - 2_000_000] {
            assert!(!Date(bad).is_valid() && Date(bad).text().is_none(), "{bad}");
        }
    }
}
