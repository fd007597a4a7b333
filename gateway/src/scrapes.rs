//! Shares one computation of the metrics among all clients with equal scopes, for [`KEPT`].

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use moka::sync::Cache;
use tokio::sync::OnceCell;
use vmwatch_api::{InstanceId, Scope, wire::Fault};

/// Time for which an answer is reused, from the start of its computation.
const KEPT: Duration = Duration::from_secs(15);
/// Maximum number of answers that are kept. Only one of them has all VMs; a limited scope has at most 500.
const MAX_ANSWERS: u64 = 32;

/// The VMs of a scope, sorted; `None` if these are all VMs.
type Vms = Option<Vec<InstanceId>>;

/// Compressed answers by scope.
pub(crate) struct Scrapes(Cache<Vms, Arc<OnceCell<Bytes>>>);

/// An answer.
#[derive(Debug)]
pub(crate) struct Scrape {
    /// The metrics, compressed with gzip.
    pub(crate) gzip: Bytes,
    /// Whether another request had already computed them.
    pub(crate) is_shared: bool,
}

impl Scrapes {
    pub(crate) fn new() -> Self {
        Self::keeping(KEPT)
    }

    fn keeping(time: Duration) -> Self {
        let answers = Cache::builder()
            .max_capacity(MAX_ANSWERS)
            .time_to_live(time)
            .build();
        Self(answers)
    }

    /// Returns the answer for a scope. If there is none, one request computes it and the others wait for it. If the
    /// computation fails or its client disconnects, another request computes the answer.
    pub(crate) async fn get(
        &self,
        scope: &Scope,
        compute: impl Future<Output = Result<Bytes, Fault>>,
    ) -> Result<Scrape, Fault> {
        let answer = self.0.get_with(vms(scope), Arc::default);
        let mut is_shared = true;
        let computed = answer.get_or_try_init(|| {
            is_shared = false;
            compute
        });
        let gzip = computed.await?.clone();
        Ok(Scrape { gzip, is_shared })
    }
}

fn vms(scope: &Scope) -> Vms {
    match scope {
        Scope::All => None,
        Scope::Only(ids) => {
            let mut ids = ids.clone();
            ids.sort_unstable();
            ids.dedup();
            Some(ids)
        }
        Scope::Unknown => Some(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vmwatch_api::wire::FaultKind;

    use super::*;

    fn only(ids: &[&str]) -> Scope {
        Scope::Only(ids.iter().map(|id| id.parse().unwrap()).collect())
    }

    #[tokio::test]
    async fn clients_with_equal_scopes_share_one_computation() {
        let (scrapes, count) = (Scrapes::new(), AtomicUsize::new(0));
        let get = async |scope: Scope| {
            let compute = async {
                tokio::task::yield_now().await;
                let number = count.fetch_add(1, Ordering::Relaxed);
                Ok(Bytes::from(number.to_string()))
            };
            let scrape = scrapes.get(&scope, compute).await.unwrap();
            (scrape.gzip, scrape.is_shared)
        };
        let (one, other) = tokio::join!(get(Scope::All), get(Scope::All));
        assert_eq!((one, other), (("0".into(), false), ("0".into(), true)));
        assert_eq!(get(only(&["a", "b"])).await, ("1".into(), false));
        assert_eq!(get(only(&["b", "a", "b"])).await, ("1".into(), true));
        assert_eq!(get(only(&["a"])).await, ("2".into(), false));
        assert_eq!(get(Scope::Unknown).await, ("3".into(), false));
        assert_eq!(get(only(&[])).await, ("3".into(), true));
    }

    #[tokio::test]
    async fn failed_and_expired_answers_are_computed_again() {
        let scrapes = Scrapes::keeping(Duration::from_millis(1));
        let fault = async { Err(Fault::new(FaultKind::Unavailable, "x")) };
        scrapes.get(&Scope::All, fault).await.unwrap_err();
        let get = || scrapes.get(&Scope::All, async { Ok(Bytes::from_static(b"1")) });
        get().await.unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(30);
        while get().await.unwrap().is_shared {
            assert!(std::time::Instant::now() < end, "the answer never expires");
            tokio::task::yield_now().await;
        }
    }
}
