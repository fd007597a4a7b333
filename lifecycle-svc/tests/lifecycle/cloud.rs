//! A cloud: Keystone and Nova as far as the driver speaks with them, answering as the real ones were seen to. What it
//! is asked is kept, and it can be held at any step, so that a test decides what happens between two of them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path as UrlPath, Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use e2e::{PATIENCE, eventually};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};

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
    fault: Option<String>,
    last_failure: Option<String>,
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

/// A cloud, on a port of its own.
#[derive(Clone)]
pub(crate) struct Cloud {
    inner: Arc<Mutex<Inner>>,
    /// What is to be held; a change lets everybody look again.
    holds: Arc<watch::Sender<HashSet<At>>>,
    pub(crate) address: SocketAddr,
}

impl Cloud {
    /// A cloud with these servers and their status.
    pub(crate) async fn start(servers: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = |(id, status): &(&str, &str)| {
            let server = Server {
                name: format!("name of {id}"),
                status: (*status).to_owned(),
                task: None,
                fault: None,
                last_failure: None,
            };
            ((*id).to_owned(), server)
        };
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
            holds: Arc::new(watch::Sender::new(HashSet::new())),
            address: listener.local_addr().unwrap(),
        };
        let router = Router::new()
            .route("/identity/v3/auth/tokens", post(log_in))
            .route("/compute/v2.1/servers", get(list))
            .route("/compute/v2.1/servers/detail", get(list))
            .route("/compute/v2.1/servers/{id}", get(show))
            .route("/compute/v2.1/servers/{id}/action", post(act))
            .route("/compute/v2.1/servers/{id}/os-instance-actions", get(actions))
            .route(
                "/compute/v2.1/servers/{id}/os-instance-actions/{request}",
                get(action),
            )
            .with_state(cloud.clone());
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
            holds.insert(at);
        });
    }

    /// Lets those go on that were held, and those to come.
    pub(crate) fn release(&self, at: At) {
        self.holds.send_modify(|holds| {
            holds.remove(&at);
        });
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
        if holds.borrow_and_update().contains(&at) {
            *self.lock().held.entry(at).or_default() += 1;
            let guard = Held(Some(self.clone()));
            holds.wait_for(|holds| !holds.contains(&at)).await.unwrap();
            guard.passes();
        }
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

fn refusal(status: StatusCode, kind: &str, message: &str) -> Response {
    (
        status,
        Json(json!({kind: {"code": status.as_u16(), "message": message}})),
    )
        .into_response()
}

fn unauthorized() -> Response {
    refusal(
        StatusCode::UNAUTHORIZED,
        "error",
        "The request you have made requires authentication.",
    )
}

async fn log_in(State(cloud): State<Cloud>, Json(body): Json<Value>) -> Response {
    let identity = &body["auth"]["identity"];
    let user = &identity["password"]["user"];
    let by_password = user["name"] == USER
        && user["password"] == PASSWORD
        && user["domain"]["name"] == "Default"
        && body["auth"]["scope"]["project"]["name"] == "vms";
    let credential = &identity["application_credential"];
    let by_credential = credential["id"] == CREDENTIAL.0
        && credential["secret"] == CREDENTIAL.1
        && body["auth"].get("scope").is_none();
    if !(by_password || by_credential) {
        return unauthorized();
    }
    let mut inner = cloud.lock();
    inner.logins += 1;
    let token = format!("token-{}", inner.logins);
    inner.tokens.insert(token.clone());
    let expires = jiff::Timestamp::try_from(SystemTime::now() + inner.token_life).unwrap();
    let url = format!("http://{}/compute/v2.1", cloud.address);
    let endpoint =
        |interface: &str, url: &str| json!({"interface": interface, "region_id": "here", "url": url});
    let body = json!({"token": {
        "expires_at": expires.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string(),
        "catalog": [
            {"type": "identity", "endpoints": [endpoint("public", "http://127.0.0.1:9/")]},
            {"type": "compute", "endpoints": [endpoint("admin", "http://127.0.0.1:9/"), endpoint("public", &url)]},
        ],
    }});
    (StatusCode::CREATED, [("x-subject-token", token)], Json(body)).into_response()
}

fn shown(id: &str, server: &Server) -> Value {
    let mut shown = json!({
        "id": id,
        "name": server.name,
        "status": server.status,
        "OS-EXT-STS:task_state": server.task,
    });
    if let Some(fault) = &server.fault {
        shown["fault"] = json!({"code": 500, "message": fault});
    }
    shown
}

async fn show(State(cloud): State<Cloud>, UrlPath(id): UrlPath<String>, headers: HeaderMap) -> Response {
    if !cloud.admits(&headers) {
        return unauthorized();
    }
    cloud.pass(At::Look).await;
    let inner = cloud.lock();
    if let Some((status, body)) = &inner.instead {
        return (StatusCode::from_u16(*status).unwrap(), body.clone()).into_response();
    }
    match inner.servers.get(&id) {
        Some(server) => Json(json!({"server": shown(&id, server)})).into_response(),
        None => refusal(
            StatusCode::NOT_FOUND,
            "itemNotFound",
            &format!("Instance {id} could not be found."),
        ),
    }
}

async fn list(
    State(cloud): State<Cloud>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    if !cloud.admits(&headers) {
        return unauthorized();
    }
    let inner = cloud.lock();
    let after = query.get("marker").cloned().unwrap_or_default();
    let asked: usize = query.get("limit").map_or(1000, |limit| limit.parse().unwrap());
    let size = asked.min(inner.page_size);
    let mut rest = inner.servers.iter().filter(|(id, _)| **id > after);
    let servers: Vec<_> = rest
        .by_ref()
        .take(size)
        .map(|(id, server)| shown(id, server))
        .collect();
    let mut page = json!({"servers": servers});
    if rest.next().is_some() {
        page["servers_links"] = json!([{"rel": "next", "href": "http://127.0.0.1:9/"}]);
    }
    Json(page).into_response()
}

/// The command of an action's body, the status that it asks for, its task, and the status that it leads to.
fn meaning(command: &str) -> (&'static [&'static str], &'static str, &'static str) {
    match command {
        "os-start" => (&["SHUTOFF"], "powering-on", "ACTIVE"),
        "os-stop" => (&["ACTIVE", "ERROR"], "powering-off", "SHUTOFF"),
        "reboot" => (&["ACTIVE"], "reboot_started", "ACTIVE"),
        "unpause" => (&["PAUSED"], "unpausing", "ACTIVE"),
        "resume" => (&["SUSPENDED"], "resuming", "ACTIVE"),
        other => panic!("no such command: {other}"),
    }
}

