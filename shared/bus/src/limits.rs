//! Limits of concurrent requests: one limit for each class of requests, and within each limit a share for each user.
//!
//! The gateway and every service apply the same limits, so the load of one class or user cannot use up the permits
//! of others. A request that finds no free permit is refused immediately. Only heavy reads wait, for up to one second
//! and in a bounded queue, because the web page requests several charts at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError},
    time::Instant,
};
use vmwatch_api::{
    Class,
    wire::{Fault, FaultKind},
};
use vmwatch_service::config::{Environment, Invalid, Setting, Value};

const MAX_LOGINS: Setting = Setting {
    name: "VMWATCH_MAX_LOGINS",
    value: Value::Number(1, 65_536),
    default: "32",
    help: "maximum number of concurrent logins in each gateway and each auth-svc; further logins are refused with 503",
};
const MAX_ENROLLMENTS: Setting = Setting {
    name: "VMWATCH_MAX_ENROLLMENTS",
    value: Value::Number(1, 65_536),
    default: "16",
    help: "maximum number of concurrent enrolments of agents in each gateway and each auth-svc; further ones are refused with 503, and agents try again",
};
const MAX_ACCOUNT_REQUESTS: Setting = Setting {
    name: "VMWATCH_MAX_ACCOUNT_REQUESTS",
    value: Value::Number(1, 65_536),
    default: "16",
    help: "maximum concurrent logouts and user-management requests in each gateway and each auth-svc; one user may use a quarter of them",
};
const MAX_COMMANDS: Setting = Setting {
    name: "VMWATCH_MAX_COMMANDS",
    value: Value::Number(1, 65_536),
    default: "64",
    help: "maximum concurrent VM commands in each gateway and each lifecycle-svc; one user may use a quarter of them",
};
const MAX_CHEAP_READS: Setting = Setting {
    name: "VMWATCH_MAX_CHEAP_READS",
    value: Value::Number(1, 65_536),
    default: "256",
    help: "maximum concurrent cheap reads (newest samples, VM lists, VM states) in each gateway and each service; one user may use a quarter of them",
};
const MAX_HEAVY_READS: Setting = Setting {
    name: "VMWATCH_MAX_HEAVY_READS",
    value: Value::Number(1, 65_536),
    default: "8",
    help: "maximum concurrent expensive reads (history, processes over time, the audit) in each gateway and each service; one user may use a quarter of them; a read beyond the maximum waits for up to 1 s and is then refused; at most four times as many reads as this maximum can wait",
};

pub const SETTINGS: &[Setting] = &[
    MAX_LOGINS,
    MAX_ENROLLMENTS,
    MAX_ACCOUNT_REQUESTS,
    MAX_COMMANDS,
    MAX_CHEAP_READS,
    MAX_HEAVY_READS,
];

/// A user's share is the limit divided by this number, but at least one permit.
pub const SHARES: usize = 4;
/// Maximum time that a request waits in the queue of a limit.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Number of heavy reads that may wait in the queue, as a multiple of the number of permits.
const HEAVY_READS_WAITING: usize = 4;

/// The maximum number of concurrent requests of each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitSettings {
    /// Maximum number of concurrent requests of [`Class::Login`].
    pub logins: usize,
    /// Maximum number of concurrent requests of [`Class::Enrollment`].
    pub enrollments: usize,
    /// Maximum number of concurrent requests of [`Class::Account`].
    pub account_requests: usize,
    /// Maximum number of concurrent requests of [`Class::Command`].
    pub commands: usize,
    /// Maximum number of concurrent requests of [`Class::CheapRead`].
    pub cheap_reads: usize,
    /// Maximum number of concurrent requests of [`Class::HeavyRead`].
    pub heavy_reads: usize,
}

