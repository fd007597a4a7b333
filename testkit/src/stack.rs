//! A complete stack for tests: NATS, a database and all programs of vmwatch.

use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    fmt::Write as _,
    fs,
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Output,
};

use futures::future::join_all;
use mongodb::bson::{DateTime, doc, serialize_to_bson};
use tempfile::TempDir;
use tokio::sync::Mutex;
use vmwatch_api::{
    Principal, Role, Scope, Service, UserKey,
    auth::Token,
    lifecycle::{MachineState, State, Target},
    sessions::{SESSION_BUCKET, SessionRecord, USER_BUCKET, UserRecord},
    time::unix_millis,
};
use vmwatch_bus::{
    Bus, Context, NATS_PING_INTERVAL, NATS_URL, audit::AuditSettings, provision::ensure_stream, random_id,
};
use vmwatch_service::{config::Environment, health};
use vmwatch_store::{MONGODB_CA_FILE, MONGODB_URI};

use crate::{
    Database, Gateway, Nats, PATIENCE, Process, Secrets, Spec, eventually, ports::free_port, process::run,
    server::Backend, tools,
};

/// A password hash that no password matches.
const NO_PASSWORD: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// User name and password of the first administrator in every test stack.
pub const ADMIN: (&str, &str) = ("admin", "correct horse battery staple");

/// The VMs of the test hypervisor, each with its initial state. The first instance id is that of the documented API's
/// examples.
pub const MACHINES: [(&str, Power); 3] = [
    ("6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e", Power::Off),
    ("768a07b5-2206-4952-b445-21162571a19b", Power::Off),
    ("9afdb1ec-d396-4ba3-af7a-1e38fd8751cb", Power::Running),
];

/// The instance id of a stack's first agent, which samples the machine that runs the tests.
pub const THIS_MACHINE: &str = "this-machine";

/// The NATS user of the `setup` commands.
pub const SETUP_USER: &str = "vmwatch-setup";
/// The NATS user of operators' tools.
pub const OPERATOR_USER: &str = "vmwatch-operator";

const NODE_FILE: &str = "node.xml";
const KEY_FILE: &str = "alert-key";

/// The power state of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// The VM is switched off.
    Off,
    /// The VM is running.
    Running,
}

/// The programs of vmwatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Program {
    /// The HTTP server.
    Gateway,
    /// The service for users and sessions.
    Auth,
    /// The service that stores and reads rows.
    Metrics,
    /// The service that performs actions on VMs.
    Lifecycle,
    /// The service that evaluates alert rules and notifies recipients.
    Alert,
    /// The agent, which publishes samples of this machine.
    Agent,
}

impl Program {
    const ALL: [Self; 6] = [
        Self::Gateway,
        Self::Auth,
        Self::Metrics,
        Self::Lifecycle,
        Self::Alert,
        Self::Agent,
    ];

    /// The programs that own JetStream streams, in the order in which a deployment runs their `setup` commands.
    const OWNERS: [Self; 4] = [Self::Auth, Self::Metrics, Self::Lifecycle, Self::Alert];

    const fn binary(self) -> &'static str {
        match self {
            Self::Gateway => "vmwatch-gateway",
            Self::Auth => "vmwatch-auth",
            Self::Metrics => "vmwatch-metrics",
            Self::Lifecycle => "vmwatch-lifecycle",
            Self::Alert => "vmwatch-alert",
            Self::Agent => "vmwatch-agent",
        }
    }

    /// The NATS user of the service in stacks with permissions. Agents log in with keys.
    const fn user(self) -> &'static str {
        self.binary()
    }
}

/// One running replica of a program.
#[derive(Debug)]
pub struct Replica {
    /// The process of the replica.
    pub process: Process,
    health: String,
}

impl Replica {
    /// Waits until the replica reports that it is ready.
    pub async fn ready(&self) {
        let what = format!("{} is ready", self.process.name());
        eventually(&what, PATIENCE, async || {
            if let Some(status) = self.process.ended() {
                panic!(
                    "{} ended ({status}):\n{}",
                    self.process.name(),
                    self.process.log()
                );
            }
            self.readiness().await
        })
        .await;
    }

