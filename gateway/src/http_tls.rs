//! TLS for the HTTP listener. Certificate and key are reloaded when their files change.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use metrics::{counter, gauge};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Interval at which the certificate and key files are compared with the served certificate, which costs two small
/// reads. Modification times are not used, because a renewal that replaces a symbolic link may leave them unchanged.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Paths of the PEM files with the TLS certificate and its private key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file with the server's certificate first, then its intermediate certificates.
    pub certificate: PathBuf,
    /// PEM file with the private key of the server's certificate.
    pub key: PathBuf,
}

/// Why the TLS certificate and key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate or key file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The file is not valid PEM, or does not contain a certificate or key.
    #[error("{} does not contain a valid PEM certificate or key", path.display())]
    Pem {
        path: PathBuf,
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate and the key do not match, or are of an unsupported kind.
    #[error("the certificate and the private key do not match, or are of an unsupported kind")]
    Pair(#[from] rustls::Error),
}

/// The current TLS certificate and key, which every new connection uses.
#[derive(Clone)]
pub struct Tls {
    current: watch::Receiver<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the certificate and key, and watches their files until shutdown. A renewed certificate is served within
    /// seconds. If the renewed files are not usable, the error is logged and counted, and the previous certificate
    /// stays in use.
    pub async fn load(files: TlsFiles, shutdown: CancellationToken) -> Result<Self, TlsError> {
        let pem = Pem::read(&files).await?;
        let (sender, current) = watch::channel(Arc::new(pem.config(&files)?));
        tokio::spawn(async move { shutdown.run_until_cancelled(renew(files, pem, sender)).await });
        Ok(Self { current })
    }

    /// The TLS acceptor with the current certificate.
    pub fn acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.current.borrow()).into()
    }
}

/// Contents of the certificate file and of the key file.
#[derive(PartialEq, Eq)]
struct Pem {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Pem {
    async fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = async |path: &PathBuf| {
            tokio::fs::read(path).await.map_err(|source| TlsError::Read {
                path: path.clone(),
                source,
            })
        };
        Ok(Self {
            certificate: read(&files.certificate).await?,
            key: read(&files.key).await?,
        })
    }

    /// Builds the TLS configuration. Fails if certificate and key do not match, which happens in the middle of a
    /// renewal.
    fn config(&self, files: &TlsFiles) -> Result<ServerConfig, TlsError> {
        let pem = |path: &PathBuf| {
            let path = path.clone();
            |source| TlsError::Pem { path, source }
        };
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(pem(&files.certificate))?;
        let expires = chain.first().and_then(|own| expires(own));
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(pem(&files.key))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        if let Some(expires) = expires {
            gauge!("vmwatch_tls_certificate_expiry_timestamp_seconds").set(expires);
        }
        Ok(config)
    }
}

/// The certificate's expiry, in seconds since 1970.
fn expires(certificate: &CertificateDer<'_>) -> Option<f64> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    // Convert by way of `u32`, which an `f64` holds exactly; an expiry after 2106 is reported as 2106.
    let seconds = parsed.validity().not_after.timestamp();
    Some(f64::from(u32::try_from(seconds).unwrap_or(u32::MAX)))
}

async fn renew(files: TlsFiles, mut served: Pem, sender: watch::Sender<Arc<ServerConfig>>) {
    let mut checks = tokio::time::interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        checks.tick().await;
        let found = match Pem::read(&files).await {
            Ok(pem) if pem == served => continue,
            Ok(pem) => pem.config(&files).map(|config| (pem, config)),
            Err(error) => Err(error),
        };
        match found {
            Ok((pem, config)) => {
                served = pem;
                sender.send_replace(Arc::new(config));
                counter!("vmwatch_tls_renewals_total").increment(1);
                info!("renewed TLS certificate loaded");
            }
            Err(error) => {
                counter!("vmwatch_tls_renewal_failures_total").increment(1);
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                warn!(%error, cause, "loading the renewed TLS certificate failed; the previous certificate stays in use");
            }
        }
    }
}
