//! A database that speaks MongoDB's protocol.

use std::{path::Path, time::Duration};

use mongodb::{
    Client,
    bson::doc,
    options::{ClientOptions, ServerAddress},
};

use crate::{
    Container, PATIENCE, Process, Server, Spec,
    container::ContainerSpec,
    eventually,
    ports::free_port,
    server::{Backend, MONGO_IMAGE, image},
    tools,
};

/// The database, whose store outlives its restarts.
#[derive(Debug)]
pub struct Database {
    /// The server.
    pub server: Server,
    uri: String,
    client: Client,
}

impl Database {
    /// Starts one that keeps its store and log in the folder, and waits until it answers.
    pub async fn start(folder: &Path) -> Self {
        let port = free_port();
        let server = match Backend::chosen() {
            Backend::Processes => Server::Process(process(folder, port)),
            Backend::Containers => Server::Container(container(port)),
        };
        let mut options = ClientOptions::default();
        options.hosts = vec![ServerAddress::Tcp {
            host: "127.0.0.1".to_owned(),
            port: Some(port),
        }];
        options.server_selection_timeout = Some(Duration::from_millis(500));
        let client = Client::with_options(options).expect("the options are right");
        let uri = format!("mongodb://127.0.0.1:{port}");
        let database = Self { server, uri, client };
        database.answers().await;
        database
    }

    /// The address of the server.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The driver's handle of the database that the stack uses.
    pub fn handle(&self) -> mongodb::Database {
        self.client.database(shared::config::DATABASE.default)
    }

    /// Starts it again on the same port and store after it was killed, and waits until it answers.
    pub async fn restart(&self) {
        self.server.start_again();
        self.answers().await;
    }

    async fn answers(&self) {
        eventually("the database answers", PATIENCE, async || {
            if let Some(status) = self.server.ended() {
                panic!("the database ended at once ({status}):\n{}", self.server.log());
            }
            let ping = self.handle().run_command(doc! { "ping": 1 }).await;
            ping.map(drop).map_err(|error| error.to_string())
        })
        .await;
    }
}

fn process(folder: &Path, port: u16) -> Process {
    let store = folder.join("database");
    std::fs::create_dir(&store).unwrap();
    let program = tools::database();
    let (port, store) = (port.to_string(), store.display().to_string());
    let mut args = vec!["--port", &port];
    if program.file_name().is_some_and(|name| name == "mongod") {
        args.extend(["--bind_ip", "127.0.0.1", "--dbpath", &store]);
    } else {
        // Without --sync-on-commit the stand-in loses acknowledged writes at a kill -9; the sizes keep an empty
        // store small.
        args.extend(["--storage-path", &store, "--standalone", "--sync-on-commit"]);
        args.extend(["--cache-size", "256M", "--log-file-max", "16MB"]);
    }
    Process::start(Spec {
        name: "database".to_owned(),
        args: args.into_iter().map(str::to_owned).collect(),
        program,
        env: Vec::new(),
        log: folder.join("database.log"),
    })
}

fn container(host_port: u16) -> Container {
    Container::start(ContainerSpec {
        name: "mongo",
        image: image(MONGO_IMAGE),
        args: Vec::new(),
        host_port,
        port: 27_017,
        mounts: Vec::new(),
    })
}
