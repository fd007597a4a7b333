//! TLS to the gateway.

use std::{io, path::PathBuf, sync::Arc};

use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        CertificateError, ClientConfig, Error, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

use super::EnrolError;

/// Why there is no TLS connection to the gateway.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(
        "this VM has no certificate authorities ({0}); install the package ca-certificates, or give the gateway's with --ca-file"
    )]
    NoAuthorities(String),
    #[error("{}: contains a certificate that cannot be used: {reason}", path.display())]
    CaFile { path: PathBuf, reason: String },
    #[error("TLS cannot be set up: {0}")]
    Setup(Error),
    #[error(
        "no TLS connection to {host} ({source}); if a private authority signed the gateway's certificate, give it with --ca-file"
    )]
    Handshake { host: String, source: io::Error },
}

/// The certificate authorities of a file in PEM, which was read from this path.
#[derive(Debug, Clone)]
pub(crate) struct CaFile {
    pub(crate) path: PathBuf,
    pub(crate) pem: Vec<u8>,
}

/// Makes a connector that trusts the authorities of the file or, without one, those of the VM, as the NATS client does.
pub(super) fn connector(ca_file: Option<&CaFile>) -> Result<TlsConnector, EnrolError> {
    let roots = match ca_file {
        Some(file) => given_roots(file)?,
        None => own_roots()?,
    };
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| EnrolError::Tls(TlsError::Setup(error)))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Whether the text is empty or a series of certificates in PEM.
pub(super) fn has_only_certificates(pem: &str) -> bool {
    let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes()).peekable();
    pem.is_empty() || (certificates.peek().is_some() && certificates.all(|certificate| certificate.is_ok()))
}

fn given_roots(file: &CaFile) -> Result<RootCertStore, EnrolError> {
    let invalid = |reason: String| {
        let path = file.path.clone();
        EnrolError::Tls(TlsError::CaFile { path, reason })
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&file.pem) {
        let certificate = certificate.map_err(|error| invalid(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| invalid(error.to_string()))?;
    }
    if roots.is_empty() {
        let (path, content) = (file.path.clone(), "PEM certificate");
        return Err(EnrolError::NoInput { path, content });
    }
    Ok(roots)
}

fn own_roots() -> Result<RootCertStore, EnrolError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        let reason = if reasons.is_empty() {
            "none found".to_owned()
        } else {
            reasons.join("; ")
        };
        return Err(EnrolError::Tls(TlsError::NoAuthorities(reason)));
    }
    Ok(roots)
}

/// Performs the TLS handshake.
pub(super) async fn handshake(
    connector: &TlsConnector,
    host: &str,
    stream: TcpStream,
    until: Instant,
) -> Result<TlsStream<TcpStream>, EnrolError> {
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| EnrolError::Usage(format!("{host} is no host name that a certificate can have")))?;
    let handshake = connector.connect(name, stream);
    let done = tokio::time::timeout_at(until, handshake).await;
    let done = done.map_err(|_| EnrolError::Timeout(super::http::DEADLINE))?;
    done.map_err(|source| {
        let host = host.to_owned();
        if is_about_time(&source) {
            EnrolError::Clock { host, source }
        } else {
            EnrolError::Tls(TlsError::Handshake { host, source })
        }
    })
}

/// Whether the certificate is expired or not yet valid, which is often the fault of the VM's clock.
fn is_about_time(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    matches!(
        cause,
        Some(Error::InvalidCertificate(
            CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. }
        ))
    )
}
