//! HTTP client for a cloud: one connection pool, bounded answers, verified certificates.
//!
//! It uses hyper and rustls directly. reqwest with rustls on *ring*, which the bus and the database use, would make
//! every TLS client in the process panic unless a default crypto provider was installed first.

use std::{error::Error, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::driver::{DriverError, one_line};

/// Maximum size of an answer; a page of 1,000 servers is about 3 MiB.
const LARGEST_ANSWER: usize = 8 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle timeout of pooled connections: shorter than that of common proxies, so that no request is sent on a connection
/// that the proxy is closing.
const IDLE: Duration = Duration::from_secs(30);

/// Why the client could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// The given file holds no certificate.
    #[error("ca_file holds no usable certificate")]
    Ca,
    /// The operating system has no usable certificates.
    #[error("the operating system has no usable certificates; set ca_file")]
    System,
    /// The TLS configuration is invalid.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// A complete answer.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

#[derive(Debug, Clone)]
pub(super) struct Http(Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

impl Http {
    /// A client that trusts these certificates, or those of the operating system.
    pub(super) fn new(ca: Option<&[u8]>) -> Result<Self, TlsError> {
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(ca)?)
            .with_no_client_auth();
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Ok(Self(client))
    }

    /// Sends a request and reads the answer. It has no deadline because the driver's whole call has one.
    pub(super) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Answer, DriverError> {
        let answer = self
            .0
            .request(request)
            .await
            .map_err(|error| unreachable(&error))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, LARGEST_ANSWER)
            .collect()
            .await
            .map_err(|error| {
                if error.is::<LengthLimitError>() {
                    DriverError::Rejected("the cloud's answer is too large".to_owned())
                } else {
                    DriverError::Unavailable(one_line(&format!("the cloud's answer was incomplete: {error}")))
                }
            })?;
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: body.to_bytes(),
        })
    }
}

fn roots(ca: Option<&[u8]>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    let Some(pem) = ca else {
        let found = rustls_native_certs::load_native_certs();
        let (usable, _) = roots.add_parsable_certificates(found.certs);
        return if usable > 0 {
            Ok(roots)
        } else {
            Err(TlsError::System)
        };
    };
    for certificate in CertificateDer::pem_slice_iter(pem) {
        roots.add(certificate.map_err(|_| TlsError::Ca)?)?;
    }
    if roots.is_empty() {
        Err(TlsError::Ca)
    } else {
        Ok(roots)
    }
}

/// An error with all causes, which show whether the name, the port or the certificate is wrong.
fn unreachable(error: &(dyn Error + 'static)) -> DriverError {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let chain = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    DriverError::Unavailable(one_line(&format!("the cloud cannot be reached: {chain}")))
}
