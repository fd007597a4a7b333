//! Finds the newest sample before a moment.

use vmwatch_api::InstanceId;

use super::{Budget, Most, Newest, Order, Query, Row, two_hours_before};
use crate::{
    MetricsError,
    deadline::Deadline,
    store::{RowKind, RowStore},
};

/// How far before a moment the sample may have been taken.
const WEEK_MICROS: i64 = 7 * 24 * 3_600_000_000;

impl RowStore {
    /// Returns a row of the newest sample with rows of this kind before a time (Unix microseconds): one of the two hours
    /// before it, or else of the week before it. The row has no fields besides its date and `_id`.
    pub(crate) async fn sample_before(
        &self,
        kind: RowKind,
        instance: &InstanceId,
        end: i64,
        deadline: Deadline,
    ) -> Result<Option<Row>, MetricsError> {
        let one = Most { rows: 1, after: None };
        let mut newest = Newest::new(one, Order::Newest);
        let mut budget = Budget::of_request(self);
        let mut query = Query::new(kind, instance, &[]);
        let mut until = end;
        for since in [two_hours_before(end), end.saturating_sub(WEEK_MICROS)] {
            query.time = since..until;
            newest.read(self, &query, &mut budget, deadline).await?;
            until = since;
        }
        Ok(newest.into_rows().into_iter().next())
    }
}
