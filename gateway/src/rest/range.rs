//! Time range and number of points of a chart, as requested in a REST query.

use std::time::Duration;

use vmwatch_api::history::{Points, TimeRange};

use super::{extract::Number, problem::Problem, time::Timestamp};

/// Default length of a chart's time range.
const USUAL: Duration = Duration::from_hours(1);

/// Requested maximum number of points of a chart, with the bounds of [`Points`].
pub(super) type PointCount = Number<1, 2000>;

/// Returns the requested number of points of the chart, or 300 if the request does not state it.
pub(super) fn points(given: Option<PointCount>) -> Points {
    // This cannot fail, because `PointCount` and `Points` have the same bounds.
    given
        .and_then(|points| Points::new(points.get()))
        .unwrap_or_default()
}

/// Time range of the chart; the last hour by default.
pub(super) fn range(from: Option<Timestamp>, to: Option<Timestamp>) -> Result<TimeRange, Problem> {
    let to = to.unwrap_or_else(Timestamp::now).as_ms();
    let hour = u64::try_from(USUAL.as_millis()).unwrap_or(u64::MAX);
    let from = from.map_or(to.saturating_sub(hour), Timestamp::as_ms);
    TimeRange::new(from, to).ok_or_else(|| Problem::contradictory("query: from must be before to"))
}
