//! The service for users and sessions, and for join tokens and agents. Users are stored in MongoDB, sessions and API
//! tokens in JetStream KV buckets that gateways follow, join tokens and agents in KV buckets that only this service
//! reads.
//!
//! A login costs two reads of the user, one argon2id verification, and one write each to the KV bucket of sessions, the
//! session index and the audit. No program asks this service whether a session is valid: gateways decide from the KV
//! buckets of sessions and users. [`mirror`] and [`reconcile`] keep the bucket of users equal to the database.

#![expect(
    missing_docs,
    reason = "the names of some settings, fields and errors are sufficient documentation"
)]

mod accounts;
mod agents;
mod api_tokens;
mod audit;
mod audit_watch;
mod bucket;
mod callout;
pub mod config;
mod enrollment;
pub mod enrollment_commands;
mod error;
mod first_admin;
mod handlers;
mod join_tokens;
mod mirror;
mod password;
mod reconcile;
mod session_index;
mod sessions;
mod store;
mod throttle;
pub mod users;

use std::{sync::Arc, time::Duration};

use mongodb::Database;
use tracing::warn;
use vmwatch_api::{
    Service,
    api_tokens::{ApiTokensCreate, ApiTokensList, ApiTokensRevoke, ApiTokensUsed},
    audit::List,
    auth::Login,
    enrollment::{
        AgentsEnroll, AgentsList, AgentsRevoke, JoinTokensCreate, JoinTokensList, JoinTokensRevoke,
    },
    sessions::{SESSION_BUCKET, SessionsEnd, SessionsList, SessionsUsed, USER_BUCKET},
    users::{Logout, UsersAdd, UsersGet, UsersList, UsersRemove, UsersSetPassword, UsersUpdate},
};
use vmwatch_bus::{
    Bus,
    audit::{Audit, Refusals},
    clock,
    follow::Follower,
    provision::{
        ProvisionError, Wanted, ensure_stream,
        setup::{self, SetupArguments},
    },
    serve::{Server, bind},
    users::UserTable,
};
use vmwatch_service::{lifetime::until_done, program::Program};

pub use error::AuthError;

use crate::{
    accounts::Accounts,
    agents::Agents,
    api_tokens::ApiTokens,
    audit_watch::Floods,
    callout::{Callout, Checks},
    config::{AuthSettings, ForAgents},
    enrollment::Enrollment,
    join_tokens::JoinTokens,
    mirror::Mirror,
    password::Hasher,
    reconcile::Reconciler,
    session_index::SessionIndex,
    sessions::Sessions,
    store::UserStore,
    throttle::Throttle,
};

/// Time without confirmation after which the in-memory copy of the KV bucket of users is stale. A stale copy is not
/// compared with the database.
const MIRROR_STALE_AFTER: Duration = Duration::from_secs(10);

/// Number of failed logins, and of refused enrolments, from one client address that are recorded individually in each
/// counting period.
const FLOOD_ONE_BY_ONE: u32 = 10;
const FLOOD_PERIOD: Duration = Duration::from_mins(1);

/// The state that all handlers share.
pub(crate) struct Auth {
    bus: Bus,
    accounts: Arc<Accounts>,
    /// The in-memory copy of the KV bucket of users.
    mirrored: Follower<UserTable>,
    api_tokens: Arc<ApiTokens>,
    enrollment: Enrollment,
    /// What agents need in order to report.
    for_agents: ForAgents,
    throttle: Throttle,
    audit: Audit,
    floods: Arc<Floods>,
    refusals: Arc<Refusals>,
}

