//! The spool: a queue of sample parts on disk, oldest first.
//!
//! **Guarantees.** Within 250 ms of sampling (`ship::GRACE`), a sample part is either acknowledged by JetStream or
//! spooled. If NATS is unreachable or other sample parts are queued, it is spooled immediately. Spooled parts survive
//! `kill -9` and restarts, and keep their order. A part leaves the spool only when it is acknowledged, or when it is
//! the oldest part of a full spool; in the latter case it is dropped, counted and logged. If the agent is killed with
//! `kill -9` within those 250 ms, the sample just taken is lost. In return, an agent that can reach NATS does not write
//! to the guest's disk.
//!
//! **Limits.** Files are not synced. After a power loss or a kernel crash in the guest, parts of about the last 30 s
//! (the kernel's write-back delay) may be missing or truncated; truncated parts are detected, skipped and counted.
//! While the disk hangs or is full, a bounded number of parts is kept in memory. A part may be sent twice if the agent
//! is killed between the acknowledgement and the removal of the file. That is harmless, because rows have deterministic
//! ids.
//!
//! **Files.** Each part is stored in a file `<sequence>.sample` with the message's body, which begins with the version of
//! its encoding and has a checksum. The file is written under a temporary name and then renamed, so it is always
//! complete. A lock file prevents a second agent from using the same folder. The folder `refused` has the newest sample parts
//! that NATS will never accept ([`refused`]).

mod refused;

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use metrics::gauge;
use tracing::{info, warn};
use vmwatch_api::InstanceId;
use vmwatch_blocks::sample_head;

use self::refused::Refused;
use crate::{
    config::{SPOOL_DIR, SpoolSettings},
    dropped,
    parts::{Part, part_id},
    sample::float,
};

const LOCK: &str = "lock";
/// The end of the names of the files with sample parts.
const SUFFIX: &str = ".sample";
/// The temporary name of a file that is being written. A crash can leave such a file behind.
const UNFINISHED: &str = "unfinished";
/// The usual block size of file systems. Files occupy whole blocks on disk.
const BLOCK: u64 = 4096;

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The spool folder cannot be created, read or written.
    #[error("{}: cannot use {}: {source}; set this to a folder that the agent can write to", SPOOL_DIR.name, dir.display())]
    Dir {
        /// The path of the spool folder.
        dir: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Another agent already uses the spool folder.
    #[error("{}: another agent uses {}; stop that agent, or set this to a different folder", SPOOL_DIR.name, dir.display())]
    Taken {
        /// The path of the spool folder.
        dir: PathBuf,
    },
}

/// A sample part with its sequence number in the spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) sequence: u64,
    pub(crate) part: Part,
}

/// The spool. Its methods block the calling thread while the disk hangs.
#[derive(Debug)]
pub(crate) struct Spool {
    dir: PathBuf,
    limit: u64,
    instance_id: InstanceId,
    /// The space that each sample part occupies on disk in bytes, by sequence number.
    files: BTreeMap<u64, u64>,
    bytes: u64,
    /// The number of files in the spool. It can be read even while the disk hangs.
    waiting: Arc<AtomicU64>,
    refused: Refused,
    _lock: SpoolLock,
}

/// The locked file that keeps other agents from using the folder.
#[derive(Debug)]
pub(crate) struct SpoolLock(#[expect(dead_code, reason = "dropping the file unlocks it")] File);

impl SpoolLock {
    /// Locks the spool folder, creating it if necessary. Only the agent's user may read the folder, because it reveals what
    /// runs on this VM.
    pub(crate) fn take(dir: &Path) -> Result<Self, SpoolError> {
        let unusable = |source| SpoolError::Dir {
            dir: dir.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(unusable)?;
        let lock = File::create(dir.join(LOCK)).map_err(unusable)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => SpoolError::Taken { dir: dir.to_owned() },
            TryLockError::Error(source) => unusable(source),
        })?;
        Ok(Self(lock))
    }
}

/// The names of the files with sample parts in a folder.
pub(crate) fn sample_files(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().into_string();
        names.extend(name.ok().filter(|name| parse_name(name).is_some()));
    }
    Ok(names)
}

impl Spool {
    /// Opens the locked spool folder, and finds the sample parts of an earlier run.
    pub(crate) fn open(
        settings: &SpoolSettings,
        instance_id: InstanceId,
        lock: SpoolLock,
    ) -> Result<Self, SpoolError> {
        let dir = settings.dir.clone();
        let unusable = |source| SpoolError::Dir {
            dir: dir.clone(),
            source,
        };
        if dir.join(UNFINISHED).exists() {
            fs::remove_file(dir.join(UNFINISHED)).map_err(unusable)?;
            warn!("skipped a half-written file in the spool");
            dropped::note("unfinished", 1);
        }
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(unusable)? {
            let entry = entry.map_err(unusable)?;
            if let Some(sequence) = entry.file_name().to_str().and_then(parse_name) {
                files.insert(sequence, on_disk(entry.metadata().map_err(unusable)?.len()));
            }
        }
        let mut spool = Self {
            bytes: files.values().sum(),
            dir,
            limit: settings.limit.0,
            instance_id,
            files,
            waiting: Arc::default(),
            refused: Refused::new(&settings.dir),
            _lock: lock,
        };
        spool.make_room(0);
        spool.update_depth();
        if !spool.files.is_empty() {
            info!(
                parts = spool.files.len(),
                "found spooled samples of an earlier run"
            );
        }
        Ok(spool)
    }

