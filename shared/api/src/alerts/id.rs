//! The ids of alerts, rules, silences, channels and messages.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

use crate::{bounded_text, hex_id};

/// The id of an alert, rule, silence, channel or message, written as 32 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(pattern = "^[0-9a-f]{32}$")
)]
pub struct RecordId(String);

/// The text is not a valid [`RecordId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", hex_id::RULE)]
pub struct InvalidRecordId;

impl RecordId {
    /// Creates the id of a record that a user creates. The bits must come from the operating system's random generator.
    pub fn from_random(bits: [u8; 16]) -> Self {
        Self(hex::encode(bits))
    }

    /// Derives the id of a record from what identifies it, so that making the same record again gives the same id.
    pub fn from_parts(parts: &[&str]) -> Self {
        Self(hex_id::from_parts(parts))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RecordId {
    type Err = InvalidRecordId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if hex_id::is_valid(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidRecordId)
        }
    }
}

impl<'de> Deserialize<'de> for RecordId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, hex_id::RULE, hex_id::is_valid).map(Self)
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_depends_on_where_its_parts_end() {
        let id = RecordId::from_parts(&["ab", "c"]);
        assert_eq!(id, RecordId::from_parts(&["ab", "c"]));
        assert_ne!(id, RecordId::from_parts(&["a", "bc"]));
        assert_eq!(id.as_str().parse(), Ok(id.clone()));
        for bad in ["", "abc", &"A".repeat(32), &"0".repeat(33)] {
            assert_eq!(bad.parse::<RecordId>(), Err(InvalidRecordId), "{bad}");
        }
    }
}
