//! The newest rows, read once for all who ask for the same at about the same time.
//!
//! A read that equals one under way waits for that one's answer, and an answer is given again for as long as the setting
//! says, counted from the start of its query: no answer is older than that, however slow the database was. What is kept
//! knows nothing of users: whether a caller may see an instance is decided before this is asked.

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

/// The most memory that kept answers take, in bytes.
const KEPT_BYTES: u64 = 6 << 20;
/// What one takes beside its rows: the key, the read, the cache's own bookkeeping.
const OVERHEAD_BYTES: u32 = 600;
/// A row as JSON takes 250 to 350 bytes. An answer that takes more than this a row is not kept.
const ROW_BYTES: u32 = 512;

/// What is asked for; equal ones have equal answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Question {
    /// Which rows.
    pub kind: RowKind,
    /// Of which VM.
    pub instance: InstanceId,
    /// Of processes of this name only.
    pub cmd: Option<String>,
    /// At most how many.
    pub limit: Limit,
    /// Only rows behind this place.
    pub before: Option<RowPlace>,
}

type Read = Shared<BoxFuture<'static, Result<RowPage, Fault>>>;

/// The newest rows, shared by equal reads.
pub struct NewestRows {
    store: Arc<RowStore>,
    reads: Option<Cache<Question, Read>>,
}

impl NewestRows {
    /// Gives an answer again for so long; zero: every read is a query of its own.
    pub fn of(store: &Arc<RowStore>, keep: Duration) -> Self {
        let reads = || {
            Cache::builder()
                .weigher(|question: &Question, _| question.most_bytes())
                .max_capacity(KEPT_BYTES)
                .time_to_live(keep)
                .build()
        };
        Self {
            store: Arc::clone(store),
            reads: (!keep.is_zero()).then(reads),
        }
    }

    /// A page of the newest rows, as [`RowStore::latest`] has it.
    pub async fn rows(&self, question: Question, deadline: Deadline) -> Result<RowPage, Fault> {
        let Some(reads) = &self.reads else {
            return self.query(question, deadline).await;
        };
        // Another's query may have failed for want of its caller's time, so that it is not the last word; a second one
        // that fails is the database's.
        for _ in 0..2 {
            let mut mine = false;
            let read = reads.get_with(question.clone(), || {
                mine = true;
                self.query(question.clone(), deadline).shared()
            });
            let answer = read.await;
            let kept = answer
                .as_ref()
                .is_ok_and(|page| page.rows.as_json().len() <= question.most_bytes() as usize);
            if !kept {
                reads.invalidate(&question);
            }
            if mine || answer.is_ok() {
                return answer;
            }
        }
        self.query(question, deadline).await
    }

    fn query(&self, question: Question, deadline: Deadline) -> BoxFuture<'static, Result<RowPage, Fault>> {
        counter!("vmwatch_newest_rows_queries_total").increment(1);
        let store = Arc::clone(&self.store);
        async move { Ok(store.latest(question.query(), deadline).await?) }.boxed()
    }
}

impl Question {
    fn query(&self) -> Query<'_> {
        Query {
            kind: self.kind,
            instance: &self.instance,
            cmd: self.cmd.as_deref(),
            limit: self.limit,
            before: self.before.as_ref(),
        }
    }

    fn most_bytes(&self) -> u32 {
        OVERHEAD_BYTES + ROW_BYTES * u32::from(self.limit.get())
    }
}