async fn act(
    State(cloud): State<Cloud>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    if !cloud.admits(&headers) {
        return unauthorized();
    }
    let command = body.as_object().unwrap().keys().next().unwrap().clone();
    cloud.pass(At::Arrived).await;
    let answer = cloud.carry_out(&id, &command);
    cloud
        .lock()
        .commands
        .push((id, command, answer.status().as_u16()));
    cloud.pass(At::Done).await;
    answer
}

impl Cloud {
    fn carry_out(&self, id: &str, command: &str) -> Response {
        let mut inner = self.lock();
        let obedience = inner.obedience;
        let Some(server) = inner.servers.get_mut(id) else {
            return refusal(
                StatusCode::NOT_FOUND,
                "itemNotFound",
                &format!("Instance {id} could not be found."),
            );
        };
        let (from, task, to) = meaning(command);
        if !from.contains(&server.status.as_str()) || server.task.is_some() {
            let what = format!(
                "Cannot '{command}' instance {id} while it is in vm_state {} task_state {:?}",
                server.status, server.task
            );
            return refusal(StatusCode::CONFLICT, "conflictingRequest", &what);
        }
        match obedience {
            Obedience::AtOnce => to.clone_into(&mut server.status),
            Obedience::Later => server.task = Some(task.to_owned()),
            Obedience::InVain => server.last_failure = Some("No valid host: the disk is gone".to_owned()),
        }
        StatusCode::ACCEPTED.into_response()
    }
}

async fn actions(State(cloud): State<Cloud>, UrlPath(id): UrlPath<String>) -> Response {
    let inner = cloud.lock();
    let failure = inner
        .servers
        .get(&id)
        .and_then(|server| server.last_failure.as_ref());
    let message = failure.map(|_| "Error");
    let action = json!({"action": "start", "request_id": "req-1", "message": message});
    Json(json!({"instanceActions": [action]})).into_response()
}

async fn action(
    State(cloud): State<Cloud>,
    UrlPath((id, request)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let details = cloud
        .lock()
        .servers
        .get(&id)
        .and_then(|server| server.last_failure.clone());
    let version = headers
        .get("openstack-api-version")
        .map(|version| version.to_str().unwrap());
    // Older versions have no such field.
    let event = if version == Some("compute 2.84") {
        json!({"details": details})
    } else {
        json!({})
    };
    let action = json!({"action": "start", "request_id": request, "message": "Error", "events": [event]});
    Json(json!({"instanceAction": action})).into_response()
}
