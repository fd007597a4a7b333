//! Work that must continue during an overload. Each kind of work (`Cell`) is repeated, and each repetition must succeed
//! within the bound of its kind.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use mongodb::bson::doc;
use serde_json::json;
use testkit::{ADMIN, Gateway, MACHINES, PATIENCE, Stack, eventually, figure};
use vmwatch_api::{
    Role,
    time::{CreateDate, unix_millis},
};

use super::super::vm_request;
use crate::{
    history_support::{publish, sample},
    rest::client::Api,
    rows::stored_rows,
};

/// The bounds are far above the usual durations on a busy machine, and below the deadlines at which the work would
/// fail.
const LOGOUT: Duration = Duration::from_secs(3);
const READ: Duration = Duration::from_secs(3);
const START: Duration = Duration::from_secs(10);
const INGEST: Duration = Duration::from_secs(10);
const REVOCATION: Duration = Duration::from_secs(3);
const LOGIN: Duration = Duration::from_secs(3);
/// Pause between two repetitions, so that this work is not an overload itself.
const PAUSE: Duration = Duration::from_millis(50);
/// Number of users that are removed one after the other.
const VICTIMS: usize = 2;
/// The VM whose samples must be stored during the overload.
const OTHER_VM: &str = "other-vm";

/// A kind of work that must continue during an overload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cell {
    Logout,
    Read,
    Start,
    Ingest,
    Revocation,
    Login,
}

impl Cell {
    const fn bound(self) -> Duration {
        match self {
            Self::Logout => LOGOUT,
            Self::Read => READ,
            Self::Start => START,
            Self::Ingest => INGEST,
            Self::Revocation => REVOCATION,
            Self::Login => LOGIN,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::Read => "read",
            Self::Start => "start",
            Self::Ingest => "ingest",
            Self::Revocation => "revocation",
            Self::Login => "login",
        }
    }
}

/// The durations of all repetitions, for each kind of work.
#[derive(Debug)]
pub(super) struct Took(Vec<(Cell, Vec<Duration>)>);

/// Users that work normally while the system is overloaded.
pub(super) struct Bystander<'a> {
    stack: &'a Stack,
    gateway: &'a Gateway,
    admin: Api,
    reader: String,
    operator: String,
    /// Users that are removed during the overload, with one session each.
    victims: Vec<(String, Api)>,
    /// The source address from which the administrator and these users connect. No overload uses it.
    address: Ipv4Addr,
}

impl<'a> Bystander<'a> {
    /// Creates the users and their sessions before an overload begins. For each overload, these users get a new source
    /// address.
    pub(super) async fn prepare(stack: &'a Stack) -> Self {
        static ROW: AtomicU8 = AtomicU8::new(2);
        let address = Ipv4Addr::new(127, 0, 0, ROW.fetch_add(1, Ordering::Relaxed));
        let gateway = stack.gateway(0);
        let api = Api::from_address(gateway, address);
        let admin = api.log_in(ADMIN.0, ADMIN.1).await;
        let mut victims = Vec::new();
        for number in 0..VICTIMS {
            let name = format!("victim-{number}-{address}");
            let password = "correct for this one";
            let user = json!({ "name": name, "password": password, "role": "viewer", "scope": "all" });
            let added = admin.post("/users", user).await;
            assert_eq!(added.status, 201, "{added:?}");
            victims.push((name.clone(), api.log_in(&name, password).await));
        }
        Self {
            stack,
            gateway,
            admin,
            reader: stack.session_as("reader", Role::Viewer).await,
            operator: stack.session_as("operator", Role::Operator).await,
            victims,
            address,
        }
    }

    /// Repeats all kinds of work in parallel for `time`, except the kinds in `leaves_out`.
    pub(super) async fn work(mut self, time: Duration, leaves_out: &[Cell]) -> Took {
        let end = Instant::now() + time;
        let victims = std::mem::take(&mut self.victims);
        let end_of = |cell| (!leaves_out.contains(&cell)).then_some(end);
        let (logouts, reads, starts, ingests, logins, revocations) = tokio::join!(
            again(end_of(Cell::Logout), PAUSE, || self.log_out()),
            again(end_of(Cell::Read), PAUSE, || self.read()),
            again(end_of(Cell::Start), PAUSE, || self.start()),
            again(end_of(Cell::Ingest), PAUSE, || self.ingest()),
            // Logs in once per second, the rate that the gateway permits to one source address.
            again(end_of(Cell::Login), Duration::from_secs(1), || self.log_in()),
            self.revoke(victims, time),
        );
        Took(vec![
            (Cell::Logout, logouts),
            (Cell::Read, reads),
            (Cell::Start, starts),
            (Cell::Ingest, ingests),
            (Cell::Revocation, revocations),
            (Cell::Login, logins),
        ])
    }

