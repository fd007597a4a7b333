//! A simulated OpenStack cloud: the parts of Keystone and Nova that the driver uses, with the answers of the real
//! services. It records the actions that it receives. It can hold requests at several steps, so that a test decides
//! what happens in between.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

mod answers;

use axum::{body::Bytes, http::HeaderMap};
use tokio::{net::TcpListener, sync::watch};

use crate::{PATIENCE, eventually};

/// User name that the simulated cloud accepts.
pub const USER: &str = "vmwatch";
/// Password of [`USER`].
pub const PASSWORD: &str = "the cloud's password";
/// User name and password of the administrator of the simulated cloud.
pub const ADMIN: (&str, &str) = ("admin", "the administrator's password");
/// Id and secret of the application credential that the simulated cloud accepts.
pub const CREDENTIAL: (&str, &str) = ("credential-id", "credential-secret");

/// The steps at which the simulated cloud can hold a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum At {
    /// The state of a server was requested and is not answered yet.
    Read,
    /// A list of servers was requested and is not answered yet.
    List,
    /// An action has arrived and has not taken effect yet.
    Arrived,
    /// An action has taken effect and is not answered yet.
    Done,
}

/// What an action does to a server of the simulated cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obedience {
    /// The action takes effect before it is answered.
    AtOnce,
    /// The action begins; the test completes it with [`Cloud::settle`].
    Later,
    /// The action is accepted and then fails.
    Fails,
}

#[derive(Debug, Clone)]
struct Server {
    name: String,
    status: String,
    task: Option<String>,
    /// The number that Nova reports for the state of the guest on its host.
    power: i64,
    /// What Nova reports of the host to administrators; `None` for the usual.
    host: Option<String>,
    locked: bool,
    fault: Option<String>,
    last_failure: Option<String>,
    metadata: BTreeMap<String, String>,
    tags: Vec<String>,
}

impl Server {
    fn new(id: &str, status: &str) -> Self {
        Self {
            name: format!("name of {id}"),
            status: status.to_owned(),
            task: None,
            power: usual_power(status),
            host: None,
            locked: false,
            fault: None,
            last_failure: None,
            metadata: BTreeMap::new(),
            tags: Vec::new(),
        }
    }
}

/// The state of the guest that belongs to this status: 0 (none), 1 (running), 3 (paused) or 4 (shut down).
fn usual_power(status: &str) -> i64 {
    match status {
        "SHUTOFF" | "SUSPENDED" | "SHELVED" | "SHELVED_OFFLOADED" => 4,
        "PAUSED" => 3,
        "ERROR" | "BUILD" => 0,
        _ => 1,
    }
}

struct Inner {
    servers: BTreeMap<String, Server>,
    tokens: HashSet<String>,
    token_life: Duration,
    logins: u32,
    /// Number of requested lists of servers.
    lists: usize,
    page_size: usize,
    /// Regions in the catalogue, each with the path of Nova.
    regions: Vec<(String, String)>,
    /// Time until a list of servers is answered.
    list_delay: Duration,
    /// Maximum of the random time until a state or an action is answered.
    jitter: Duration,
    obedience: Obedience,
    /// The received actions: server, action, and status of the answer.
    commands: Vec<(String, String, u16)>,
    /// If set, every request for a server gets this status and body.
    instead: Option<(u16, Bytes)>,
    held: HashMap<At, usize>,
    given_up: usize,
}

/// The steps at which requests are held, and how many held requests may continue.
#[derive(Default)]
struct Holds {
    at: HashSet<At>,
    passes: HashMap<At, usize>,
}

/// A simulated cloud that listens on its own port.
#[derive(Clone)]
pub struct Cloud {
    inner: Arc<Mutex<Inner>>,
    /// The steps that hold requests. A change wakes every held request.
    holds: Arc<watch::Sender<Holds>>,
    /// Address at which Keystone and Nova answer.
    pub address: SocketAddr,
}

