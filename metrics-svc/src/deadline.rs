//! Deadline of a request that needs several database commands.

use std::time::Duration;

use tokio::time::Instant;
use vmwatch_bus::Context;

use crate::MetricsError;

/// Time at which the caller of a request stops waiting. Each database command gets the remaining time as its limit, so
/// that all commands of the request end by then.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// Creates a deadline this far from now.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit)
    }

    /// The deadline of a bus request.
    pub fn of(context: &Context) -> Self {
        Self::after(context.remaining())
    }

    /// The earlier of this deadline and one this far from now.
    pub(crate) fn at_most(self, limit: Duration) -> Self {
        Self(self.0.min(Self::after(limit).0))
    }

    /// Returns the remaining time, or an error if the deadline has passed. The result is at least one millisecond,
    /// because MongoDB takes a limit of zero milliseconds as "no limit".
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
    fn passed_deadline_gives_an_error_instead_of_zero_time() {
        assert!(Deadline::after(Duration::from_mins(1)).left().unwrap() <= Duration::from_mins(1));
        for limit in [Duration::ZERO, Duration::from_micros(900)] {
            assert!(matches!(
                Deadline::after(limit).left(),
                Err(MetricsError::DeadlinePassed)
            ));
        }
    }
}
