//! The certificate authorities that receivers are verified with.

use std::sync::Arc;

use lettre::transport::smtp::client::{Certificate, CertificateStore, TlsParameters};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tracing::warn;

use super::SendError;

/// Verifies receivers with the authorities of the system and those of the deployment.
#[derive(Clone)]
pub(crate) struct Trust {
    connector: TlsConnector,
    authorities: Arc<[CertificateDer<'static>]>,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trust")
            .field("authorities", &self.authorities.len())
            .finish_non_exhaustive()
    }
}

impl Trust {
    /// Loads the authorities. Those of the system that cannot be used are ignored.
    pub(crate) fn load(own: &[CertificateDer<'static>]) -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        let mut authorities = Vec::new();
        let system = rustls_native_certs::load_native_certs().certs;
        for certificate in system.into_iter().chain(own.iter().cloned()) {
            if roots.add(certificate.clone()).is_ok() {
                authorities.push(certificate);
            }
        }
        if authorities.is_empty() {
            warn!("there are no certificate authorities; receivers with TLS cannot be verified");
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            connector: TlsConnector::from(Arc::new(config)),
            authorities: authorities.into(),
        })
    }

    /// Begins TLS on a connection and verifies that its certificate is for this host.
    pub(super) async fn handshake(
        &self,
        host: &str,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, SendError> {
        let failed = |reason: String| SendError::Tls {
            host: host.to_owned(),
            reason,
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(error.to_string()))?;
        let shaken = self.connector.connect(name, stream).await;
        shaken.map_err(|error| failed(error.to_string()))
    }

    /// The parameters of TLS to the mail server of this name.
    pub(super) fn for_mail(&self, host: &str) -> Result<TlsParameters, SendError> {
        let failed = |error: lettre::transport::smtp::Error| SendError::Tls {
            host: host.to_owned(),
            reason: error.to_string(),
        };
        let mut parameters =
            TlsParameters::builder(host.to_owned()).certificate_store(CertificateStore::None);
        for authority in self.authorities.iter() {
            let certificate = Certificate::from_der(authority.to_vec()).map_err(failed)?;
            parameters = parameters.add_root_certificate(certificate);
        }
        parameters.build().map_err(failed)
    }
}