    /// Measures the time from a logout to the first refused request with the ended session.
    async fn log_out(&self) {
        let token = self.stack.session_as("leaver", Role::Viewer).await;
        let leaver = Api::of(self.gateway).holding(&token);
        let reply = leaver.delete("/sessions/current").await;
        assert_eq!(reply.status, 204, "{reply:?}");
        is_over(&leaver).await;
    }

    async fn read(&self) {
        let answer = self.gateway.post(&vm_request(&self.reader)).await;
        assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
    }

    async fn start(&self) {
        let answer = self.gateway.start_vm(&self.operator, MACHINES[0].0).await;
        assert_eq!((answer.http, answer.status()), (200, 1), "{answer:?}");
    }

    /// Measures the time from the publishing of a sample until its row is stored.
    async fn ingest(&self) {
        let at = unix_millis();
        publish(self.stack, &sample(OTHER_VM, at, "+00:00", 1.5)).await;
        let date = CreateDate::at_millis(at, "+00:00".parse().unwrap());
        let of_vm = doc! { "instance_id": OTHER_VM, "kind": "vm" };
        eventually("the published sample is stored", PATIENCE, async || {
            let found = stored_rows(&self.stack.database, of_vm.clone()).await;
            let found = found.map_err(|error| error.to_string())?;
            let is_stored = found.iter().any(|row| {
                row.get_str("create_date")
                    .is_ok_and(|found| found == date.as_str())
            });
            is_stored
                .then_some(())
                .ok_or_else(|| "the row is missing".to_owned())
        })
        .await;
    }

    /// Logs in from an address that no overload uses.
    async fn log_in(&self) {
        let api = Api::from_address(self.gateway, self.address);
        api.log_in(ADMIN.0, ADMIN.1).await;
    }

    /// Measures the time from the removal of a user to the first refusal of the user's session.
    async fn revoke(&self, victims: Vec<(String, Api)>, time: Duration) -> Vec<Duration> {
        let pause = time / u32::try_from(2 * victims.len().max(1)).unwrap();
        let mut took = Vec::new();
        for (name, session) in victims {
            tokio::time::sleep(pause).await;
            let began = Instant::now();
            let reply = self.admin.delete(&format!("/users/{name}")).await;
            assert_eq!(reply.status, 204, "{reply:?}");
            is_over(&session).await;
            took.push(began.elapsed());
        }
        took
    }
}

/// Repeats the work until `end`, at least twice, and returns the durations. Does nothing if `end` is `None`.
async fn again(end: Option<Instant>, pause: Duration, work: impl AsyncFn()) -> Vec<Duration> {
    let mut took = Vec::new();
    while end.is_some_and(|end| took.len() < 2 || Instant::now() < end) {
        let began = Instant::now();
        work().await;
        took.push(began.elapsed());
        tokio::time::sleep(pause).await;
    }
    took
}

async fn is_over(session: &Api) {
    eventually("the gateway refuses the session", PATIENCE, async || {
        let reply = session.get("/me").await;
        (reply.status == 401)
            .then_some(())
            .ok_or_else(|| format!("{reply:?}"))
    })
    .await;
}

impl Took {
    /// Returns the durations of one kind of work.
    pub(super) fn of(&self, cell: Cell) -> &[Duration] {
        let found = self.0.iter().find(|(of, _)| *of == cell);
        found.map_or(&[], |(_, times)| times)
    }

    /// Prints the longest duration of each kind of work, and asserts that it is within its bound.
    pub(super) fn check(&self, row: &str) {
        for (cell, times) in &self.0 {
            let Some(slowest) = times.iter().max() else {
                continue;
            };
            let name = format!("isolation_{row}_{}_ms", cell.name());
            figure(&name, slowest.as_secs_f64() * 1e3);
            assert!(*slowest <= cell.bound(), "{row}: {cell:?} took {slowest:?}");
        }
    }
}
