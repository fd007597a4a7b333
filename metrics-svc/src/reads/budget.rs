//! Limits how much a request decodes.

use std::sync::Arc;

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use vmwatch_blocks::{Limits, MAX_ROWS};

use crate::{MetricsError, deadline::Deadline, store::RowStore};

/// Maximum number of bytes of rows that a request decodes, by the measure of the decoder.
pub(crate) const MAX_DECODED: usize = 64 << 20;
/// Number of bytes that a request decodes without a permit, so that the usual small requests do not wait for large ones.
const WITHOUT_PERMIT: usize = 4 << 20;

/// How much a request may still decode.
#[derive(Debug)]
pub(crate) struct Budget {
    left: usize,
    permits: Option<Arc<Semaphore>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Budget {
    /// The budget of a request.
    pub(crate) fn of_request(store: &RowStore) -> Self {
        Self {
            left: MAX_DECODED,
            permits: Some(Arc::clone(&store.large_reads)),
            permit: None,
        }
    }

    /// The budget of background work, which needs no permit because there is one of each kind.
    pub(crate) const fn of_background() -> Self {
        Self::of_background_part(MAX_DECODED)
    }

    /// The budget of a part of background work, in bytes.
    pub(crate) const fn of_background_part(bytes: usize) -> Self {
        Self {
            left: bytes,
            permits: None,
            permit: None,
        }
    }

    /// Waits for a permit if the request has decoded so much that it needs one.
    pub(crate) async fn admit(&mut self, deadline: Deadline) -> Result<(), MetricsError> {
        let left = deadline.left()?;
        if self.permit.is_some() || self.left > MAX_DECODED - WITHOUT_PERMIT {
            return Ok(());
        }
        if let Some(permits) = &self.permits {
            let permit = timeout(left, Arc::clone(permits).acquire_owned()).await;
            self.permit = permit.map_err(|_| MetricsError::DeadlinePassed)?.ok();
        }
        Ok(())
    }

    /// Limits for decoding the next block.
    pub(super) const fn limits(&self) -> Limits {
        Limits {
            rows: MAX_ROWS,
            bytes: self.left,
        }
    }

    /// Sets the number of bytes that this request may still decode.
    pub(super) const fn set_left(&mut self, left: usize) {
        self.left = left;
    }

    /// Takes bytes off the budget; returns `false` if it has too few.
    pub(super) const fn take(&mut self, bytes: usize) -> bool {
        let enough = self.left >= bytes;
        self.left = self.left.saturating_sub(bytes);
        enough
    }

    /// Allows the request to decode as much again.
    pub(super) const fn refill(&mut self) {
        self.left = MAX_DECODED;
    }

    /// Whether the full budget of a request is left.
    pub(super) const fn is_largest(&self) -> bool {
        self.left >= MAX_DECODED
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::LARGE_READS;

    #[tokio::test]
    async fn only_four_requests_at_once_decode_much() {
        let permits = Arc::new(Semaphore::new(LARGE_READS));
        let decoded = |bytes| Budget {
            left: MAX_DECODED - bytes,
            permits: Some(Arc::clone(&permits)),
            ..Budget::of_background()
        };
        let deadline = Deadline::after(Duration::from_mins(1));
        let mut large = Vec::new();
        for _ in 0..4 {
            let mut budget = decoded(WITHOUT_PERMIT);
            budget.admit(deadline).await.unwrap();
            large.push(budget);
        }
        let mut fifth = decoded(WITHOUT_PERMIT);
        let refused = fifth.admit(Deadline::after(Duration::from_millis(20))).await;
        assert!(
            matches!(refused, Err(MetricsError::DeadlinePassed)),
            "{refused:?}"
        );
        // Requests that decode little need no permit.
        decoded(WITHOUT_PERMIT - 1).admit(deadline).await.unwrap();
        large.pop();
        fifth.admit(deadline).await.unwrap();
    }
}
