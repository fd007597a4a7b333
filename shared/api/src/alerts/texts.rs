//! Texts that users write, with their limits.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

use crate::bounded_text;

/// Maximum length of a [`Title`] in bytes.
const MAX_TITLE: usize = 128;
/// Maximum length of a [`Comment`] in bytes.
const MAX_COMMENT: usize = 1024;

/// The name of a rule, channel or API token: 1 to 128 bytes without control characters and without space at its ends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(min_length = 1, max_length = 128)
)]
pub struct Title(String);

/// The text is not a valid [`Title`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", Title::RULE)]
pub struct InvalidTitle;

impl Title {
    const RULE: &str =
        "must be a text of 1 to 128 bytes without control characters and without space at its ends";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        (1..=MAX_TITLE).contains(&text.len()) && !text.contains(char::is_control) && text.trim() == text
    }
}

impl FromStr for Title {
    type Err = InvalidTitle;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidTitle)
        }
    }
}

impl<'de> Deserialize<'de> for Title {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for Title {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A comment of a user: at most 1,024 bytes; it may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(max_length = 1024))]
pub struct Comment(String);

impl Comment {
    const RULE: &str = "must be a text of at most 1024 bytes";

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Comment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, |text| text.len() <= MAX_COMMENT).map(Self)
    }
}
