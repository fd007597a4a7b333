//! Passwords as argon2id hashes, at OWASP's parameters (19 MiB, 2 passes, 1 lane: the Password Storage Cheat Sheet).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use argon2::{
    Algorithm, Argon2, Block, Params, Version,
    password_hash::{
        CustomizedPasswordHasher, PasswordVerifier,
        phc::{Output, ParamsString, PasswordHash, Salt},
    },
};
use shared::api::auth::Password;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::AuthError;

const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// Longer than this nobody is left waiting for a permit: a login must end within the caller's five seconds.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// Hashes and verifies, a bounded number at once and never on an async thread.
pub(crate) struct Hasher {
    permits: Arc<Semaphore>,
    /// Of hashes that are done, for the next ones: at most one a permit. Memory that is given back and asked for anew
    /// each time stays with the allocator's arena of each thread that ever hashed (glibc raises its threshold for
    /// returning it to the system beyond 19 MiB), and sixteen of those are more than a container of 256 MiB has.
    memories: Arc<Mutex<Vec<Memory>>>,
    /// What a login of an unknown user is verified against, so that it takes as long as any other.
    dummy: String,
}

impl Hasher {
    pub(crate) fn new(permits: usize) -> Result<Self, AuthError> {
        let memory = Memory::default();
        let dummy = hash_now(&memory, b"no user has this password")?;
        Ok(Self {
            permits: Arc::new(Semaphore::new(permits)),
            memories: Arc::new(Mutex::new(vec![memory])),
            dummy,
        })
    }

    /// A place among those that hash; held until the login is decided, so that the tries under way at once are few.
    pub(crate) async fn permit(&self) -> Result<OwnedSemaphorePermit, AuthError> {
        let waited = tokio::time::timeout(LONGEST_WAIT, Arc::clone(&self.permits).acquire_owned()).await;
        waited.map_err(|_| AuthError::Busy)?.map_err(|_| AuthError::Busy)
    }

    /// The hash to store.
    pub(crate) async fn hash(&self, password: Password) -> Result<String, AuthError> {
        let permit = self.permit().await?;
        self.blocking(permit, move |memory| hash_now(memory, password.as_bytes()))
            .await
            .map(|(hash, _)| hash)
    }

    /// Whether the password belongs to the stored hash; without one the answer is no, after the same work.
    pub(crate) async fn verify(
        &self,
        permit: OwnedSemaphorePermit,
        password: Password,
        stored: Option<String>,
    ) -> Result<(bool, OwnedSemaphorePermit), AuthError> {
        let known = stored.is_some();
        let stored = stored.unwrap_or_else(|| self.dummy.clone());
        self.blocking(permit, move |memory| {
            let parsed = PasswordHash::new(&stored).map_err(hash_error)?;
            Ok(known & memory.verify_password(password.as_bytes(), &parsed).is_ok())
        })
        .await
    }

    /// Off the async threads. The permit goes with the work: a caller who gives up does not make room for one more hash.
    async fn blocking<T: Send + 'static>(
        &self,
        permit: OwnedSemaphorePermit,
        work: impl FnOnce(&Memory) -> Result<T, AuthError> + Send + 'static,
    ) -> Result<(T, OwnedSemaphorePermit), AuthError> {
        let memories = Arc::clone(&self.memories);
        let hashed = tokio::task::spawn_blocking(move || {
            let idle = || memories.lock().unwrap_or_else(PoisonError::into_inner);
            let memory = idle().pop().unwrap_or_default();
            let result = work(&memory);
            idle().push(memory);
            result.map(|result| (result, permit))
        });
        hashed.await.map_err(|error| AuthError::Hash(error.to_string()))?
    }
}

/// What one hash works in, used again by the next.
#[derive(Default)]
struct Memory(Mutex<Vec<Block>>);

/// As `Argon2` does it itself, but for the memory. With this the library verifies as well, in constant time.
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
    // Argon2id and its newest version are the defaults.
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
    async fn a_hash_verifies_its_own_password_only() {
        let hasher = Hasher::new(1).unwrap();
        let hash = hasher.hash("correct horse".parse().unwrap()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(verifies(&hasher, "correct horse", Some(hash.clone())).await);
        assert!(!verifies(&hasher, "wrong", Some(hash)).await);
        assert!(!verifies(&hasher, "correct horse", None).await);
    }

    #[tokio::test]
    async fn not_even_the_dummys_own_password_logs_in_an_unknown_user() {
        let hasher = Hasher::new(1).unwrap();
        assert!(!verifies(&hasher, "no user has this password", None).await);
    }

    /// Of threads that ever hashed there may be many: the runtime's pool has 512. Memory is for each permit, not for each
    /// of them.
    #[tokio::test]
    async fn memory_is_bounded_by_permits_however_many_threads_hash() {
        let hasher = Hasher::new(2).unwrap();
        let hash = hasher.hash("right".parse().unwrap()).await.unwrap();
        let before = peak_memory_kib();
        // The pool makes a thread for each of these, and gives later work to all of them in turn.
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
        assert!(grown < memories + 16 * 1024, "{grown} KiB more than before");
    }

    /// The most that this process ever had.
    fn peak_memory_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