    /// Requests `/readyz` from the replica; the error contains the reason why it is not ready.
    pub async fn readiness(&self) -> Result<(), String> {
        let asked = reqwest::get(format!("{}/readyz", self.health))
            .await
            .map_err(|error| error.to_string())?;
        if asked.status().is_success() {
            return Ok(());
        }
        let reason = asked.text().await.unwrap_or_default();
        // A program whose clock a benchmark makes fast is otherwise never ready.
        let has_own_clock = !self.process.setting(CLOCK_FILE).is_empty();
        if has_own_clock && reason.contains("the clock of this machine") {
            return Ok(());
        }
        Err(reason)
    }

    /// The replica's metrics in the text format of Prometheus.
    pub async fn metrics(&self) -> String {
        let asked = reqwest::get(format!("{}/metrics", self.health)).await;
        asked
            .expect("the replica answers the request for its metrics")
            .text()
            .await
            .expect("the metrics are text")
    }

    /// The sum of all series of a metric; `None` if the metric has no series yet.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let metrics = self.metrics().await;
        let values = metrics.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let of = series.split('{').next()?;
            (of == name).then(|| value.parse::<f64>().ok()).flatten()
        });
        values.reduce(|sum, value| sum + value)
    }

    /// Restarts the ended replica and waits until it is ready.
    pub async fn restart(&self) {
        self.process.start_again();
        self.ready().await;
    }
}

/// The setting of libfaketime that names the file with the difference to the machine's clock.
pub const CLOCK_FILE: &str = "FAKETIME_TIMESTAMP_FILE";

/// Configures a stack before it is started.
#[derive(Debug)]
pub struct StackBuilder {
    replicas: HashMap<Program, usize>,
    settings: Vec<(Program, String, String)>,
    permissions: bool,
    durable: bool,
    tls: bool,
    /// The port of NATS over WebSocket.
    websocket: Option<u16>,
    /// The backend for NATS and the database; `None` selects the default of this test run.
    backend: Option<Backend>,
    bus_store: Option<PathBuf>,
    nats_servers: usize,
}

impl StackBuilder {
    /// Sets the number of replicas of a program. By default there is one replica of each program, but no alert-svc and no
    /// agent.
    #[must_use]
    pub fn replicas(mut self, program: Program, count: usize) -> Self {
        self.replicas.insert(program, count);
        self
    }

    /// Changes a setting of all replicas of a program.
    #[must_use]
    pub fn set(mut self, program: Program, name: &str, value: &str) -> Self {
        self.settings.push((program, name.to_owned(), value.to_owned()));
        self
    }

    /// Raises the limit of concurrent cheap reads, for tests and benchmarks that would otherwise exceed it.
    #[must_use]
    pub fn without_read_limit(self) -> Self {
        [Program::Gateway, Program::Metrics]
            .into_iter()
            .fold(self, |builder, program| {
                builder.set(program, "VMWATCH_MAX_CHEAP_READS", "16384")
            })
    }

    /// Raises the limit of logins per client address, for tests and benchmarks that would otherwise exceed it.
    #[must_use]
    pub fn without_login_limit(self) -> Self {
        self.set(Program::Gateway, "VMWATCH_LOGIN_BURST", "1000000")
    }

    /// Makes NATS write each message to disk before acknowledging it, as configured in deploy/nats; for benchmarks. In
    /// stacks with permissions, NATS always does this.
    #[must_use]
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Uses the NATS users and permissions of deploy/nats. By default, every NATS client has all permissions. The stack's agents
    /// are enrolled then, so the stack needs an auth-svc if it has agents.
    #[must_use]
    pub fn with_permissions(mut self) -> Self {
        self.permissions = true;
        self
    }

    /// Makes NATS and the database accept only TLS, as in a deployment. Like [`StackBuilder::with_permissions`], also
    /// uses the NATS users and permissions of deploy/nats.
    #[must_use]
    pub fn with_tls(mut self) -> Self {
        self.tls = true;
        self.with_permissions()
    }

    /// Like [`StackBuilder::with_tls`]; agents that enrol get the address of NATS over WebSocket. NATS runs as a local process.
    #[must_use]
    pub fn with_websocket(mut self) -> Self {
        self.websocket = Some(free_port());
        self.with_tls().with_local_servers()
    }

