//! Requests to the NATS servers in the system account: which connections agents have, and to end a connection.

use std::time::Duration;

use async_nats::{Client, Error, Subscriber};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, timeout, timeout_at};
use vmwatch_api::enrollment::AgentKey;

use super::answer::ACCOUNT;

/// Number of connections that each server lists per answer.
pub(super) const PAGE: usize = 1024;
/// The number of servers is unknown. A request is complete when no server has answered for `QUIET`, but after `LIMIT` at the
/// latest.
const QUIET: Duration = Duration::from_millis(250);
const LIMIT: Duration = Duration::from_secs(2);

/// The request to all servers for their connections; the names are those of NATS.
#[derive(Serialize)]
struct Filter<'a> {
    acc: &'static str,
    /// Whether the answer contains the key of each connection.
    auth: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<&'a AgentKey>,
    limit: usize,
    offset: usize,
}

#[derive(Deserialize)]
struct Answer {
    server: Server,
    data: Option<Listed>,
}

#[derive(Deserialize)]
struct Server {
    id: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Listed {
    connections: Vec<Listing>,
}

#[derive(Deserialize)]
struct Listing {
    cid: u64,
    start: String,
    #[serde(default)]
    authorized_user: String,
}

/// A live connection of an agent. Connections sort by their start.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Connection {
    /// RFC 3339 in UTC, so that texts sort like times.
    pub(super) start: String,
    pub(super) server: String,
    pub(super) cid: u64,
}

/// The connections on one server, or one page of them.
pub(super) struct OnServer {
    /// Whether the server has listed as many connections as fit into an answer.
    pub(super) full: bool,
    /// The connections of agents that log in with nkeys.
    pub(super) agents: Vec<(AgentKey, Connection)>,
}

/// The answers of the servers to one or more requests.
pub(super) struct Answers {
    client: Client,
    inbox: Subscriber,
    subject: String,
    end: Instant,
    quiet: Instant,
    any: bool,
}

impl Answers {
    /// Creates an inbox for answers.
    pub(super) async fn new(client: &Client) -> Result<Self, Error> {
        let subject = client.new_inbox();
        let end = Instant::now() + LIMIT;
        Ok(Self {
            client: client.clone(),
            inbox: client.subscribe(subject.clone()).await?,
            subject,
            end,
            quiet: end,
            any: false,
        })
    }

    /// Asks all servers for the connections of this key, or for a page of the connections of all agents.
    pub(super) async fn request(&self, user: Option<&AgentKey>, offset: usize) -> Result<(), Error> {
        let filter = Filter {
            acc: ACCOUNT,
            auth: true,
            user,
            limit: PAGE,
            offset,
        };
        let body = serde_json::to_vec(&filter)?;
        let inbox = self.subject.clone();
        let sent = self
            .client
            .publish_with_reply("$SYS.REQ.SERVER.PING.CONNZ", inbox, body.into());
        Ok(timeout(LIMIT, sent).await??)
    }

    /// The next answer; `None` if no more are expected.
    pub(super) async fn next(&mut self) -> Result<Option<OnServer>, Error> {
        let Ok(Some(message)) = timeout_at(self.quiet.min(self.end), self.inbox.next()).await else {
            return if self.any {
                Ok(None)
            } else {
                Err("no NATS server answered".into())
            };
        };
        self.any = true;
        self.quiet = Instant::now() + QUIET;
        let Answer { server, data } = serde_json::from_slice(&message.payload)?;
        let connections = data.unwrap_or_default().connections;
        Ok(Some(OnServer {
            full: connections.len() >= PAGE,
            agents: connections
                .into_iter()
                .filter_map(|listing| agent(&server.id, listing))
                .collect(),
        }))
    }
}

fn agent(server: &str, listing: Listing) -> Option<(AgentKey, Connection)> {
    let key = listing.authorized_user.parse().ok()?;
    let connection = Connection {
        start: listing.start,
        server: server.to_owned(),
        cid: listing.cid,
    };
    Some((key, connection))
}

/// Ends a connection. The answer is not awaited, because all connections are checked again; but the server ignores requests
/// without a reply subject.
pub(super) async fn end(client: &Client, connection: &Connection) -> Result<(), Error> {
    let subject = format!("$SYS.REQ.SERVER.{}.KICK", connection.server);
    let body = json!({ "cid": connection.cid }).to_string();
    let sent = client.publish_with_reply(subject, client.new_inbox(), body.into());
    Ok(timeout(LIMIT, sent).await??)
}
