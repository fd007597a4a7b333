//! A database server for tests that speaks the MongoDB protocol.

use std::{path::Path, time::Duration};

use mongodb::{
    Client,
    bson::doc,
    options::{ClientOptions, ServerAddress, Tls, TlsOptions},
};

use crate::{
    Container, PATIENCE, Process, Server, Spec,
    container::ContainerSpec,
    eventually,
    ports::free_port,
    server::{Backend, MONGO_IMAGE, image},
    tools,
};

/// The database of a test. Its data survives restarts.
#[derive(Debug)]
pub struct Database {
    /// The database server's process or container.
    pub server: Server,
    uri: String,
    client: Client,
}

impl Database {
    /// Starts a database that stores its data and log in `folder`, and waits until it answers.
    pub async fn start(folder: &Path) -> Self {
        Self::start_with(folder, None).await
    }

    /// Starts a database that accepts only TLS, with a certificate from a folder that `deploy/secrets` created.
    pub async fn start_with(folder: &Path, certificate: Option<&Path>) -> Self {
        Self::start_on(Backend::chosen(), folder, certificate).await
    }

    /// Like [`Database::start_with`], with the database running on the given backend.
    pub(crate) async fn start_on(backend: Backend, folder: &Path, certificate: Option<&Path>) -> Self {
        let port = free_port();
        let server = match backend {
            Backend::Processes => Server::Process(process(folder, port, certificate)),
            Backend::Containers => Server::Container(container(port, certificate)),
        };
        let mut options = ClientOptions::default();
        options.hosts = vec![ServerAddress::Tcp {
            host: "127.0.0.1".to_owned(),
            port: Some(port),
        }];
        options.server_selection_timeout = Some(Duration::from_millis(500));
        options.tls = certificate.map(|certificate| {
            let mut tls = TlsOptions::default();
            tls.ca_file_path = Some(certificate.join("ca.crt"));
            Tls::Enabled(tls)
        });
        let client = Client::with_options(options).expect("the client options are valid");
        let uri = format!("mongodb://127.0.0.1:{port}");
        let database = Self { server, uri, client };
        database.wait_until_ready().await;
        database
    }

    /// The connection URI of the database server.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The MongoDB driver's handle of the database that the stack uses.
    pub fn handle(&self) -> mongodb::Database {
        self.client.database(vmwatch_store::DATABASE.default)
    }

    /// Restarts the killed database with the same data and port, and waits until it answers.
    pub async fn restart(&self) {
        self.server.start_again();
        self.wait_until_ready().await;
    }

    async fn wait_until_ready(&self) {
        eventually("the database answers", PATIENCE, async || {
            if let Some(status) = self.server.ended() {
                panic!(
                    "the database ended during its start ({status}):\n{}",
                    self.server.log()
                );
            }
            let ping = self.handle().run_command(doc! { "ping": 1 }).await;
            ping.map(drop).map_err(|error| error.to_string())
        })
        .await;
    }
}

/// The command-line arguments that make mongod accept only TLS, with the certificate files in this folder.
fn tls_arguments(certificate: &Path) -> Vec<String> {
    let [pair, ca] = ["tls.pem", "ca.crt"].map(|name| certificate.join(name).display().to_string());
    let words = [
        "--tlsMode",
        "requireTLS",
        "--tlsCertificateKeyFile",
        &pair,
        "--tlsCAFile",
        &ca,
        "--tlsAllowConnectionsWithoutCertificates",
    ];
    words.map(str::to_owned).to_vec()
}

fn process(folder: &Path, port: u16, certificate: Option<&Path>) -> Process {
    let store = folder.join("database");
    std::fs::create_dir(&store).unwrap();
    let program = tools::database();
    let (port, store) = (port.to_string(), store.display().to_string());
    let mut args = vec!["--port", &port];
    let mut tls = Vec::new();
    if program.file_name().is_some_and(|name| name == "mongod") {
        args.extend(["--bind_ip", "127.0.0.1", "--dbpath", &store]);
        tls.extend(certificate.into_iter().flat_map(tls_arguments));
    } else {
        // Without --sync-on-commit, the stand-in for MongoDB would lose acknowledged writes on SIGKILL. The values of
        // --cache-size and --log-file-max are chosen so that an empty database takes little disk space.
        args.extend(["--storage-path", &store, "--standalone", "--sync-on-commit"]);
        args.extend(["--cache-size", "256M", "--log-file-max", "16MB"]);
        for (option, name) in [("--tls-cert-file", "tls.crt"), ("--tls-key-file", "tls.key")] {
            let file = certificate.map(|folder| folder.join(name).display().to_string());
            tls.extend(file.into_iter().flat_map(|file| [option.to_owned(), file]));
        }
    }
    let args = args.into_iter().map(str::to_owned).chain(tls).collect();
    Process::start(Spec {
        name: "database".to_owned(),
        args,
        program,
        env: Vec::new(),
        log: folder.join("database.log"),
    })
}

fn container(host_port: u16, certificate: Option<&Path>) -> Container {
    const FOLDER: &str = "/etc/vmwatch/mongo-secrets";
    let mut args = Vec::new();
    let mut mounts = Vec::new();
    if let Some(certificate) = certificate {
        args.push("mongod".to_owned());
        args.extend(tls_arguments(Path::new(FOLDER)));
        mounts.push((certificate.display().to_string(), FOLDER));
    }
    Container::start(ContainerSpec {
        name: "mongo",
        image: image(MONGO_IMAGE),
        args,
        host_port,
        port: 27_017,
        mounts,
    })
}
