//! Admission control: limits requests per method class, per user and per source address.
//!
//! Every call of a service first takes a concurrency permit for its class ([`MethodInfo::class`]) and its user.
//! Requests that call no service (the web page, the API description, refusals) take no permit. The session is checked
//! before a permit is taken, so that requests without a session cannot use up the permits.

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use metrics::counter;
use vmwatch_api::{
    Class, MethodInfo,
    wire::{Fault, FaultKind},
};
use vmwatch_bus::{
    Context,
    limits::{Full, Limit, LimitSettings, Limits, Permit, SHARES},
};

use crate::{
    rate::{Bucket, nanoseconds},
    sources::{SourceSettings, Sources},
};

/// Name of this program in fault messages.
const PROGRAM: &str = "the gateway";

/// Configured limits of concurrency and request rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdmissionSettings {
    pub(crate) limits: LimitSettings,
    pub(crate) event_streams: usize,
    pub(crate) event_streams_per_user: usize,
    pub(crate) per_second: Option<NonZeroU32>,
    pub(crate) logins: SourceSettings,
}

/// Concurrency and rate limits for all requests to this gateway.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: Limits,
    /// Concurrency limit for requests that act on several VMs. Such a request keeps its connection open for minutes and
    /// takes a permit of the command class for each of its actions.
    batches: Limit,
    event_streams: Limit,
    rate: Option<Rate>,
    logins: Sources,
    /// Separate from the limit of logins, so that people can log in from an address from which many VMs enrol.
    enrollments: Sources,
    /// Separate from the limit of enrolments, so that downloads by one VM do not stop the enrolment of others.
    downloads: Sources,
}

impl Admission {
    pub(crate) fn new(settings: AdmissionSettings) -> Self {
        Self {
            limits: Limits::new(settings.limits),
            batches: Limit::new((settings.limits.commands / SHARES).max(1)),
            event_streams: Limit::new(settings.event_streams).with_share(settings.event_streams_per_user),
            rate: settings.per_second.map(Rate::new),
            logins: Sources::new(settings.logins),
            enrollments: Sources::new(settings.logins),
            downloads: Sources::new(settings.logins),
        }
    }

    /// Admits a call to a service: returns its permit, or the fault to send to the client.
    pub(crate) async fn enter(&self, info: &MethodInfo, context: &Context) -> Result<Permit, Fault> {
        let permit = self.limits.for_class(info.class).enter(user(context)).await;
        let permit = permit.map_err(|full| refused(full, info.subject, info.class.as_str()))?;
        // Check the source address last, so that a request that gets no permit spends no login token.
        match info.class {
            Class::Login => self.check_source(info, context)?,
            Class::Enrollment => {
                take(
                    &self.enrollments,
                    info.subject,
                    context.source.as_deref(),
                    "enrolments",
                )?;
            }
            _ => {}
        }
        // Logout, session revocation and user management are exempt from the rate limit: they must work under any load.
        let exempt = info.class == Class::Account;
        match &self.rate {
            Some(rate) if !exempt && !rate.admits() => {
                shed(info.subject, "rate");
                let text = "the gateway is at its limit of requests per second; try again shortly";
                Err(Fault::new(FaultKind::Overloaded, text))
            }
            _ => Ok(permit),
        }
    }

    /// Waits, at most until the given time, for the permit of one action. Requests that act on several VMs call this
    /// for each of their actions.
    pub(crate) async fn enter_until(
        &self,
        info: &MethodInfo,
        user: &str,
        until: tokio::time::Instant,
    ) -> Result<Permit, Fault> {
        let permit = self
            .limits
            .for_class(info.class)
            .enter_until(Some(user), until)
            .await;
        permit.map_err(|full| refused(full, info.subject, info.class.as_str()))
    }

