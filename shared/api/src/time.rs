//! The two formats of time in vmwatch: `create_date`, a text in local time with a fixed UTC offset, and Unix
//! milliseconds.

use std::{
    borrow::Cow,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jiff::{Timestamp, civil::DateTime, tz::Offset};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// The current time in Unix milliseconds.
pub fn unix_millis() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// The UTC offset, such as `+08:00`, that applies to all `create_date`s of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UtcOffset(Offset);

/// The text is not a valid [`UtcOffset`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a UTC offset such as +08:00, from -18:00 to +18:00")]
pub struct InvalidOffset;

impl FromStr for UtcOffset {
    type Err = InvalidOffset;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (sign, digits) = match text.as_bytes().first() {
            Some(b'+') => (1, &text[1..]),
            Some(b'-') => (-1, &text[1..]),
            _ => return Err(InvalidOffset),
        };
        let (hours, minutes) = digits.split_once(':').ok_or(InvalidOffset)?;
        let number = |part: &str, most: i32| {
            (part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit()))
                .then(|| part.parse::<i32>().ok())
                .flatten()
                .filter(|&number| number <= most)
                .ok_or(InvalidOffset)
        };
        let seconds = sign * (number(hours, 18)? * 3600 + number(minutes, 59)? * 60);
        if seconds.abs() > 18 * 3600 {
            return Err(InvalidOffset);
        }
        Offset::from_seconds(seconds).map(Self).map_err(|_| InvalidOffset)
    }
}

impl UtcOffset {
    pub const UTC: Self = Self(Offset::UTC);

    /// The UTC offset in milliseconds; positive values are east of Greenwich.
    pub fn as_millis(self) -> i64 {
        i64::from(self.0.seconds()) * 1000
    }

    /// Converts a `create_date` with this offset to Unix milliseconds; `None` if it is not a date or is before 1970.
    pub fn unix_millis_of(self, create_date: &str) -> Option<u64> {
        self.unix_micros_of(create_date).map(|micros| micros / 1000)
    }

    /// Converts a `create_date` with this offset to Unix microseconds; `None` if it is not a date or is before 1970.
    pub fn unix_micros_of(self, create_date: &str) -> Option<u64> {
        let local: DateTime = create_date.parse().ok()?;
        u64::try_from(self.0.to_timestamp(local).ok()?.as_microsecond()).ok()
    }
}

impl fmt::Display for UtcOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.seconds();
        let sign = if seconds < 0 { '-' } else { '+' };
        write!(
            f,
            "{sign}{:02}:{:02}",
            seconds.abs() / 3600,
            seconds.abs() % 3600 / 60
        )
    }
}

impl Serialize for UtcOffset {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UtcOffset {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: Cow<'_, str> = Deserialize::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The time of a row as text: ISO 8601 with microseconds and without UTC offset. Texts sort in the order of their
/// times.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct CreateDate(String);

/// The text is not a valid [`CreateDate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a date such as 2017-01-01T21:37:59.001065")]
pub struct InvalidDate;

impl CreateDate {
    /// Converts a system time to a `create_date` with the given UTC offset. Times outside the years 1 to 9999 are
    /// clamped.
    pub fn at(moment: SystemTime, offset: UtcOffset) -> Self {
        let timestamp = Timestamp::try_from(moment).unwrap_or(Timestamp::MAX);
        let local = offset.0.to_datetime(timestamp);
        Self(format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}",
            local.year(),
            local.month(),
            local.day(),
            local.hour(),
            local.minute(),
            local.second(),
            local.subsec_nanosecond() / 1000
        ))
    }

    /// Converts Unix milliseconds to a `create_date` with the given UTC offset. Times outside the years 1 to 9999 are
    /// clamped.
    pub fn at_millis(millis: u64, offset: UtcOffset) -> Self {
        let moment = UNIX_EPOCH.checked_add(Duration::from_millis(millis));
        moment.map_or_else(
            || Self("9999-12-31T23:59:59.999999".to_owned()),
            |moment| Self::at(moment, offset),
        )
    }

    /// Converts the `create_date`, read with the given UTC offset, to a system time.
    pub fn moment(&self, offset: UtcOffset) -> Result<SystemTime, InvalidDate> {
        let local: DateTime = self.0.parse().map_err(|_| InvalidDate)?;
        let micros = offset
            .0
            .to_timestamp(local)
            .map_err(|_| InvalidDate)?
            .as_microsecond();
        let from_epoch = Duration::from_micros(micros.unsigned_abs());
        let moment = if micros < 0 {
            UNIX_EPOCH.checked_sub(from_epoch)
        } else {
            UNIX_EPOCH.checked_add(from_epoch)
        };
        moment.ok_or(InvalidDate)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Accepts the output of Python's `isoformat`, which omits the fraction if it is zero.
impl FromStr for CreateDate {
    type Err = InvalidDate;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let template = match text.len() {
            19 => "dddd-dd-ddTdd:dd:dd",
            26 => "dddd-dd-ddTdd:dd:dd.dddddd",
            _ => return Err(InvalidDate),
        };
        let fits = text.bytes().zip(template.bytes()).all(|(byte, form)| match form {
            b'd' => byte.is_ascii_digit(),
            mark => byte == mark,
        });
        let real = fits && text.parse::<DateTime>().is_ok();
        if real {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidDate)
        }
    }
}

impl<'de> Deserialize<'de> for CreateDate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

impl fmt::Display for CreateDate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_date_is_in_the_time_zone_utc_plus_8() {
        // ObjectId('58690637…') was created at 0x58690637 = 2017-01-01T13:37:59Z.
        let date: CreateDate = "2017-01-01T21:37:59.001065".parse().unwrap();
        let moment = date.moment("+08:00".parse().unwrap()).unwrap();
        assert_eq!(moment.duration_since(UNIX_EPOCH).unwrap().as_secs(), 0x5869_0637);
        assert_eq!(CreateDate::at(moment, "+08:00".parse().unwrap()), date);
    }

    #[test]
    fn create_date_round_trips_through_unix_milliseconds() {
        let offset: UtcOffset = "-03:30".parse().unwrap();
        assert_eq!(offset.as_millis(), -12_600_000);
        for millis in [0, 12_600_000, 1_483_277_879_001, 4_102_444_800_000] {
            let date = CreateDate::at_millis(millis, offset);
            assert_eq!(offset.unix_millis_of(date.as_str()), Some(millis), "{date}");
        }
        assert_eq!(offset.unix_millis_of("2017-1-1"), None);
        assert_eq!(offset.unix_millis_of("1969-12-31T00:00:00"), None);
    }

    #[test]
    fn utc_offset_must_be_signed_hours_and_minutes() {
        for good in ["+00:00", "+08:00", "-03:30", "+18:00"] {
            assert_eq!(good.parse::<UtcOffset>().unwrap().to_string(), good);
        }
        for bad in [
            "", "8", "+8:00", "+08", "08:00", "+19:00", "+18:01", "+00:60", "+0é:00", "é",
        ] {
            assert_eq!(bad.parse::<UtcOffset>(), Err(InvalidOffset), "{bad:?}");
        }
    }

    #[test]
    fn invalid_create_dates_are_rejected() {
        assert!("2017-01-01T21:37:59".parse::<CreateDate>().is_ok());
        for bad in [
            "2017-1-01T21:37:58.999841",
            "2017-02-30T00:00:00",
            "2017-01-01 21:37:59",
            "",
            "x",
        ] {
            assert_eq!(bad.parse::<CreateDate>(), Err(InvalidDate), "{bad:?}");
        }
    }
}
