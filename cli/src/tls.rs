//! The HTTP client, with verified certificates.

use std::{fs, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use crate::{error::CliError, url::GatewayUrl};

/// Time limit of a connection to one of the addresses of the gateway.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Creates a client that trusts the certificate authorities of the file or, without one, those of the system. These are
/// not read if the gateway is reached without TLS.
pub(crate) fn http_client(url: &GatewayUrl, ca_file: Option<&Path>) -> Result<Http, CliError> {
    let unusable = |error: rustls::Error| CliError::Usage(format!("TLS cannot be set up: {error}"));
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots(url, ca_file)?)
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
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

fn roots(url: &GatewayUrl, ca_file: Option<&Path>) -> Result<RootCertStore, CliError> {
    let mut roots = RootCertStore::empty();
    let Some(path) = ca_file else {
        if url.is_encrypted() {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        return Ok(roots);
    };
    let failed = |reason: String| CliError::File {
        path: path.to_owned(),
        reason,
    };
    let pem = fs::read(path).map_err(|error| failed(error.to_string()))?;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| failed(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(failed("contains no certificate".to_owned()));
    }
    Ok(roots)
}
