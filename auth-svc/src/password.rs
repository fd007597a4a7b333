//! Passwords as argon2id hashes, at OWASP's parameters (19 MiB, 2 passes, 1 lane: the Password Storage Cheat Sheet).

use std::{sync::Arc, time::Duration};

use argon2::{
    Algorithm, Argon2, Params, Version,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
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
    /// What a login of an unknown user is verified against, so that it takes as long as any other.
    dummy: String,
}

impl Hasher {
    pub(crate) fn new(permits: usize) -> Result<Self, AuthError> {
        let dummy = hash_now(b"no user has this password")?;
        Ok(Self {
            permits: Arc::new(Semaphore::new(permits)),
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
        blocking(permit, move || hash_now(password.as_bytes()))
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
        blocking(permit, move || {
            let parsed = PasswordHash::new(&stored).map_err(hash_error)?;
            Ok(known & argon2()?.verify_password(password.as_bytes(), &parsed).is_ok())
        })
        .await
    }
}

/// Off the async threads. The permit goes with the work: a caller who gives up does not make room for one more hash.
async fn blocking<T: Send + 'static>(
    permit: OwnedSemaphorePermit,
    work: impl FnOnce() -> Result<T, AuthError> + Send + 'static,
) -> Result<(T, OwnedSemaphorePermit), AuthError> {
    let hashed = tokio::task::spawn_blocking(move || work().map(|result| (result, permit)));
    hashed.await.map_err(|error| AuthError::Hash(error.to_string()))?
}

fn argon2() -> Result<Argon2<'static>, AuthError> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(hash_error)?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

fn hash_now(password: &[u8]) -> Result<String, AuthError> {
    Ok(argon2()?.hash_password(password).map_err(hash_error)?.to_string())
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
}