    /// Takes a permit for a request that acts on several VMs.
    pub(crate) async fn enter_batch(&self, user: &str) -> Result<Permit, Fault> {
        let permit = self.batches.enter(Some(user)).await;
        permit.map_err(|full| refused(full, "act_on_several", "requests for several VMs"))
    }

    /// Takes a permit for a client of the live event stream.
    pub(crate) async fn enter_stream(&self, user: &str) -> Result<Permit, Fault> {
        let permit = self.event_streams.enter(Some(user)).await;
        permit.map_err(|full| refused(full, "events", "event streams"))
    }

    /// Refuses a password check if its source address has sent too many of them. [`Self::enter`] calls this for logins.
    pub(crate) fn check_source(&self, info: &MethodInfo, context: &Context) -> Result<(), Fault> {
        take(&self.logins, info.subject, context.source.as_deref(), "logins")
    }

    /// Refuses the download of the install script or of a package if too many of them came from the source address. These
    /// requests have no session.
    pub(crate) fn check_download(&self, method: &'static str, source: Option<&str>) -> Result<(), Fault> {
        take(&self.downloads, method, source, "downloads")
    }
}

fn take(sources: &Sources, method: &'static str, source: Option<&str>, what: &str) -> Result<(), Fault> {
    // The source address is missing only if the request did not come through the HTTP listener.
    let source = source.and_then(|source| source.parse::<IpAddr>().ok());
    let Some(Err(wait)) = source.map(|source| sources.take(source)) else {
        return Ok(());
    };
    shed(method, "source");
    let text = format!("too many {what} from this address; try again later");
    Err(Fault::new(FaultKind::Throttled, text).retry_after(wait))
}

fn user(context: &Context) -> Option<&str> {
    let principal = context.principal.as_ref()?;
    Some(&principal.user)
}

fn refused(full: Full, method: &'static str, what: &str) -> Fault {
    shed(method, full.label());
    full.fault(PROGRAM, what)
}

fn shed(method: &'static str, limit: &'static str) {
    counter!("vmwatch_requests_shed_total", "method" => method, "limit" => limit).increment(1);
}

/// Limits requests per second, with a burst allowance.
#[derive(Debug)]
struct Rate {
    began: Instant,
    bucket: Bucket,
    /// Time at which the token bucket is full again, in nanoseconds since `began`.
    full_at: AtomicU64,
}

impl Rate {
    fn new(per_second: NonZeroU32) -> Self {
        Self {
            began: Instant::now(),
            bucket: Bucket::new(per_second.get(), Duration::from_secs(1) / per_second.get()),
            full_at: AtomicU64::new(0),
        }
    }

    fn admits(&self) -> bool {
        self.admits_at(nanoseconds(self.began.elapsed()))
    }

