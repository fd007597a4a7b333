//! Login: passwords and session tokens.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de::Error};
use sha2::{Digest, Sha256};

use super::{Access, Class, Kind, Method, MethodInfo, Principal, Service, UserName, bounded_text};

/// Login with a name and a password.
#[derive(Debug)]
pub struct Login;

impl Method for Login {
    type Params = Credentials;
    type Reply = Session;
    const INFO: MethodInfo = MethodInfo {
        service: Service::Auth,
        subject: "auth.login",
        access: Access::Public,
        kind: Kind::Query,
        class: Class::Login,
    };
}

#[derive(Serialize, Deserialize)]
pub struct Credentials {
    /// Any spelling of the user name. A login with an invalid user name fails like one with an unknown user name.
    pub user_name: UserName,
    /// A password of 1 to 1024 bytes.
    pub password: Password,
}

/// A password of 1 to 1024 bytes. `Debug` does not print it.
#[derive(Clone, Serialize)]
#[serde(transparent)]
pub struct Password(String);

impl Password {
    const RULE: &str = "must be a text of 1 to 1024 bytes";

    /// The password as bytes, for hashing.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    fn allows(text: &str) -> bool {
        (1..=1024).contains(&text.len())
    }
}

impl FromStr for Password {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if Self::allows(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Self::RULE)
        }
    }
}

impl<'de> Deserialize<'de> for Password {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        bounded_text(deserializer, Self::RULE, Self::allows).map(Self)
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

/// The reply to a successful login.
#[derive(Debug, Serialize, Deserialize)]
pub struct Session {
    /// The session token. Anyone who has the token can act as the user.
    pub session_id: Token,
    /// Time at which the session expires, in Unix milliseconds.
    pub expires_at_ms: u64,
    pub principal: Principal,
}

/// A session token: 128 random bits, formatted as a lower-case UUID because the documented API requires it. A version-4
/// UUID would have only 122 random bits; OWASP ASVS 7.2.3 requires 128. `Debug` does not print the token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token([u8; 16]);

/// The SHA-256 hash of a session token. Tokens are stored and looked up by this hash, so read access to the
/// session store reveals no token.
pub type TokenHash = [u8; 32];

impl Token {
    /// Creates a session token from random bits, which must come from the operating system's random generator.
    pub const fn from_random(bits: [u8; 16]) -> Self {
        Self(bits)
    }

    pub fn hash(&self) -> TokenHash {
        Sha256::digest(self.to_string().as_bytes()).into()
    }

    /// The session's key in the JetStream KV bucket of sessions: the token's hash in hex.
    pub fn key(&self) -> String {
        hex::encode(self.hash())
    }
}

/// Formats the session token as the 36 characters that the documented API requires.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// The text is not a valid session [`Token`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 36 characters in the format of a lower-case UUID")]
pub struct InvalidToken;

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let has_uuid_format = text.len() == 36
            && text.bytes().enumerate().all(|(index, byte)| match index {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
            });
        if !has_uuid_format {
            return Err(InvalidToken);
        }
        let mut bits = [0; 16];
        hex::decode_to_slice(text.replace('-', ""), &mut bits).map_err(|_| InvalidToken)?;
        Ok(Self(bits))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_token_is_formatted_as_uuid_and_round_trips() {
        let token = Token::from_random([
            0x9a, 0xfd, 0xb1, 0xec, 0xd3, 0x96, 0x4b, 0xa3, 0xaf, 0x7a, 0x1e, 0x38, 0xfd, 0x87, 0x51, 0xca,
        ]);
        assert_eq!(token.to_string(), "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca");
        assert_eq!(token.to_string().parse(), Ok(token));
        for bad in [
            "",
            "9AFDB1EC-D396-4BA3-AF7A-1E38FD8751CA",
            "9afdb1ecd3964ba3af7a1e38fd8751ca0000",
            "9afdb1ec-d396-4ba3-af7a-1e38fd8751c",
            "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca ",
            "9afdb1ec-d396-4ba3-af7a-1e38fd8751é",
        ] {
            assert_eq!(bad.parse::<Token>(), Err(InvalidToken), "{bad:?}");
        }
    }

    #[test]
    fn debug_output_hides_passwords_and_tokens() {
        let shown = format!(
            "{:?} {:?}",
            "hunter2".parse::<Password>(),
            Token::from_random([7; 16])
        );
        assert!(!shown.contains("hunter2") && !shown.contains("07"), "{shown}");
    }

    #[test]
    fn empty_and_too_long_passwords_are_rejected() {
        assert!(
            "x".repeat(1024).parse::<Password>().is_ok() && "x".repeat(1025).parse::<Password>().is_err()
        );
    }
}
