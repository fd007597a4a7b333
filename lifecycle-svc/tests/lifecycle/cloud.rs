//! A cloud: Keystone and Nova as far as the driver speaks with them, answering as the real ones were seen to. What it
//! is asked is kept, and it can be held at any step, so that a test decides what happens between two of them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{body::Bytes, http::HeaderMap};
use testkit::{PATIENCE, eventually};
use tokio::{net::TcpListener, sync::watch};

mod answers;

pub(crate) const USER: &str = "vmwatch";
pub(crate) const PASSWORD: &str = "the cloud's password";
pub(crate) const CREDENTIAL: (&str, &str) = ("credential-id", "credential-secret");

/// Where the cloud can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum At {
    /// A server is asked for; no answer yet.
    Look,
    /// A command has arrived; nothing is done yet.
    Arrived,
    /// It is done; no answer yet.
    Done,
}

/// What a command does to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Obedience {
    /// It is carried out before the answer.
    AtOnce,
    /// It is begun; the test says when it is done, by [`Cloud::settle`].
    Later,
    /// It is accepted, tried, and fails.
    InVain,
}

#[derive(Debug, Clone)]
struct Server {
    name: String,
    status: String,
    task: Option<String>,
    locked: bool,
    fault: Option<String>,
    last_failure: Option<String>,
}

impl Server {
    fn new(id: &str, status: &str) -> Self {
        Self {
            name: format!("name of {id}"),
            status: status.to_owned(),
            task: None,
            locked: false,
            fault: None,
            last_failure: None,
        }
    }
}

struct Inner {
    servers: BTreeMap<String, Server>,
    tokens: HashSet<String>,
    token_life: Duration,
    logins: u32,
    page_size: usize,
    obedience: Obedience,
    /// Commands as they arrived: server, command, status of the answer.
    commands: Vec<(String, String, u16)>,
    /// What is answered instead of a server, whatever it is.
    instead: Option<(u16, Bytes)>,
    held: HashMap<At, usize>,
    given_up: usize,
}

/// The steps at which requests are held, and how many of the held ones may go on.
#[derive(Default)]
struct Holds {
    at: HashSet<At>,
    passes: HashMap<At, usize>,
}

/// A cloud, on a port of its own.
#[derive(Clone)]
pub(crate) struct Cloud {
    inner: Arc<Mutex<Inner>>,
    /// What is to be held; a change lets every held request look again.
    holds: Arc<watch::Sender<Holds>>,
    pub(crate) address: SocketAddr,
}

