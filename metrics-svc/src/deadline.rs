//! The deadline of a request that may take several commands to the database.

use std::time::Duration;

use tokio::time::Instant;
use vmwatch_bus::Context;

use crate::MetricsError;

/// The time at which the caller stops waiting. Each database command gets the remaining time, so that all commands of a
/// request end by then.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline this far from now.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit)
    }

    /// The deadline of a request.
    pub fn of(context: &Context) -> Self {
        Self::after(context.remaining())
    }

    /// The time that is left; an error once it has passed. MongoDB counts in milliseconds and takes zero for no limit.
    pub fn left(self) -> Result<Duration, MetricsError> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Err(MetricsError::DeadlinePassed);
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_deadline_is_an_error_and_never_zero() {
        assert!(Deadline::after(Duration::from_mins(1)).left().unwrap() <= Duration::from_mins(1));
        for limit in [Duration::ZERO, Duration::from_micros(900)] {
            assert!(matches!(
                Deadline::after(limit).left(),
                Err(MetricsError::DeadlinePassed)
            ));
        }
    }
}