/// Serves requests until shutdown, then drains them.
pub async fn run(settings: AuthSettings, program: Program) -> Result<(), AuthError> {
    let name = Service::Auth.name();
    let bus = Bus::connect(name, &settings.bus).await?;
    clock::watch(&bus, &format!("KV_{SESSION_BUCKET}"), program.shutdown().clone());
    let callout = match &settings.callout {
        Some(keys) => Some(Callout::connect(&settings.bus, keys).await?),
        None => None,
    };
    let waiting_for = "waiting for the database, the KV buckets and the NATS subscriptions";
    let (connected, system) = (bus.clone(), callout.clone());
    let check = move || {
        connected.check()?;
        system.as_ref().map_or(Ok(()), Callout::check)
    };
    program.start_health(settings.health, waiting_for, check).await?;

    let database = settings.store.open_durable(name).await?;
    let served = Box::pin(serve(&settings, &bus, callout, &database, &program)).await;
    vmwatch_store::close(&database).await;
    served
}

async fn serve(
    settings: &AuthSettings,
    bus: &Bus,
    callout: Option<Callout>,
    database: &Database,
    program: &Program,
) -> Result<(), AuthError> {
    let shutdown = program.shutdown().clone();
    let users = UserStore::new(database, &settings.collection);
    let hasher = Hasher::new(settings.login_permits)?;
    let buckets = until_done("JetStream", &shutdown, || open_buckets(bus, settings));
    // The audit stream is created before the first administrator, because creating the administrator writes an audit
    // record.
    let audit = async {
        let opening = until_done("the audit stream", &shutdown, || ensure_audit(bus, settings));
        let audit = Box::pin(opening).await?;
        let first_admin = until_done("the database", &shutdown, || {
            first_admin::ensure(&users, &hasher, &settings.first_admin, &audit)
        });
        Box::pin(first_admin).await.map(|()| audit)
    };
    let (buckets, audit) = tokio::join!(buckets, Box::pin(audit));
    let (Some((sessions, mirror, throttle)), Some(audit)) = (buckets, audit) else {
        return Ok(());
    };
    let (checks, queue) = Checks::new();
    let enrollment = Enrollment::follow(bus, &shutdown, checks.clone());
    let api_tokens = Arc::new(ApiTokens::follow(bus, &shutdown));
    let accounts = Arc::new(Accounts {
        users,
        hasher,
        mirror,
        sessions,
    });
    let mirrored = Follower::start(
        bus,
        USER_BUCKET,
        MIRROR_STALE_AFTER,
        UserTable::default(),
        shutdown.clone(),
    );
    let reconciler = Reconciler::new(
        Arc::clone(&accounts),
        mirrored.clone(),
        Arc::clone(&api_tokens),
        settings.reconcile_interval,
    );
    if until_done("the users to be copied to the KV bucket", &shutdown, || {
        reconciler.pass()
    })
    .await
    .is_none()
    {
        return Ok(());
    }
    if shutdown.run_until_cancelled(enrollment.filled()).await.is_none() {
        return Ok(());
    }
    tokio::spawn(reconciler.run(shutdown.clone()));
    let refusals = Arc::new(Refusals::new(audit.clone(), Service::Auth));
    let auth = Arc::new(Auth {
        bus: bus.clone(),
        accounts,
        mirrored,
        api_tokens,
        enrollment,
        for_agents: settings.for_agents.clone(),
        throttle,
        audit,
        floods: Arc::new(Floods::new(FLOOD_PERIOD, FLOOD_ONE_BY_ONE)),
        refusals: Arc::clone(&refusals),
    });
    let watching = tokio::spawn(audit_watch::run(
        bus.clone(),
        auth.audit.clone(),
        settings.audit,
        Arc::clone(&auth.floods),
        shutdown.clone(),
    ));
    let (counting, until) = (Arc::clone(&refusals), shutdown.clone());
    tokio::spawn(async move { counting.run(until).await });
    let answering = match (callout, &settings.callout) {
        (Some(callout), Some(keys)) => {
            let (agents, issuer) = (auth.enrollment.agents(), keys.issuer.clone());
            let starting = callout.start(agents, (checks, queue), issuer, shutdown.clone());
            Some(starting.await?)
        }
        _ => None,
    };
    let server = methods(Server::new(bus, Service::Auth, settings.serve), &auth);
    server.run(shutdown, || program.set_serving()).await?;
    refusals.finish().await;
    for task in [Some(watching), answering].into_iter().flatten() {
        if let Err(error) = task.await {
            warn!(%error, "a background task of auth-svc panicked");
        }
    }
    Ok(())
}

