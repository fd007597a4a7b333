//! Moments as users write them, such as `yesterday 14:03`, and times as they are shown.

use jiff::{
    SignedDuration, Timestamp, ToSpan as _, ZonedDateTime,
    civil::{Date, DateTime, Time},
    tz::TimeZone,
};

/// The forms of a moment, for help and error messages.
pub(crate) const FORMS: &str =
    "now, -2h, -1d12h, 14:03, \"yesterday 14:03\", \"2026-11-27 14:03:10\" or 2026-11-27T14:03:10Z";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidMoment {
    #[error("\"{0}\" is no time; write {FORMS}")]
    Form(String),
    #[error("\"{0}\" is outside of the years 1970 to 9999")]
    Range(String),
}

/// Reads a moment that a user has written. Times without an offset are in the time zone of `now`; a time of day without
/// a date is the last one before `now`.
pub(crate) fn parse_moment(text: &str, now: &ZonedDateTime) -> Result<Timestamp, InvalidMoment> {
    let text = text.trim();
    let moment = parse(text, now).ok_or_else(|| InvalidMoment::Form(text.to_owned()))?;
    // The gateway's times have four digits for the year.
    let last = Date::constant(9999, 1, 1).to_datetime(Time::midnight());
    let last = last
        .to_zoned_datetime(TimeZone::UTC)
        .map_or(Timestamp::MAX, |last| last.timestamp());
    if (Timestamp::UNIX_EPOCH..last).contains(&moment) {
        Ok(moment)
    } else {
        Err(InvalidMoment::Range(text.to_owned()))
    }
}

fn parse(text: &str, now: &ZonedDateTime) -> Option<Timestamp> {
    if text.eq_ignore_ascii_case("now") {
        return Some(now.timestamp());
    }
    if let Some(ago) = text.strip_prefix('-').or_else(|| text.strip_suffix(" ago")) {
        return now.timestamp().checked_sub(duration(ago.trim_end())?).ok();
    }
    if let Some(time) = time_of_day(text) {
        let today = in_zone(now.date().to_datetime(time), now)?;
        if today <= now.timestamp() {
            return Some(today);
        }
        return in_zone(now.date().yesterday().ok()?.to_datetime(time), now);
    }
    let split = text.split_once(' ').or_else(|| text.split_once(['T', 't']));
    if let Some((day, time)) = split
        && let (Some(day), Some(time)) = (date(day, now), time_of_day(time.trim_start()))
    {
        return in_zone(day.to_datetime(time), now);
    }
    // A time with an offset (RFC 3339).
    let has_date_and_time = text.contains([' ', 'T', 't']) && text.contains(':');
    has_date_and_time.then(|| text.parse().ok())?
}

fn in_zone(local: DateTime, now: &ZonedDateTime) -> Option<Timestamp> {
    // A local time that the change to daylight saving time skips or repeats gets the offset before the change.
    let zoned = local.to_zoned_datetime(now.time_zone().clone()).ok()?;
    Some(zoned.timestamp())
}

fn date(text: &str, now: &ZonedDateTime) -> Option<Date> {
    match text.to_ascii_lowercase().as_str() {
        "today" => Some(now.date()),
        "yesterday" => now.date().yesterday().ok(),
        text => {
            let mut numbers = text.split('-').map(number);
            let (year, month, day) = (numbers.next()??, numbers.next()??, numbers.next()??);
            if text.len() != 10 || numbers.next().is_some() {
                return None;
            }
            Date::new(year, i8::try_from(month).ok()?, i8::try_from(day).ok()?).ok()
        }
    }
}

/// `14:03` or `14:03:10`.
fn time_of_day(text: &str) -> Option<Time> {
    let mut numbers = text.split(':').map(|digits| {
        let in_range = (1..=2).contains(&digits.len());
        in_range.then(|| i8::try_from(number(digits)?).ok())?
    });
    let (hour, minute) = (numbers.next()??, numbers.next()??);
    let second = numbers.next().unwrap_or(Some(0))?;
    if numbers.next().is_some() {
        return None;
    }
    Time::new(hour, minute, second, 0).ok()
}

fn number(digits: &str) -> Option<i16> {
    let only_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    only_digits.then(|| digits.parse().ok())?
}

/// A duration such as `90s`, `2h` or `1d12h`.
fn duration(text: &str) -> Option<SignedDuration> {
    let mut rest = text;
    let mut seconds = 0_i64;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|char: char| char.is_ascii_digit()).len();
        let (count, unit) = rest.split_at_checked(digits)?;
        let unit_seconds = match unit.chars().next()? {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            'w' => 604_800,
            _ => return None,
        };
        seconds = count
            .parse::<i64>()
            .ok()?
            .checked_mul(unit_seconds)?
            .checked_add(seconds)?;
        rest = unit.get(1..)?;
    }
    (!text.is_empty()).then(|| SignedDuration::from_secs(seconds))
}

