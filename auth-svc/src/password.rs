//! Password hashing with argon2id and the parameters of OWASP's Password Storage Cheat Sheet (19 MiB of memory, 2
//! passes, 1 lane).

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use argon2::{
    Algorithm, Argon2, Block, Params, Version,
    password_hash::{
        CustomizedPasswordHasher, PasswordVerifier,
        phc::{Output, ParamsString, PasswordHash, Salt},
    },
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vmwatch_api::auth::Password;

use crate::AuthError;

const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// Maximum wait for a hashing permit. A login must finish within the caller's time limit of five seconds.
const LONGEST_WAIT: Duration = Duration::from_secs(3);
/// A login is refused if hashing the passwords queued before it would take longer than this.
const LONGEST_QUEUE: Duration = Duration::from_secs(1);
/// Smoothing of the moving average of the time per hash: the newest measurement has the weight 1 / `AVERAGED`.
const AVERAGED: u64 = 8;

/// Hashes and verifies passwords on separate threads, a limited number at a time.
pub(crate) struct Hasher {
    permits: Arc<Semaphore>,
    threads: u32,
    work: Arc<Work>,
    /// Memory blocks that are reused for hashing, at most one per permit. Without reuse, freed blocks would remain in
    /// the allocator's arena of each thread that ever hashed a password, because glibc stops returning blocks of 19 MiB
    /// to the operating system. Sixteen such arenas exceed a container's limit of 256 MiB.
    memories: Arc<Mutex<Vec<Memory>>>,
    /// The hash that logins of unknown users are verified against, so they take as long as other logins.
    dummy: String,
}

/// How much password hashing is queued.
#[derive(Debug)]
struct Work {
    /// Number of requests that hash a password or wait for a hashing permit.
    queued: AtomicU32,
    /// Moving average of the time per hash, in nanoseconds.
    each: AtomicU64,
}

/// The right to hash a password; dropping it returns the permit.
pub(crate) struct HashPermit {
    _permit: OwnedSemaphorePermit,
    _queued: Queued,
}

/// Counts a request as queued while it hashes a password or waits for a permit.
struct Queued(Arc<Work>);

impl Hasher {
    pub(crate) fn new(permits: usize) -> Result<Self, AuthError> {
        let memory = Memory::default();
        let began = Instant::now();
        let dummy = hash_now(&memory, b"no user has this password")?;
        Ok(Self {
            permits: Arc::new(Semaphore::new(permits)),
            threads: u32::try_from(permits).unwrap_or(u32::MAX),
            work: Arc::new(Work {
                queued: AtomicU32::new(0),
                each: AtomicU64::new(nanoseconds(began.elapsed())),
            }),
            memories: Arc::new(Mutex::new(vec![memory])),
            dummy,
        })
    }

    /// Acquires a hashing permit for a login, which is refused immediately if too much hashing is queued. The caller
    /// holds the permit until the login has succeeded or failed, so only a few attempts run concurrently.
    pub(crate) async fn login_permit(&self) -> Result<HashPermit, AuthError> {
        let ahead = self.work.time() / self.threads;
        if ahead > LONGEST_QUEUE {
            return Err(AuthError::QueueFull(ahead));
        }
        self.permit().await
    }

    /// Acquires a hashing permit for a user with a session. The queue limit for logins does not apply, so that
    /// administrators can set passwords during a flood of logins. The limit of concurrent user-management requests
    /// bounds the number of waiting requests.
    pub(crate) async fn permit(&self) -> Result<HashPermit, AuthError> {
        let queued = Queued::new(&self.work);
        let waited = tokio::time::timeout(LONGEST_WAIT, Arc::clone(&self.permits).acquire_owned()).await;
        Ok(HashPermit {
            _permit: waited
                .map_err(|_| AuthError::Busy)?
                .map_err(|_| AuthError::Busy)?,
            _queued: queued,
        })
    }

    /// Computes the hash of a password for storage.
    pub(crate) async fn hash(&self, password: Password) -> Result<String, AuthError> {
        let permit = self.permit().await?;
        self.blocking(permit, move |memory| hash_now(memory, password.as_bytes()))
            .await
            .map(|(hash, _)| hash)
    }

    /// Verifies a password against a stored hash. If there is no stored hash, the same work is done and the result is
    /// false.
    pub(crate) async fn verify(
        &self,
        permit: HashPermit,
        password: Password,
        stored: Option<String>,
    ) -> Result<(bool, HashPermit), AuthError> {
        let known = stored.is_some();
        let stored = stored.unwrap_or_else(|| self.dummy.clone());
        self.blocking(permit, move |memory| {
            let parsed = PasswordHash::new(&stored).map_err(hash_error)?;
            Ok(known & memory.verify_password(password.as_bytes(), &parsed).is_ok())
        })
        .await
    }

    /// Runs the work on a thread for blocking work. The work owns its hashing permit, so the permit is not
    /// returned early if the caller stops waiting.
    async fn blocking<T: Send + 'static>(
        &self,
        permit: HashPermit,
        hash: impl FnOnce(&Memory) -> Result<T, AuthError> + Send + 'static,
    ) -> Result<(T, HashPermit), AuthError> {
        let (memories, work) = (Arc::clone(&self.memories), Arc::clone(&self.work));
        let hashed = tokio::task::spawn_blocking(move || {
            let idle = || memories.lock().unwrap_or_else(PoisonError::into_inner);
            let memory = idle().pop().unwrap_or_default();
            let began = Instant::now();
            let result = hash(&memory);
            work.measured(began.elapsed());
            idle().push(memory);
            result.map(|result| (result, permit))
        });
        hashed.await.map_err(|error| AuthError::Hash(error.to_string()))?
    }
}

