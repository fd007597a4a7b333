//! HTTP clients that each send one request after the other while a test changes the running system.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::Value;
use testkit::{Gateway, PATIENCE, eventually};

use super::http::{Connection, address, post};

/// A client of one or several gateways. It switches to the next gateway if the current one refuses or closes a
/// connection. It never repeats a request that was sent.
#[derive(Debug)]
pub(super) struct Client {
    addresses: Vec<String>,
    at: usize,
    connection: Option<Connection>,
    /// Whether it uses the REST API, whose answers have no envelope.
    is_rest: bool,
}

/// The result of one request.
#[derive(Debug)]
pub(super) struct Seen {
    /// The index of the client that sent the request.
    pub(super) client: usize,
    pub(super) sent: Instant,
    pub(super) took: Duration,
    /// The HTTP status, or 0 if the connection ended without an answer.
    pub(super) http: u16,
    /// The `status_code` of the answer's envelope. An answer of the REST API counts as 1 if it has the status 200.
    pub(super) status: u64,
    /// The complete answer, or an empty text if the request succeeded.
    pub(super) said: String,
}

impl Seen {
    pub(super) fn is_good(&self) -> bool {
        (self.http, self.status) == (200, 1)
    }
}

impl Client {
    pub(super) fn of(gateways: &[&Gateway], first: usize) -> Self {
        Self {
            addresses: gateways.iter().map(|gateway| address(gateway)).collect(),
            at: first,
            connection: None,
            is_rest: false,
        }
    }

    /// Like [`Client::of`], for requests of the REST API.
    pub(super) fn of_rest(gateways: &[&Gateway], first: usize) -> Self {
        Self {
            is_rest: true,
            ..Self::of(gateways, first)
        }
    }

    pub(super) async fn ask(&mut self, request: &[u8]) -> Seen {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect().await,
        };
        let sent = Instant::now();
        let answer = connection.ask(request).await;
        let took = sent.elapsed();
        let (http, status, said) = match answer {
            Ok(answer) => {
                if answer.is_last() {
                    self.at += 1;
                } else {
                    self.connection = Some(connection);
                }
                let http = answer.http;
                let status = if self.is_rest {
                    u64::from(http == 200)
                } else {
                    answer.status()
                };
                let good = (http, status) == (200, 1);
                (http, status, if good { String::new() } else { answer.body })
            }
            Err(error) => (0, 0, error.to_string()),
        };
        Seen {
            client: 0,
            sent,
            took,
            http,
            status,
            said,
        }
    }

    async fn connect(&mut self) -> Connection {
        eventually("a gateway accepts the connection", PATIENCE, async || {
            let address = &self.addresses[self.at % self.addresses.len()];
            let opened = Connection::open(address).await;
            self.at += usize::from(opened.is_err());
            opened.map_err(|error| error.to_string())
        })
        .await
    }
}

/// A running load, and the results of its requests so far.
#[derive(Debug, Default)]
pub(super) struct Load {
    over: Cell<bool>,
    seen: RefCell<Vec<Seen>>,
}

impl Load {
    /// Lets each client repeat its request while `story` runs. Returns the results of all requests, and the result of
    /// `story`.
    pub(super) async fn during<T>(
        self,
        clients: Vec<(Client, Value)>,
        story: impl AsyncFnOnce(&Self) -> T,
    ) -> (Vec<Seen>, T) {
        let clients = clients.into_iter();
        let requests = clients.map(|(client, question)| (client, post(&question.to_string())));
        self.during_requests(requests.collect(), story).await
    }

    /// Like [`Load::during`], with complete requests.
    pub(super) async fn during_requests<T>(
        self,
        clients: Vec<(Client, Vec<u8>)>,
        story: impl AsyncFnOnce(&Self) -> T,
    ) -> (Vec<Seen>, T) {
        let asking = clients
            .into_iter()
            .enumerate()
            .map(|(index, (mut client, request))| {
                let load = &self;
                async move {
                    while !load.over.get() {
                        let seen = client.ask(&request).await;
                        load.seen.borrow_mut().push(Seen {
                            client: index,
                            ..seen
                        });
                    }
                }
            });
        let running = async {
            let result = story(&self).await;
            self.over.set(true);
            result
        };
        let (_, result) = tokio::join!(join_all(asking), running);
        (self.seen.into_inner(), result)
    }

    /// Returns the number of requests answered so far.
    pub(super) fn answered(&self) -> usize {
        self.seen.borrow().len()
    }

    /// Waits for `more` further answers.
    pub(super) async fn goes_on(&self, more: usize) {
        let before = self.answered();
        eventually("more requests are answered", PATIENCE, async || {
            let done = self.answered() - before;
            if done >= more {
                Ok(())
            } else {
                Err(format!("{done} of {more} requests are answered"))
            }
        })
        .await;
    }
}

/// Returns a quantile of the durations in milliseconds; a `share` of 0.5 is the median.
pub(super) fn quantile(of: &[Duration], share: f64) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_unstable();
    let position = (share * (sorted.len() - 1) as f64).round() as usize;
    sorted[position].as_secs_f64() * 1e3
}
