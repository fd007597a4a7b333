//! A NATS server for tests.

use std::{path::Path, time::Duration};

use nkeys::KeyPair;
use vmwatch_bus::{
    Bus, BusSettings, EnrolledKey, NATS_CA_FILE, NATS_PASSWORD_FILE, NATS_PING_INTERVAL, NATS_URL, NATS_USER,
};
use vmwatch_service::config::Environment;

use crate::{
    Container, PATIENCE, Process, Secrets, Server, Spec,
    container::ContainerSpec,
    eventually,
    ports::free_port,
    secrets::TEST_USER,
    server::{Backend, NATS_IMAGE, image},
    tools,
};

/// The configuration file of [`Nats::start_configured`], and its path inside the container.
const CONFIG: &str = "nats-configured.conf";
const MOUNTED_CONFIG: &str = "/etc/vmwatch/nats-configured.conf";

/// A NATS server with JetStream. Its stored data survives restarts.
#[derive(Debug)]
pub struct Nats {
    /// The NATS server's process or container.
    pub server: Server,
    url: String,
    secrets: Option<Secrets>,
    /// The other servers of the cluster, with their URLs.
    others: Vec<(Server, String)>,
}

impl Nats {
    /// Starts a NATS server that stores its data and log in the folder, and waits until it answers. Clients need no
    /// credentials and have all permissions.
    pub async fn start(folder: &Path) -> Self {
        Self::start_with(folder, None).await
    }

    /// Like [`Nats::start`], but the NATS server writes each message to disk before acknowledging it, as configured in
    /// deploy/nats.
    pub async fn start_durable(folder: &Path) -> Self {
        Self::start_configured(folder, "sync_interval: always", "").await
    }

    /// Starts a NATS server with these options of JetStream, and further lines of its configuration file. Clients without
    /// credentials must have all permissions.
    pub async fn start_configured(folder: &Path, jetstream: &str, further: &str) -> Self {
        let config = folder.join(CONFIG).display().to_string();
        write_config(folder, jetstream, further);
        let port = free_port();
        let server = match Backend::chosen() {
            Backend::Processes => Server::Process(process(folder, "nats", port, &["--config", &config])),
            Backend::Containers => {
                let mounts = vec![(config, MOUNTED_CONFIG)];
                Server::Container(container(port, &["--config", MOUNTED_CONFIG], mounts))
            }
        };
        Self::started(server, port, None).await
    }

    /// Writes another configuration file for [`Nats::start_configured`], which the server reads when it is reloaded or
    /// restarted.
    pub fn configure(&self, folder: &Path, jetstream: &str, further: &str) {
        write_config(folder, jetstream, further);
    }

    /// Starts a NATS server with the users and permissions of deploy/nats.
    pub async fn start_with(folder: &Path, secrets: Option<Secrets>) -> Self {
        Self::start_on(Backend::chosen(), folder, secrets).await
    }

    /// Like [`Nats::start_with`], with the NATS server running on the given backend.
    pub(crate) async fn start_on(backend: Backend, folder: &Path, secrets: Option<Secrets>) -> Self {
        let port = free_port();
        let store = folder.join("nats").display().to_string();
        let server = match (backend, &secrets) {
            (Backend::Processes, None) => {
                let args = ["--jetstream", &format!("--store_dir={store}")];
                Server::Process(process(folder, "nats", port, &args))
            }
            (Backend::Processes, Some(secrets)) => {
                let config = secrets.nats_config(&store, free_port());
                Server::Process(process(folder, "nats", port, &["--config", &config]))
            }
            // The container gets the same arguments as in compose.yaml.
            (Backend::Containers, None) => {
                Server::Container(container(port, &["--jetstream", "--store_dir=/data"], Vec::new()))
            }
            (Backend::Containers, Some(secrets)) => {
                let args = ["--config", "/etc/vmwatch/nats/nats.conf"];
                Server::Container(container(port, &args, secrets.mounts()))
            }
        };
        Self::started(server, port, secrets).await
    }

    /// Starts a cluster of NATS servers with the users and permissions of deploy/nats, as local processes. Programs connect
    /// to the first of them.
    pub async fn start_cluster(folder: &Path, size: usize, secrets: Secrets) -> Self {
        let routes: Vec<_> = (0..size).map(|_| format!("127.0.0.1:{}", free_port())).collect();
        let start = |(index, listen): (usize, &String)| {
            let (name, port) = (format!("nats-{index}"), free_port());
            let store = folder.join(format!("{name}-data")).display().to_string();
            let config = secrets.nats_cluster_config(&name, &store, listen, &routes);
            (
                Server::Process(process(folder, &name, port, &["--config", &config])),
                port,
            )
        };
        let mut servers = routes.iter().enumerate().map(start);
        let (first, port) = servers.next().expect("a cluster has servers");
        let others = servers
            .map(|(server, port)| (server, format!("nats://127.0.0.1:{port}")))
            .collect();
        let url = format!("nats://127.0.0.1:{port}");
        let nats = Self {
            server: first,
            url,
            secrets: Some(secrets),
            others,
        };
        nats.answers().await;
        nats
    }

    /// The URLs of all servers of the cluster.
    pub fn urls(&self) -> Vec<&str> {
        let others = self.others.iter().map(|(_, url)| url.as_str());
        [self.url()].into_iter().chain(others).collect()
    }

