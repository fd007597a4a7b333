//! A webhook receiver that notes when a message about a VM arrives.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use axum::{Json, Router, extract::State, http::StatusCode, routing::post};
use serde::Deserialize;

/// When the first message about each VM arrived, by the id of the VM.
type Arrivals = Arc<Mutex<HashMap<String, Instant>>>;

/// The part of Alertmanager's webhook JSON that the benchmark reads.
#[derive(Debug, Deserialize)]
struct Body {
    alerts: Vec<BodyAlert>,
}

#[derive(Debug, Deserialize)]
struct BodyAlert {
    status: String,
    labels: HashMap<String, String>,
}

/// The receiver, which listens on a free port of the loopback interface until it is dropped.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) address: SocketAddr,
    arrivals: Arrivals,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Receiver {
    pub(super) async fn start() -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let arrivals = Arrivals::default();
        let router = Router::new()
            .route("/", post(receive))
            .with_state(Arc::clone(&arrivals));
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the receiver has ended: {error}");
            }
        });
        Ok(Self {
            address,
            arrivals,
            task,
        })
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// Returns when the first message about a VM arrived.
    pub(super) fn arrival(&self, vm: &str) -> Option<Instant> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.get(vm).copied()
    }
}

async fn receive(State(arrivals): State<Arrivals>, Json(body): Json<Body>) -> StatusCode {
    let now = Instant::now();
    let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
    for alert in body.alerts.into_iter().filter(|alert| alert.status == "firing") {
        if let Some(vm) = alert.labels.get("instance_id") {
            arrivals.entry(vm.clone()).or_insert(now);
        }
    }
    StatusCode::OK
}
