//! User names by RFC 8265 (PRECIS).
//!
//! | type | meaning | used for |
//! |---|---|---|
//! | [`UserName`] | a name as given by a caller | login, and requests about a user |
//! | [`NewUserName`] | a name that a new user may have | creating a user |
//! | [`UserKey`] | the identity behind a name: equal for spellings that differ only in case | database, buckets, throttle |

use std::{borrow::Cow, fmt, str::FromStr};

use precis_profiles::{
    UsernameCaseMapped, UsernameCasePreserved, precis_core::profile::PrecisFastInvocation,
};
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use sha2::{Digest, Sha256};
use unicode_security::MixedScript;

use super::bounded_text;

/// The SHA-256 hash of a [`UserKey`].
pub type UserHash = [u8; 32];

/// The name of a user as typed or stored: 1 to 128 characters, no control characters. Such a user need not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
#[cfg_attr(
    feature = "openapi",
    derive(utoipa::ToSchema),
    schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$"
    )
)]
pub struct UserName(String);

impl UserName {
    const RULE: &str = "must be a text of 1 to 128 characters, none a control character";

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key that identifies the user with this name.
    pub fn key(&self) -> UserKey {
        UserKey::from_name(&self.0)
    }

    /// The user name as written to the audit and the log. If no user can have the name, all characters except ASCII are
    /// escaped, so the text cannot be mistaken for the name of an existing user.
    pub fn shown(&self) -> String {
        if NewUserName::try_from(self.clone()).is_ok_and(|allowed| allowed.0 == *self) {
            return self.0.clone();
        }
        let is_plain = |character: char| character == ' ' || character.is_ascii_graphic();
        let escaped = self.0.chars().map(|character| {
            if is_plain(character) {
                character.to_string()
            } else {
                character.escape_unicode().to_string()
            }
        });
        escaped.collect()
    }

    fn allows(text: &str) -> bool {
        (1..=128).contains(&text.chars().count()) && !text.chars().any(char::is_control)
    }
}

impl FromStr for UserName {
    type Err = InvalidUserName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidUserName::Bounds)
        }
    }
}

impl<'de> Deserialize<'de> for UserName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUserName {
    /// The user name is too short, too long, or contains control characters.
    #[error("{}", UserName::RULE)]
    Bounds,
    /// The user name violates the profile `UsernameCasePreserved` of RFC 8265.
    #[error(
        "must consist of letters and digits of one script and ASCII punctuation, without spaces, symbols and invisible characters (RFC 8265)"
    )]
    Characters,
    /// The user name mixes scripts with similar letters.
    #[error("must not mix scripts, such as Latin and Cyrillic letters")]
    Scripts,
}

/// A name that a new user may have: it conforms to the profile `UsernameCasePreserved` of RFC 8265 and uses a single
/// script by Unicode technical standard 39, which treats Japanese, Korean, and Han with Bopomofo as one script each.
/// The name is stored as normalized by the profile, which preserves case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct NewUserName(UserName);

impl NewUserName {
    pub fn into_inner(self) -> UserName {
        self.0
    }

    pub const fn as_name(&self) -> &UserName {
        &self.0
    }
}

impl TryFrom<UserName> for NewUserName {
    type Error = InvalidUserName;

    fn try_from(given: UserName) -> Result<Self, Self::Error> {
        let characters = |_| InvalidUserName::Characters;
        let name = UsernameCasePreserved::enforce(given.as_str()).map_err(characters)?;
        let key = UsernameCaseMapped::enforce(&*name).map_err(characters)?;
        // For a few names the rules give a different result when applied again (RFC 8264, section 7). Such names are
        // rejected.
        let is_stable = UsernameCasePreserved::enforce(&*name).is_ok_and(|again| again == name)
            && UsernameCaseMapped::enforce(&*key).is_ok_and(|again| again == key);
        if !is_stable {
            return Err(InvalidUserName::Characters);
        }
        if !name.is_single_script() {
            return Err(InvalidUserName::Scripts);
        }
        // Normalization can lengthen a name, so its length must be checked again.
        name.parse().map(Self)
    }
}

impl FromStr for NewUserName {
    type Err = InvalidUserName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<UserName>()?.try_into()
    }
}

impl<'de> Deserialize<'de> for NewUserName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        UserName::deserialize(deserializer)?
            .try_into()
            .map_err(D::Error::custom)
    }
}

impl fmt::Display for NewUserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity of a user: the name normalized by the profile `UsernameCaseMapped` of RFC 8265. Users are stored,
/// looked up, throttled and compared by this key, so no two users differ only in letter case, width or Unicode
/// normalization.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UserKey(String);

