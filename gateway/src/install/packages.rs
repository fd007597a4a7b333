//! The agent's packages in a folder, which are kept in memory and read again when their files change.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::{sync::watch, task::spawn_blocking, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Names of the files that are served. `./dev package` writes names without an architecture; the script installs such a
/// package only if it is for the VM's architecture.
const NAMES: [&str; 6] = [
    "vmwatch-agent.deb",
    "vmwatch-agent.rpm",
    "vmwatch-agent-amd64.deb",
    "vmwatch-agent-amd64.rpm",
    "vmwatch-agent-arm64.deb",
    "vmwatch-agent-arm64.rpm",
];
/// Maximum size of a package; a larger one is not served.
const MAX_BYTES: u64 = 64 << 20;
/// Interval at which the files are compared with what was read.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The packages that are served, in the order of their names.
#[derive(Debug, Default)]
pub(super) struct Packages(Vec<Arc<Package>>);

/// A package as it was read.
#[derive(Debug)]
pub(super) struct Package {
    name: &'static str,
    sha256: String,
    pub(super) content: Bytes,
}

impl Package {
    pub(super) fn media_type(&self) -> &'static str {
        match self.name.rsplit('.').next() {
            Some("deb") => "application/vnd.debian.binary-package",
            _ => "application/x-rpm",
        }
    }
}

impl Packages {
    pub(super) fn get(&self, name: &str) -> Option<Arc<Package>> {
        self.0.iter().find(|package| package.name == name).cloned()
    }

    /// A line for each package: its name and its SHA-256.
    pub(super) fn checksums(&self) -> String {
        let lines = self
            .0
            .iter()
            .map(|package| format!("{} {}", package.name, package.sha256));
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// Identifies the content of a file, as far as its metadata can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl From<Metadata> for Stamp {
    fn from(metadata: Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// The files of [`NAMES`] that exist.
type Stamps = [Option<Stamp>; NAMES.len()];

fn stamps(folder: &Path) -> Stamps {
    NAMES.map(|name| fs::metadata(folder.join(name)).ok().map(Stamp::from))
}

/// Reads the packages of the folder, and until shutdown checks for changes at the interval.
pub(super) async fn follow(
    folder: PathBuf,
    interval: Duration,
    shutdown: CancellationToken,
) -> watch::Receiver<Arc<Packages>> {
    let (packages, stamps) = read(folder.clone()).await;
    let (sender, current) = watch::channel(Arc::new(packages));
    tokio::spawn(async move {
        shutdown
            .run_until_cancelled(renew(folder, interval, stamps, sender))
            .await
    });
    current
}

async fn renew(
    folder: PathBuf,
    interval: Duration,
    mut served: Stamps,
    sender: watch::Sender<Arc<Packages>>,
) {
    let mut checks = tokio::time::interval(interval);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = served;
    loop {
        checks.tick().await;
        let path = folder.clone();
        let Ok(now) = spawn_blocking(move || stamps(&path)).await else {
            continue;
        };
        // A file that changed since the previous check may still be written.
        if now != served && now == before {
            let packages;
            (packages, served) = read(folder.clone()).await;
            sender.send_replace(Arc::new(packages));
        }
        before = now;
    }
}

async fn read(folder: PathBuf) -> (Packages, Stamps) {
    let reading = spawn_blocking(move || {
        let stamps = stamps(&folder);
        let found = NAMES.iter().filter_map(|name| read_package(&folder, name));
        (Packages(found.map(Arc::new).collect()), stamps)
    });
    // The task is never aborted and does not panic.
    let (packages, stamps) = reading.await.unwrap_or_default();
    info!(packages = ?packages.0.iter().map(|package| package.name).collect::<Vec<_>>(), "serving packages of the agent");
    (packages, stamps)
}

/// Reads a package; `None` if there is no such file or it cannot be served, which is logged.
fn read_package(folder: &Path, name: &'static str) -> Option<Package> {
    let content = match bounded(&folder.join(name)) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(%error, name, "a package of the agent cannot be served");
            return None;
        }
    };
    Some(Package {
        name,
        sha256: hex::encode(Sha256::digest(&content)),
        content: content.into(),
    })
}

fn bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "it is larger than 64 MiB",
        ));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_packages_with_known_names_and_at_most_64_mib_are_served() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        fs::write(file("vmwatch-agent.rpm"), "rpm").unwrap();
        fs::write(file("secret"), "secret").unwrap();
        File::create(file("vmwatch-agent.deb"))
            .unwrap()
            .set_len(MAX_BYTES + 1)
            .unwrap();
        File::create(file("vmwatch-agent-arm64.deb"))
            .unwrap()
            .set_len(MAX_BYTES)
            .unwrap();
        let packages = read(folder.path().to_owned()).await.0;
        let served: Vec<_> = packages.0.iter().map(|package| package.name).collect();
        assert_eq!(served, ["vmwatch-agent.rpm", "vmwatch-agent-arm64.deb"]);
        for name in [
            "secret",
            "../secret",
            "",
            ".",
            "vmwatch-agent.deb",
            "vmwatch-agent.rpm/",
            "./vmwatch-agent.rpm",
        ] {
            assert!(packages.get(name).is_none(), "{name}");
        }
        assert_eq!(packages.checksums().lines().count(), 2);
    }

    #[tokio::test]
    async fn changed_package_is_served_with_its_new_checksum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmwatch-agent.deb");
        fs::write(&path, "old").unwrap();
        let stop = CancellationToken::new();
        let mut current = follow(folder.path().to_owned(), Duration::from_millis(5), stop.clone()).await;
        let old = current.borrow_and_update().checksums();
        fs::write(&path, "newer").unwrap();
        current.changed().await.unwrap();
        let new = current.borrow_and_update().clone();
        assert_eq!(new.get("vmwatch-agent.deb").unwrap().content, "newer");
        assert_ne!(new.checksums(), old);
        fs::remove_file(&path).unwrap();
        current.changed().await.unwrap();
        assert_eq!(current.borrow().checksums(), "");
        stop.cancel();
    }
}
