//! Ids of 32 lower-case hex digits, which [`RecordId`](crate::alerts::RecordId) and
//! [`OperationId`](crate::lifecycle::OperationId) have in common.

use sha2::{Digest, Sha256};

/// The validation rule, as quoted in error messages to callers.
pub(crate) const RULE: &str = "must be 32 lower-case hex digits";

/// Whether a text is such an id.
pub(crate) fn is_valid(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Derives an id from texts.
pub(crate) fn from_parts(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // Each part is preceded by its length, so different parts cannot produce the same input.
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    hex::encode(digest.get(..16).unwrap_or_default())
}
