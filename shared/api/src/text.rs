//! Text types with limits that are checked during decoding, so handlers receive only valid texts.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de::Error};

/// Decodes a JSON string that passes `check`. Any other input (an object with a query operator, a number, a text that
/// is too long) is rejected with the message `rule`. The error never repeats the input, because it may be a password.
pub fn bounded_text<'de, D: Deserializer<'de>>(
    deserializer: D,
    rule: &'static str,
    check: impl Fn(&str) -> bool,
) -> Result<String, D::Error> {
    match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) if check(&text) => Ok(text),
        _ => Err(D::Error::custom(rule)),
    }
}

/// The id of a VM: 1 to 64 characters of `[0-9A-Za-z_-]`, so it is a valid NATS subject token. It need not be a
/// UUID.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(pattern = "^[0-9A-Za-z_-]{1,64}$")
)]
pub struct InstanceId(String);

/// The text is not a valid [`InstanceId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", InstanceId::RULE)]
pub struct InvalidInstanceId;

impl InstanceId {
    const RULE: &str = "must be 1 to 64 characters of 0-9, A-Z, a-z, _ and -";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn allows(text: &str) -> bool {
        (1..=64).contains(&text.len())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
    }
}

impl FromStr for InstanceId {
    type Err = InvalidInstanceId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidInstanceId)
        }
    }
}

impl<'de> Deserialize<'de> for InstanceId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_id_must_be_a_single_nats_subject_token() {
        for good in [
            "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e",
            "a",
            "VM_1",
            &"x".repeat(64),
        ] {
            assert_eq!(good.parse::<InstanceId>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a.b",
            "a*",
            "a>",
            "a b",
            "$SYS",
            "é",
            "a;",
            "a\n",
            &"x".repeat(65),
        ] {
            assert_eq!(bad.parse::<InstanceId>(), Err(InvalidInstanceId), "{bad:?}");
        }
    }

    #[test]
    fn database_operator_in_place_of_a_text_is_rejected_and_not_quoted_in_the_error() {
        for bad in [r#"{"$gt":"hunter2"}"#, r#"["hunter2"]"#, "1", "null", "true"] {
            let error = serde_json::from_str::<InstanceId>(bad).unwrap_err().to_string();
            assert!(
                error.contains("must be 1 to 64") && !error.contains("hunter2"),
                "{error}"
            );
        }
    }
}
