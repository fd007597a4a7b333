//! The identity folder: the key of the agent and the answer to its enrolment.
//!
//! | file | content |
//! |---|---|
//! | `agent.seed` | the seed of the key |
//! | `agent.seed.new` | the seed of a key whose enrolment has not been completed, and the id of its join token |
//! | `enrollment.json` | the [`Record`] of the enrolment |
//! | `ca.crt` | the certificate authorities in `enrollment.json`, for the NATS client |
//! | `lock` | locked while an enrolment runs |
//!
//! Each file is written under a temporary name, synced and then renamed. A new seed is stored before its public key is sent,
//! so an enrolment whose answer was lost is repeated with the same key. An enrolment takes effect when `enrollment.json` is
//! replaced: it has the public key, by which [`IdentityDir::load`] finds the seed that belongs to it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nkeys::{KeyPair, KeyPairType};
use serde::{Deserialize, Serialize};
use vmwatch_api::{
    InstanceId,
    enrollment::{AgentKey, Enrolled, JoinTokenId, Platform},
};

use crate::config::IDENTITY_DIR;

const SEED: &str = "agent.seed";
const NEW_SEED: &str = "agent.seed.new";
const RECORD: &str = "enrollment.json";
const CA: &str = "ca.crt";
const LOCK: &str = "lock";

/// The identity folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{}: cannot use {}: {source}", IDENTITY_DIR.name, path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("another enrolment of this VM is running; wait until it has ended")]
    Busy,
    #[error("{} is damaged ({why}); enrol this VM again: vmwatch-agent enroll --help", path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("the operating system provided no random numbers ({0})")]
    Random(getrandom::Error),
}

/// What is recorded of an enrolment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) instance_id: InstanceId,
    pub(crate) public_key: AgentKey,
    /// What the platform said of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
    pub(crate) join_token: JoinTokenId,
    pub(crate) answer: Enrolled,
}

/// An nkey of a user. `Debug` does not print the seed.
pub(crate) struct Key {
    seed: String,
    public: AgentKey,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", self.public)
    }
}

impl Key {
    fn create() -> Result<Self, IdentityError> {
        let mut bits = [0; 32];
        getrandom::fill(&mut bits).map_err(IdentityError::Random)?;
        let pair = KeyPair::new_from_raw(KeyPairType::User, bits);
        let created = pair.and_then(|pair| Ok((pair.seed()?, pair.public_key())));
        let (seed, public) = created.map_err(|error| damaged(Path::new(SEED), error.to_string()))?;
        let public = public
            .parse()
            .map_err(|why: &str| damaged(Path::new(SEED), why))?;
        Ok(Self { seed, public })
    }

    fn from_seed(seed: &str) -> Option<Self> {
        let pair = KeyPair::from_seed(seed).ok()?;
        let public = pair.public_key().parse().ok()?;
        let seed = seed.to_owned();
        Some(Self { seed, public })
    }

    pub(crate) const fn public(&self) -> &AgentKey {
        &self.public
    }

    pub(crate) fn into_seed(self) -> String {
        self.seed
    }
}

/// An enrolled agent.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) record: Record,
    pub(crate) key: Key,
    /// The file with the certificate authorities of the NATS servers, unless the VM's own are used.
    pub(crate) ca_file: Option<PathBuf>,
}

/// The identity folder.
#[derive(Debug, Clone)]
pub(crate) struct IdentityDir {
    path: PathBuf,
}

/// The locked identity folder. The lock ends when this value is dropped.
#[derive(Debug)]
pub(crate) struct LockedDir<'a> {
    dir: &'a IdentityDir,
    _lock: File,
}

impl IdentityDir {
    pub(crate) const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn is_enrolled(&self) -> bool {
        self.path.join(RECORD).exists()
    }

    /// Reads the identity; `None` if the agent is not enrolled.
    pub(crate) fn load(&self) -> Result<Option<Identity>, IdentityError> {
        let path = self.path.join(RECORD);
        let Some(text) = self.read(RECORD)? else {
            return Ok(None);
        };
        let record: Record =
            serde_json::from_str(&text).map_err(|error| damaged(&path, error.to_string()))?;
        let key = self.key_of(&record.public_key)?;
        let ca_file = self.ca_file(&record.answer.ca_certificates)?;
        Ok(Some(Identity { record, key, ca_file }))
    }

