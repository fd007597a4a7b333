//! Lets equal concurrent reads of newest rows share one query (single-flight), and reuses the answer for a short time.
//!
//! An answer is reused for the configured time, counted from the start of its query. So no answer is older than the
//! configured time, however slow the database is. Users share cached answers, because the caller's access to the VM is
//! checked before the cache is read.

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use metrics::counter;
use moka::sync::Cache;
use vmwatch_api::{
    InstanceId,
    metrics::{Latest, Limit, RowPage, RowPosition},
    wire::Fault,
};

use crate::{
    deadline::Deadline,
    reads::PageQuery,
    store::{RowKind, RowStore},
};

/// Maximum total size of cached answers, in bytes.
const MAX_CACHE_BYTES: u64 = 6 << 20;
/// Memory that an answer takes in addition to its rows: the key, the future and the cache's bookkeeping.
const OVERHEAD_BYTES: u32 = 600;
/// Assumed maximum size of a row as JSON; rows normally take 250 to 350 bytes. An answer with more bytes per row is not
/// cached.
const ROW_BYTES: u32 = 512;

/// A query for newest rows. Equal queries have equal answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RowQuery {
    /// Which rows to read.
    pub kind: RowKind,
    /// The VM whose rows to read.
    pub instance: InstanceId,
    /// Only rows of processes with this name.
    pub cmd: Option<String>,
    /// Maximum number of rows in the answer.
    pub limit: Limit,
    /// Only rows that come after this row in the order of the answer (newest first).
    pub before: Option<RowPosition>,
}

type Read = Shared<BoxFuture<'static, Result<RowPage, Fault>>>;

/// Reads newest rows and caches the answers.
pub struct RowCache {
    store: Arc<RowStore>,
    reads: Option<Cache<RowQuery, Read>>,
}

impl RowCache {
    /// Creates a cache that reuses an answer for the time `keep`. If `keep` is zero, nothing is cached and every read
    /// sends its own query.
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

    /// Reads a page of the newest rows, like [`RowStore::latest`].
    pub async fn rows(&self, question: RowQuery, deadline: Deadline) -> Result<RowPage, Fault> {
        let Some(reads) = &self.reads else {
            return self.query(question, deadline).await;
        };
        // Try again once, because a shared query may have failed only because its first caller's deadline passed. If
        // the second attempt fails, the database itself has failed.
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

    /// Reads a page of the newest rows of a VM: those of its agent, or those of its hypervisor if there is none of an agent.
    pub async fn vm_rows(&self, latest: Latest, deadline: Deadline) -> Result<RowPage, Fault> {
        let mut question = RowQuery {
            kind: RowKind::Vm,
            instance: latest.instance_id,
            cmd: None,
            limit: latest.limit,
            before: latest.before,
        };
        let of_agent = self.rows(question.clone(), deadline).await?;
        if !is_empty(&of_agent) {
            return Ok(of_agent);
        }
        // A page after the last row of the agent is empty too.
        if question.before.is_some() {
            let first = RowQuery {
                limit: Limit::ONE,
                before: None,
                ..question.clone()
            };
            if !is_empty(&self.rows(first, deadline).await?) {
                return Ok(of_agent);
            }
        }
        question.kind = RowKind::Hypervisor;
        self.rows(question, deadline).await
    }

    fn query(&self, question: RowQuery, deadline: Deadline) -> BoxFuture<'static, Result<RowPage, Fault>> {
        counter!("vmwatch_newest_rows_queries_total").increment(1);
        let store = Arc::clone(&self.store);
        async move { Ok(store.latest(question.query(), deadline).await?) }.boxed()
    }
}

/// Whether there are no rows, on this page and after it.
fn is_empty(page: &RowPage) -> bool {
    page.next.is_none() && page.rows.as_json() == "[]"
}

impl RowQuery {
    fn query(&self) -> PageQuery<'_> {
        PageQuery {
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