    async fn started(server: Server, port: u16, secrets: Option<Secrets>) -> Self {
        let encrypted = secrets
            .as_ref()
            .is_some_and(|secrets| secrets.ca_file().is_some());
        let scheme = if encrypted { "tls" } else { "nats" };
        let url = format!("{scheme}://127.0.0.1:{port}");
        let nats = Self {
            server,
            url,
            secrets,
            others: Vec::new(),
        };
        nats.answers().await;
        nats
    }

    /// The files with credentials and certificates that `deploy/secrets` created for this NATS server.
    pub const fn secrets(&self) -> Option<&Secrets> {
        self.secrets.as_ref()
    }

    /// The URL of the NATS server.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Restarts the killed NATS server with the same port and stored data, and waits until it answers.
    pub async fn restart(&self) {
        self.server.start_again();
        self.answers().await;
    }

    /// The settings with which a program logs in as this NATS user; empty if the NATS server requires no credentials.
    pub fn login_of(&self, user: &str) -> Vec<(String, String)> {
        let Some(secrets) = &self.secrets else {
            return Vec::new();
        };
        let password_file = secrets.password_file(user).display().to_string();
        let mut login = vec![
            (NATS_USER.name.to_owned(), user.to_owned()),
            (NATS_PASSWORD_FILE.name.to_owned(), password_file),
        ];
        let ca_file = secrets.ca_file();
        login.extend(ca_file.map(|file| (NATS_CA_FILE.name.to_owned(), file.display().to_string())));
        login
    }

    /// The password of this NATS user; empty if the NATS server requires no credentials.
    pub fn password_of(&self, user: &str) -> String {
        self.secrets
            .as_ref()
            .map(|secrets| secrets.password(user))
            .unwrap_or_default()
    }

    /// Connects under the given client name. Unlike a real program, the connection detects a frozen server within one
    /// second.
    pub async fn connect(&self, name: &str) -> Bus {
        self.connect_as(name, TEST_USER).await
    }

    /// Connects as the given NATS user of deploy/nats.
    pub async fn connect_as(&self, name: &str, user: &str) -> Bus {
        let login = self.login_of(user);
        let value = |setting: &str| {
            let found = login.iter().find(|(name, _)| name == setting);
            found.map_or("", |(_, value)| value)
        };
        let env = Environment::from_variables([
            (NATS_URL.name, self.url()),
            (NATS_PING_INTERVAL.name, "300ms"),
            (NATS_USER.name, value(NATS_USER.name)),
            (NATS_PASSWORD_FILE.name, value(NATS_PASSWORD_FILE.name)),
            (NATS_CA_FILE.name, value(NATS_CA_FILE.name)),
        ]);
        let settings = BusSettings::read(&env).expect("the NATS settings are valid");
        self.connect_with(name, &settings).await
    }

    /// Connects as the enrolled agent with this key.
    pub async fn connect_as_agent(&self, name: &str, key: &KeyPair) -> Bus {
        let key = EnrolledKey {
            seed: key.seed().expect("the key has a seed"),
            public_key: key.public_key(),
        };
        let ca_file = self.secrets.as_ref().and_then(Secrets::ca_file);
        let urls = vec![self.url.clone()];
        let settings = BusSettings::enrolled(urls, key, ca_file, Duration::from_millis(300));
        self.connect_with(name, &settings).await
    }

    async fn connect_with(&self, name: &str, settings: &BusSettings) -> Bus {
        let bus = Bus::connect(name, settings)
            .await
            .expect("NATS accepts the connection");
        eventually("the connection to NATS", PATIENCE, async || {
            if bus.is_connected() {
                Ok(())
            } else {
                Err("not yet".to_owned())
            }
        })
        .await;
        bus
    }

    async fn answers(&self) {
        eventually("NATS answers", PATIENCE, async || {
            if let Some(status) = self.server.ended() {
                panic!(
                    "nats-server ended during its start ({status}):\n{}",
                    self.server.log()
                );
            }
            let mut options = async_nats::ConnectOptions::new();
            if let Some(secrets) = &self.secrets {
                options = options.user_and_password(TEST_USER.to_owned(), secrets.password(TEST_USER));
                if let Some(ca_file) = secrets.ca_file() {
                    options = options.add_root_certificates(ca_file);
                }
            }
            let client = options
                .connect(&self.url)
                .await
                .map_err(|error| error.to_string())?;
            let jetstream = async_nats::jetstream::new(client);
            jetstream
                .query_account()
                .await
                .map(drop)
                .map_err(|error| error.to_string())
        })
        .await;
    }
}

fn write_config(folder: &Path, jetstream: &str, further: &str) {
    let store = match Backend::chosen() {
        Backend::Processes => folder.join("nats").display().to_string(),
        Backend::Containers => "/data".to_owned(),
    };
    let text = format!("jetstream {{\nstore_dir: {store:?}\n{jetstream}\n}}\n{further}\n");
    std::fs::write(folder.join(CONFIG), text).expect("writing to the temporary folder succeeds");
}

fn process(folder: &Path, name: &str, port: u16, args: &[&str]) -> Process {
    let port = port.to_string();
    let args = [&["--addr", "127.0.0.1", "--port", &port], args].concat();
    Process::start(Spec {
        name: name.to_owned(),
        program: tools::nats_server(),
        args: args.into_iter().map(str::to_owned).collect(),
        env: Vec::new(),
        log: folder.join(format!("{name}.log")),
    })
}

fn container(host_port: u16, args: &[&str], mounts: Vec<(String, &'static str)>) -> Container {
    Container::start(ContainerSpec {
        name: "nats",
        image: image(NATS_IMAGE),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        host_port,
        port: 4222,
        mounts,
    })
}
