//! Tests HTTPS of the gateway, including certificates that are renewed while it runs.

use std::{fs, path::Path, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ProtocolVersion, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::json;
use testkit::{ADMIN, Gateway, PATIENCE, Program, Stack, codes, eventually};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::wire::{address, connect, post, to_end};

/// A certificate authority for tests.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The authority's own certificate in PEM.
    pub(super) pem: String,
}

impl Authority {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "a test's authority");
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Returns a certificate for loopback addresses and its key, both in PEM.
    pub(super) fn certificate(&self) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }

    /// Opens a TLS connection as a client that trusts only this authority.
    async fn connect(&self, gateway: &Gateway) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap())
            .unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(config));
        connector
            .connect(ServerName::try_from("localhost").unwrap(), connect(gateway).await)
            .await
    }
}

fn write(folder: &Path, pair: &(String, String)) {
    // Files are replaced as a whole, as cert-manager and certbot do.
    for (name, text) in [("tls.crt", &pair.0), ("tls.key", &pair.1)] {
        fs::write(folder.join("new"), text).unwrap();
        fs::rename(folder.join("new"), folder.join(name)).unwrap();
    }
}

fn served(stream: &TlsStream<TcpStream>) -> Vec<u8> {
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

#[tokio::test]
async fn gateway_reloads_tls_certificate_without_restart() {
    let (authority, folder) = (Authority::new(), tempfile::tempdir().unwrap());
    let first = authority.certificate();
    write(folder.path(), &first);
    let path = |name: &str| folder.path().join(name).display().to_string();
    let stack = Stack::builder()
        .set(Program::Gateway, "VMWATCH_TLS_CERTIFICATE_FILE", &path("tls.crt"))
        .set(Program::Gateway, "VMWATCH_TLS_KEY_FILE", &path("tls.key"))
        .set(Program::Gateway, "VMWATCH_REQUEST_TIMEOUT", "2s")
        .start()
        .await;
    let gateway = stack.gateway(0);

    let login = json!({ "method": codes::LOGIN, "data": { "user_name": ADMIN.0, "password": ADMIN.1 } });
    let mut stream = authority.connect(gateway).await.unwrap();
    assert_eq!(served(&stream), der(&first.0));
    assert_eq!(
        stream.get_ref().1.protocol_version(),
        Some(ProtocolVersion::TLSv1_3)
    );
    stream
        .write_all(post("/wsgi_app.py", "", &login.to_string()).as_bytes())
        .await
        .unwrap();
    let said = to_end(&mut stream).await;
    assert!(
        said.starts_with("HTTP/1.1 200 ") && said.contains("authenticated"),
        "{said}"
    );
    assert!(
        said.contains("strict-transport-security: max-age=31536000"),
        "{said}"
    );

    // Plain HTTP and incomplete handshakes are refused.
    let mut plain = connect(gateway).await;
    plain
        .write_all(post("/wsgi_app.py", "", "{}").as_bytes())
        .await
        .unwrap();
    let said = to_end(&mut plain).await;
    assert!(!said.contains("HTTP/"), "{said}");
    let mut silent = connect(gateway).await;
    assert_eq!(
        to_end(&mut silent).await,
        "",
        "the gateway closes a silent connection at its time limit"
    );
    assert!(
        Authority::new().connect(gateway).await.is_err(),
        "a client must not trust a certificate of another authority"
    );

    // After an incomplete or invalid renewal the gateway continues to serve the former certificate.
    let (second, third) = (authority.certificate(), authority.certificate());
    for broken in [(&second.0, &first.1), (&"no certificate".to_owned(), &first.1)] {
        write(folder.path(), &(broken.0.clone(), broken.1.clone()));
        let failures = async || {
            let count = gateway.replica.metric("vmwatch_tls_renewal_failures_total").await;
            count.unwrap_or(0.0)
        };
        let before = failures().await;
        eventually(
            "the gateway reads the invalid certificates",
            PATIENCE,
            async || {
                if failures().await > before {
                    Ok(())
                } else {
                    Err("the gateway counted no failed renewal".to_owned())
                }
            },
        )
        .await;
        assert_eq!(served(&authority.connect(gateway).await.unwrap()), der(&first.0));
    }
    let before = authority.connect(gateway).await.unwrap();
    write(folder.path(), &third);
    eventually(
        "the gateway serves the renewed certificate",
        PATIENCE,
        async || {
            let found = served(&authority.connect(gateway).await.unwrap());
            if found == der(&third.0) {
                Ok(())
            } else {
                Err("the gateway serves the former certificate".to_owned())
            }
        },
    )
    .await;
    drop(before);
    // Certificates that the crate rcgen creates are valid until the end of the year 4095.
    let expires = gateway
        .replica
        .metric("vmwatch_tls_certificate_expiry_timestamp_seconds")
        .await;
    assert!(expires.is_some_and(|end| end > 4e9), "{expires:?}");
    let log = gateway.replica.process.log();
    assert!(!log.contains("PRIVATE KEY"), "{log}");
    assert_eq!(gateway.replica.process.ended(), None);
    assert!(!address(gateway).is_empty());
}