    /// A shared counter of the sample parts in the spool.
    pub(crate) fn waiting(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.waiting)
    }

    /// The sequence number for the next sample part.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.files.last_key_value().map_or(0, |(last, _)| last + 1)
    }

    /// Writes a sample part to the spool. If there is not enough space, the oldest parts are dropped.
    pub(crate) fn push(&mut self, queued: &Queued) -> io::Result<()> {
        let bytes = on_disk(queued.part.body.len() as u64);
        self.make_room(bytes);
        let unfinished = self.dir.join(UNFINISHED);
        fs::write(&unfinished, &queued.part.body)
            .and_then(|()| fs::rename(&unfinished, self.path(queued.sequence)))
            .inspect_err(|_| {
                // Removing the unfinished file frees space if the disk is full. If that fails as well, nothing else can
                // be done.
                let _ = fs::remove_file(&unfinished);
            })?;
        self.bytes += bytes;
        // The same sample part may already be in the spool, written by a call that timed out.
        if let Some(before) = self.files.insert(queued.sequence, bytes) {
            self.bytes -= before;
        }
        self.update_depth();
        Ok(())
    }

    /// Returns the oldest sample part. Drops unreadable parts, and parts of another VM of which this VM is a clone. A
    /// returned error may be temporary.
    pub(crate) fn oldest(&mut self) -> io::Result<Option<Queued>> {
        while let Some((&sequence, _)) = self.files.first_key_value() {
            let lost = match fs::read(self.path(sequence)) {
                Ok(body) => match sample_head(&body) {
                    Ok(head) if head.instance_id == self.instance_id => {
                        let part = Part {
                            id: part_id(&head.instance_id, &head.create_date, head.part),
                            body: body.into(),
                        };
                        return Ok(Some(Queued { sequence, part }));
                    }
                    Ok(_) => "of_another_vm",
                    Err(_) => "unreadable",
                },
                Err(error) if is_permanent(&error) => "unreadable",
                Err(error) => return Err(error),
            };
            warn!(
                file = file_name(sequence),
                reason = lost,
                "dropped a spooled sample"
            );
            dropped::note(lost, 1);
            self.remove(sequence);
        }
        Ok(None)
    }

    /// Removes a sample part, if the spool contains it.
    pub(crate) fn remove(&mut self, sequence: u64) {
        let Some(bytes) = self.files.remove(&sequence) else {
            return;
        };
        self.bytes -= bytes;
        if let Err(error) = fs::remove_file(self.path(sequence))
            && error.kind() != ErrorKind::NotFound
        {
            // If removing failed, the sample part is sent again after a restart, which is harmless.
            warn!(%error, "removing a file from the spool failed");
        }
        self.update_depth();
    }

    /// Keeps a copy of a sample part that NATS will never accept, for an administrator to examine.
    pub(crate) fn keep_refused(&mut self, part: &Part) -> io::Result<PathBuf> {
        self.refused.keep(part)
    }

    fn make_room(&mut self, needed: u64) {
        let mut dropped = 0;
        while self.bytes + needed > self.limit
            && let Some((&oldest, _)) = self.files.first_key_value()
        {
            self.remove(oldest);
            dropped += 1;
        }
        if dropped > 0 {
            warn!(
                dropped,
                limit = self.limit,
                "the spool is full; dropped the oldest samples"
            );
            dropped::note("spool_full", dropped);
        }
    }

    fn path(&self, sequence: u64) -> PathBuf {
        self.dir.join(file_name(sequence))
    }

    fn update_depth(&self) {
        let parts = self.files.len() as u64;
        self.waiting.store(parts, Ordering::Relaxed);
        gauge!("vmwatch_agent_spool_parts").set(float(parts));
        gauge!("vmwatch_agent_spool_bytes").set(float(self.bytes));
    }
}

fn on_disk(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(BLOCK)
}

/// File names contain the sequence number padded to 20 digits, so sorting them by name sorts them by number.
fn file_name(sequence: u64) -> String {
    format!("{sequence:020}{SUFFIX}")
}

fn parse_name(name: &str) -> Option<u64> {
    name.strip_suffix(SUFFIX)?.parse().ok()
}

/// Whether the file is lost, because it is missing or on a bad sector. Other errors (such as no free file descriptor)
/// may be temporary.
fn is_permanent(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

#[cfg(test)]
pub(crate) mod tests;