impl Work {
    /// The time that a single thread would need for all queued hashes.
    fn time(&self) -> Duration {
        let queued = u64::from(self.queued.load(Ordering::Relaxed));
        Duration::from_nanos(queued.saturating_mul(self.each.load(Ordering::Relaxed)))
    }

    fn measured(&self, took: Duration) {
        let took = nanoseconds(took);
        let averaged = |each: u64| Some(each - each / AVERAGED + took / AVERAGED);
        // The update cannot fail, because the closure always returns a value.
        let _ = self
            .each
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, averaged);
    }
}

impl Queued {
    fn new(work: &Arc<Work>) -> Self {
        work.queued.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(work))
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The memory block of one hash computation, which the next computation reuses.
#[derive(Default)]
struct Memory(Mutex<Vec<Block>>);

/// Hashes like `Argon2` of the argon2 crate, but with reused memory. The crate also verifies passwords through this
/// implementation, in constant time.
impl CustomizedPasswordHasher<PasswordHash> for Memory {
    type Params = Params;

    fn hash_password_customized(
        &self,
        password: &[u8],
        salt: &[u8],
        algorithm: Option<&str>,
        version: Option<u32>,
        params: Params,
    ) -> argon2::password_hash::Result<PasswordHash> {
        let algorithm = algorithm
            .map(Algorithm::try_from)
            .transpose()?
            .unwrap_or_default();
        let version = version.map(Version::try_from).transpose()?.unwrap_or_default();
        let mut output = vec![0; params.output_len().unwrap_or(Params::DEFAULT_OUTPUT_LEN)];
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.resize(params.block_count(), Block::default());
        let param_string = ParamsString::try_from(&params)?;
        Argon2::new(algorithm, version, params).hash_password_into_with_memory(
            password,
            salt,
            &mut output,
            blocks.as_mut_slice(),
        )?;
        Ok(PasswordHash {
            algorithm: algorithm.ident(),
            version: Some(version.into()),
            params: param_string,
            salt: Some(Salt::new(salt)?),
            hash: Some(Output::new(&output)?),
        })
    }
}

fn hash_now(memory: &Memory, password: &[u8]) -> Result<String, AuthError> {
    let mut salt = [0_u8; Salt::RECOMMENDED_LENGTH];
    getrandom::fill(&mut salt).map_err(hash_error)?;
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(hash_error)?;
    // `None` selects the default algorithm, argon2id, and its newest version.
    let hash = memory.hash_password_customized(password, &salt, None, None, params);
    Ok(hash.map_err(hash_error)?.to_string())
}

fn hash_error(error: impl std::fmt::Display) -> AuthError {
    AuthError::Hash(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn verifies(hasher: &Hasher, password: &str, stored: Option<String>) -> bool {
        let permit = hasher.permit().await.unwrap();
        hasher
            .verify(permit, password.parse().unwrap(), stored)
            .await
            .unwrap()
            .0
    }

    #[tokio::test]
    async fn password_hash_accepts_only_its_own_password() {
        let hasher = Hasher::new(1).unwrap();
        let hash = hasher.hash("correct horse".parse().unwrap()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(verifies(&hasher, "correct horse", Some(hash.clone())).await);
        assert!(!verifies(&hasher, "wrong", Some(hash)).await);
        assert!(!verifies(&hasher, "correct horse", None).await);
    }

    #[tokio::test]
    async fn long_hashing_queue_refuses_logins_but_not_administrators() {
        let hasher = Arc::new(Hasher::new(2).unwrap());
        hasher.work.each.store(100_000_000, Ordering::Relaxed);
        let held = [hasher.permit().await.unwrap(), hasher.permit().await.unwrap()];
        let waiting: Vec<_> = (0..19)
            .map(|_| {
                let hasher = Arc::clone(&hasher);
                tokio::spawn(async move { hasher.login_permit().await.map(drop) })
            })
            .collect();
        // The test queues 21 hashes of a tenth of a second each for two threads, which is more than one second of work.
        while hasher.work.queued.load(Ordering::Relaxed) < 21 {
            tokio::task::yield_now().await;
        }
        let Err(AuthError::QueueFull(wait)) = hasher.login_permit().await else {
            panic!("a login must be refused while the hashing queue is longer than one second");
        };
        assert_eq!(wait, Duration::from_millis(1050));
        let administrator = {
            let hasher = Arc::clone(&hasher);
            tokio::spawn(async move { hasher.permit().await.map(drop) })
        };
        drop(held);
        for waited in waiting {
            assert!(waited.await.unwrap().is_ok());
        }
        assert!(administrator.await.unwrap().is_ok());
        assert_eq!(hasher.work.queued.load(Ordering::Relaxed), 0);
        assert!(hasher.login_permit().await.is_ok());
    }

    #[tokio::test]
    async fn estimated_hashing_time_follows_measurements() {
        let hasher = Hasher::new(1).unwrap();
        hasher.work.each.store(1, Ordering::Relaxed);
        for _ in 0..50 {
            hasher.work.measured(Duration::from_millis(80));
        }
        let _queued = Queued::new(&hasher.work);
        let time = hasher.work.time();
        assert!((75..=80).contains(&time.as_millis()), "{time:?}");
        let far_too_long = Duration::from_secs(100);
        hasher
            .work
            .each
            .store(nanoseconds(far_too_long), Ordering::Relaxed);
        verifies(&hasher, "right", None).await;
        let time = hasher.work.time();
        assert!(
            time < far_too_long,
            "each hash must update the measured time: {time:?}"
        );
    }

    #[tokio::test]
    async fn dummy_password_does_not_log_in_unknown_user() {
        let hasher = Hasher::new(1).unwrap();
        assert!(!verifies(&hasher, "no user has this password", None).await);
    }

    /// The runtime's pool of blocking threads can have 512 threads. Memory must scale with the number of permits, not
    /// with the number of threads that ever hashed a password.
    #[tokio::test]
    async fn hashing_memory_is_bounded_by_permits_not_by_threads() {
        let hasher = Hasher::new(2).unwrap();
        let hash = hasher.hash("right".parse().unwrap()).await.unwrap();
        let before = peak_memory_kib();
        // The runtime starts a thread for each of these blocking tasks; later hashes are distributed over all of them.
        let together = Arc::new(std::sync::Barrier::new(16));
        let threads = (0..16).map(|_| {
            let together = Arc::clone(&together);
            tokio::task::spawn_blocking(move || together.wait())
        });
        futures::future::join_all(threads).await;
        for _ in 0..32 {
            assert!(verifies(&hasher, "right", Some(hash.clone())).await);
        }
        let grown = peak_memory_kib() - before;
        let memories = u64::from(2 * MEMORY_KIB);
        assert!(grown < memories + 16 * 1024, "peak memory grew by {grown} KiB");
    }

    /// The peak memory usage of this process in KiB.
    fn peak_memory_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
