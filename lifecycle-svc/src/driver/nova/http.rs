//! HTTP client for one cloud, with a connection pool, bounded answers and verified certificates.
//!
//! It uses hyper and rustls directly, instead of reqwest. If reqwest were built with rustls on *ring*, like the clients
//! for the bus and the database, every TLS client in the process would panic unless a default crypto provider was
//! installed first.

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

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle timeout of pooled connections. It is shorter than that of common proxies, so that no request is sent on a
/// connection that the proxy is about to close.
const IDLE: Duration = Duration::from_secs(30);

/// Why the HTTPS client for a cloud could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// The file given as `ca_file` contains no certificate.
    #[error("ca_file contains no valid certificate")]
    Ca,
    /// The operating system has no usable CA certificates.
    #[error("the operating system has no usable CA certificates; set ca_file")]
    System,
    /// rustls rejected the TLS configuration.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// HTTP status and complete body of a cloud's answer.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

#[derive(Debug, Clone)]
pub(super) struct Http(Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

impl Http {
    /// Creates a client that trusts the given CA certificates, or those of the operating system.
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

    /// Sends a request and reads the whole answer, of at most `max_answer` bytes. There is no deadline here, because the driver call as a whole has
    /// one.
    pub(super) async fn send(
        &self,
        request: Request<Full<Bytes>>,
        max_answer: usize,
    ) -> Result<Answer, DriverError> {
        let answer = self
            .0
            .request(request)
            .await
            .map_err(|error| unreachable(&error))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, max_answer).collect().await.map_err(|error| {
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

/// Builds the error for an unreachable cloud from all causes, which show whether the host name, the port or the
/// certificate is wrong.
fn unreachable(error: &(dyn Error + 'static)) -> DriverError {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let chain = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    DriverError::Unavailable(one_line(&format!("the cloud cannot be reached: {chain}")))
}
