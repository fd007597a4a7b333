//! The time range and number of points of a chart.

use std::time::Duration;

use vmwatch_api::history::{Points, TimeRange};

use super::{extract::Number, problem::Problem, time::Timestamp};

/// Default length of the range.
const USUAL: Duration = Duration::from_hours(1);

/// The requested number of points, with the bounds of [`Points`].
pub(super) type PointCount = Number<1, 2000>;

/// The number of points. Default: 300.
pub(super) fn points(given: Option<PointCount>) -> Points {
    // Cannot fail: the bounds are those of `Points`.
    given
        .and_then(|points| Points::new(points.get()))
        .unwrap_or_default()
}

/// The range. Default: one hour up to now.
pub(super) fn range(from: Option<Timestamp>, to: Option<Timestamp>) -> Result<TimeRange, Problem> {
    let to = to.unwrap_or_else(Timestamp::now).as_ms();
    let hour = u64::try_from(USUAL.as_millis()).unwrap_or(u64::MAX);
    let from = from.map_or(to.saturating_sub(hour), Timestamp::as_ms);
    TimeRange::new(from, to).ok_or_else(|| Problem::contradictory("query: from must be before to"))
}