    /// Starts a cluster of this many NATS servers, with the NATS users and permissions of deploy/nats.
    #[must_use]
    pub fn with_nats_cluster(mut self, size: usize) -> Self {
        self.nats_servers = size;
        self.with_permissions()
    }

    /// Raises the limits of what one VM may send, for tests that publish in one second what an agent publishes in an
    /// hour.
    #[must_use]
    pub fn without_rates(self) -> Self {
        [
            ("VMWATCH_STREAM_MESSAGES_PER_VM", "100000"),
            ("VMWATCH_VM_MESSAGES_PER_SECOND", "1000000"),
            ("VMWATCH_VM_ROWS_PER_SECOND", "10000000"),
            ("VMWATCH_VM_BYTES_PER_SECOND", "1GiB"),
            ("VMWATCH_VM_BUCKETS_PER_SECOND", "1000000"),
        ]
        .into_iter()
        .fold(self, |builder, (name, value)| {
            builder.set(Program::Metrics, name, value)
        })
    }

    /// Runs NATS and the database as local processes even if other tests use containers, for tests that replace a
    /// server's files.
    #[must_use]
    pub fn with_local_servers(mut self) -> Self {
        self.backend = Some(Backend::Processes);
        self
    }

    /// Stores NATS's data in the given folder, and runs the servers as local processes.
    #[must_use]
    pub fn with_bus_store(mut self, folder: &Path) -> Self {
        self.bus_store = Some(folder.to_owned());
        self.with_local_servers()
    }

    /// Starts the servers and the replicas, and waits until all of them are ready.
    pub async fn start(self) -> Stack {
        let folder = tempfile::Builder::new().prefix("vmwatch-e2e-").tempdir().unwrap();
        if let Some(store) = &self.bus_store {
            std::os::unix::fs::symlink(store, folder.path().join("nats")).unwrap();
        }
        let secrets = self.permissions.then(|| Secrets::make(folder.path()));
        let secrets = if self.tls {
            secrets.map(|secrets| secrets.with_tls().with_websocket(self.websocket))
        } else {
            secrets
        };
        let certificate = secrets.as_ref().and_then(Secrets::database_certificate);
        let backend = self.backend.unwrap_or_else(Backend::chosen);
        // Boxed, because the futures of tests contain it.
        let nats = Box::pin(async {
            match secrets {
                Some(secrets) if self.nats_servers > 1 => {
                    Nats::start_cluster(folder.path(), self.nats_servers, secrets).await
                }
                None if self.durable => Nats::start_durable(folder.path()).await,
                secrets => Nats::start_on(backend, folder.path(), secrets).await,
            }
        });
        let (nats, database) = tokio::join!(
            nats,
            Database::start_on(backend, folder.path(), certificate.as_deref())
        );
        write_node_file(folder.path());
        write_key_file(folder.path());
        let mut stack = Stack {
            gateways: Vec::new(),
            replicas: HashMap::new(),
            bus: nats.connect("vmwatch-test").await,
            nats,
            database,
            users: Mutex::default(),
            folder,
        };
        if self.replicas.get(&Program::Auth).is_none_or(|count| *count == 0) {
            stack.make_audit().await;
        }
        if self.permissions {
            for program in Program::OWNERS {
                stack.set_up(program, &self.overrides(program));
            }
        }
        for program in Program::ALL {
            for index in 0..self.replicas.get(&program).copied().unwrap_or(0) {
                let listen = free_port();
                let mut env = stack.common_settings(program, index).await;
                env.extend(own_settings(program, index, listen, stack.folder.path()));
                if program == Program::Auth {
                    env.extend(stack.agent_logins());
                }
                env.extend(self.overrides(program));
                let replica = stack.spawn(program, index, env);
                if program == Program::Gateway {
                    stack.gateways.push(Gateway::new(replica, listen));
                } else {
                    stack.replicas.entry(program).or_default().push(replica);
                }
            }
        }
        stack.ready().await;
        stack
    }

    fn overrides(&self, program: Program) -> Vec<(String, String)> {
        let of_program = self.settings.iter().filter(|(of, ..)| *of == program);
        of_program
            .map(|(_, name, value)| (name.clone(), value.clone()))
            .collect()
    }
}

