//! The users of the bus as a deployment has them: deploy/nats, with passwords by `deploy/secrets`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A user of the tests' own, beside those of a deployment, who may do everything.
pub(crate) const TEST_USER: &str = "test";

/// What `deploy/secrets` made, in a folder of the test.
#[derive(Debug)]
pub struct Secrets {
    folder: PathBuf,
}

impl Secrets {
    /// Makes all secrets, and lets agents of these instances onto the bus.
    pub fn make(folder: &Path, agents: &[&str]) -> Self {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        let folder = folder.join("deployment");
        // As in the container: nats.conf names its neighbour `nats-secrets`.
        let store = folder.join("secrets");
        run_secrets(&deploy, &store, &[]);
        for agent in agents {
            run_secrets(&deploy, &store, &["agent", agent]);
        }
        fs::create_dir(folder.join("nats")).unwrap();
        for name in ["nats.conf", "permissions.conf"] {
            fs::copy(deploy.join("nats").join(name), folder.join("nats").join(name)).unwrap();
        }
        let made = fs::read_to_string(store.join("nats-server/users.conf")).unwrap();
        let (users, end) = made.rsplit_once(']').expect("a list of users");
        fs::create_dir(folder.join("nats-secrets")).unwrap();
        fs::write(
            folder.join("nats-secrets/users.conf"),
            format!("{users}  {{ user: {TEST_USER}, password: {TEST_USER} }}\n]{end}"),
        )
        .unwrap();
        fs::write(store.join("nats").join(TEST_USER), TEST_USER).unwrap();
        Self { folder }
    }

    /// The configuration and the users, as a container has them; its port is published to the loopback interface alone.
    pub(crate) fn mounts(&self) -> Vec<(String, &'static str)> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        vec![
            (path("nats"), "/etc/vmwatch/nats"),
            (path("nats-secrets"), "/etc/vmwatch/nats-secrets"),
        ]
    }

    /// Writes the configuration of a server that is a process, and gives back its path. Nothing of a test is reached
    /// from outside.
    pub(crate) fn nats_config(&self, store: &str, monitoring_port: u16) -> String {
        let deployed = include_str!("../../deploy/nats/nats.conf");
        let config = deployed
            .replace("0.0.0.0:8222", &format!("127.0.0.1:{monitoring_port}"))
            .replace("0.0.0.0", "127.0.0.1")
            .replace("\"/data\"", &format!("{store:?}"));
        let path = self.folder.join("nats/nats.conf");
        fs::write(&path, config).unwrap();
        path.display().to_string()
    }

    /// The file with the password of a user.
    pub fn password_file(&self, user: &str) -> PathBuf {
        let store = self.folder.join("secrets");
        match user.strip_prefix("vmwatch-agent-") {
            Some(instance) => store.join("agents").join(instance),
            None => store.join("nats").join(user),
        }
    }

    /// The password of a user.
    pub fn password(&self, user: &str) -> String {
        fs::read_to_string(self.password_file(user))
            .unwrap()
            .trim()
            .to_owned()
    }
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
