//! Baseline: one axum process that answers the five documented methods itself, as a small team would write it. It has
//! no bus, services, limits, drain or traces. It reads and renders rows with vmwatch's code, so that a comparison shows
//! only what these features cost.

mod methods;
mod sessions;

use std::{env, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
    routing::post,
};
use metrics_svc::{config::RowSettings, row_cache::RowCache, store::RowStore};
use mongodb::{Client, bson::Document};
use vmwatch_api::metrics::Rows;
use vmwatch_service::config::{Environment, UTC_OFFSET};
use vmwatch_store::StoreSettings;
use vmwatch_store::{DATABASE, MONGODB_URI};

use crate::sessions::Sessions;

/// The state that all HTTP requests share.
struct App {
    newest: RowCache,
    /// If set, every request for rows is answered with these rows instead of rows from the database.
    echo: Option<Rows>,
    users: mongodb::Collection<Document>,
    sessions: Sessions,
    hypervisor: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let set = |name: &str| env::var(name).with_context(|| format!("{name} is not set"));
    let uri = set("BASELINE_MONGODB")?;
    let env = Environment::from_variables([(MONGODB_URI.name, uri.as_str())]);
    let settings = StoreSettings::read(&env).map_err(|_| anyhow::anyhow!(env.problems().join("; ")))?;
    let rows = RowSettings {
        blocks: "blocks".to_owned(),
        vms: "vm_samples".to_owned(),
        flat_check: std::time::Duration::ZERO,
        processes: "process_samples".to_owned(),
        offset: UTC_OFFSET.default.parse()?,
    };
    let store = Arc::new(RowStore::open(&settings, &rows).await?);
    let kept = Duration::from_millis(set("BASELINE_KEPT_MS")?.parse()?);
    let users = Client::with_uri_str(&uri).await?.database(DATABASE.default);
    let app = App {
        newest: RowCache::new(&store, kept),
        echo: env::var("BASELINE_ECHO").ok().map(Rows::from_json).transpose()?,
        users: users.collection("baseline_users"),
        sessions: Sessions::with(
            &set("BASELINE_SESSION")?,
            set("BASELINE_SESSIONS")?.parse()?,
            env::var_os("BASELINE_UNCHECKED").is_none(),
        )?,
        hypervisor: env::var("BASELINE_HYPERVISOR").unwrap_or_default(),
    };
    let router = Router::new()
        .route(gateway::legacy::PATH, post(answer))
        .route("/echo", post(async |body: Bytes| body))
        .with_state(Arc::new(app));
    let listener = tokio::net::TcpListener::bind(set("BASELINE_LISTEN")?).await?;
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        // Setting TCP_NODELAY fails only if the peer has disconnected.
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await?;
    Ok(())
}

async fn answer(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let body = match methods::answer(&app, &body).await {
        Ok(body) => body,
        Err(error) => format!("{{\"error\":{:?}}}", error.to_string()),
    };
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}
