//! Secrets for tests as in a deployment: the NATS users of deploy/nats with passwords, and the certificates of NATS and
//! the database, all created by `deploy/secrets`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::ports::free_port;

/// An additional NATS user for tests, with all permissions.
pub(crate) const TEST_USER: &str = "test";

/// The files that `deploy/secrets` created in the test's folder.
#[derive(Debug)]
pub struct Secrets {
    folder: PathBuf,
    /// Whether NATS and the database accept only TLS.
    tls: bool,
    /// The port at which NATS serves WebSocket, if it does.
    websocket_port: Option<u16>,
}

/// The folder in which nats.conf finds the list of users and the certificate.
const NATS_SECRETS: &str = "/etc/vmwatch/nats-secrets";
/// The files of NATS's configuration that need the certificate. They are empty in stacks without TLS.
const TLS_FILES: [&str; 2] = ["tls.conf", "websocket.conf"];
/// The address in websocket.conf.
const WEBSOCKET_LISTEN: &str = "0.0.0.0:8443";

impl Secrets {
    /// Creates all secrets.
    pub fn make(folder: &Path) -> Self {
        let deploy = deploy();
        let folder = folder.join("deployment");
        // The folder needs this name, because nats.conf includes files from the sibling folder `nats-secrets`, as in
        // the container.
        let store = folder.join("secrets");
        run_secrets(&deploy, &store, &[]);
        fs::create_dir(folder.join("nats")).unwrap();
        fs::create_dir(folder.join("nats-secrets")).unwrap();
        fs::write(store.join("nats").join(TEST_USER), TEST_USER).unwrap();
        for name in TLS_FILES {
            fs::write(folder.join("nats").join(name), "").unwrap();
        }
        let secrets = Self {
            folder,
            tls: false,
            websocket_port: None,
        };
        for name in ["nats.conf", "accounts.conf", "permissions.conf"] {
            secrets.copy_config(name);
        }
        secrets.copy_users();
        secrets
    }

    /// Makes NATS and the database accept only TLS, as in a deployment. Most tests do not use TLS because it makes them
    /// slower.
    #[must_use]
    pub fn with_tls(mut self) -> Self {
        self.tls = true;
        self.copy_config("tls.conf");
        self.copy_certificate();
        self
    }

    /// Makes NATS serve WebSocket at this port if it runs as a local process. It uses the certificate of TLS.
    #[must_use]
    pub(crate) fn with_websocket(mut self, port: Option<u16>) -> Self {
        if port.is_some() {
            self.copy_config("websocket.conf");
        }
        self.websocket_port = port;
        self
    }

    fn copy_config(&self, name: &str) {
        let to = self.folder.join("nats").join(name);
        fs::copy(deploy().join("nats").join(name), to).unwrap();
    }

    /// Runs `deploy/secrets` again and copies the result to the NATS server's folder.
    pub fn renew(&self, args: &[&str]) {
        run_secrets(&deploy(), &self.folder.join("secrets"), args);
        self.copy_certificate();
        self.copy_users();
    }

    /// Copies the files with NATS users to the NATS server's folder and adds the user for tests.
    fn copy_users(&self) {
        let made = self.folder.join("secrets/nats-server");
        let to = self.folder.join("nats-secrets");
        let users = fs::read_to_string(made.join("users.conf")).unwrap();
        let (users, end) = users.rsplit_once(']').expect("the file contains a list of users");
        let users = format!("{users}  {{ user: {TEST_USER}, password: {TEST_USER} }}\n]{end}");
        fs::write(to.join("users.conf"), users).unwrap();
        let callout = fs::read_to_string(made.join("callout.conf")).unwrap();
        let (issuer, auth_users) = callout
            .split_once("auth_users: [")
            .expect("the file contains a list of users");
        let callout = format!("{issuer}auth_users: [\n  {TEST_USER}{auth_users}");
        fs::write(to.join("callout.conf"), callout).unwrap();
        fs::write(
            to.join("system.conf"),
            fs::read(made.join("system.conf")).unwrap(),
        )
        .unwrap();
    }