    fn admits_at(&self, now: u64) -> bool {
        let take = |full_at| self.bucket.take(full_at, now).ok();
        let admitted = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        admitted.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use vmwatch_api::{
        Method, Principal, Role, Scope, auth::Login, lifecycle::Start, metrics::VmLatest, users::Logout,
    };

    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn admission(per_second: Option<u32>) -> Admission {
        Admission::new(AdmissionSettings {
            limits: LimitSettings {
                logins: 4,
                enrollments: 4,
                account_requests: 4,
                commands: 4,
                cheap_reads: 8,
                heavy_reads: 4,
            },
            event_streams: 8,
            event_streams_per_user: 3,
            per_second: per_second.and_then(NonZeroU32::new),
            logins: SourceSettings {
                burst: 2,
                interval: Duration::from_hours(1),
            },
        })
    }

    fn asks(user: &str) -> Context {
        Context::new(Duration::from_secs(5)).as_principal(Principal {
            user: user.to_owned(),
            role: Role::Admin,
            scope: Scope::All,
        })
    }

    fn from(source: &str) -> Context {
        let mut context = Context::new(Duration::from_secs(5));
        context.source = Some(source.to_owned());
        context
    }

    #[tokio::test]
    async fn commands_do_not_use_up_permits_of_reads() {
        let admission = admission(None);
        let mut held = Vec::new();
        for user in ["a", "b", "c", "d"] {
            held.push(admission.enter(&Start::INFO, &asks(user)).await.unwrap());
        }
        let refused = admission.enter(&Start::INFO, &asks("e")).await.unwrap_err();
        assert_eq!(refused.kind, FaultKind::Overloaded);
        assert_eq!(
            refused.message,
            "the gateway is at its limit of commands; try again shortly"
        );
        assert!(refused.retry_after.is_some());
        for method in [VmLatest::INFO, Logout::INFO] {
            held.push(admission.enter(&method, &asks("a")).await.unwrap());
        }
    }

    #[tokio::test]
    async fn user_at_its_permit_limit_does_not_block_other_users() {
        let admission = admission(None);
        let read = async |user| admission.enter(&VmLatest::INFO, &asks(user)).await;
        let _held = (read("a").await.unwrap(), read("a").await.unwrap());
        let refused = read("a").await.unwrap_err();
        assert_eq!(refused.kind, FaultKind::Throttled);
        assert!(refused.retry_after.is_some());
        assert!(read("b").await.is_ok());
    }

    #[tokio::test]
    async fn event_streams_are_limited_per_user() {
        let admission = admission(None);
        let mut held = Vec::new();
        for user in ["a", "a", "a", "b", "b", "b", "c", "c"] {
            held.push(admission.enter_stream(user).await.unwrap());
        }
        let kind = async |user| admission.enter_stream(user).await.unwrap_err().kind;
        assert_eq!(kind("a").await, FaultKind::Throttled);
        assert_eq!(kind("d").await, FaultKind::Overloaded);
    }

    #[tokio::test]
    async fn login_refused_because_of_overload_does_not_count_against_source_address() {
        let admission = admission(None);
        let login = async |source| admission.enter(&Login::INFO, &from(source)).await;
        let held = [
            login("192.0.2.1").await.unwrap(),
            login("192.0.2.2").await.unwrap(),
            login("192.0.2.3").await.unwrap(),
            login("192.0.2.4").await.unwrap(),
        ];
        for _ in 0..10 {
            assert_eq!(login("192.0.2.5").await.unwrap_err().kind, FaultKind::Overloaded);
        }
        drop(held);
        for _ in 0..2 {
            assert!(login("192.0.2.5").await.is_ok());
        }
        let refused = login("192.0.2.5").await.unwrap_err();
        assert_eq!(refused.kind, FaultKind::Throttled);
        assert!(refused.retry_after.unwrap() > Duration::from_mins(59));
        assert!(login("192.0.2.6").await.is_ok());
    }

    #[tokio::test]
    async fn refused_request_does_not_count_against_rate_limit() {
        let admission = admission(Some(3));
        let read = async |user| admission.enter(&VmLatest::INFO, &asks(user)).await;
        let held = (read("a").await.unwrap(), read("a").await.unwrap());
        for _ in 0..100 {
            assert_eq!(read("a").await.unwrap_err().kind, FaultKind::Throttled);
        }
        assert!(
            read("b").await.is_ok(),
            "the refused request must not have spent the last rate token"
        );
        assert_eq!(read("b").await.unwrap_err().kind, FaultKind::Overloaded);
        assert!(admission.enter(&Logout::INFO, &asks("b")).await.is_ok());
        drop(held);
    }

    #[test]
    fn rate_limiter_admits_burst_plus_rate_under_overload() {
        let rate = Rate::new(NonZeroU32::new(2000).unwrap());
        // Send 10,000 requests per second for ten seconds.
        let admitted = (0..100_000_u64).filter(|turn| rate.admits_at(turn * MILLISECOND / 10));
        // Expect 2,000 requests per second for ten seconds, plus the initial burst of 2,000.
        assert_eq!(admitted.count(), 20_000 + 2_000 - 1);
    }
}
