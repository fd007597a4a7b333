//! Timestamps of the REST API, written as in RFC 3339. On the bus, services use Unix milliseconds instead.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, Type},
};
use vmwatch_api::time::unix_millis;

/// A point in time, written in UTC with milliseconds: `2017-01-01T13:37:59.001Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Timestamp(jiff::Timestamp);

/// The text is not an RFC 3339 time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be an RFC 3339 time such as 2017-01-01T13:37:59Z or 2017-01-01T21:37:59+08:00")]
pub(super) struct InvalidTimestamp;

impl Timestamp {
    /// Converts from Unix milliseconds; a time after the year 9999 becomes the end of that year.
    pub(super) fn of_ms(ms: u64) -> Self {
        let moment = i64::try_from(ms)
            .ok()
            .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
        Self(moment.unwrap_or(jiff::Timestamp::MAX))
    }

    /// Converts to Unix milliseconds; a time before 1970 becomes 0, because no older data is stored.
    pub(super) fn as_ms(self) -> u64 {
        u64::try_from(self.0.as_millisecond()).unwrap_or(0)
    }

    pub(super) fn now() -> Self {
        Self::of_ms(unix_millis())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"))
    }
}

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if is_rfc3339(text) {
            text.parse().map(Self).map_err(|_| InvalidTimestamp)
        } else {
            Err(InvalidTimestamp)
        }
    }
}

/// Whether the text has the form that RFC 3339, section 5.6, requires; jiff accepts other forms as well.
fn is_rfc3339(text: &str) -> bool {
    let fits = |text: &str, form: &str| {
        text.len() == form.len()
            && text.bytes().zip(form.bytes()).all(|(byte, form)| match form {
                b'd' => byte.is_ascii_digit(),
                b'T' => byte == b'T' || byte == b't',
                b'+' => byte == b'+' || byte == b'-',
                mark => byte == mark,
            })
    };
    let Some((date_time, rest)) = text.split_at_checked(19) else {
        return false;
    };
    let offset = match rest.strip_prefix('.') {
        None => rest,
        Some(fraction) => {
            let offset = fraction.trim_start_matches(|c: char| c.is_ascii_digit());
            if offset.len() == fraction.len() {
                return false;
            }
            offset
        }
    };
    fits(date_time, "dddd-dd-ddTdd:dd:dd") && (matches!(offset, "Z" | "z") || fits(offset, "+dd:dd"))
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl PartialSchema for Timestamp {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
            .into()
    }
}

impl ToSchema for Timestamp {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_read_with_any_utc_offset_and_written_in_utc() {
        for (text, written) in [
            ("2017-01-01T13:37:59Z", "2017-01-01T13:37:59.000Z"),
            ("2017-01-01t21:37:59.0019+08:00", "2017-01-01T13:37:59.001Z"),
            ("1969-12-31T23:59:59-00:00", "1969-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), written);
        }
        assert_eq!("1969-12-31T23:59:59Z".parse::<Timestamp>().unwrap().as_ms(), 0);
        let ms = 1_483_277_879_001;
        assert_eq!(Timestamp::of_ms(ms).as_ms(), ms);
        assert!(Timestamp::of_ms(u64::MAX).to_string().starts_with("9999-12-30T"));
    }

    #[test]
    fn timestamps_that_are_not_rfc_3339_are_rejected() {
        for bad in [
            "",
            "now",
            "1483277879",
            "2017-01-01",
            "2017-01-01T13:37:59",
            "2017-01-01 13:37:59Z",
            "2017-01-01T13:37Z",
            "2017-01-01T13:37:59.Z",
            "2017-01-01T13:37:59+08",
            "2017-01-01T13:37:59+0800",
            "2017-02-30T13:37:59Z",
            "2017-01-01T13:37:59Z[UTC]",
            "２017-01-01T13:37:59Z",
        ] {
            assert_eq!(bad.parse::<Timestamp>(), Err(InvalidTimestamp), "{bad}");
        }
    }
}