impl LimitSettings {
    pub fn read(env: &Environment) -> Result<Self, Invalid> {
        let limit = |setting| env.number(setting);
        let enrollments = limit(&MAX_ENROLLMENTS);
        let (logins, account_requests) = (limit(&MAX_LOGINS), limit(&MAX_ACCOUNT_REQUESTS));
        let (commands, cheap_reads) = (limit(&MAX_COMMANDS), limit(&MAX_CHEAP_READS));
        let heavy_reads = limit(&MAX_HEAVY_READS);
        Ok(Self {
            logins: logins?,
            enrollments: enrollments?,
            account_requests: account_requests?,
            commands: commands?,
            cheap_reads: cheap_reads?,
            heavy_reads: heavy_reads?,
        })
    }
}

#[derive(Debug, Clone)]
pub struct Limits {
    logins: Limit,
    enrollments: Limit,
    account_requests: Limit,
    commands: Limit,
    cheap_reads: Limit,
    heavy_reads: Limit,
}

impl Limits {
    pub fn new(settings: LimitSettings) -> Self {
        Self {
            logins: Limit::new(settings.logins),
            enrollments: Limit::new(settings.enrollments),
            account_requests: Limit::new(settings.account_requests),
            commands: Limit::new(settings.commands),
            cheap_reads: Limit::new(settings.cheap_reads),
            heavy_reads: Limit::new(settings.heavy_reads)
                .with_queue(settings.heavy_reads * HEAVY_READS_WAITING),
        }
    }

    pub const fn for_class(&self, class: Class) -> &Limit {
        match class {
            Class::Login => &self.logins,
            Class::Enrollment => &self.enrollments,
            Class::Account => &self.account_requests,
            Class::Command => &self.commands,
            Class::CheapRead => &self.cheap_reads,
            Class::HeavyRead => &self.heavy_reads,
        }
    }
}

/// Grants permits for the requests of one class.
#[derive(Debug, Clone)]
pub struct Limit {
    permits: Arc<Semaphore>,
    queue: Arc<Semaphore>,
    share: Sizes,
    users: Arc<Users>,
}

/// One user's share of the permits and of the queue of a limit.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    permits: usize,
    queue: usize,
}

/// The users that hold or wait for a permit. All other users are removed, so the number of permits and the size of
/// the queue bound this table.
#[derive(Debug, Default)]
struct Users(Mutex<HashMap<String, Entry>>);

#[derive(Debug)]
struct Entry {
    share: Share,
    claims: usize,
}

#[derive(Debug, Clone)]
struct Share {
    permits: Arc<Semaphore>,
    queue: Arc<Semaphore>,
}

/// Registers a request of a user that holds or waits for a permit; dropping it unregisters the request.
#[derive(Debug)]
struct Claim {
    users: Arc<Users>,
    user: String,
    share: Share,
}

/// The right to process one request; dropping it returns the permit.
#[derive(Debug)]
#[must_use = "dropping it returns the permit"]
pub struct Permit {
    _of_class: OwnedSemaphorePermit,
    _of_user: Option<OwnedSemaphorePermit>,
    _claim: Option<Claim>,
}

/// Why a request was refused a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// All permits of the limit are in use.
    ForAll,
    /// The user's share of the permits is in use.
    ForUser,
}