/// A running test stack. Dropping it ends all its processes.
#[derive(Debug)]
pub struct Stack {
    gateways: Vec<Gateway>,
    replicas: HashMap<Program, Vec<Replica>>,
    /// The test's own connection to NATS, which has all permissions.
    pub bus: Bus,
    /// The NATS server.
    pub nats: Nats,
    /// The database server.
    pub database: Database,
    /// The users for whom the harness has created sessions.
    users: Mutex<HashSet<String>>,
    folder: TempDir,
}

impl Stack {
    /// Configures a stack that has one replica of each program, but no alert-svc and no agent.
    pub fn builder() -> StackBuilder {
        let one = |program| (program, 1);
        StackBuilder {
            replicas: [
                Program::Gateway,
                Program::Auth,
                Program::Metrics,
                Program::Lifecycle,
            ]
            .map(one)
            .into(),
            settings: Vec::new(),
            permissions: false,
            durable: false,
            tls: false,
            websocket: None,
            backend: None,
            bus_store: None,
            nats_servers: 1,
        }
    }

    /// Starts the first agent of a running stack, with these additional settings.
    pub async fn start_agent(&self, settings: &[(&str, &str)]) -> Replica {
        let mut env = self.agent_settings(0).await;
        env.extend(own_settings(Program::Agent, 0, free_port(), self.folder.path()));
        env.extend(
            settings
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned())),
        );
        self.spawn(Program::Agent, 0, env)
    }

    /// Starts an agent that logs in with the identity in this folder, and has no other setting than a folder for its spool.
    pub fn start_enrolled_agent(&self, identity: &Path) -> Replica {
        let path = |path: &Path| path.display().to_string();
        let env = [
            ("VMWATCH_AGENT_IDENTITY_DIR", path(identity)),
            ("VMWATCH_AGENT_SPOOL_DIR", path(&identity.with_extension("spool"))),
            (NATS_PING_INTERVAL.name, "300ms".to_owned()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value));
        self.spawn(Program::Agent, 0, env.into())
    }

    /// The gateway with the given index.
    pub fn gateway(&self, index: usize) -> &Gateway {
        self.gateways
            .get(index)
            .expect("the stack has a gateway with this index")
    }

    /// The replica of a program with the given index.
    pub fn replica(&self, program: Program, index: usize) -> &Replica {
        let replica = match program {
            Program::Gateway => self.gateways.get(index).map(|gateway| &gateway.replica),
            other => self.replicas.get(&other).and_then(|replicas| replicas.get(index)),
        };
        replica.expect("the stack has a replica with this index")
    }

    /// The state of a VM as lifecycle-svc reports it over NATS.
    pub async fn machine_state(&self, instance: &str) -> MachineState {
        let admin = Principal {
            user: "test".to_owned(),
            role: Role::Admin,
            scope: Scope::All,
        };
        let context = Context::new(PATIENCE).as_principal(admin);
        let target = Target {
            instance_id: instance.parse().expect("the instance id is valid"),
        };
        let machine = self.bus.call::<State>(&context, &target).await;
        machine
            .unwrap_or_else(|fault| panic!("reading the state of {instance} failed: {fault}"))
            .state
    }

    /// The folder with the logs and data of the stack's processes.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn all(&self) -> impl Iterator<Item = &Replica> {
        let gateways = self.gateways.iter().map(|gateway| &gateway.replica);
        gateways.chain(self.replicas.values().flatten())
    }

    /// Waits until every replica is ready and the test's own NATS connection is established.
    pub async fn ready(&self) {
        join_all(self.all().map(Replica::ready)).await;
        eventually("the test is connected to the bus", PATIENCE, async || {
            let connected = self.bus.is_connected();
            connected
                .then_some(())
                .ok_or_else(|| "the server is unreachable".to_owned())
        })
        .await;
    }

    /// Creates a session without a login, for tests that do not concern passwords. Sessions with the same role and
    /// scope belong to the same user; see [`Stack::user_of`].
    pub async fn session(&self, role: Role, scope: Scope) -> String {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).expect("the operating system's random generator works");
        self.session_of(Token::from_random(bits), role, scope).await
    }

    /// Like [`Stack::session`], but with the given session token.
    pub async fn session_of(&self, token: Token, role: Role, scope: Scope) -> String {
        let user = Self::user_of(role, &scope);
        self.put_session(user, token, role, scope).await
    }

    /// Like [`Stack::session`], but for the given user, for tests of limits per user. Each user can have only one role.
    pub async fn session_as(&self, user: &str, role: Role) -> String {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits).expect("the operating system's random generator works");
        self.put_session(user.to_owned(), Token::from_random(bits), role, Scope::All)
            .await
    }

    async fn put_session(&self, user: String, token: Token, role: Role, scope: Scope) -> String {
        self.make_user(&user, role, scope).await;
        let now = unix_millis();
        let record = SessionRecord {
            user: UserKey::from_name(&user),
            began_at_ms: now,
            expires_at_ms: now + 3_600_000,
            last_used_at_ms: now,
            idle_ends_at_ms: now + 3_600_000,
            source: None,
        };
        self.put(SESSION_BUCKET, token.key(), &record).await;
        token.to_string()
    }

    /// The name of the user to whom the sessions created by [`Stack::session`] belong.
    pub fn user_of(role: Role, scope: &Scope) -> String {
        let Scope::Only(instances) = scope else {
            return format!("test-{role}");
        };
        let mut hasher = DefaultHasher::new();
        instances.hash(&mut hasher);
        format!("test-{role}-{:016x}", hasher.finish())
    }

    /// Creates a user without a password in the database and in the KV bucket that gateways follow, as auth-svc does.
    async fn make_user(&self, name: &str, role: Role, scope: Scope) {
        let mut users = self.users.lock().await;
        if !users.insert(name.to_owned()) {
            return;
        }
        let created = DateTime::now();
        let user = doc! {
            "_id": UserKey::from_name(name).as_str(), "name": name, "password_hash": NO_PASSWORD, "role": role.to_string(), "created": created,
            "scope": serialize_to_bson(&scope).expect("encoding a scope succeeds"),
            "sessions_not_before": DateTime::from_millis(0),
        };
        let made = self.database.handle().collection("users").insert_one(user).await;
        made.expect("storing the user in the database succeeds");
        let record = UserRecord {
            principal: Principal {
                user: name.to_owned(),
                role,
                scope,
            },
            sessions_not_before_ms: 0,
            created_at_ms: u64::try_from(created.timestamp_millis()).unwrap_or_default(),
            removed: false,
        };
        self.put(USER_BUCKET, UserKey::from_name(name).bucket_key(), &record)
            .await;
    }

    pub(crate) async fn put(&self, bucket: &str, key: String, record: &impl serde::Serialize) {
        let bucket = self.bus.jetstream_for_tests().get_key_value(bucket).await;
        let record = serde_json::to_vec(record).expect("encoding a record succeeds");
        let put = bucket
            .expect("the setup command of auth-svc has created the KV bucket")
            .put(key, record.into())
            .await;
        put.expect("storing the record in the KV bucket succeeds");
    }

    async fn common_settings(&self, program: Program, index: usize) -> Vec<(String, String)> {
        match program {
            Program::Agent => self.agent_settings(index).await,
            _ => self.settings_as(program.user(), program),
        }
    }

    /// The settings of the agent with this index, which is enrolled in stacks with permissions.
    async fn agent_settings(&self, index: usize) -> Vec<(String, String)> {
        let login = if self.nats.secrets().is_some() {
            // A login that no auth-svc decides on ends after ten seconds.
            let auth = self.replicas.get(&Program::Auth).into_iter().flatten();
            join_all(auth.map(Replica::ready)).await;
            let identity = self.identity_of(&agent_instance(index)).await;
            ("VMWATCH_AGENT_IDENTITY_DIR", identity.display().to_string())
        } else {
            (NATS_URL.name, self.nats.url().to_owned())
        };
        let settings = [
            login,
            (NATS_PING_INTERVAL.name, "300ms".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
        ];
        settings.map(|(name, value)| (name.to_owned(), value)).into()
    }

    fn settings_as(&self, user: &str, program: Program) -> Vec<(String, String)> {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut env = vec![
            pair(NATS_URL.name, self.nats.url()),
            // The short ping interval lets the program detect a frozen NATS server within a second.
            pair(NATS_PING_INTERVAL.name, "300ms"),
            pair("RUST_BACKTRACE", "1"),
        ];
        env.extend(self.nats.login_of(user));
        if matches!(program, Program::Auth | Program::Metrics | Program::Alert) {
            env.push(pair(MONGODB_URI.name, self.database.uri()));
            let ca_file = self.nats.secrets().and_then(Secrets::ca_file);
            env.extend(ca_file.map(|file| pair(MONGODB_CA_FILE.name, &file.display().to_string())));
        }
        env
    }

    /// The settings with which auth-svc enrols agents and answers NATS's auth callout; none in stacks without permissions.
    fn agent_logins(&self) -> Vec<(String, String)> {
        let Some(secrets) = self.nats.secrets() else {
            return Vec::new();
        };
        let url = secrets
            .websocket_url()
            .unwrap_or_else(|| self.nats.url().to_owned());
        let file = |path: PathBuf| path.display().to_string();
        let mut settings = vec![
            (
                "VMWATCH_CALLOUT_NKEY_SEED_FILE",
                file(secrets.callout_file("nkey-seed")),
            ),
            (
                "VMWATCH_CALLOUT_ISSUER_SEED_FILE",
                file(secrets.callout_file("issuer-seed")),
            ),
            ("VMWATCH_AGENT_NATS_URL", url),
            ("VMWATCH_AGENT_VM_INTERVAL", "500ms".to_owned()),
            ("VMWATCH_AGENT_PROCESS_INTERVAL", "500ms".to_owned()),
        ];
        settings.extend(
            secrets
                .ca_file()
                .map(|path| ("VMWATCH_AGENT_NATS_CA_FILE", file(path))),
        );
        let owned = settings.into_iter().map(|(name, value)| (name.to_owned(), value));
        owned.collect()
    }

    fn spawn(&self, program: Program, index: usize, mut env: Vec<(String, String)>) -> Replica {
        let health_port = free_port();
        env.push((
            health::setting("").name.to_owned(),
            format!("127.0.0.1:{health_port}"),
        ));
        Replica {
            process: Process::start(self.spec(program, index, env)),
            health: format!("http://127.0.0.1:{health_port}"),
        }
    }

    fn spec(&self, program: Program, index: usize, env: Vec<(String, String)>) -> Spec {
        let name = format!("{}-{index}", program.binary());
        Spec {
            log: self.folder.path().join(format!("{name}.log")),
            name,
            program: tools::own(program.binary()),
            args: Vec::new(),
            env,
        }
    }

    /// Runs a program's command as an operator would, and returns its output; panics if the command fails.
    pub fn command(&self, program: Program, args: &[&str], input: &str) -> String {
        self.command_as(program.user(), program, args, input)
    }

    /// Like [`Stack::command`], but with the credentials of the given NATS user.
    pub fn command_as(&self, user: &str, program: Program, args: &[&str], input: &str) -> String {
        let output = self.try_command(user, program, args, input, &[]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a program's command with the credentials of the given NATS user and these settings. The command may fail.
    pub fn try_command(
        &self,
        user: &str,
        program: Program,
        args: &[&str],
        input: &str,
        settings: &[(String, String)],
    ) -> Output {
        let mut env = self.settings_as(user, program);
        env.extend(settings.iter().cloned());
        let mut spec = self.spec(program, 0, env);
        spec.args = args.iter().map(|&arg| arg.to_owned()).collect();
        run(&spec, input)
    }

    /// Runs `vmwatch-agent enroll` for this VM at the first gateway. The command may fail.
    pub fn try_enrol(&self, token: &str, identity: &Path, vm: &str) -> Output {
        let folder = identity.display().to_string();
        let env = vec![("VMWATCH_AGENT_IDENTITY_DIR".to_owned(), folder)];
        let mut spec = self.spec(Program::Agent, 0, env);
        let gateway = self.gateway(0).url("");
        spec.args = [
            "enroll",
            "--gateway",
            &gateway,
            "--token-file",
            "-",
            "--instance-id",
            vm,
        ]
        .map(str::to_owned)
        .into();
        run(&spec, token)
    }

    /// Starts a program's command with these settings, and does not wait for its end. Its output goes to a log of its own.
    pub fn start_command(&self, program: Program, args: &[&str], settings: &[(String, String)]) -> Process {
        let mut env = self.settings_as(program.user(), program);
        env.extend(settings.iter().cloned());
        let mut spec = self.spec(program, 0, env);
        spec.name = format!("{}-command-{}", program.binary(), random_id());
        spec.log = self.folder.path().join(format!("{}.log", spec.name));
        spec.args = args.iter().map(|&arg| arg.to_owned()).collect();
        Process::start(spec)
    }

    /// Creates the audit streams, which commands and lifecycle-svc need, for stacks in which auth-svc's `setup` does
    /// not run.
    async fn make_audit(&self) {
        let settings =
            AuditSettings::read(&Environment::from_variables([])).expect("the default settings are valid");
        for stream in settings.streams() {
            let made = ensure_stream(&self.bus, Service::Auth, &stream).await;
            made.expect("creating the audit streams succeeds");
        }
    }

    /// Runs a program's `setup` command, as a deployment does before it starts the services.
    fn set_up(&self, program: Program, settings: &[(String, String)]) {
        let output = self.try_command(SETUP_USER, program, &["setup"], "", settings);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "setup of {}: {errors}", program.binary());
    }
}

/// The settings of a program, other than the addresses of NATS and the database.
fn own_settings(program: Program, index: usize, listen: u16, folder: &Path) -> Vec<(String, String)> {
    let path = |name: &str| folder.join(name).display().to_string();
    let pairs = match program {
        Program::Gateway => vec![("VMWATCH_LISTEN", format!("127.0.0.1:{listen}"))],
        Program::Auth => vec![
            ("VMWATCH_ADMIN_USER", ADMIN.0.to_owned()),
            ("VMWATCH_ADMIN_PASSWORD", ADMIN.1.to_owned()),
        ],
        // Tests write rows into the flat collections at any time.
        Program::Metrics => vec![
            ("VMWATCH_FLAT_CHECK_INTERVAL", "0s".to_owned()),
            // Tests that count blocks must not depend on how long ago the last hour ended.
            ("VMWATCH_COMPACTION_INTERVAL", "1h".to_owned()),
        ],
        Program::Lifecycle => {
            vec![("VMWATCH_HYPERVISORS", format!("test=test://{}", path(NODE_FILE)))]
        }
        Program::Alert => vec![("VMWATCH_ALERT_KEY_FILE", path(KEY_FILE))],
        Program::Agent => vec![
            ("VMWATCH_INSTANCE_ID", agent_instance(index)),
            ("VMWATCH_AGENT_VM_INTERVAL", "500ms".to_owned()),
            ("VMWATCH_AGENT_PROCESS_INTERVAL", "500ms".to_owned()),
            ("VMWATCH_AGENT_SPOOL_DIR", path(&format!("spool-{listen}"))),
        ],
    };
    let owned = pairs.into_iter().map(|(name, value)| (name.to_owned(), value));
    owned.collect()
}

/// The instance id of the stack's agent with this index; each agent has a different one.
fn agent_instance(index: usize) -> String {
    match index {
        0 => THIS_MACHINE.to_owned(),
        other => format!("{THIS_MACHINE}-{other}"),
    }
}

/// Writes the definitions of the test VMs in the format of libvirt's test driver.
fn write_node_file(folder: &Path) {
    let mut node = String::from("<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>\n");
    for (index, (uuid, power)) in MACHINES.iter().enumerate() {
        // The numbers are values of `virDomainState`: 1 is running, 5 is shut off.
        let state = match power {
            Power::Running => 1,
            Power::Off => 5,
        };
        let title = if index == 0 { "<title>Ledger</title>" } else { "" };
        let _ = writeln!(
            node,
            "<domain type='test'><name>vm-{index}</name><uuid>{uuid}</uuid>{title}<memory unit='MiB'>64</memory>\
             <os><type>hvm</type></os><test:runstate>{state}</test:runstate></domain>"
        );
    }
    node.push_str("</node>\n");
    fs::write(folder.join(NODE_FILE), node).expect("writing to the temporary folder succeeds");
}

/// Writes the key with which alert-svc seals the secrets of channels, in the format of `deploy/secrets`.
fn write_key_file(folder: &Path) {
    let key = "5e".repeat(32);
    fs::write(folder.join(KEY_FILE), key).expect("writing to the temporary folder succeeds");
}