    fn copy_certificate(&self) {
        for name in ["ca.crt", "tls.crt", "tls.key"] {
            let made = self.folder.join("secrets/nats-server").join(name);
            let to = self.folder.join("nats-secrets").join(name);
            fs::write(to, fs::read(made).unwrap()).unwrap();
        }
    }

    /// The certificate authority that signed the servers' certificates; `None` if the servers do not use TLS.
    pub fn ca_file(&self) -> Option<PathBuf> {
        self.tls.then(|| self.folder.join("secrets/ca.crt"))
    }

    /// The folder with the database's certificate; `None` if the database does not use TLS.
    pub fn database_certificate(&self) -> Option<PathBuf> {
        self.tls.then(|| self.folder.join("secrets/mongo-server"))
    }

    /// The folders with the NATS configuration and users to mount into a container. The container's port is published
    /// only on the loopback interface.
    pub(crate) fn mounts(&self) -> Vec<(String, &'static str)> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        vec![
            (path("nats"), "/etc/vmwatch/nats"),
            (path("nats-secrets"), "/etc/vmwatch/nats-secrets"),
        ]
    }

    /// Writes the configuration for a NATS server that runs as a local process, and returns the path. The server
    /// listens only on the loopback interface.
    pub(crate) fn nats_config(&self, store: &str, monitoring_port: u16) -> String {
        let deployed = include_str!("../../deploy/nats/nats.conf");
        let config = deployed
            .replace("127.0.0.1:8222", &format!("127.0.0.1:{monitoring_port}"))
            .replace("0.0.0.0", "127.0.0.1")
            .replace("\"/data\"", &format!("{store:?}"));
        let path = self.folder.join("nats/nats.conf");
        fs::write(&path, config).unwrap();
        let here = self.folder.join("nats-secrets").display().to_string();
        let listen = format!("127.0.0.1:{}", self.websocket_port.unwrap_or_default());
        for name in TLS_FILES {
            let path = self.folder.join("nats").join(name);
            let config = fs::read_to_string(&path).unwrap();
            let config = config
                .replace(NATS_SECRETS, &here)
                .replace(WEBSOCKET_LISTEN, &listen);
            fs::write(&path, config).unwrap();
        }
        path.display().to_string()
    }

    /// The URL of NATS over WebSocket; `None` if NATS does not serve it.
    pub fn websocket_url(&self) -> Option<String> {
        self.websocket_port.map(|port| format!("wss://127.0.0.1:{port}"))
    }

    /// Writes the configuration for one of several NATS servers that form a cluster. `listen` and `routes` are addresses
    /// of the cluster, the latter those of all servers.
    pub(crate) fn nats_cluster_config(
        &self,
        name: &str,
        store: &str,
        listen: &str,
        routes: &[String],
    ) -> String {
        let routes: Vec<_> = routes.iter().map(|route| format!("nats://{route}")).collect();
        let first = self.nats_config(store, free_port());
        let config = fs::read_to_string(first).unwrap();
        let config = config.replace("server_name: vmwatch", &format!("server_name: {name}"));
        let config =
            format!("{config}\ncluster {{ name: vmwatch, listen: \"{listen}\", routes: {routes:?} }}\n");
        let path = self.folder.join(format!("nats/{name}.conf"));
        fs::write(&path, config).unwrap();
        path.display().to_string()
    }

    /// The path of a file with a key of the auth callout: `nkey-seed` or `issuer-seed`.
    pub fn callout_file(&self, name: &str) -> PathBuf {
        self.folder.join("secrets/callout").join(name)
    }

    /// The path of the file with the password of a NATS user.
    pub fn password_file(&self, user: &str) -> PathBuf {
        self.folder.join("secrets/nats").join(user)
    }

    /// The password of a NATS user.
    pub fn password(&self, user: &str) -> String {
        fs::read_to_string(self.password_file(user))
            .unwrap()
            .trim()
            .to_owned()
    }
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn run_secrets(deploy: &Path, store: &Path, args: &[&str]) {
    let done = Command::new("python3")
        .arg(deploy.join("secrets"))
        .arg("--store")
        .arg(store)
        .args(args)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "deploy/secrets: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}
