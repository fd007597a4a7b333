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
mod throttle;
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
    lifetime::until_done,
};
use tokio_util::sync::CancellationToken;

pub use error::AuthError;

use crate::{
    config::AuthSettings, password::Hasher, sessions::Sessions, store::UserStore, throttle::Throttle,
};

/// What the handlers share.
pub(crate) struct Auth {
    users: UserStore,
    hasher: Hasher,
    sessions: Sessions,
    throttle: Throttle,
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
    let first_admin = until_done("the database", &shutdown, || {
        first_admin::ensure(&users, &hasher, &settings.first_admin)
    });
    let buckets = until_done("JetStream", &shutdown, || async {
        let throttle = Throttle::open(&bus, settings.throttle, settings.sessions.replicas);
        tokio::try_join!(Sessions::open(&bus, &settings.sessions), throttle)
    });
    let (Some(()), Some((sessions, throttle))) = tokio::join!(first_admin, buckets) else {
        return Ok(());
    };
    let auth = Arc::new(Auth {
        users,
        hasher,
        sessions,
        throttle,
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