impl Cloud {
    /// A cloud with these servers and their status.
    pub(crate) async fn start(servers: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = |&(id, status): &(&str, &str)| (id.to_owned(), Server::new(id, status));
        let cloud = Self {
            inner: Arc::new(Mutex::new(Inner {
                servers: servers.iter().map(server).collect(),
                tokens: HashSet::new(),
                token_life: Duration::from_hours(1),
                logins: 0,
                page_size: 1000,
                obedience: Obedience::AtOnce,
                commands: Vec::new(),
                instead: None,
                held: HashMap::new(),
                given_up: 0,
            })),
            holds: Arc::new(watch::Sender::new(Holds::default())),
            address: listener.local_addr().unwrap(),
        };
        let router = answers::router(cloud.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        cloud
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The value of `VMWATCH_HYPERVISORS` that names this cloud so, with the password of a user.
    pub(crate) fn entry(&self, folder: &Path, name: &str) -> String {
        let file = format!(
            "auth_url = 'http://{}/identity/v3'\nusername = '{USER}'\nproject = 'vms'\n",
            self.address
        );
        entry(folder, name, &file, "password_file", PASSWORD)
    }

    /// The same with an application credential.
    pub(crate) fn entry_of_credential(&self, folder: &Path, name: &str) -> String {
        let file = format!(
            "auth_url = 'http://{}/identity/v3/'\napplication_credential_id = '{}'\n",
            self.address, CREDENTIAL.0
        );
        entry(
            folder,
            name,
            &file,
            "application_credential_secret_file",
            CREDENTIAL.1,
        )
    }

    /// From now on commands do this.
    pub(crate) fn obey(&self, obedience: Obedience) {
        self.lock().obedience = obedience;
    }

    /// The server is so now.
    pub(crate) fn settle(&self, id: &str, status: &str) {
        let mut inner = self.lock();
        let server = inner.servers.get_mut(id).unwrap();
        status.clone_into(&mut server.status);
        server.task = None;
    }

    /// The server is in error, for this reason.
    pub(crate) fn break_down(&self, id: &str, fault: &str) {
        self.settle(id, "ERROR");
        self.lock().servers.get_mut(id).unwrap().fault = Some(fault.to_owned());
    }

    /// Something is being done with the server.
    pub(crate) fn task(&self, id: &str, task: &str) {
        self.lock().servers.get_mut(id).unwrap().task = Some(task.to_owned());
    }

    /// An administrator lets nobody else change the server.
    pub(crate) fn lock_server(&self, id: &str) {
        self.lock().servers.get_mut(id).unwrap().locked = true;
    }

    /// Answers this instead of any server.
    pub(crate) fn answer_instead(&self, answer: Option<(u16, Bytes)>) {
        self.lock().instead = answer;
    }

    /// Tokens given from now on live this long.
    pub(crate) fn token_life(&self, life: Duration) {
        self.lock().token_life = life;
    }

    /// Pages of lists hold so many.
    pub(crate) fn page_size(&self, size: usize) {
        self.lock().page_size = size;
    }

    /// Forgets all tokens.
    pub(crate) fn revoke(&self) {
        self.lock().tokens.clear();
    }

    pub(crate) fn logins(&self) -> u32 {
        self.lock().logins
    }

    /// The commands that arrived: server, command, status of the answer.
    pub(crate) fn commands(&self) -> Vec<(String, String, u16)> {
        self.lock().commands.clone()
    }

    /// How many commands of this name were accepted.
    pub(crate) fn accepted(&self, command: &str) -> usize {
        let commands = self.commands();
        commands
            .iter()
            .filter(|(_, of, status)| of == command && *status == 202)
            .count()
    }

    /// Holds every request that comes to this step.
    pub(crate) fn hold(&self, at: At) {
        self.holds.send_modify(|holds| {
            holds.at.insert(at);
        });
    }

    /// Lets those go on that were held, and those to come.
    pub(crate) fn release(&self, at: At) {
        self.holds.send_modify(|holds| {
            holds.at.remove(&at);
        });
    }

    /// Lets one of the held go on.
    pub(crate) fn let_one_pass(&self, at: At) {
        self.holds
            .send_modify(|holds| *holds.passes.entry(at).or_default() += 1);
    }

    /// The cloud has one more server.
    pub(crate) fn add(&self, id: &str, status: &str) {
        self.lock().servers.insert(id.to_owned(), Server::new(id, status));
    }

    /// The cloud has no such server any more.
    pub(crate) fn remove(&self, id: &str) {
        self.lock().servers.remove(id);
    }

    /// Waits until one more request is held at this step than were.
    pub(crate) async fn one_more_held(&self, at: At, than: usize) {
        eventually("a request is held", PATIENCE, async || {
            let held = self.held(at);
            (held > than)
                .then_some(())
                .ok_or_else(|| format!("{held} at {at:?}"))
        })
        .await;
    }

    /// Waits until so many commands of this name were accepted.
    pub(crate) async fn has_accepted(&self, command: &str, count: usize) {
        eventually("a command is accepted", PATIENCE, async || {
            let commands = self.commands();
            (self.accepted(command) == count)
                .then_some(())
                .ok_or_else(|| format!("{commands:?}"))
        })
        .await;
    }

    /// Waits until a request that was held is given up, since who sent it is gone.
    pub(crate) async fn has_given_up(&self) {
        eventually("the connection is seen to be gone", PATIENCE, async || {
            (self.lock().given_up > 0).then_some(()).ok_or_else(String::new)
        })
        .await;
    }

    /// How many requests ever were held at this step.
    pub(crate) fn held(&self, at: At) -> usize {
        self.lock().held.get(&at).copied().unwrap_or(0)
    }

    async fn pass(&self, at: At) {
        let mut holds = self.holds.subscribe();
        if holds.borrow_and_update().at.contains(&at) {
            *self.lock().held.entry(at).or_default() += 1;
            let guard = Held(Some(self.clone()));
            while holds.borrow_and_update().at.contains(&at) && !self.takes_pass(at) {
                holds.changed().await.unwrap();
            }
            guard.passes();
        }
    }

    fn takes_pass(&self, at: At) -> bool {
        self.holds.send_if_modified(|holds| {
            let passes = holds.passes.entry(at).or_default();
            let taken = *passes > 0;
            *passes = passes.saturating_sub(1);
            taken
        })
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let token = headers.get("x-auth-token").and_then(|token| token.to_str().ok());
        token.is_some_and(|token| self.lock().tokens.contains(token))
    }
}

/// A request that is held; it is given up when its connection ends.
struct Held(Option<Cloud>);

impl Held {
    fn passes(mut self) {
        self.0 = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(cloud) = &self.0 {
            cloud.lock().given_up += 1;
        }
    }
}

/// Writes a cloud's file and its secret.
pub(crate) fn entry(folder: &Path, name: &str, file: &str, key: &str, secret: &str) -> String {
    let secret_path = folder.join(format!("{name}.secret"));
    fs::write(&secret_path, format!("{secret}\n")).unwrap();
    let path = folder.join(format!("{name}.toml"));
    fs::write(&path, format!("{file}{key} = '{}'\n", secret_path.display())).unwrap();
    format!("{name}=nova:{}", path.display())
}
