//! Tests NATS over TLS: nkeys, credentials files of a NATS operator's accounts, and certificates of server and client.

use std::{fs, path::Path};

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Value, json};
use testkit::{PATIENCE, Process, Spec, eventually, free_port, nats_server};
use vmwatch_bus::{Bus, BusSettings};
use vmwatch_bus::{
    NATS_CA_FILE, NATS_CERTIFICATE_FILE, NATS_CREDENTIALS_FILE, NATS_KEY_FILE, NATS_NKEY_SEED_FILE, NATS_URL,
};
use vmwatch_service::config::Environment;

use super::tls::Authority;

/// A NATS server that accepts only TLS, with additional lines of configuration for access.
struct Server {
    process: Process,
    url: String,
}

impl Server {
    fn start(folder: &Path, authority: &Authority, verify: bool, access: &str) -> Self {
        let (certificate, key) = authority.certificate();
        for (name, text) in [
            ("ca.pem", &authority.pem),
            ("server.pem", &certificate),
            ("server.key", &key),
        ] {
            fs::write(folder.join(name), text).unwrap();
        }
        let port = free_port();
        let path = |name: &str| folder.join(name).display().to_string();
        let config = format!(
            "listen: \"127.0.0.1:{port}\"\n\
             tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: {verify} }}\n{access}\n",
            path("server.pem"),
            path("server.key"),
            path("ca.pem"),
        );
        fs::write(folder.join("nats.conf"), config).unwrap();
        let process = Process::start(Spec {
            name: "nats".to_owned(),
            program: nats_server(),
            args: vec!["--config".to_owned(), path("nats.conf")],
            env: Vec::new(),
            log: folder.join("nats.log"),
        });
        let url = format!("tls://localhost:{port}");
        Self { process, url }
    }

    async fn connect(&self, settings: [(&str, String); 4]) -> Bus {
        let [a, b, c, d] = &settings;
        let env = Environment::from_variables([
            (NATS_URL.name, self.url.as_str()),
            (a.0, &a.1),
            (b.0, &b.1),
            (c.0, &c.1),
            (d.0, &d.1),
        ]);
        let settings = BusSettings::read(&env).unwrap_or_else(|_| panic!("{:?}", env.problems()));
        assert!(!format!("{settings:?}").contains("SU"), "{settings:?}");
        Bus::connect("a-test", &settings)
            .await
            .expect("the client connects in the background")
    }

    async fn takes(&self, settings: [(&str, String); 4]) {
        let bus = self.connect(settings).await;
        eventually("the client is connected to NATS", PATIENCE, async || {
            if bus.is_connected() {
                Ok(())
            } else {
                Err(self.process.log())
            }
        })
        .await;
        bus.client_for_tests().flush().await.unwrap();
    }

    /// Asserts that the server refuses a client with these settings and logs these words.
    async fn refuses(&self, settings: [(&str, String); 4], words: &str) {
        let before = self.process.log().matches(words).count();
        let bus = self.connect(settings).await;
        eventually(words, PATIENCE, async || {
            let log = self.process.log();
            if log.matches(words).count() > before {
                Ok(())
            } else {
                Err(log)
            }
        })
        .await;
        assert!(!bus.is_connected());
    }
}

fn file(folder: &Path, name: &str, text: &str) -> String {
    fs::write(folder.join(name), text).unwrap();
    folder.join(name).display().to_string()
}

#[tokio::test]
async fn nats_requires_nkey_and_client_certificate() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    let folder = folder.path();
    let user = KeyPair::new_user();
    let access = format!("authorization {{ users: [ {{ nkey: {} }} ] }}", user.public_key());
    let server = Server::start(folder, &authority, true, &access);
    let seed = file(folder, "user.nk", &format!("{}\n", user.seed().unwrap()));
    let other = file(folder, "other.nk", &KeyPair::new_user().seed().unwrap());
    let (certificate, key) = authority.certificate();
    let (certificate, key) = (
        file(folder, "client.pem", &certificate),
        file(folder, "client.key", &key),
    );
    let ca = folder.join("ca.pem").display().to_string();
    let settings = |ca: &str, seed: &str, certificate: &str, key: &str| {
        [
            (NATS_CA_FILE.name, ca.to_owned()),
            (NATS_NKEY_SEED_FILE.name, seed.to_owned()),
            (NATS_CERTIFICATE_FILE.name, certificate.to_owned()),
            (NATS_KEY_FILE.name, key.to_owned()),
        ]
    };
    server.takes(settings(&ca, &seed, &certificate, &key)).await;
    server
        .refuses(settings(&ca, &other, &certificate, &key), "authentication error")
        .await;
    server
        .refuses(settings(&ca, "", &certificate, &key), "authentication error")
        .await;
    server
        .refuses(settings(&ca, &seed, "", ""), "TLS handshake error")
        .await;
    // A client that trusts only another authority must not trust this server.
    let foreign = file(folder, "foreign.pem", &Authority::new().pem);
    server
        .refuses(
            settings(&foreign, &seed, &certificate, &key),
            "TLS handshake error",
        )
        .await;
}

/// Returns a NATS JWT, signed with the issuer's key.
fn jwt(issuer: &KeyPair, subject: &str, name: &str, claims: &Value) -> String {
    let encode = |value: &Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let header = encode(&json!({ "typ": "JWT", "alg": "ed25519-nkey" }));
    let body = encode(&json!({
        "jti": name, "iat": 1_600_000_000, "iss": issuer.public_key(), "name": name, "sub": subject, "nats": claims,
    }));
    let signed = format!("{header}.{body}");
    let signature = BASE64URL_NOPAD.encode(&issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

#[tokio::test]
async fn nats_accepts_a_credentials_file_and_rejects_a_forged_one() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    let folder = folder.path();
    let (operator, account, user) = (
        KeyPair::new_operator(),
        KeyPair::new_account(),
        KeyPair::new_user(),
    );
    let all = -1;
    let limits = json!({
        "subs": all, "data": all, "payload": all, "imports": all, "exports": all, "wildcards": true, "conn": all, "leaf": all,
    });
    let operators = jwt(
        &operator,
        &operator.public_key(),
        "operator",
        &json!({ "type": "operator", "version": 2 }),
    );
    let accounts = jwt(
        &operator,
        &account.public_key(),
        "account",
        &json!({ "type": "account", "version": 2, "limits": limits }),
    );
    let access = format!(
        "operator: {operators}\nresolver: MEMORY\nresolver_preload: {{ {}: {accounts} }}",
        account.public_key()
    );
    let server = Server::start(folder, &authority, false, &access);
    let ca = folder.join("ca.pem").display().to_string();
    let credentials = |name: &str, signer: &KeyPair| {
        let claims = &json!({ "type": "user", "version": 2, "subs": all, "data": all, "payload": all });
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            jwt(signer, &user.public_key(), "user", claims),
            user.seed().unwrap()
        );
        let path = file(folder, name, &text);
        [
            (NATS_CA_FILE.name, ca.clone()),
            (NATS_CREDENTIALS_FILE.name, path),
            (NATS_CERTIFICATE_FILE.name, String::new()),
            (NATS_KEY_FILE.name, String::new()),
        ]
    };
    server.takes(credentials("user.creds", &account)).await;
    server
        .refuses(
            credentials("forged.creds", &KeyPair::new_account()),
            "authentication error",
        )
        .await;
}
