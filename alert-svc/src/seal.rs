//! Seals the secrets of channels, so that the database contains none in clear text.
//!
//! A sealed secret is the text `v1.<key id>.<base64 of nonce and ciphertext>`. The cipher is XChaCha20-Poly1305 with a random
//! nonce. The channel's id and receiver are authenticated with the secret: if either changes, the secret cannot be opened,
//! so that a changed document of the database cannot direct a secret to another receiver.

use std::{fmt, str::FromStr};

use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use data_encoding::BASE64;
use sha2::{Digest, Sha256};
use vmwatch_api::alerts::{RecordId, channels::ChannelTarget};
use zeroize::Zeroizing;

const VERSION: &str = "v1";
const NONCE_BYTES: usize = 24;
/// Length of a key's id in hex digits.
const KEY_ID_DIGITS: usize = 16;
/// Maximum number of keys in the file: the current one, and older ones during a change.
const MAX_KEYS: usize = 8;

/// Why a secret could not be sealed or opened. The texts are shown to administrators and contain no secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The service has no key.
    #[error("the service has no key for secrets; set VMWATCH_ALERT_KEY_FILE")]
    NoKey,
    /// The secret was sealed with a key that is not in the file.
    #[error(
        "the secret was sealed with a key that VMWATCH_ALERT_KEY_FILE does not contain; enter the secret again"
    )]
    OtherKey,
    /// The sealed text is damaged, or it belongs to another channel or receiver.
    #[error("the sealed secret does not belong to this channel and receiver; enter the secret again")]
    Damaged,
    /// The operating system's source of random numbers failed.
    #[error("the operating system's source of random numbers failed")]
    Random,
}

/// The content of a key file is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must contain 1 to 8 lines of 64 hex digits, each a key, as printed by `openssl rand -hex 32`")]
pub(crate) struct InvalidKeys;

struct SealingKey {
    id: String,
    key: Zeroizing<[u8; 32]>,
}

/// The keys that seal secrets. The first one seals; all of them open. Without any, secrets can be neither sealed nor opened.
#[derive(Default)]
pub(crate) struct Keys(Vec<SealingKey>);

/// Shows only the ids of the keys.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.id)).finish()
    }
}

impl FromStr for Keys {
    type Err = InvalidKeys;

    /// Reads the lines of a key file. Empty lines are ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let keys = lines.map(SealingKey::from_hex).collect::<Result<Vec<_>, _>>()?;
        if (1..=MAX_KEYS).contains(&keys.len()) {
            Ok(Self(keys))
        } else {
            Err(InvalidKeys)
        }
    }
}

impl SealingKey {
    fn from_hex(digits: &str) -> Result<Self, InvalidKeys> {
        let mut key = Zeroizing::new([0; 32]);
        hex::decode_to_slice(digits, key.as_mut_slice()).map_err(|_| InvalidKeys)?;
        let mut id = hex::encode(Sha256::digest(key.as_slice()));
        id.truncate(KEY_ID_DIGITS);
        Ok(Self { id, key })
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.key).into())
    }
}

impl Keys {
    /// Whether there is a key.
    pub(crate) fn are_known(&self) -> bool {
        !self.0.is_empty()
    }

    /// Seals the secret of a channel for its receiver.
    pub(crate) fn seal(
        &self,
        channel: &RecordId,
        target: &ChannelTarget,
        secret: &str,
    ) -> Result<String, SealError> {
        let key = self.0.first().ok_or(SealError::NoKey)?;
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|_| SealError::Random)?;
        let owner = owner(channel, target);
        let payload = Payload {
            msg: secret.as_bytes(),
            aad: owner.as_bytes(),
        };
        // Encryption fails only for texts of many gigabytes.
        let encrypted = key.cipher().encrypt(&XNonce::from(nonce), payload);
        let encrypted = encrypted.map_err(|_| SealError::Damaged)?;
        let sealed = [nonce.as_slice(), &encrypted].concat();
        Ok(format!("{VERSION}.{}.{}", key.id, BASE64.encode(&sealed)))
    }

    /// Opens the sealed secret of a channel.
    pub(crate) fn open(
        &self,
        channel: &RecordId,
        target: &ChannelTarget,
        sealed: &str,
    ) -> Result<Zeroizing<String>, SealError> {
        if self.0.is_empty() {
            return Err(SealError::NoKey);
        }
        let mut parts = sealed.splitn(3, '.');
        let (Some(VERSION), Some(id), Some(text)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(SealError::Damaged);
        };
        let key = self
            .0
            .iter()
            .find(|key| key.id == id)
            .ok_or(SealError::OtherKey)?;
        let bytes = BASE64.decode(text.as_bytes()).map_err(|_| SealError::Damaged)?;
        let (nonce, encrypted) = bytes
            .split_first_chunk::<NONCE_BYTES>()
            .ok_or(SealError::Damaged)?;
        let owner = owner(channel, target);
        let payload = Payload {
            msg: encrypted,
            aad: owner.as_bytes(),
        };
        let opened = key.cipher().decrypt(&XNonce::from(*nonce), payload);
        let opened = String::from_utf8(opened.map_err(|_| SealError::Damaged)?);
        opened.map(Zeroizing::new).map_err(|_| SealError::Damaged)
    }

    /// Whether the secret is sealed with the first key.
    pub(crate) fn is_current(&self, sealed: &str) -> bool {
        let current = self.0.first().map(|key| key.id.as_str());
        current.is_some() && sealed.split('.').nth(1) == current
    }
}