impl Limit {
    /// Creates a limit without a queue. Each user may hold a quarter of the permits.
    pub fn new(most: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(most)),
            queue: Arc::new(Semaphore::new(0)),
            share: Sizes {
                permits: (most / SHARES).max(1),
                queue: 0,
            },
            users: Arc::default(),
        }
    }

    /// Adds a queue to the limit. Each user may occupy a quarter of the queue.
    #[must_use]
    pub fn with_queue(mut self, most: usize) -> Self {
        self.queue = Arc::new(Semaphore::new(most));
        self.share.queue = most.div_ceil(SHARES);
        self
    }

    /// Sets how many permits each user may hold.
    #[must_use]
    pub const fn with_share(mut self, permits: usize) -> Self {
        self.share.permits = permits;
        self
    }

    /// Acquires a permit; if the limit has a queue, waits for at most one second. A request without a user counts only
    /// against the total limit, not against a user's share.
    pub async fn enter(&self, user: Option<&str>) -> Result<Permit, Full> {
        let claim = user.map(|user| self.claim(user));
        let full = match self.take_now(claim.as_ref()) {
            Ok((of_class, of_user)) => return Ok(Permit::new(of_class, of_user, claim)),
            Err(full) => full,
        };
        let _queued = self.queue_up(claim.as_ref()).ok_or(full)?;
        self.take_until(claim, Instant::now() + LONGEST_WAIT).await
    }

    /// Acquires a permit, waiting until the given time at the latest. The caller must limit the number of waiting
    /// requests.
    pub async fn enter_until(&self, user: Option<&str>, until: Instant) -> Result<Permit, Full> {
        if Instant::now() >= until {
            return Err(Full::ForAll);
        }
        self.take_until(user.map(|user| self.claim(user)), until).await
    }

    fn claim(&self, user: &str) -> Claim {
        let mut users = self.users.lock();
        let entry = users.entry(user.to_owned()).or_insert_with(|| Entry {
            share: Share {
                permits: Arc::new(Semaphore::new(self.share.permits)),
                queue: Arc::new(Semaphore::new(self.share.queue)),
            },
            claims: 0,
        });
        entry.claims += 1;
        Claim {
            users: Arc::clone(&self.users),
            user: user.to_owned(),
            share: entry.share.clone(),
        }
    }

    fn take_now(
        &self,
        claim: Option<&Claim>,
    ) -> Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), Full> {
        let of_user = claim.map(|claim| Arc::clone(&claim.share.permits).try_acquire_owned());
        let of_user = of_user.transpose().map_err(|_| Full::ForUser)?;
        let of_class = Arc::clone(&self.permits).try_acquire_owned();
        Ok((of_class.map_err(|_| Full::ForAll)?, of_user))
    }

    fn queue_up(
        &self,
        claim: Option<&Claim>,
    ) -> Option<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>)> {
        let of_user = claim.map(|claim| Arc::clone(&claim.share.queue).try_acquire_owned());
        let queued = || -> Result<_, TryAcquireError> {
            Ok((Arc::clone(&self.queue).try_acquire_owned()?, of_user.transpose()?))
        };
        queued().ok()
    }

    /// Acquires a permit of the user's share first: a user that waits for its share then holds no permit that others
    /// need.
    async fn take_until(&self, claim: Option<Claim>, until: Instant) -> Result<Permit, Full> {
        let of_user = match &claim {
            None => None,
            Some(claim) => {
                let acquired =
                    tokio::time::timeout_at(until, Arc::clone(&claim.share.permits).acquire_owned());
                Some(
                    acquired
                        .await
                        .map_err(|_| Full::ForUser)?
                        .map_err(|_| Full::ForUser)?,
                )
            }
        };
        let acquired = tokio::time::timeout_at(until, Arc::clone(&self.permits).acquire_owned());
        let of_class = acquired
            .await
            .map_err(|_| Full::ForAll)?
            .map_err(|_| Full::ForAll)?;
        Ok(Permit::new(of_class, of_user, claim))
    }
}

impl Users {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut users = self.users.lock();
        if let Some(entry) = users.get_mut(&self.user) {
            entry.claims -= 1;
            if entry.claims == 0 {
                users.remove(&self.user);
            }
        }
    }
}

impl Permit {
    const fn new(
        of_class: OwnedSemaphorePermit,
        of_user: Option<OwnedSemaphorePermit>,
        claim: Option<Claim>,
    ) -> Self {
        Self {
            _of_class: of_class,
            _of_user: of_user,
            _claim: claim,
        }
    }
}

