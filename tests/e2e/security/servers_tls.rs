//! Tests NATS and the database as in a deployment: with TLS only, and with certificates of `deploy/secrets`.

use std::{fs, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::json;
use testkit::{
    ADMIN, Database, MACHINES, PATIENCE, Program, Secrets, Stack, THIS_MACHINE, codes, eventually,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use vmwatch_api::time::unix_millis;
use vmwatch_service::config::Environment;
use vmwatch_store::StoreSettings;
use vmwatch_store::{MONGODB_CA_FILE, MONGODB_URI};

use super::tls::Authority;
use crate::rest::client::{publish, sample};

/// This name is added to the certificate of NATS while all programs run.
const FURTHER_NAME: &str = "bus.example.com";

#[tokio::test]
async fn all_programs_work_over_tls_and_nats_reloads_its_certificate() {
    let stack = Stack::builder()
        .replicas(Program::Alert, 1)
        .replicas(Program::Agent, 1)
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "1s")
        .with_tls()
        .start()
        .await;
    let gateway = stack.gateway(0);
    // Users and rows are in the database, and all requests and the agent's samples pass through NATS, so these answers
    // show that both connections work.
    let session = gateway.login(ADMIN.0, ADMIN.1).await;
    let data = json!({ "instance_id": THIS_MACHINE });
    eventually("the agent's rows can be read", PATIENCE, async || {
        let rows = gateway.rows(&session, codes::VM, 3, data.clone()).await;
        (!rows.is_empty())
            .then_some(())
            .ok_or("no row is stored".to_owned())
    })
    .await;
    assert_eq!(gateway.start_vm(&session, MACHINES[0].0).await.status(), 1);
    refuses_plain(address(stack.nats.url())).await;

    let secrets = stack.nats.secrets().unwrap();
    let before = served_by_bus(&stack, "localhost").await.unwrap();
    assert!(
        served_by_bus(&stack, FURTHER_NAME).await.is_err(),
        "the former certificate must not contain the new name"
    );
    secrets.renew(&["bus-name", FURTHER_NAME]);
    stack.nats.server.reload();
    eventually("NATS serves the renewed certificate", PATIENCE, async || {
        let served = served_by_bus(&stack, FURTHER_NAME)
            .await
            .map_err(|error| error.to_string())?;
        (served != before)
            .then_some(())
            .ok_or("NATS serves the former certificate".to_owned())
    })
    .await;
    // Existing connections continue, and new clients trust the new certificate.
    assert_eq!(gateway.start_vm(&session, MACHINES[1].0).await.status(), 1);
    stack.nats.connect_as("a tool", "vmwatch-operator").await;
    metrics_of_alert_rules_are_correct(&stack).await;
}

/// The metrics that alert rules use exist and are correct. A VM whose agent stops is counted as silent.
async fn metrics_of_alert_rules_are_correct(stack: &Stack) {
    for program in [
        Program::Gateway,
        Program::Auth,
        Program::Metrics,
        Program::Lifecycle,
        Program::Alert,
    ] {
        let replica = stack.replica(program, 0);
        assert_eq!(replica.metric("vmwatch_ready").await, Some(1.0), "{program:?}");
        eventually("the program reports its clock difference", PATIENCE, async || {
            let skew = replica.metric("vmwatch_clock_skew_seconds").await;
            // All programs and NATS use the clock of this machine, so the measured difference must be small.
            let agrees = skew.is_some_and(|skew| skew.abs() < 1.0);
            agrees.then_some(()).ok_or(format!("{program:?}: {skew:?}"))
        })
        .await;
    }
    let current = stack
        .gateway(0)
        .replica
        .metric("vmwatch_session_table_current")
        .await;
    assert_eq!(current, Some(1.0));
    let metrics = stack.replica(Program::Metrics, 0);
    assert_eq!(metrics.metric("vmwatch_vms_fell_silent").await, Some(0.0));
    let mut report = sample("vm-1", unix_millis(), 1.0);
    report.vm.as_mut().unwrap().dropped_parts = 3;
    publish(stack, &report).await;
    eventually(
        "the agent exports its number of dropped sample parts",
        PATIENCE,
        async || {
            let count = metrics.metric("vmwatch_parts_dropped_by_agents_total").await;
            (count == Some(3.0)).then_some(()).ok_or(format!("{count:?}"))
        },
    )
    .await;
    stack.replica(Program::Agent, 0).process.kill9();
    eventually("metrics-svc counts the silent VM", PATIENCE, async || {
        let count = metrics.metric("vmwatch_vms_fell_silent").await;
        // The VM `vm-1` is counted too, because its only sample is older than `VMWATCH_SILENT_AFTER` by now.
        (count == Some(2.0)).then_some(()).ok_or(format!("{count:?}"))
    })
    .await;
}

#[tokio::test]
async fn database_client_trusts_only_the_configured_certificate_authority() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = Secrets::make(folder.path()).with_tls();
    let database = Database::start_with(folder.path(), secrets.database_certificate().as_deref()).await;
    let foreign = folder.path().join("foreign.pem");
    fs::write(&foreign, Authority::new().pem).unwrap();
    let answers = async |uri: &str, ca_file: &str| {
        let env = Environment::from_variables([(MONGODB_URI.name, uri), (MONGODB_CA_FILE.name, ca_file)]);
        let settings = StoreSettings::read(&env).unwrap();
        let opened = settings.open("a-test").await.unwrap();
        opened.run_command(mongodb::bson::doc! { "ping": 1 }).await
    };
    let uri = format!("{}/?serverSelectionTimeoutMS=500", database.uri());
    let ca_file = secrets.ca_file().unwrap().display().to_string();
    answers(&uri, &ca_file).await.unwrap();
    // This connection string enables TLS itself.
    answers(&format!("{uri}&ssl=true"), &ca_file).await.unwrap();
    for (uri, ca_file, why) in [
        (&uri, "", "the database must refuse a connection without TLS"),
        (
            &uri,
            foreign.to_str().unwrap(),
            "a client of another authority must refuse the database's certificate",
        ),
    ] {
        answers(uri, ca_file).await.expect_err(why);
    }
}

fn address(url: &str) -> &str {
    url.strip_prefix("tls://").expect("NATS accepts only TLS")
}

/// Asserts that NATS refuses a client that sends its credentials without TLS.
async fn refuses_plain(address: &str) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"CONNECT {\"user\":\"test\",\"pass\":\"test\"}\r\nPING\r\n")
        .await
        .unwrap();
    let mut said = Vec::new();
    // The server may reset the connection after it has sent the reason.
    let _ = stream.read_to_end(&mut said).await;
    let said = String::from_utf8_lossy(&said);
    assert!(said.starts_with("INFO ") && !said.contains("PONG"), "{said}");
}

/// Returns the certificate that NATS serves to a client that requests this name.
async fn served_by_bus(stack: &Stack, name: &'static str) -> std::io::Result<Vec<u8>> {
    let mut roots = RootCertStore::empty();
    let ca_file = stack.nats.secrets().unwrap().ca_file().unwrap();
    roots.add_parsable_certificates(
        CertificateDer::pem_file_iter(ca_file)
            .unwrap()
            .map(Result::unwrap),
    );
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut stream = BufReader::new(TcpStream::connect(address(stack.nats.url())).await?);
    // NATS first sends a line in plain text; the TLS handshake follows.
    let mut info = String::new();
    stream.read_line(&mut info).await?;
    let connector = TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(name).unwrap();
    let stream = connector.connect(name, stream.into_inner()).await?;
    Ok(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec())
}
