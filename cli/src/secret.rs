//! Tokens and passwords.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::Path,
    str::FromStr,
};

use http::HeaderValue;
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use vmwatch_api::api_tokens::ApiToken;

use crate::error::CliError;

/// Maximum size of a file with a token or password.
const MAX_BYTES: u64 = 4096;
/// Name of a file that stands for the standard input.
const STDIN: &str = "-";

/// A session token or an API token. `Debug` does not print it.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Token(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token has 1 to 512 visible ASCII characters")]
pub(crate) struct InvalidToken;

impl Token {
    /// Reads a token from a file, or from the standard input if the name is `-`.
    pub(crate) fn from_file(path: &Path) -> Result<Self, CliError> {
        let text = read_text(path)?;
        text.parse().map_err(|error: InvalidToken| CliError::File {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }

    /// The message if the gateway does not accept the token. The gateway does not report why an API token is invalid.
    pub(crate) fn refusal(&self) -> &'static str {
        if self.0.starts_with(ApiToken::PREFIX) {
            "the API token is not valid: it is unknown, was revoked or has expired, or its owner was removed; create \
             another one on the page, under API tokens"
        } else {
            "the session is not valid any more; run `vmwatch login`"
        }
    }

    /// The value of the header `Authorization`.
    pub(crate) fn header(&self) -> Result<HeaderValue, CliError> {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", self.0))
            .map_err(|_| CliError::Usage(InvalidToken.to_string()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_valid = (1..=512).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        if is_valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidToken)
        }
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The error does not repeat the text.
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Reads the first line of a file with a password, or of the standard input if the name is `-`.
pub(crate) fn password_from_file(path: &Path) -> Result<String, CliError> {
    read_text(path)
}

/// Asks for a password in the terminal.
pub(crate) fn ask_password(prompt: &str) -> Result<String, CliError> {
    rpassword::prompt_password(prompt).map_err(|error| {
        CliError::Usage(format!(
            "the password cannot be read from a terminal ({error}); give it with --password-file"
        ))
    })
}

/// Reads one line without the line break.
fn read_text(path: &Path) -> Result<String, CliError> {
    let failed = |reason: String| CliError::File {
        path: path.to_owned(),
        reason,
    };
    let mut text = String::new();
    let read = if path.as_os_str() == STDIN {
        io::stdin().lock().take(MAX_BYTES + 1).read_to_string(&mut text)
    } else {
        File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text))
    };
    read.map_err(|error| failed(error.to_string()))?;
    if u64::try_from(text.len()).is_ok_and(|bytes| bytes > MAX_BYTES) {
        return Err(failed(format!("has more than {MAX_BYTES} bytes")));
    }
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() || line.contains('\n') {
        return Err(failed("must have exactly one line".to_owned()));
    }
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn token_file_has_one_line_with_a_valid_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for (content, valid) in [
            ("vmt_1_secret", true),
            ("vmt_1_secret\n", true),
            ("vmt_1_secret\r\n", true),
            ("", false),
            ("\n", false),
            ("a\nb\n", false),
            ("a b", false),
            ("tökén", false),
        ] {
            fs::write(&path, content).unwrap();
            assert_eq!(Token::from_file(&path).is_ok(), valid, "{content:?}");
        }
        fs::write(&path, "x".repeat(5000)).unwrap();
        let error = Token::from_file(&path).unwrap_err().to_string();
        assert!(error.ends_with("token: has more than 4096 bytes"), "{error}");
        assert!(Token::from_file(&folder.path().join("none")).is_err());
    }

    #[test]
    fn refusal_names_the_kind_of_token() {
        for (token, advice) in [
            ("vmt_1_secret", "create another one"),
            ("vmt_", "create another one"),
            ("9afdb1ec-d396-4ba3-af7a-1e38fd8751ca", "run `vmwatch login`"),
        ] {
            let refusal = token.parse::<Token>().unwrap().refusal();
            assert!(refusal.contains(advice), "{token}: {refusal}");
        }
    }

    #[test]
    fn token_is_not_shown_in_debug_output() {
        let token: Token = "vmt_1_secret".parse().unwrap();
        assert_eq!(
            format!("{token:?} {:?}", token.header().unwrap()),
            "Token(…) Sensitive"
        );
    }
}
