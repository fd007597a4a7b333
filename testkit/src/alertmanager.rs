//! Debian's Alertmanager, as a receiver of alerts.

use std::{fs, net::SocketAddr, path::Path};

use serde_json::{Value, json};

use crate::{PATIENCE, Process, Spec, eventually, ports::free_port, tools};

/// An Alertmanager that notifies a webhook.
#[derive(Debug)]
pub struct Alertmanager {
    _process: Process,
    /// The address of its API, on loopback.
    pub address: SocketAddr,
}

impl Alertmanager {
    /// Starts an Alertmanager that has its files in the folder, and waits until it answers. It groups alerts by
    /// `instance_id` and `env`.
    pub async fn start(folder: &Path, webhook: &str) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = json!({
            "route": {
                "receiver": "hook", "group_by": ["instance_id", "env"],
                "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h",
            },
            "receivers": [{ "name": "hook", "webhook_configs": [{ "url": webhook, "send_resolved": true }] }],
        });
        let file = folder.join("alertmanager.yml");
        fs::write(&file, config.to_string()).unwrap();
        let args = [
            format!("--config.file={}", file.display()),
            format!("--storage.path={}", folder.join("alertmanager").display()),
            format!("--web.listen-address={address}"),
            "--cluster.listen-address=".to_owned(),
        ];
        let process = Process::start(Spec {
            name: "alertmanager".to_owned(),
            program: tools::alertmanager(),
            args: args.to_vec(),
            env: Vec::new(),
            log: folder.join("alertmanager.log"),
        });
        let alertmanager = Self {
            _process: process,
            address,
        };
        eventually("Alertmanager answers", PATIENCE, async || {
            let answer = reqwest::get(alertmanager.url("/-/ready")).await;
            answer
                .and_then(reqwest::Response::error_for_status)
                .map(drop)
                .map_err(|error| error.to_string())
        })
        .await;
        alertmanager
    }

    /// The URL of a path of its API.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The alerts that are active.
    pub async fn active(&self) -> Vec<Value> {
        let answer = reqwest::get(self.url("/api/v2/alerts")).await.unwrap();
        answer.json().await.unwrap()
    }

    /// The active alert with this name, if there is one.
    pub async fn alert(&self, name: &str) -> Option<Value> {
        let mut active = self.active().await.into_iter();
        active.find(|alert| alert["labels"]["alertname"] == name)
    }
}
