//! Users in MongoDB, sessions in a JetStream KV bucket that gateways watch.
//!
//! A login costs one read of the user, one argon2id verification and one write to the bucket; nothing else ever asks
//! this service, since gateways check sessions by themselves.

pub mod config;
mod error;
mod first_admin;
mod handlers;
mod password;
mod sessions;
mod store;
pub mod users;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    api::{Service, auth::Login},
    bus::{Bus, serve::Server},
    health,
};
use tokio_util::sync::CancellationToken;

pub use error::AuthError;

use crate::{config::AuthSettings, password::Hasher, sessions::Sessions, store::UserStore};

/// What the handlers share.
pub(crate) struct Auth {
    users: UserStore,
    hasher: Hasher,
    sessions: Sessions,
}

/// Serves until `shutdown`, then drains.
pub async fn run(
    settings: AuthSettings,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
) -> Result<(), AuthError> {
    let name = Service::Auth.name();
    let bus = Bus::connect(name, &settings.bus).await?;
    let serving = Arc::new(AtomicBool::new(false));
    let readiness = {
        let (bus, serving) = (bus.clone(), Arc::clone(&serving));
        Arc::new(
            move || match (bus.is_connected(), serving.load(Ordering::Relaxed)) {
                (false, _) => Err("the bus is away"),
                (true, false) => Err("waiting for the database and the session bucket"),
                (true, true) => Ok(()),
            },
        )
    };
    health::start(settings.health, metrics, readiness, shutdown.clone()).await?;

    let users = UserStore::open(&settings.store, &settings.collection).await?;
    let hasher = Hasher::new(settings.login_permits)?;
    let prepared = async {
        first_admin::ensure(&users, &hasher, &settings.first_admin, &shutdown).await?;
        Sessions::open(&bus, &settings.sessions, &shutdown).await
    };
    let Some(sessions) = prepared.await? else {
        return Ok(());
    };
    let auth = Arc::new(Auth {
        users,
        hasher,
        sessions,
    });
    let server =
        Server::new(&bus, Service::Auth, settings.serve).method::<Login, _, _>(move |context, params| {
            let auth = Arc::clone(&auth);
            async move { auth.login(&context, params).await.map_err(Into::into) }
        });
    serving.store(true, Ordering::Relaxed);
    server.run(shutdown).await?;
    Ok(())
}
