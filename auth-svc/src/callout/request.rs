//! What a NATS server asks: whether a client may log in. A client must log in with an nkey alone.
//!
//! The server does not check the signature of a key that is not in its configuration, so this check is here.

use data_encoding::BASE64URL_NOPAD;
use nkeys::{KeyPair, KeyPairType};
use serde::Deserialize;
use vmwatch_api::enrollment::AgentKey;

use super::{
    jwt::{self, JwtError},
    refusal::Refusal,
};

const AUDIENCE: &str = "nats-authorization-request";
const TYPE: &str = "authorization_request";

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    nats: Question,
}

#[derive(Deserialize)]
struct Question {
    #[serde(rename = "type")]
    kind: String,
    server_id: Server,
    user_nkey: String,
    client_info: Client,
    connect_opts: Options,
}

#[derive(Deserialize)]
struct Server {
    id: String,
}

#[derive(Deserialize)]
struct Client {
    #[serde(default)]
    host: String,
    /// The text that the server sent to this connection; missing if the client has sent no signature.
    #[serde(default)]
    nonce: String,
}

/// What the client has sent to log in. `Debug` is not implemented, because a password may be in it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Options {
    nkey: String,
    sig: String,
    user: String,
    pass: String,
    auth_token: String,
    jwt: String,
}

/// A client that has proved to own its key.
#[derive(Debug)]
pub(super) struct Login {
    pub(super) key: AgentKey,
    /// IP address of the client as the NATS server sees it.
    pub(super) host: String,
    /// The id of the server that asks.
    pub(super) server: String,
    /// The name that the server expects in the answer. The server makes a new one for each login.
    pub(super) user_nkey: String,
}

/// Decodes the request and checks the client's signature of the nonce.
pub(super) fn decode(request: &[u8]) -> Result<Login, Refusal> {
    let claims: Claims = jwt::from_server(request)?;
    let asked = claims.nats;
    if claims.aud != AUDIENCE || asked.kind != TYPE || asked.server_id.id != claims.iss {
        return Err(Refusal::Malformed(JwtError::Issuer));
    }
    let sent = asked.connect_opts;
    let others = [&sent.user, &sent.pass, &sent.auth_token, &sent.jwt];
    if others.into_iter().any(|credential| !credential.is_empty()) {
        return Err(Refusal::OtherCredential);
    }
    if [&sent.nkey, &sent.sig, &asked.client_info.nonce]
        .into_iter()
        .any(String::is_empty)
    {
        return Err(Refusal::Unsigned);
    }
    let key = verified(&sent.nkey, &sent.sig, &asked.client_info.nonce).ok_or(Refusal::Signature)?;
    Ok(Login {
        key,
        host: asked.client_info.host,
        server: claims.iss,
        user_nkey: asked.user_nkey,
    })
}

/// The key, if it is a user's and has made the signature.
fn verified(nkey: &str, signature: &str, nonce: &str) -> Option<AgentKey> {
    let key: AgentKey = nkey.parse().ok()?;
    let public = KeyPair::from_public_key(nkey).ok()?;
    let signature = BASE64URL_NOPAD.decode(signature.as_bytes()).ok()?;
    public.verify(nonce.as_bytes(), &signature).ok()?;
    (public.key_pair_type() == KeyPairType::User).then_some(key)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A request of a server for this client, after these changes of what the client has sent.
    fn request(client: &KeyPair, changes: &Value) -> String {
        let server = KeyPair::new_server();
        let signature = client.sign(b"nonce").unwrap();
        let mut options = json!({ "nkey": client.public_key(), "sig": BASE64URL_NOPAD.encode(&signature) });
        for (name, value) in changes.as_object().unwrap() {
            options[name] = value.clone();
        }
        let claims = json!({
            "iss": server.public_key(),
            "aud": AUDIENCE,
            "nats": {
                "type": TYPE,
                "server_id": { "id": server.public_key() },
                "user_nkey": KeyPair::new_user().public_key(),
                "client_info": { "host": "192.0.2.1", "id": 7, "nonce": "nonce" },
                "connect_opts": options,
            },
        });
        jwt::sign(&claims, &server).unwrap()
    }

    #[test]
    fn accepts_a_signed_nkey_and_refuses_all_else() {
        let client = KeyPair::new_user();
        let login = decode(request(&client, &json!({})).as_bytes()).unwrap();
        assert_eq!(login.key.as_str(), client.public_key());
        assert_eq!(login.host, "192.0.2.1");
        let reason = |changes: Value| {
            let refused = decode(request(&client, &changes).as_bytes()).unwrap_err();
            refused.reason()
        };
        for changes in [json!({ "nkey": "" }), json!({ "sig": "" })] {
            assert_eq!(reason(changes), "unsigned");
        }
        for name in ["user", "pass", "auth_token", "jwt"] {
            assert_eq!(reason(json!({ name: "x" })), "other_credential");
        }
        let other = KeyPair::new_user();
        let foreign = BASE64URL_NOPAD.encode(&other.sign(b"nonce").unwrap());
        let of_another_connection = BASE64URL_NOPAD.encode(&client.sign(b"other").unwrap());
        for changes in [
            json!({ "sig": foreign }),
            json!({ "sig": of_another_connection }),
            json!({ "sig": "AAAA" }),
            json!({ "sig": "?" }),
            json!({ "nkey": other.public_key() }),
            json!({ "nkey": KeyPair::new_account().public_key() }),
            json!({ "nkey": "x" }),
        ] {
            assert_eq!(reason(changes), "signature");
        }
        assert_eq!(decode(b"x").unwrap_err().reason(), "malformed");
    }
}
