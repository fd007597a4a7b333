//! Tests HTTPS connections to a cloud: only the configured certificate authority is trusted or, if none is configured,
//! those of the operating system.

use std::{fs, net::SocketAddr, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use testkit::{
    PATIENCE,
    cloud::{Cloud, PASSWORD, USER, entry},
    eventually,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring},
};
use vmwatch_api::{lifecycle::MachineState, wire::FaultKind};

use crate::support::{World, operator};

const OFF: &str = "aaaaaaaa-1111-4111-8111-111111111111";

/// Starts an HTTPS proxy in front of the cloud, with a certificate of a new authority. Returns the proxy's address and
/// the authority's certificate.
async fn https(cloud: &Cloud) -> (SocketAddr, String) {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();

    let tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.into())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, behind) = (listener.local_addr().unwrap(), cloud.address);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // The handshake fails if the client does not trust the certificate.
                let Ok(mut outside) = acceptor.accept(stream).await else {
                    return;
                };
                let mut inside = TcpStream::connect(behind).await.unwrap();
                let _ = copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    });
    (address, authority_pem)
}

#[tokio::test]
async fn nova_driver_connects_only_to_trusted_certificates() {
    let (world, cloud) = (World::new().await, Cloud::start(&[(OFF, "SHUTOFF")]).await);
    let (address, authority) = https(&cloud).await;
    let ca_file = world.path().join("ca.pem");
    fs::write(&ca_file, authority).unwrap();
    let file = format!(
        "auth_url = 'https://{address}/identity/v3'\ncompute_url = 'https://{address}/compute/v2.1'\n\
         username = '{USER}'\nproject = 'vms'\n"
    );
    let trusting = format!("{file}ca_file = '{}'\n", ca_file.display());
    let trusting = entry(world.path(), "trusting", &trusting, "password_file", PASSWORD);
    let service = world
        .replica("trusting", &[("VMWATCH_HYPERVISORS", &trusting)])
        .await;
    assert_eq!(
        world.start(&operator(), OFF).await.unwrap(),
        MachineState::Running
    );
    service.0.kill9();

    // Without a configured authority, the client trusts those of the operating system, and none of them signed the
    // certificate.
    let other = entry(world.path(), "other", &file, "password_file", PASSWORD);
    let service = world.spawn("other", &[("VMWATCH_HYPERVISORS", &other)]);
    let logins = cloud.logins();
    eventually(
        "the service reports that it is not ready",
        PATIENCE,
        async || match service.readiness().await {
            Err(reason) if reason.contains("no hypervisor answers") => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .await;
    let fault = world.refused_start(&operator(), OFF).await;
    assert_eq!(fault.kind, FaultKind::Backend);
    assert_eq!(
        cloud.logins(),
        logins,
        "no password may be sent to an untrusted server"
    );
}