/// What identifies the receiver of a channel's secret. If it changes, the secret must be entered again.
pub(crate) fn receiver(target: &ChannelTarget) -> String {
    match target {
        ChannelTarget::Email {
            server, tls, user, ..
        } => {
            let user = user.as_deref().unwrap_or_default();
            format!("email {server} {tls:?} {user}")
        }
        ChannelTarget::Webhook { url } | ChannelTarget::Alertmanager { url } => {
            format!("{} {}", target.kind(), url.as_str())
        }
    }
}

/// The data that is authenticated with a secret.
fn owner(channel: &RecordId, target: &ChannelTarget) -> String {
    format!("{channel} {}", receiver(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const OLDER: &str = "ff0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1eff";

    fn webhook(url: &str) -> ChannelTarget {
        serde_json::from_value(serde_json::json!({ "kind": "webhook", "url": url })).unwrap()
    }

    #[test]
    fn secret_opens_only_for_its_channel_and_receiver() {
        let keys: Keys = KEY.parse().unwrap();
        let (channel, other) = (RecordId::from_parts(&["a"]), RecordId::from_parts(&["b"]));
        let target = webhook("https://example.com/a");
        let sealed = keys.seal(&channel, &target, "s3cret").unwrap();
        assert!(!sealed.contains("s3cret"));
        assert_ne!(
            sealed,
            keys.seal(&channel, &target, "s3cret").unwrap(),
            "nonces are random"
        );
        assert_eq!(keys.open(&channel, &target, &sealed).unwrap().as_str(), "s3cret");
        assert_eq!(keys.open(&other, &target, &sealed), Err(SealError::Damaged));
        let moved = webhook("https://evil.example.com/a");
        assert_eq!(keys.open(&channel, &moved, &sealed), Err(SealError::Damaged));
        let mut damaged = sealed.clone();
        let last = if damaged.pop() == Some('A') { 'B' } else { 'A' };
        damaged.push(last);
        assert_eq!(keys.open(&channel, &target, &damaged), Err(SealError::Damaged));
    }

    #[test]
    fn older_keys_open_but_do_not_seal() {
        let (channel, target) = (RecordId::from_parts(&["a"]), webhook("https://example.com"));
        let older: Keys = OLDER.parse().unwrap();
        let both: Keys = format!("{KEY}\n\n{OLDER}\n").parse().unwrap();
        let sealed = older.seal(&channel, &target, "s").unwrap();
        assert!(older.is_current(&sealed) && !both.is_current(&sealed));
        assert_eq!(both.open(&channel, &target, &sealed).unwrap().as_str(), "s");
        let again = both.seal(&channel, &target, "s").unwrap();
        assert!(both.is_current(&again));
        assert_eq!(older.open(&channel, &target, &again), Err(SealError::OtherKey));
    }

    #[test]
    fn without_keys_nothing_is_sealed_or_opened() {
        let (channel, target) = (RecordId::from_parts(&["a"]), webhook("https://example.com"));
        let keys = Keys::default();
        assert!(!keys.are_known());
        assert_eq!(keys.seal(&channel, &target, "s"), Err(SealError::NoKey));
        assert_eq!(keys.open(&channel, &target, "v1.x.y"), Err(SealError::NoKey));
    }

    #[test]
    fn rejects_invalid_key_files_and_shows_no_key() {
        for text in [
            "",
            "\n",
            "abc",
            &KEY[1..],
            &format!("{KEY}\nx"),
            &format!("{KEY}\n").repeat(9),
        ] {
            assert_eq!(text.parse::<Keys>().err(), Some(InvalidKeys), "{text}");
        }
        let shown = format!("{:?}", KEY.parse::<Keys>().unwrap());
        assert!(!shown.contains(&KEY[..16]) && shown.len() < 24, "{shown}");
    }
}
