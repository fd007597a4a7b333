//! The texts of join tokens, keys and platform ids, validated while they are decoded.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest, Sha256};

use crate::bounded_text;

/// Maximum length of [`Platform`], in bytes.
const MAX_PLATFORM: usize = 128;

/// A join token: `vmj_ID_SECRET` with 16 and 64 hex digits. `Debug` does not print the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub id: JoinTokenId,
    secret: [u8; 32],
}

/// The text is not in the format of a [`JoinToken`]. The error does not repeat the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a join token: vmj_, 16 hex digits, _, 64 hex digits")]
pub struct InvalidJoinToken;

impl JoinToken {
    /// Creates a join token from random bits, which must come from the operating system's random generator.
    pub fn from_random(id: [u8; 8], secret: [u8; 32]) -> Self {
        Self {
            id: JoinTokenId(hex::encode(id)),
            secret,
        }
    }

    /// The hash by which the secret is stored, in hex. The secret has 256 random bits, so a fast hash is sufficient.
    pub fn secret_hash(&self) -> String {
        hex::encode(Sha256::digest(self.secret))
    }
}

/// Formats the whole token, including its secret.
impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmj_{}_{}", self.id, hex::encode(self.secret))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, …)", self.id)
    }
}

impl FromStr for JoinToken {
    type Err = InvalidJoinToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.strip_prefix("vmj_").and_then(|rest| rest.split_once('_'));
        let (id, digits) = parts.ok_or(InvalidJoinToken)?;
        let mut secret = [0; 32];
        hex::decode_to_slice(digits, &mut secret).map_err(|_| InvalidJoinToken)?;
        let id = id.parse().map_err(|_| InvalidJoinToken)?;
        Ok(Self { id, secret })
    }
}

/// The public id of a join token: 16 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(pattern = "^[0-9a-f]{16}$")
)]
pub struct JoinTokenId(String);

impl JoinTokenId {
    const RULE: &str = "must be 16 characters of 0-9 and a-f";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl FromStr for JoinTokenId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Self::RULE)
        }
    }
}

impl<'de> Deserialize<'de> for JoinTokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for JoinTokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The public key of an agent: an nkey of a user, `U` and 55 characters of base 32.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(value_type = String, pattern = "^U[A-Z2-7]{55}$")
)]
// Clones share the text, because auth-svc has several copies of the keys of all agents in memory.
pub struct AgentKey(Arc<str>);

impl AgentKey {
    const RULE: &str = "must be the public nkey of a user: U and 55 characters of A-Z and 2-7";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        text.len() == 56
            && text.starts_with('U')
            && text.bytes().all(|byte| matches!(byte, b'A'..=b'Z' | b'2'..=b'7'))
    }
}

impl FromStr for AgentKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.into()))
        } else {
            Err(Self::RULE)
        }
    }
}

impl<'de> Deserialize<'de> for AgentKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(|text| Self(text.into()))
    }
}

impl fmt::Display for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the platform says of the VM (DMI product UUID, cloud-init's instance id or the machine id, with the source as its
/// prefix): 1 to 128 printable ASCII characters. A clone of the VM has another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Platform(String);

impl Platform {
    const RULE: &str = "must be a text of 1 to 128 printable ASCII characters";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        (1..=MAX_PLATFORM).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
    }
}

impl FromStr for Platform {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Self::RULE)
        }
    }
}

impl<'de> Deserialize<'de> for Platform {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

/// A text of at most 1,024 bytes that `Debug` does not print: a join token, valid or not, or an API token. A malformed
/// token is refused in the same way as a wrong one.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    const RULE: &str = "must be a text of at most 1024 bytes";

    pub fn new(token: &impl fmt::Display) -> Self {
        Self(token.to_string())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, |text| text.len() <= 1024).map(Self)
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_token_round_trips_and_debug_output_hides_its_secret() {
        let token = JoinToken::from_random([0xab; 8], [7; 32]);
        let text = token.to_string();
        assert_eq!(text, format!("vmj_{}_{}", "ab".repeat(8), "07".repeat(32)));
        assert_eq!(text.parse(), Ok(token.clone()));
        let secret = SecretText::new(&token);
        assert!(!format!("{token:?} {secret:?}").contains("0707"));
        for bad in [
            "",
            "vmj_",
            "vmj_abababababababab",
            &text[..text.len() - 1],
            &text.to_uppercase(),
            &text[4..],
        ] {
            assert_eq!(bad.parse::<JoinToken>(), Err(InvalidJoinToken), "{bad}");
        }
    }
}