impl Cloud {
    /// Starts a simulated cloud with these servers in these states.
    pub async fn start(servers: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = |&(id, status): &(&str, &str)| (id.to_owned(), Server::new(id, status));
        let cloud = Self {
            inner: Arc::new(Mutex::new(Inner {
                servers: servers.iter().map(server).collect(),
                tokens: HashSet::new(),
                token_life: Duration::from_hours(1),
                logins: 0,
                lists: 0,
                page_size: 1000,
                regions: vec![("here".to_owned(), "/compute/v2.1".to_owned())],
                list_delay: Duration::ZERO,
                jitter: Duration::ZERO,
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

    /// Returns an entry of `VMWATCH_HYPERVISORS` for this cloud, with user name and password.
    pub fn entry(&self, folder: &Path, name: &str) -> String {
        let file = format!(
            "auth_url = 'http://{}/identity/v3'\nusername = '{USER}'\nproject = 'vms'\n",
            self.address
        );
        entry(folder, name, &file, "password_file", PASSWORD)
    }

    /// Returns an entry of `VMWATCH_HYPERVISORS` for this cloud, with the administrator's account.
    pub fn admin_entry(&self, folder: &Path, name: &str) -> String {
        let file = format!(
            "auth_url = 'http://{}/identity/v3'\nusername = '{}'\nproject = 'admin'\nall_projects = true\n",
            self.address, ADMIN.0
        );
        entry(folder, name, &file, "password_file", ADMIN.1)
    }

    /// Returns an entry of `VMWATCH_HYPERVISORS` for this cloud, with an application credential.
    pub fn credential_entry(&self, folder: &Path, name: &str) -> String {
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

    /// Sets what actions do from now on.
    pub fn obey(&self, obedience: Obedience) {
        self.lock().obedience = obedience;
    }

    /// Sets the status of a server and ends its task.
    pub fn settle(&self, id: &str, status: &str) {
        let mut inner = self.lock();
        let server = inner.servers.get_mut(id).unwrap();
        status.clone_into(&mut server.status);
        server.power = usual_power(status);
        server.task = None;
    }

    /// Returns the status of a server.
    pub fn status(&self, id: &str) -> String {
        self.lock().servers[id].status.clone()
    }

    /// Sets the state of the guest that the host of a server reports, as Nova's number.
    pub fn power(&self, id: &str, power: i64) {
        self.lock().servers.get_mut(id).unwrap().power = power;
    }

    /// Sets what Nova reports to administrators of the host of a server.
    pub fn host(&self, id: &str, status: &str) {
        self.lock().servers.get_mut(id).unwrap().host = Some(status.to_owned());
    }

    /// Sets the regions in the catalogue, each with the path of Nova.
    pub fn regions(&self, regions: &[(&str, &str)]) {
        let regions = regions.iter();
        self.lock().regions = regions
            .map(|&(name, path)| (name.to_owned(), path.to_owned()))
            .collect();
    }

    /// Sets the time until each page of a list of servers is answered.
    pub fn delay_lists(&self, delay: Duration) {
        self.lock().list_delay = delay;
    }

    /// Delays each answer about a state, and each action before and after its effect, by a random time up to this one.
    pub fn jitter(&self, most: Duration) {
        self.lock().jitter = most;
    }

    /// Sets the metadata and the tags of a server.
    pub fn label(&self, id: &str, metadata: &[(&str, &str)], tags: &[&str]) {
        let mut inner = self.lock();
        let server = inner.servers.get_mut(id).unwrap();
        let metadata = metadata.iter();
        server.metadata = metadata
            .map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        server.tags = tags.iter().map(|&tag| tag.to_owned()).collect();
    }

    /// Sets the status of a server to ERROR, with this fault.
    pub fn break_down(&self, id: &str, fault: &str) {
        self.settle(id, "ERROR");
        self.lock().servers.get_mut(id).unwrap().fault = Some(fault.to_owned());
    }

    /// Sets the task of a server.
    pub fn task(&self, id: &str, task: &str) {
        self.lock().servers.get_mut(id).unwrap().task = Some(task.to_owned());
    }

    /// Locks a server, as an administrator can.
    pub fn lock_server(&self, id: &str) {
        self.lock().servers.get_mut(id).unwrap().locked = true;
    }

    /// Sets the answer to every request for a server.
    pub fn answer_instead(&self, answer: Option<(u16, Bytes)>) {
        self.lock().instead = answer;
    }

    /// Sets the lifetime of new tokens.
    pub fn token_life(&self, life: Duration) {
        self.lock().token_life = life;
    }

    /// Sets the page size of server lists.
    pub fn page_size(&self, size: usize) {
        self.lock().page_size = size;
    }

    /// Invalidates all tokens.
    pub fn revoke(&self) {
        self.lock().tokens.clear();
    }

    /// Returns the number of successful logins.
    pub fn logins(&self) -> u32 {
        self.lock().logins
    }

    /// Returns the number of requested lists of servers.
    pub fn lists(&self) -> usize {
        self.lock().lists
    }

    /// Returns the received actions: server, action, and status of the answer.
    pub fn commands(&self) -> Vec<(String, String, u16)> {
        self.lock().commands.clone()
    }

    /// Returns the number of accepted actions of this name.
    pub fn accepted(&self, command: &str) -> usize {
        let commands = self.commands();
        commands
            .iter()
            .filter(|(_, of, status)| of == command && *status == 202)
            .count()
    }

    /// Holds every request that reaches this step.
    pub fn hold(&self, at: At) {
        self.holds.send_modify(|holds| {
            holds.at.insert(at);
        });
    }

    /// Releases the requests that are held at this step, and holds no later ones.
    pub fn release(&self, at: At) {
        self.holds.send_modify(|holds| {
            holds.at.remove(&at);
        });
    }

    /// Releases one request that is held at this step.
    pub fn let_one_pass(&self, at: At) {
        self.holds
            .send_modify(|holds| *holds.passes.entry(at).or_default() += 1);
    }

    /// Adds a server.
    pub fn add(&self, id: &str, status: &str) {
        self.lock().servers.insert(id.to_owned(), Server::new(id, status));
    }

    /// Removes a server.
    pub fn remove(&self, id: &str) {
        self.lock().servers.remove(id);
    }

    /// Waits until more than `than` requests have been held at this step.
    pub async fn wait_held(&self, at: At, than: usize) {
        eventually("the cloud holds a request", PATIENCE, async || {
            let held = self.held(at);
            (held > than)
                .then_some(())
                .ok_or_else(|| format!("{held} requests were held at {at:?}"))
        })
        .await;
    }

    /// Waits until `count` actions of this name have been accepted.
    pub async fn wait_accepted(&self, command: &str, count: usize) {
        eventually("the cloud accepts the actions", PATIENCE, async || {
            let commands = self.commands();
            (self.accepted(command) == count)
                .then_some(())
                .ok_or_else(|| format!("{commands:?}"))
        })
        .await;
    }

    /// Waits until a held request is abandoned because its client has disconnected.
    pub async fn wait_abandoned(&self) {
        eventually("the cloud detects the closed connection", PATIENCE, async || {
            (self.lock().given_up > 0).then_some(()).ok_or_else(String::new)
        })
        .await;
    }

    /// Returns the number of requests that were ever held at this step.
    pub fn held(&self, at: At) -> usize {
        self.lock().held.get(&at).copied().unwrap_or(0)
    }

    async fn pass(&self, at: At) {
        let delay = {
            let inner = self.lock();
            match at {
                At::List => inner.list_delay,
                At::Read | At::Arrived | At::Done => inner.jitter.mul_f64(random()),
            }
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
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
        token(headers).is_some_and(|token| self.lock().tokens.contains(token))
    }
}

fn token(headers: &HeaderMap) -> Option<&str> {
    headers.get("x-auth-token")?.to_str().ok()
}

/// Whether the request has a token of the administrator.
fn is_admin(headers: &HeaderMap) -> bool {
    token(headers).is_some_and(|token| token.starts_with(ADMIN.0))
}

/// A random number from 0 to 1.
fn random() -> f64 {
    let bits = RandomState::new().hash_one(()) >> 32;
    f64::from(u32::try_from(bits).unwrap()) / f64::from(u32::MAX)
}

/// A request that the fake cloud holds back. If it is dropped before it continues, its connection has ended, and it is
/// counted as abandoned.
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

/// Writes the settings file of a cloud and its secret. Returns the entry for `VMWATCH_HYPERVISORS`.
pub fn entry(folder: &Path, name: &str, file: &str, key: &str, secret: &str) -> String {
    let secret_path = folder.join(format!("{name}.secret"));
    fs::write(&secret_path, format!("{secret}\n")).unwrap();
    let path = folder.join(format!("{name}.toml"));
    fs::write(&path, format!("{file}{key} = '{}'\n", secret_path.display())).unwrap();
    format!("{name}=nova:{}", path.display())
}