    /// Finds the seed of a public key. If an enrolment was interrupted after `enrollment.json` was written, completes it.
    fn key_of(&self, public: &AgentKey) -> Result<Key, IdentityError> {
        let belongs = |key: &Key| key.public == *public;
        if let Some(key) = self.key(SEED)?.filter(belongs) {
            return Ok(key);
        }
        if let Some(key) = self.key(NEW_SEED)?.filter(belongs) {
            self.adopt_new_seed()?;
            return Ok(key);
        }
        // Another process may have completed the enrolment meanwhile.
        let key = self.key(SEED)?.filter(belongs);
        key.ok_or_else(|| {
            damaged(
                &self.path.join(SEED),
                "it does not contain the seed of the enrolled key",
            )
        })
    }

    /// Reads a seed from the first line of a file.
    fn key(&self, name: &str) -> Result<Option<Key>, IdentityError> {
        let text = self.read(name)?;
        Ok(text.and_then(|text| Key::from_seed(text.lines().next()?)))
    }

    fn adopt_new_seed(&self) -> Result<(), IdentityError> {
        match fs::rename(self.path.join(NEW_SEED), self.path.join(SEED)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(self.unusable(error)),
            // If the file is missing, another process has renamed it.
            _ => sync(&self.path).map_err(|error| self.unusable(error)),
        }
    }

    /// Writes the certificate authorities to their file, unless it has them.
    fn ca_file(&self, pem: &str) -> Result<Option<PathBuf>, IdentityError> {
        if pem.is_empty() {
            return Ok(None);
        }
        if self.read(CA)?.as_deref() != Some(pem) {
            self.write(CA, pem.as_bytes())?;
        }
        Ok(Some(self.path.join(CA)))
    }

    /// Creates the folder if necessary and locks it. Only the agent's user may read the folder.
    pub(crate) fn lock(&self) -> Result<LockedDir<'_>, IdentityError> {
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(self.unusable(error)),
            _ => {}
        }
        let open = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.path.join(LOCK));
        let lock = open.map_err(|error| self.unusable(error))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => IdentityError::Busy,
            TryLockError::Error(error) => self.unusable(error),
        })?;
        Ok(LockedDir {
            dir: self,
            _lock: lock,
        })
    }

    fn read(&self, name: &str) -> Result<Option<String>, IdentityError> {
        match fs::read_to_string(self.path.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.unusable(error)),
        }
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), IdentityError> {
        let partial = self.path.join(format!(".{name}.partial"));
        let written = (|| {
            let mut options = OpenOptions::new();
            let mut file = options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&partial, self.path.join(name))?;
            sync(&self.path)
        })();
        written.map_err(|error| self.unusable(error))
    }

    pub(crate) fn unusable(&self, source: io::Error) -> IdentityError {
        let path = self.path.clone();
        IdentityError::Folder { path, source }
    }
}

impl LockedDir<'_> {
    /// Returns the key to enrol with. An enrolment that is repeated with the same join token uses the same key; any other
    /// gets a new one, which is stored before it is used.
    pub(crate) fn key_for(
        &self,
        instance_id: &InstanceId,
        join_token: &JoinTokenId,
    ) -> Result<Key, IdentityError> {
        // A damaged enrolment is replaced by the new one.
        if let Ok(Some(current)) = self.dir.load()
            && current.record.join_token == *join_token
            && current.record.instance_id == *instance_id
        {
            return Ok(current.key);
        }
        if let Some(text) = self.dir.read(NEW_SEED)? {
            let mut lines = text.lines();
            let key = lines.next().and_then(Key::from_seed);
            if let Some(key) = key
                && lines.next() == Some(join_token.as_str())
            {
                return Ok(key);
            }
        }
        let key = Key::create()?;
        let content = format!("{}\n{join_token}\n", key.seed);
        self.dir.write(NEW_SEED, content.as_bytes())?;
        Ok(key)
    }

    /// Stores an enrolment, which replaces any earlier one.
    pub(crate) fn store(&self, record: &Record) -> Result<(), IdentityError> {
        let path = self.dir.path.join(RECORD);
        let text = serde_json::to_vec_pretty(record).map_err(|error| damaged(&path, error.to_string()))?;
        self.dir.write(RECORD, &text)?;
        // This completes the enrolment, as it would after an interruption.
        self.dir.load().map(drop)
    }
}

fn damaged(path: &Path, why: impl Into<String>) -> IdentityError {
    IdentityError::Damaged {
        path: path.to_owned(),
        why: why.into(),
    }
}

/// Syncs a folder, so that renamed files keep their new names after a power loss.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
pub(crate) mod tests;