impl UserKey {
    /// Derives the key of a user name. An invalid user name is used as its own key, which no user has. Looking it up
    /// therefore costs the same as looking up an existing user.
    pub fn from_name(name: &str) -> Self {
        let mapped = UsernameCaseMapped::enforce(name);
        Self(mapped.map_or_else(|_| name.to_owned(), Cow::into_owned))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A fixed-size identifier of the user for in-memory tables.
    pub fn hash(&self) -> UserHash {
        Sha256::digest(self.0.as_bytes()).into()
    }

    /// The user's key in JetStream KV buckets: the hash in hex, because a user name can contain characters that a KV
    /// key cannot.
    pub fn bucket_key(&self) -> String {
        hex::encode(self.hash())
    }
}

impl fmt::Display for UserKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn new(text: &str) -> Result<NewUserName, InvalidUserName> {
        text.parse()
    }

    #[test]
    fn empty_and_too_long_user_names_are_rejected() {
        assert!("名".repeat(128).parse::<UserName>().is_ok());
        for bad in ["", "a\0b", "a\u{85}b", &"名".repeat(129)] {
            assert_eq!(bad.parse::<UserName>(), Err(InvalidUserName::Bounds), "{bad:?}");
        }
    }

    #[test]
    fn user_names_of_one_script_are_accepted() {
        for good in [
            "admin",
            "O'Neill-2",
            "ann@example.org",
            "Zoë",
            "Иван",
            "管理",
            "ユーザー名",
            "ひらがな漢字",
            "사용자名",
            "Ωμέγα",
            "שלום",
        ] {
            assert_eq!(new(good).unwrap().as_name().as_str(), good, "{good}");
        }
    }

    #[test]
    fn user_names_with_spaces_symbols_or_invisible_characters_are_rejected() {
        for bad in [
            "a b",
            "a\u{a0}b",
            "a\u{200b}b",
            "a\u{202e}b",
            "a\u{200d}b",
            "admin\u{feff}",
            "a\u{ad}b",
            "a☃",
            "a\u{2028}b",
            "ﬁn",
            // The name mixes left-to-right and right-to-left letters.
            "aשלום",
        ] {
            assert_eq!(new(bad), Err(InvalidUserName::Characters), "{bad:?}");
        }
    }

    #[test]
    fn user_names_that_mix_scripts_are_rejected() {
        // These names mix Latin with a Cyrillic or Greek letter, or scripts that are not used together.
        for bad in ["\u{430}dmin", "adm\u{456}n", "admi\u{3b7}", "ops管理", "사용자カ"] {
            assert_eq!(new(bad), Err(InvalidUserName::Scripts), "{bad:?}");
        }
    }

    #[test]
    fn different_spellings_of_a_user_name_have_the_same_key() {
        let key = |text: &str| text.parse::<UserName>().unwrap().key();
        assert_eq!(key("Admin").as_str(), "admin");
        // The alternatives are full-width and decomposed spellings of the same name.
        for (one, other) in [
            ("ADMIN", "admin"),
            ("ａｄｍｉｎ", "admin"),
            ("ZOE\u{308}", "zoë"),
            ("ИВАН", "иван"),
        ] {
            assert_eq!(key(one), key(other), "{one}");
        }
        assert_ne!(key("admin"), key("admin1"));
        assert_eq!(new("Zoe\u{308}").unwrap().as_name().as_str(), "Zo\u{eb}");
        // An invalid user name is its own key.
        assert_eq!(key("A b").as_str(), "A b");
    }

    #[test]
    fn invalid_user_names_are_escaped_for_the_log() {
        let shown = |text: &str| text.parse::<UserName>().unwrap().shown();
        assert_eq!(shown("Иван"), "Иван");
        assert_eq!(shown("a guess"), "a guess");
        assert_eq!(shown("\u{430}dmin"), r"\u{430}dmin");
        assert_eq!(shown("admin\u{202e}"), r"admin\u{202e}");
        assert_eq!(shown("ａdmin"), r"\u{ff41}dmin");
    }

    #[test]
    fn decoding_applies_the_rules_for_user_names() {
        let decode = |json: serde_json::Value| {
            serde_json::from_value::<NewUserName>(json).map_err(|error| error.to_string())
        };
        assert_eq!(decode("Ops".into()).unwrap().to_string(), "Ops");
        assert!(decode("a b".into()).unwrap_err().contains("RFC 8265"));
        assert!(decode(1.into()).unwrap_err().contains("must be a text"));
    }

    proptest! {
        #[test]
        fn normalizing_a_user_name_twice_changes_nothing(text in "\\PC{1,12}") {
            let Ok(name) = text.parse::<NewUserName>() else { return Ok(()) };
            let key = name.as_name().key();
            prop_assert_eq!(&UserKey::from_name(&text), &key);
            prop_assert_eq!(&UserKey::from_name(key.as_str()), &key);
            prop_assert_eq!(name.to_string().parse::<NewUserName>(), Ok(name.clone()));
            prop_assert_eq!(name.as_name().shown(), name.to_string());
        }

        #[test]
        fn letter_case_does_not_change_the_user_key(text in "[!-~]{1,128}") {
            let name: NewUserName = text.parse().unwrap();
            let upper: NewUserName = text.to_ascii_uppercase().parse().unwrap();
            prop_assert_eq!(name.as_name().key(), upper.as_name().key());
        }
    }
}
