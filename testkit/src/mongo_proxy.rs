//! A proxy in front of the database that can refuse or hold back inserts, hold back deletions, delay queries, hold a
//! command until it is released, and report the size of a file system.
//!
//! The proxy understands only a small part of MongoDB's wire protocol: a message has a header of 16 bytes (length, id,
//! id of the request, opcode). A command is a message of type `OP_MSG` whose first section is a BSON document with the
//! command's name as its first key.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use mongodb::bson::{Document, doc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// The opcode of messages of type `OP_MSG`.
const OP_MSG: u32 = 2013;
const HEADER: usize = 16;
/// Maximum length of a message, far above what a MongoDB driver sends.
const LONGEST: usize = 64 << 20;

/// How the proxy handles inserts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserts {
    /// Inserts are forwarded to the database.
    Pass,
    /// Each inserted document is refused with this write error code, as a reachable server would do.
    Refuse(i32),
    /// Inserts are neither forwarded nor answered.
    Hold,
}

/// A proxy that intercepts inserts into one collection and queries of it, and forwards everything else. The proxy ends
/// with the async runtime.
#[derive(Debug)]
pub struct MongoProxy {
    uri: String,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    collection: &'static str,
    inserts: Mutex<Inserts>,
    hold_deletions: AtomicBool,
    caught: AtomicU64,
    delay: Mutex<Duration>,
    limits: Mutex<Vec<i64>>,
    gate: watch::Sender<Gate>,
    held: AtomicU64,
    /// The answer to `dbStats` instead of that of the database.
    disk: Mutex<Option<Document>>,
}

/// Which commands are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// Commands that were held are forwarded.
    Open,
    /// Connections whose command was held are closed.
    Dropped,
    /// The first of these commands, up to the given number, are forwarded; all later ones are held.
    Closed(Held, u32),
    /// Commands that were held stay so, and others are forwarded.
    Kept,
}

/// The commands on the collection that are held: those with this name that contain this text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    name: &'static str,
    text: &'static str,
}

impl MongoProxy {
    /// Starts a proxy in front of the database at the given address.
    pub async fn start(database: &str, collection: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("binding a free port succeeds");
        let address = listener.local_addr().expect("the listener has an address");
        let state = Arc::new(State {
            collection,
            inserts: Mutex::new(Inserts::Pass),
            hold_deletions: AtomicBool::new(false),
            caught: AtomicU64::new(0),
            delay: Mutex::default(),
            limits: Mutex::default(),
            gate: watch::Sender::new(Gate::Open),
            held: AtomicU64::new(0),
            disk: Mutex::default(),
        });
        let target = database.trim_start_matches("mongodb://").to_owned();
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if let Ok(server) = TcpStream::connect(&target).await {
                    connect(client, server, &shared);
                }
            }
        });
        Self {
            uri: format!("mongodb://{address}"),
            state,
        }
    }

    /// The connection URI of the proxy, to be used instead of the database's URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Sets how inserts are handled from now on.
    pub fn set(&self, inserts: Inserts) {
        *self.state.inserts.lock().unwrap_or_else(PoisonError::into_inner) = inserts;
    }

    /// From now on, neither forwards nor answers deletions from any collection.
    pub fn hold_deletions(&self) {
        self.state.hold_deletions.store(true, Ordering::Relaxed);
    }

    /// Forwards `after` more commands with this name on the collection, and holds all later ones.
    pub fn hold(&self, command: &'static str, after: u32) {
        let held = Held {
            name: command,
            text: "",
        };
        self.close(held, after);
    }

    /// Holds all commands with this name on the collection that contain the text.
    pub fn hold_with(&self, command: &'static str, text: &'static str) {
        self.close(Held { name: command, text }, 0);
    }

    fn close(&self, held: Held, after: u32) {
        self.state.held.store(0, Ordering::Relaxed);
        self.state.gate.send_replace(Gate::Closed(held, after));
    }

    /// Waits until the proxy holds a command.
    pub async fn holds(&self) {
        crate::eventually("the proxy holds a command", crate::PATIENCE, async || {
            let held = self.state.held.load(Ordering::Relaxed);
            (held > 0).then_some(()).ok_or_else(|| "it holds none".to_owned())
        })
        .await;
    }

    /// Number of commands that are or were held since [`MongoProxy::hold`].
    pub fn held(&self) -> u64 {
        self.state.held.load(Ordering::Relaxed)
    }

    /// From now on, forwards all commands but those that are held.
    pub fn hold_no_more(&self) {
        self.state.gate.send_replace(Gate::Kept);
    }

    /// Forwards the held commands.
    pub fn release(&self) {
        self.state.gate.send_replace(Gate::Open);
    }

    /// Drops the held commands with their connections.
    pub fn drop_held(&self) {
        self.state.gate.send_replace(Gate::Dropped);
    }

    /// From now on, reports a file system of this size and with this much used space, as MongoDB does. The stand-in for
    /// MongoDB reports none.
    pub fn report_disk(&self, used_mib: u32, size_mib: u32) {
        let bytes = |mib| f64::from(mib) * 1_048_576.0;
        let answer = doc! { "ok": 1.0, "fsUsedSize": bytes(used_mib), "fsTotalSize": bytes(size_mib) };
        *self.state.disk.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    /// From now on, delays each query by this time.
    pub fn delay_queries(&self, delay: Duration) {
        *self.state.delay.lock().unwrap_or_else(PoisonError::into_inner) = delay;
    }

    /// The values of `maxTimeMS` in all queries so far.
    pub fn query_limits(&self) -> Vec<i64> {
        let limits = self.state.limits.lock().unwrap_or_else(PoisonError::into_inner);
        limits.clone()
    }

    /// Number of inserts and deletions that the proxy has not forwarded.
    pub fn caught(&self) -> u64 {
        self.state.caught.load(Ordering::Relaxed)
    }
}

