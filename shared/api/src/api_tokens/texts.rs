//! The texts of API tokens, validated while they are decoded.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use sha2::{Digest, Sha256};

use crate::bounded_text;

/// An API token: `vmt_ID_SECRET` with 16 and 64 lower-case hex digits. `Debug` does not print the secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ApiToken {
    pub id: ApiTokenId,
    secret: [u8; 32],
}

/// The text is not in the format of an [`ApiToken`]. The error does not repeat the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be an API token: vmt_, 16 hex digits, _, 64 hex digits")]
pub struct InvalidApiToken;

impl ApiToken {
    /// What every API token begins with.
    pub const PREFIX: &str = "vmt_";

    /// Creates an API token from random bits, which must come from the operating system's random generator.
    pub const fn from_random(id: [u8; 8], secret: [u8; 32]) -> Self {
        Self {
            id: ApiTokenId(id),
            secret,
        }
    }

    /// The hash by which the secret is stored. The secret has 256 random bits, so a fast hash is sufficient.
    pub fn secret_hash(&self) -> SecretHash {
        SecretHash(Sha256::digest(self.secret).into())
    }
}

/// Formats the whole token, including its secret.
impl fmt::Display for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}_{}", Self::PREFIX, self.id, hex::encode(self.secret))
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiToken({}, …)", self.id)
    }
}

impl FromStr for ApiToken {
    type Err = InvalidApiToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text
            .strip_prefix(Self::PREFIX)
            .and_then(|rest| rest.split_once('_'));
        let (id, secret) = parts.ok_or(InvalidApiToken)?;
        Ok(Self {
            id: id.parse().map_err(|_| InvalidApiToken)?,
            secret: lower_hex(secret).ok_or(InvalidApiToken)?,
        })
    }
}

/// The public id of an API token: 16 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(value_type = String, pattern = "^[0-9a-f]{16}$")
)]
pub struct ApiTokenId([u8; 8]);

impl ApiTokenId {
    const RULE: &str = "must be 16 characters of 0-9 and a-f";
}

impl FromStr for ApiTokenId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        lower_hex(text).map(Self).ok_or(Self::RULE)
    }
}

impl fmt::Display for ApiTokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Serialize for ApiTokenId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ApiTokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = bounded_text(deserializer, Self::RULE, |text| text.len() == 16)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The SHA-256 hash of the secret of an API token, as 64 hex digits in JSON. Comparing two hashes need not take
/// constant time, because it is infeasible to find a secret with a hash that begins like another hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SecretHash([u8; 32]);

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

impl Serialize for SecretHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for SecretHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const RULE: &str = "must be 64 characters of 0-9 and a-f";
        let text = bounded_text(deserializer, RULE, |text| text.len() == 64)?;
        lower_hex(&text).map(Self).ok_or_else(|| D::Error::custom(RULE))
    }
}

/// Decodes a text that consists of two lower-case hex digits per byte, and of nothing else.
fn lower_hex<const BYTES: usize>(text: &str) -> Option<[u8; BYTES]> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; BYTES];
    hex::decode_to_slice(text, &mut bytes).ok().map(|()| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn api_token_round_trips_and_debug_output_hides_its_secret() {
        let token = ApiToken::from_random([0xab; 8], [7; 32]);
        let text = token.to_string();
        assert_eq!(text, format!("vmt_{}_{}", "ab".repeat(8), "07".repeat(32)));
        assert_eq!(text.parse(), Ok(token));
        let shown = format!("{token:?} {:?}", token.secret_hash());
        assert!(!shown.contains("0707") && !shown.contains(&hex::encode(token.secret_hash().0)));
        for bad in [
            "",
            "vmt_",
            "vmt_abababababababab",
            "vmt_abababababababab_",
            &text[..text.len() - 1],
            &format!("{text}0"),
            &format!("{text} "),
            &text.to_uppercase(),
            &text.replace("ab", "AB"),
            &text.replace("vmt", "vmj"),
            &text[4..],
        ] {
            assert_eq!(bad.parse::<ApiToken>(), Err(InvalidApiToken), "{bad}");
        }
    }

    #[test]
    fn id_and_hash_round_trip_as_hex_digits() {
        let token = ApiToken::from_random([0xcd; 8], [1; 32]);
        let json = serde_json::to_string(&(token.id, token.secret_hash())).unwrap();
        assert!(json.starts_with(r#"["cdcdcdcdcdcdcdcd","#), "{json}");
        let read: (ApiTokenId, SecretHash) = serde_json::from_str(&json).unwrap();
        assert_eq!(read, (token.id, token.secret_hash()));
        for bad in ["", "cdcdcdcdcdcdcdc", "CDCDCDCDCDCDCDCD", "cdcdcdcdcdcdcdcg"] {
            assert!(bad.parse::<ApiTokenId>().is_err(), "{bad:?}");
        }
    }
}
