//! Clients that ask one after the other while something happens to the stack.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::Value;
use testkit::{Gateway, PATIENCE, eventually};

use super::http::{Connection, address, post};

/// A client of one or several gateways. Where one refuses it, or has said that it ends the connection, it goes to the
/// next; a request that was sent is never sent again.
#[derive(Debug)]
pub(super) struct Client {
    addresses: Vec<String>,
    at: usize,
    connection: Option<Connection>,
}

/// What a client saw of one request.
#[derive(Debug)]
pub(super) struct Seen {
    /// The question, by the index of its client.
    pub(super) client: usize,
    pub(super) sent: Instant,
    pub(super) took: Duration,
    /// The HTTP status; 0 where the connection ended without an answer.
    pub(super) http: u16,
    /// The envelope's status.
    pub(super) status: u64,
    /// Of an answer that is not a success: all of it.
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
                let (http, status) = (answer.http, answer.status());
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
        eventually("a gateway takes the connection", PATIENCE, async || {
            let address = &self.addresses[self.at % self.addresses.len()];
            let opened = Connection::open(address).await;
            self.at += usize::from(opened.is_err());
            opened.map_err(|error| error.to_string())
        })
        .await
    }
}

/// Load, and what its clients have seen so far.
#[derive(Debug, Default)]
pub(super) struct Load {
    over: Cell<bool>,
    seen: RefCell<Vec<Seen>>,
}

impl Load {
    /// Lets each client ask its question again and again until the story is over; what they saw, and what it gave.
    pub(super) async fn during<T>(
        self,
        clients: Vec<(Client, Value)>,
        story: impl AsyncFnOnce(&Self) -> T,
    ) -> (Vec<Seen>, T) {
        let asking = clients
            .into_iter()
            .enumerate()
            .map(|(index, (mut client, question))| {
                let (load, request) = (&self, post(&question.to_string()));
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
        let telling = async {
            let told = story(&self).await;
            self.over.set(true);
            told
        };
        let (_, told) = tokio::join!(join_all(asking), telling);
        (self.seen.into_inner(), told)
    }

    /// How many requests were answered so far.
    pub(super) fn answered(&self) -> usize {
        self.seen.borrow().len()
    }

    /// Waits until so many more are answered.
    pub(super) async fn goes_on(&self, more: usize) {
        let before = self.answered();
        eventually("load goes on", PATIENCE, async || {
            let done = self.answered() - before;
            if done >= more {
                Ok(())
            } else {
                Err(format!("{done} of {more} requests"))
            }
        })
        .await;
    }
}

/// In milliseconds; 0.5 is the median.
pub(super) fn quantile(of: &[Duration], share: f64) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_unstable();
    let place = (share * (sorted.len() - 1) as f64).round() as usize;
    sorted[place].as_secs_f64() * 1e3
}