/// Opens the KV buckets, and creates those that are missing.
async fn open_buckets(bus: &Bus, settings: &AuthSettings) -> Result<(Sessions, Mirror, Throttle), AuthError> {
    let replicas = settings.sessions.replicas;
    let (sessions, mirror, throttle, ()) = tokio::try_join!(
        Sessions::open(bus, &settings.sessions),
        Mirror::open(bus, replicas),
        Throttle::open(bus, settings.throttle, replicas),
        async {
            ApiTokens::ensure_bucket(bus, replicas).await?;
            Ok(Enrollment::ensure_buckets(bus, replicas).await?)
        }
    )?;
    Ok((sessions, mirror, throttle))
}

async fn ensure_audit(bus: &Bus, settings: &AuthSettings) -> Result<Audit, ProvisionError> {
    for wanted in settings.audit.streams() {
        ensure_stream(bus, Service::Auth, &wanted).await?;
    }
    Ok(Audit::new(bus, settings.audit_required))
}

/// Creates auth-svc's streams and KV buckets; changes existing ones to the configured values.
pub async fn set_up(settings: &AuthSettings, arguments: SetupArguments) -> Result<(), AuthError> {
    let [authenticated, unauthenticated] = settings.audit.streams();
    let replicas = settings.sessions.replicas;
    let wanted: [Wanted; 9] = [
        Sessions::bucket(&settings.sessions).into(),
        SessionIndex::bucket(&settings.sessions).into(),
        Mirror::bucket(replicas).into(),
        Throttle::bucket(settings.throttle, replicas).into(),
        JoinTokens::bucket(replicas).into(),
        Agents::bucket(replicas).into(),
        ApiTokens::bucket(replicas).into(),
        authenticated.into(),
        unauthenticated.into(),
    ];
    Ok(setup::run(Service::Auth, &settings.bus, &wanted, arguments).await?)
}

/// Registers the handler of every method.
fn methods(server: Server, auth: &Arc<Auth>) -> Server {
    let for_refusals = Arc::clone(auth);
    server
        .on_refusal(move |refused| {
            let auth = Arc::clone(&for_refusals);
            async move { auth.refused(refused).await }
        })
        .method(Login, bind(auth, Auth::login))
        .method(Logout, bind(auth, Auth::logout))
        .method(SessionsList, bind(auth, Auth::list_sessions))
        .method(SessionsEnd, bind(auth, Auth::end_session))
        .method(SessionsUsed, bind(auth, Auth::note_uses))
        .method(UsersGet, bind(auth, Auth::get_user))
        .method(UsersList, bind(auth, Auth::list_users))
        .method(UsersAdd, bind(auth, Auth::add_user))
        .method(UsersUpdate, bind(auth, Auth::update_user))
        .method(UsersRemove, bind(auth, Auth::remove_user))
        .method(UsersSetPassword, bind(auth, Auth::set_password))
        .method(List, bind(auth, Auth::list_audit))
        .method(ApiTokensCreate, bind(auth, Auth::create_api_token))
        .method(ApiTokensList, bind(auth, Auth::list_api_tokens))
        .method(ApiTokensRevoke, bind(auth, Auth::revoke_api_token))
        .method(ApiTokensUsed, bind(auth, Auth::note_token_uses))
        .method(JoinTokensCreate, bind(auth, Auth::create_join_token))
        .method(JoinTokensList, bind(auth, Auth::list_join_tokens))
        .method(JoinTokensRevoke, bind(auth, Auth::revoke_join_token))
        .method(AgentsEnroll, bind(auth, Auth::enroll))
        .method(AgentsList, bind(auth, Auth::list_agents))
        .method(AgentsRevoke, bind(auth, Auth::revoke_agent))
}
