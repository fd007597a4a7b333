//! Coalesces equal reads of newest rows (single-flight) and reuses their answers for a short time.
//!
//! A read that equals a running one waits for its answer. An answer is reused for the configured time, counted from the
//! start of its query, so no answer is older than that however slow the database is. The cache is independent of users:
//! the caller's access to the VM is checked before.

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use metrics::counter;
use moka::sync::Cache;
use vmwatch_api::{
    InstanceId,
    metrics::{Limit, RowPage, RowPlace},
    wire::Fault,
};

use crate::{
    deadline::Deadline,
    store::{Query, RowKind, RowStore},
};

/// Maximum memory of cached answers, in bytes.
const MAX_CACHE_BYTES: u64 = 6 << 20;
/// Memory of an answer in addition to its rows: the key, the future and the cache's bookkeeping.
const OVERHEAD_BYTES: u32 = 600;
/// Assumed maximum size of a row as JSON, which takes 250 to 350 bytes. An answer with more bytes per row is not
/// cached.
const ROW_BYTES: u32 = 512;

/// A query for newest rows; equal queries have equal answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RowQuery {
    /// VM rows or process rows.
    pub kind: RowKind,
    /// The VM.
    pub instance: InstanceId,
    /// Only processes with this name.
    pub cmd: Option<String>,
    /// Maximum number of rows.
    pub limit: Limit,
    /// Only rows after this position, which are older.
    pub before: Option<RowPlace>,
}

type Read = Shared<BoxFuture<'static, Result<RowPage, Fault>>>;

/// Reads newest rows, with coalescing and caching.
pub struct RowCache {
    store: Arc<RowStore>,
    reads: Option<Cache<RowQuery, Read>>,
}

impl RowCache {
    /// Reuses an answer for the time `keep`; with zero every read is its own query.
    pub fn new(store: &Arc<RowStore>, keep: Duration) -> Self {
        let reads = || {
            Cache::builder()
                .weigher(|question: &RowQuery, _| question.max_bytes())
                .max_capacity(MAX_CACHE_BYTES)
                .time_to_live(keep)
                .build()
        };
        Self {
            store: Arc::clone(store),
            reads: (!keep.is_zero()).then(reads),
        }
    }

    /// A page of the newest rows, as [`RowStore::latest`] has it.
    pub async fn rows(&self, question: RowQuery, deadline: Deadline) -> Result<RowPage, Fault> {
        let Some(reads) = &self.reads else {
            return self.query(question, deadline).await;
        };
        // A shared query may have failed because its first caller's deadline passed, so try once more; a second failure
        // comes from the database.
        for _ in 0..2 {
            let mut mine = false;
            let read = reads.get_with(question.clone(), || {
                mine = true;
                self.query(question.clone(), deadline).shared()
            });
            let answer = read.await;
            let kept = answer
                .as_ref()
                .is_ok_and(|page| page.rows.as_json().len() <= question.max_bytes() as usize);
            if !kept {
                reads.invalidate(&question);
            }
            if mine || answer.is_ok() {
                return answer;
            }
        }
        self.query(question, deadline).await
    }

    fn query(&self, question: RowQuery, deadline: Deadline) -> BoxFuture<'static, Result<RowPage, Fault>> {
        counter!("vmwatch_newest_rows_queries_total").increment(1);
        let store = Arc::clone(&self.store);
        async move { Ok(store.latest(question.query(), deadline).await?) }.boxed()
    }
}

impl RowQuery {
    fn query(&self) -> Query<'_> {
        Query {
            kind: self.kind,
            instance: &self.instance,
            cmd: self.cmd.as_deref(),
            limit: self.limit,
            before: self.before.as_ref(),
        }
    }

    fn max_bytes(&self) -> u32 {
        OVERHEAD_BYTES + ROW_BYTES * u32::from(self.limit.get())
    }
}