/// A moment as the REST API expects it.
pub(crate) fn to_query(moment: Timestamp) -> String {
    moment.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// Date and time in a time zone, such as `2026-11-27 14:03:10`.
pub(crate) fn local(moment: Timestamp, zone: &TimeZone) -> String {
    let zoned = moment.to_zoned_datetime(zone.clone());
    zoned.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Time of day in a time zone; with the date unless it is that of `now`.
pub(crate) fn local_short(moment: Timestamp, now: &ZonedDateTime) -> String {
    let zoned = moment.to_zoned_datetime(now.time_zone().clone());
    let form = if zoned.date() == now.date() {
        "%H:%M:%S"
    } else {
        "%Y-%m-%d %H:%M:%S"
    };
    zoned.strftime(form).to_string()
}

/// Rounds a duration down to its greatest unit, such as `3 min`.
pub(crate) fn rough(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The moment one hour before another one, or the earliest possible moment.
pub(crate) fn hour_before(moment: Timestamp) -> Timestamp {
    moment.checked_sub(1.hour()).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 28 March 2026, 15:00 in Berlin, where the clocks were set forward at 02:00 of the following day.
    fn now() -> ZonedDateTime {
        "2026-03-28T15:00:00+01:00[Europe/Berlin]".parse().unwrap()
    }

    #[test]
    fn moments_are_read_in_all_forms() {
        for (text, expected) in [
            ("now", "2026-03-28T14:00:00Z"),
            (" NOW ", "2026-03-28T14:00:00Z"),
            ("-2h", "2026-03-28T12:00:00Z"),
            ("-90s", "2026-03-28T13:58:30Z"),
            ("-1d12h", "2026-03-27T02:00:00Z"),
            ("2h ago", "2026-03-28T12:00:00Z"),
            ("-1w", "2026-03-21T14:00:00Z"),
            ("14:03", "2026-03-28T13:03:00Z"),
            ("9:05:07", "2026-03-28T08:05:07Z"),
            ("15:00", "2026-03-28T14:00:00Z"),
            // This time of day is still to come, so it is yesterday's.
            ("15:01", "2026-03-27T14:01:00Z"),
            ("today 14:03", "2026-03-28T13:03:00Z"),
            ("Yesterday 14:03", "2026-03-27T13:03:00Z"),
            ("yesterday  23:59:59", "2026-03-27T22:59:59Z"),
            ("2026-03-01 00:00", "2026-02-28T23:00:00Z"),
            ("2026-03-01T14:03:10", "2026-03-01T13:03:10Z"),
            ("2026-03-01T14:03:10Z", "2026-03-01T14:03:10Z"),
            ("2026-03-01T14:03:10.5+08:00", "2026-03-01T06:03:10.5Z"),
            ("2026-03-01 14:03:10-01:00", "2026-03-01T15:03:10Z"),
            // The clocks skipped this hour.
            ("2026-03-29 02:30", "2026-03-29T01:30:00Z"),
        ] {
            let expected: Timestamp = expected.parse().unwrap();
            assert_eq!(parse_moment(text, &now()), Ok(expected), "{text}");
        }
    }

    #[test]
    fn texts_that_are_no_moments_are_refused() {
        for text in [
            "",
            "-",
            "-2",
            "-h",
            "-2y",
            "2h",
            "+2h",
            "--2h",
            "ago",
            " ago",
            "noon",
            "yesterday",
            "24:00",
            "14:60",
            "14:3:",
            "14:03:61",
            ":03",
            "14",
            "1403",
            "2026-02-30 14:03",
            "2026-3-1 14:03",
            "2026-03-01",
            "20260301 14:03",
            "yesterday noon",
            "1483277879",
            "-99999999999999999999h",
            "１４:０３",
            "tomorrow 14:03",
        ] {
            let error = parse_moment(text, &now()).unwrap_err();
            assert!(
                error.to_string().contains("is no time; write now"),
                "{text}: {error}"
            );
        }
        for text in ["-9000w", "1969-12-31 14:03", "-1001-01-01T00:00:00Z"] {
            assert!(parse_moment(text, &now()).is_err(), "{text}");
        }
    }

    #[test]
    fn moments_are_shown_in_the_time_zone_of_the_user() {
        let moment: Timestamp = "2026-03-27T13:03:10.001Z".parse().unwrap();
        assert_eq!(to_query(moment), "2026-03-27T13:03:10.001Z");
        assert_eq!(local(moment, now().time_zone()), "2026-03-27 14:03:10");
        assert_eq!(local_short(moment, &now()), "2026-03-27 14:03:10");
        let today: Timestamp = "2026-03-28T13:03:10Z".parse().unwrap();
        assert_eq!(local_short(today, &now()), "14:03:10");
    }

    #[test]
    fn durations_are_rounded_down() {
        for (seconds, text) in [
            (-5, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (7_199, "1 h"),
            (100_000, "27 h"),
            (172_800, "2 d"),
        ] {
            assert_eq!(rough(SignedDuration::from_secs(seconds)), text);
        }
    }
}