fn connect(client: TcpStream, server: TcpStream, state: &Arc<State>) {
    let (from_client, to_client) = client.into_split();
    let (mut from_server, to_server) = server.into_split();
    let to_client = Arc::new(tokio::sync::Mutex::new(to_client));
    let answers = Arc::clone(&to_client);
    tokio::spawn(async move {
        let mut answers_of_server = vec![0; 1 << 16];
        while let Ok(read @ 1..) = from_server.read(&mut answers_of_server).await {
            let sent = answers.lock().await.write_all(&answers_of_server[..read]).await;
            if sent.is_err() {
                break;
            }
        }
    });
    let state = Arc::clone(state);
    tokio::spawn(async move { requests(from_client, to_server, &to_client, &state).await });
}

async fn requests(
    mut from_client: OwnedReadHalf,
    mut to_server: OwnedWriteHalf,
    to_client: &tokio::sync::Mutex<OwnedWriteHalf>,
    state: &State,
) {
    while let Some(message) = next(&mut from_client).await {
        if let Some(limit) = limit_of_query(&message, state.collection) {
            state
                .limits
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(limit);
            let delay = *state.delay.lock().unwrap_or_else(PoisonError::into_inner);
            tokio::time::sleep(delay).await;
        }
        if state.hold_deletions.load(Ordering::Relaxed) && is_deletion(&message) {
            state.caught.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        if !passes(&message, state).await {
            break;
        }
        if let Some(body) = disk_answer(&message, state) {
            let sent = to_client.lock().await.write_all(&answer(&message, &body)).await;
            if sent.is_err() {
                break;
            }
            continue;
        }
        let inserts = *state.inserts.lock().unwrap_or_else(PoisonError::into_inner);
        let caught = insert_into(&message, state.collection).filter(|_| inserts != Inserts::Pass);
        let sent = match (caught, inserts) {
            (Some(documents), Inserts::Refuse(code)) => {
                state.caught.fetch_add(1, Ordering::Relaxed);
                to_client
                    .lock()
                    .await
                    .write_all(&refusal(&message, documents, code))
                    .await
            }
            (Some(_), _) => {
                state.caught.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            (None, _) => to_server.write_all(&message).await,
        };
        if sent.is_err() {
            break;
        }
    }
}

/// Waits while the command is held. Returns `false` if it is dropped.
async fn passes(message: &[u8], state: &State) -> bool {
    let mut held = false;
    loop {
        let mut gate = state.gate.subscribe();
        let now = *gate.borrow_and_update();
        match now {
            Gate::Closed(..) | Gate::Kept if held => {}
            Gate::Closed(which, _) if !which.is(message, state.collection) => return true,
            Gate::Closed(which, after) if after > 0 => {
                let one_fewer = |gate: &mut Gate| {
                    let left = *gate == now;
                    if left {
                        *gate = Gate::Closed(which, after - 1);
                    }
                    left
                };
                if state.gate.send_if_modified(one_fewer) {
                    return true;
                }
                continue;
            }
            Gate::Closed(..) => {
                held = true;
                state.held.fetch_add(1, Ordering::Relaxed);
            }
            Gate::Open | Gate::Dropped | Gate::Kept => return !held || now == Gate::Open,
        }
        if gate.changed().await.is_err() {
            return false;
        }
    }
}

impl Held {
    fn is(self, message: &[u8], collection: &str) -> bool {
        let text = self.text.as_bytes();
        let contains = text.is_empty() || message.windows(text.len()).any(|part| part == text);
        contains && is_command(message, self.name, collection)
    }
}

/// Whether the message is a command with this name on the collection.
fn is_command(message: &[u8], name: &str, collection: &str) -> bool {
    let body = || {
        let command = command_of(message)?;
        let (first, value) = command.iter().next()?;
        let of = if name == "getMore" {
            command.get_str("collection").ok()?
        } else {
            value.as_str()?
        };
        Some(first == name && of == collection)
    };
    body().unwrap_or(false)
}

async fn next(from: &mut OwnedReadHalf) -> Option<Vec<u8>> {
    let mut message = vec![0; HEADER];
    from.read_exact(&mut message).await.ok()?;
    let length = number(&message, 0)? as usize;
    if !(HEADER..LONGEST).contains(&length) {
        return None;
    }
    message.resize(length, 0);
    from.read_exact(&mut message[HEADER..]).await.ok()?;
    Some(message)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The command of a message of type `OP_MSG`.
fn command_of(message: &[u8]) -> Option<Document> {
    if number(message, 12)? != OP_MSG {
        return None;
    }
    Document::from_reader(message.get(HEADER + 5..)?).ok()
}

/// The value of `maxTimeMS` if the message is a query of the collection, or zero if the query has none; `None` for any
/// other message.
fn limit_of_query(message: &[u8], collection: &str) -> Option<i64> {
    let command = command_of(message)?;
    if command.get_str("find").ok()? != collection {
        return None;
    }
    let limit = command.get("maxTimeMS");
    Some(limit.map_or(0, |limit| {
        limit.as_i64().or(limit.as_i32().map(i64::from)).unwrap_or(0)
    }))
}

fn is_deletion(message: &[u8]) -> bool {
    command_of(message).is_some_and(|command| command.contains_key("delete"))
}

/// The answer to the message if it is `dbStats` and the proxy answers it.
fn disk_answer(message: &[u8], state: &State) -> Option<Document> {
    let reported = state
        .disk
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()?;
    command_of(message)?.contains_key("dbStats").then_some(reported)
}

/// The number of documents that the message inserts into the collection; `None` if the message is not such an insert.
fn insert_into(message: &[u8], collection: &str) -> Option<usize> {
    if number(message, 12)? != OP_MSG {
        return None;
    }
    // The body consists of flags and then sections. A section is a document (type 0) or a sequence of documents (type
    // 1).
    let (mut at, mut command, mut documents) = (HEADER + 4, None, 0);
    while at < message.len() {
        let kind = *message.get(at)?;
        let length = number(message, at + 1)? as usize;
        let section = message.get(at + 1..at + 1 + length)?;
        if kind == 0 {
            command = Some(Document::from_reader(section).ok()?);
        } else {
            documents += sequence(section)?;
        }
        at += 1 + length;
    }
    let command = command?;
    let inlined = command.get_array("documents").map_or(0, Vec::len);
    (command.get_str("insert").ok()? == collection).then_some(documents + inlined)
}

/// The number of documents in a sequence section. The documents follow the section's length and name.
fn sequence(section: &[u8]) -> Option<usize> {
    let mut at = 4 + section.get(4..)?.iter().position(|byte| *byte == 0)? + 1;
    let mut count = 0;
    while at < section.len() {
        at += number(section, at)? as usize;
        count += 1;
    }
    Some(count)
}

/// Builds a server's answer that refuses each of the inserted documents.
fn refusal(request: &[u8], documents: usize, code: i32) -> Vec<u8> {
    let error = |index| doc! { "index": index, "code": code, "errmsg": format!("refused with {code}") };
    let errors: Vec<_> = (0..i32::try_from(documents).unwrap_or(i32::MAX))
        .map(error)
        .collect();
    answer(request, &doc! { "n": 0, "writeErrors": errors, "ok": 1.0 })
}

/// Builds a server's answer to a request.
fn answer(request: &[u8], body: &Document) -> Vec<u8> {
    let mut bytes = vec![0; HEADER + 5];
    body.to_writer(&mut bytes)
        .expect("encoding the answer as BSON succeeds");
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[8..12].copy_from_slice(&request[4..8]);
    bytes[12..16].copy_from_slice(&OP_MSG.to_le_bytes());
    bytes
}
