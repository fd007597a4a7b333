//! JWTs as NATS uses them: signed with an nkey, with the header `alg: ed25519-nkey`.

use data_encoding::BASE64URL_NOPAD;
use nkeys::{KeyPair, KeyPairType};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The header that the NATS server expects.
const HEADER: &[u8] = br#"{"typ":"JWT","alg":"ed25519-nkey"}"#;

#[derive(Debug, thiserror::Error)]
pub(super) enum JwtError {
    #[error("the text does not consist of three base64url parts")]
    Format,
    #[error("the claims cannot be read or written")]
    Claims(#[from] serde_json::Error),
    #[error("the issuer is not a NATS server")]
    Issuer,
    #[error("signing failed or the signature is wrong")]
    Signature(#[from] nkeys::error::Error),
}

/// Encodes and signs the claims.
pub(super) fn sign(claims: &impl Serialize, issuer: &KeyPair) -> Result<String, JwtError> {
    let claims = BASE64URL_NOPAD.encode(&serde_json::to_vec(claims)?);
    let signed = format!("{}.{claims}", BASE64URL_NOPAD.encode(HEADER));
    let signature = issuer.sign(signed.as_bytes())?;
    Ok(format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature)))
}

#[derive(Deserialize)]
struct Issuer {
    iss: String,
}

/// Decodes the claims of a NATS server and checks that the server which they name has signed them.
pub(super) fn from_server<T: DeserializeOwned>(token: &[u8]) -> Result<T, JwtError> {
    let token = str::from_utf8(token).map_err(|_| JwtError::Format)?;
    let (signed, signature) = token.rsplit_once('.').ok_or(JwtError::Format)?;
    let (_, claims) = signed.split_once('.').ok_or(JwtError::Format)?;
    let decode = |text: &str| {
        BASE64URL_NOPAD
            .decode(text.as_bytes())
            .map_err(|_| JwtError::Format)
    };
    let claims = decode(claims)?;
    let server = KeyPair::from_public_key(&serde_json::from_slice::<Issuer>(&claims)?.iss)?;
    if server.key_pair_type() != KeyPairType::Server {
        return Err(JwtError::Issuer);
    }
    server.verify(signed.as_bytes(), &decode(signature)?)?;
    Ok(serde_json::from_slice(&claims)?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn accepts_only_claims_that_their_server_signed() {
        let (server, other, user) = (KeyPair::new_server(), KeyPair::new_server(), KeyPair::new_user());
        let claims = json!({ "iss": server.public_key(), "nats": { "type": "authorization_request" } });
        let token = sign(&claims, &server).unwrap();
        assert_eq!(from_server::<Value>(token.as_bytes()).unwrap(), claims);
        let foreign = sign(&claims, &other).unwrap();
        assert!(from_server::<Value>(foreign.as_bytes()).is_err());
        let by_user = sign(&json!({ "iss": user.public_key() }), &user).unwrap();
        assert!(from_server::<Value>(by_user.as_bytes()).is_err());
        let (head, _) = token.rsplit_once('.').unwrap();
        for bad in ["", ".", "..", head, &format!("{head}."), &format!("{head}.=")] {
            assert!(from_server::<Value>(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