impl Full {
    /// The value of the label `limit` of the metric `vmwatch_requests_shed_total`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::ForAll => "class",
            Self::ForUser => "user",
        }
    }

    /// The fault for the refused caller. `program` is the name that callers know the program by; `what` is the plural
    /// of the limited requests.
    pub fn fault(self, program: &str, what: &str) -> Fault {
        match self {
            Self::ForAll => Fault::new(
                FaultKind::Overloaded,
                format!("{program} is at its limit of {what}; try again shortly"),
            ),
            Self::ForUser => Fault::new(
                FaultKind::Throttled,
                format!("this user has reached the limit of concurrent {what} per user; wait until one has finished"),
            )
            .retry_after(LONGEST_WAIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_user_may_hold_at_most_a_quarter_of_the_permits() {
        let limit = Limit::new(8);
        let mut held = Vec::new();
        for user in ["a", "a", "b", "b", "c", "c", "d", "d"] {
            held.push(limit.enter(Some(user)).await.unwrap());
            if held.len() == 2 {
                assert_eq!(limit.enter(Some("a")).await.unwrap_err(), Full::ForUser);
            }
        }
        assert_eq!(limit.enter(Some("e")).await.unwrap_err(), Full::ForAll);
        assert_eq!(limit.enter(None).await.unwrap_err(), Full::ForAll);
        held.clear();
        assert!(limit.enter(Some("e")).await.is_ok());
    }

    #[tokio::test]
    async fn each_user_gets_at_least_one_permit() {
        let limit = Limit::new(1);
        let held = limit.enter(Some("a")).await.unwrap();
        assert_eq!(limit.enter(Some("a")).await.unwrap_err(), Full::ForUser);
        drop(held);
        assert!(limit.enter(Some("a")).await.is_ok());
    }

    #[tokio::test]
    async fn users_without_a_running_request_are_removed_from_memory() {
        let limit = Limit::new(4);
        for number in 0..1000 {
            drop(limit.enter(Some(&format!("user-{number}"))).await.unwrap());
        }
        let held = limit.enter(Some("a")).await.unwrap();
        assert!(limit.enter(Some("a")).await.is_err());
        assert_eq!(limit.users.lock().len(), 1);
        drop(held);
        assert_eq!(limit.users.lock().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn queue_for_permits_is_bounded_and_waits_at_most_one_second() {
        let limit = Limit::new(4).with_queue(8);
        let held = limit.enter(Some("a")).await.unwrap();
        // User `a` may occupy a quarter of the queue, which is two of eight requests.
        let waiting = [(); 2].map(|()| {
            let limit = limit.clone();
            tokio::spawn(async move { limit.enter(Some("a")).await.map(drop) })
        });
        tokio::task::yield_now().await;
        let began = Instant::now();
        assert_eq!(limit.enter(Some("a")).await.unwrap_err(), Full::ForUser);
        assert_eq!(
            began.elapsed(),
            Duration::ZERO,
            "a request is refused immediately if the user's share of the queue is full"
        );
        assert!(
            limit.enter(Some("b")).await.is_ok(),
            "another user gets a permit without waiting"
        );
        drop(held);
        for waited in waiting {
            assert_eq!(waited.await.unwrap(), Ok(()));
        }
        let held = limit.enter(Some("a")).await.unwrap();
        let began = Instant::now();
        assert_eq!(limit.enter(Some("a")).await.unwrap_err(), Full::ForUser);
        assert!(began.elapsed() >= LONGEST_WAIT, "{:?}", began.elapsed());
        drop(held);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_a_permit_ends_at_the_given_time() {
        let limit = Limit::new(1);
        let held = limit.enter(Some("a")).await.unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        let waiting = limit.enter_until(Some("b"), until);
        assert_eq!(waiting.await.unwrap_err(), Full::ForAll);
        assert!(Instant::now() >= until);
        drop(held);
        assert_eq!(
            limit.enter_until(Some("b"), until).await.unwrap_err(),
            Full::ForAll
        );
        let until = Instant::now() + Duration::from_secs(1);
        assert!(limit.enter_until(Some("b"), until).await.is_ok());
    }
}
