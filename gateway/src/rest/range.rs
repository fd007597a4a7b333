//! The time that a chart shows.

use std::time::Duration;

use vmwatch_api::history::{Points, TimeRange};

use super::{extract::Number, problem::Problem, time::Timestamp};

/// Where no beginning is given.
const USUAL: Duration = Duration::from_hours(1);

/// How many points a chart may have, by [`Points`].
pub(super) type PointCount = Number<1, 2000>;

/// The points, 300 unless given.
pub(super) fn points(given: Option<PointCount>) -> Points {
    // The bounds are those of `Points`.
    given
        .and_then(|points| Points::new(points.get()))
        .unwrap_or_default()
}

/// The range: up to now unless its end is given, and an hour long unless its beginning is.
pub(super) fn range(from: Option<Timestamp>, to: Option<Timestamp>) -> Result<TimeRange, Problem> {
    let to = to.unwrap_or_else(Timestamp::now).as_ms();
    let hour = u64::try_from(USUAL.as_millis()).unwrap_or(u64::MAX);
    let from = from.map_or(to.saturating_sub(hour), Timestamp::as_ms);
    TimeRange::new(from, to).ok_or_else(|| Problem::contradictory("query: from must be before to"))
}
