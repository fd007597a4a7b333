//! A NATS server.

use std::path::Path;

use shared::{
    bus::{Bus, BusSettings},
    config::{Environment, NATS_PING_INTERVAL, NATS_URL},
};

use crate::{PATIENCE, Process, Spec, eventually, ports::free_port, tools};

/// A NATS server with JetStream, whose store outlives its restarts.
#[derive(Debug)]
pub struct Nats {
    /// The server.
    pub process: Process,
    url: String,
}

impl Nats {
    /// Starts one that keeps its store and log in the folder, and waits until it answers.
    pub async fn start(folder: &Path) -> Self {
        let port = free_port();
        let store = folder.join("nats");
        let args = [
            "--addr",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--jetstream",
            "--store_dir",
        ];
        let args = args
            .into_iter()
            .map(str::to_owned)
            .chain([store.display().to_string()]);
        let process = Process::start(Spec {
            name: "nats".to_owned(),
            program: tools::nats_server(),
            args: args.collect(),
            env: Vec::new(),
            log: folder.join("nats.log"),
        });
        let url = format!("nats://127.0.0.1:{port}");
        let nats = Self { process, url };
        nats.answers().await;
        nats
    }

    /// The address of the server.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Starts it again on the same port and store after it was killed, and waits until it answers.
    pub async fn restart(&self) {
        self.process.start_again();
        self.answers().await;
    }

    /// Connects as a program of this name would; a frozen server is noticed within a second.
    pub async fn connect(&self, name: &str) -> Bus {
        let env = Environment::of([(NATS_URL.name, self.url()), (NATS_PING_INTERVAL.name, "300ms")]);
        let settings = BusSettings::read(&env).expect("the settings are right");
        let bus = Bus::connect(name, &settings)
            .await
            .expect("NATS takes the connection");
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
            if let Some(status) = self.process.ended() {
                panic!("nats-server ended at once ({status}):\n{}", self.process.log());
            }
            let client = async_nats::connect(&self.url)
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
