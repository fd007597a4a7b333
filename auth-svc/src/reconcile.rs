//! The reconciler keeps the KV bucket of users equal to the database, ends the sessions of removed users, and deletes
//! API tokens of removed users and tokens that expired long ago. It repairs the state after a crash between two steps,
//! after a command whose second step failed, and after a rollback of the JetStream store.
//!
//! Each replica reconciles at its start, at a regular interval, and whenever the KV bucket was reread. Several replicas
//! may do so at the same time, because each write replaces only an unchanged entry ([`crate::mirror`]).

use std::{collections::HashMap, sync::Arc, time::Duration};

use metrics::counter;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use vmwatch_api::UserKey;
use vmwatch_bus::{follow::Follower, jetstream::JetStreamError, users::UserTable};
use vmwatch_service::jitter::jittered;

use crate::{AuthError, accounts::Accounts, api_tokens::ApiTokens, mirror::record_of};

/// Number of users read per database query.
const PAGE: usize = 500;
/// Number of users whose reconciliation may fail before the pass is aborted.
const MOST_FAILURES: usize = 5;
/// Maximum time that a pass waits for the KV bucket of users to be read.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) struct Reconciler {
    accounts: Arc<Accounts>,
    mirrored: Follower<UserTable>,
    api_tokens: Arc<ApiTokens>,
    interval: Duration,
}

impl Reconciler {
    pub(crate) const fn new(
        accounts: Arc<Accounts>,
        mirrored: Follower<UserTable>,
        api_tokens: Arc<ApiTokens>,
        interval: Duration,
    ) -> Self {
        Self {
            accounts,
            mirrored,
            api_tokens,
            interval,
        }
    }

    /// Reconciles at a regular interval and whenever the KV bucket was reread, until shutdown.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut reloads = self.mirrored.reloads();
        let passes = async {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(jittered(self.interval, 0.2)) => {}
                    Ok(()) = reloads.changed() => {}
                }
                if let Err(error) = self.pass().await {
                    counter!("vmwatch_reconciler_failures_total").increment(1);
                    warn!(%error, "reconciling users with the database failed; retrying at the next interval");
                }
            }
        };
        shutdown.run_until_cancelled(passes).await;
    }

    /// Compares all users in the database with the KV bucket and propagates those that differ.
    pub(crate) async fn pass(&self) -> Result<(), AuthError> {
        let filled = tokio::time::timeout(PATIENCE, self.mirrored.filled()).await;
        filled.map_err(|_| JetStreamError::Timeout)?;
        // The records in the KV buckets are listed before the database is read. A user created in between is then
        // missing from these lists and cannot be mistaken for a removed user.
        let mirrored = self.mirrored.read().all();
        let tokens = self.api_tokens.stored();
        let mut failures = Failures::default();
        let mut known = HashMap::new();
        let mut after = None;
        loop {
            let users = self.accounts.users.list(after.as_ref(), PAGE).await?;
            for user in &users {
                let hash = user.key.hash();
                known.insert(hash, user.created_at_ms());
                let held = self.mirrored.read().get(&hash);
                if held.as_deref() != Some(&record_of(user)) {
                    failures.note(self.finish(&user.key, "copied").await)?;
                }
            }
            match users.last() {
                Some(last) if users.len() == PAGE => after = Some(last.key.clone()),
                _ => break,
            }
        }
        for record in mirrored {
            let user = UserKey::from_name(&record.principal.user);
            if !known.contains_key(&user.hash()) {
                failures.note(self.finish(&user, "removed").await)?;
            }
        }
        failures.note(self.api_tokens.sweep(&tokens, &known).await)?;
        failures.first.map_or(Ok(()), Err)
    }

    /// Completes the remaining steps of a change of the user.
    async fn finish(&self, user: &UserKey, done: &'static str) -> Result<(), AuthError> {
        self.accounts.pass_on(user).await?;
        counter!("vmwatch_users_reconciled_total", "done" => done).increment(1);
        info!(%user, done, "repaired the record of a user in the KV bucket");
        Ok(())
    }
}

/// Collects the failures of one pass. A failure of one user must not keep others from being reconciled, but if the KV
/// bucket is unreachable, the pass must not wait for a time-out for every user.
#[derive(Default)]
struct Failures {
    count: usize,
    first: Option<AuthError>,
}

impl Failures {
    /// Records a failure so that the pass continues; aborts the pass with its first error if there are too many.
    fn note(&mut self, outcome: Result<(), AuthError>) -> Result<(), AuthError> {
        let Err(error) = outcome else {
            return Ok(());
        };
        self.count += 1;
        let first = self.first.get_or_insert(error);
        if self.count < MOST_FAILURES {
            return Ok(());
        }
        Err(std::mem::replace(first, AuthError::Contended))
    }
}
