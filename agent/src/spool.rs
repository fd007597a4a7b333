//! Parts of samples that wait on disk, oldest first.
//!
//! **What is guaranteed.** A part is either acknowledged by the stream or in the spool 250 ms after it was sampled
//! (`ship::GRACE`), and at once where the bus is away or others wait already. From then on neither a `kill -9` of the
//! agent nor a restart loses or reorders it; it leaves the spool only when it is acknowledged, or when the spool is
//! full and it is the oldest: then it is dropped, counted and logged. In those first 250 ms a `kill -9` loses the one
//! sample that was just taken, just as it would have a moment before; in return an agent whose bus is there writes
//! nothing to the guest's disk.
//!
//! **What is not.** Files are not synced: after a power loss or a crash of the guest's kernel, what was written in
//! the last half minute or so (the kernel's write-back delay) may be missing or cut off. What is cut off is
//! recognised, skipped and counted. While the disk hangs or is full, parts wait in memory, bounded and counted alike.
//! A part may be sent twice (acknowledged, but killed before its file was removed): the rows' own ids make that harmless.
//!
//! **How.** One file a part, `<sequence>.json`, its content the message's body: written under another name
//! and renamed, so that a file of that name is whole. A locked file keeps a second agent out.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use metrics::gauge;
use serde::Deserialize;
use shared::{api::InstanceId, time::CreateDate};
use tracing::{info, warn};

use crate::{
    config::{SPOOL_DIR, SpoolSettings},
    dropped,
    parts::{Part, part_id},
    sample::float,
};

const LOCK: &str = "lock";
/// What is being written; a crash leaves it behind.
const UNFINISHED: &str = "unfinished";
/// File systems give whole blocks, mostly of this size: a small part takes one all the same.
const BLOCK: u64 = 4096;

/// The spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The folder cannot be made, read or written.
    #[error("{}: {} cannot be used: {source}; give the agent a folder that it may write", SPOOL_DIR.name, dir.display())]
    Dir {
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent uses it.
    #[error("{}: another agent uses {}; stop it, or give this one a folder of its own", SPOOL_DIR.name, dir.display())]
    Taken {
        /// The folder.
        dir: PathBuf,
    },
}

/// A part and its place in the order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) sequence: u64,
    pub(crate) part: Part,
}

/// The spool. Its calls block on the disk.
#[derive(Debug)]
pub(crate) struct Spool {
    dir: PathBuf,
    limit: u64,
    instance_id: InstanceId,
    /// The parts, and what each takes on disk.
    files: BTreeMap<u64, u64>,
    bytes: u64,
    /// How many files there are; readable while the disk hangs.
    waiting: Arc<AtomicU64>,
    /// Held as long as the spool lives.
    _lock: File,
}

/// What identifies a part. Reading it checks the whole of the JSON.
#[derive(Deserialize)]
struct Head {
    instance_id: InstanceId,
    create_date: CreateDate,
    part: u32,
}

impl Spool {
    /// Opens the folder, makes it where it is missing, and takes up what an earlier agent left.
    pub(crate) fn open(settings: &SpoolSettings, instance_id: InstanceId) -> Result<Self, SpoolError> {
        let dir = settings.dir.clone();
        let unusable = |source| SpoolError::Dir {
            dir: dir.clone(),
            source,
        };
        // What runs on this VM is its owner's affair only.
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(unusable)?;
        let lock = File::create(dir.join(LOCK)).map_err(unusable)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => SpoolError::Taken { dir: dir.clone() },
            TryLockError::Error(source) => unusable(source),
        })?;
        if dir.join(UNFINISHED).exists() {
            fs::remove_file(dir.join(UNFINISHED)).map_err(unusable)?;
            warn!("the last part that was being spooled is half-written and was skipped");
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
            _lock: lock,
        };
        spool.make_room(0);
        spool.tell_depth();
        if !spool.files.is_empty() {
            info!(parts = spool.files.len(), "parts from before wait to be sent");
        }
        Ok(spool)
    }

    /// How many parts wait.
    pub(crate) fn waiting(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.waiting)
    }

    /// The sequence number that comes after all that wait.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.files.last_key_value().map_or(0, |(last, _)| last + 1)
    }

    /// Writes a part, dropping the oldest where it would not fit.
    pub(crate) fn push(&mut self, queued: &Queued) -> io::Result<()> {
        let bytes = on_disk(queued.part.body.len() as u64);
        self.make_room(bytes);
        let unfinished = self.dir.join(UNFINISHED);
        fs::write(&unfinished, &queued.part.body)
            .and_then(|()| fs::rename(&unfinished, self.path(queued.sequence)))
            .inspect_err(|_| {
                // Where the disk is full this frees what was written; where it is broken nothing helps.
                let _ = fs::remove_file(&unfinished);
            })?;
        self.bytes += bytes;
        // It may be there already: written by a call that was given up on.
        if let Some(before) = self.files.insert(queued.sequence, bytes) {
            self.bytes -= before;
        }
        self.tell_depth();
        Ok(())
    }

    /// The oldest part. What is unreadable or of another VM (this one was cloned) is dropped on the way; an error is
    /// one that may pass.
    pub(crate) fn oldest(&mut self) -> io::Result<Option<Queued>> {
        while let Some((&sequence, _)) = self.files.first_key_value() {
            let lost = match fs::read(self.path(sequence)) {
                Ok(body) => match serde_json::from_slice::<Head>(&body) {
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
                Err(error) if is_lasting(&error) => "unreadable",
                Err(error) => return Err(error),
            };
            warn!(
                file = file_name(sequence),
                reason = lost,
                "a spooled part was dropped"
            );
            dropped::note(lost, 1);
            self.remove(sequence);
        }
        Ok(None)
    }

    /// Removes a part, if it is there.
    pub(crate) fn remove(&mut self, sequence: u64) {
        let Some(bytes) = self.files.remove(&sequence) else {
            return;
        };
        self.bytes -= bytes;
        if let Err(error) = fs::remove_file(self.path(sequence))
            && error.kind() != ErrorKind::NotFound
        {
            // It is sent again after a restart, which is harmless.
            warn!(%error, "a spooled part could not be removed");
        }
        self.tell_depth();
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
                "the spool is full: its oldest parts were dropped"
            );
            dropped::note("spool_full", dropped);
        }
    }

    fn path(&self, sequence: u64) -> PathBuf {
        self.dir.join(file_name(sequence))
    }

    fn tell_depth(&self) {
        let parts = self.files.len() as u64;
        self.waiting.store(parts, Ordering::Relaxed);
        gauge!("vmwatch_agent_spool_parts").set(float(parts));
        gauge!("vmwatch_agent_spool_bytes").set(float(self.bytes));
    }
}

fn on_disk(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(BLOCK)
}

/// Twenty digits hold every sequence number, so that the names sort as the numbers do.
fn file_name(sequence: u64) -> String {
    format!("{sequence:020}.json")
}

fn parse_name(name: &str) -> Option<u64> {
    name.strip_suffix(".json")?.parse().ok()
}

/// Whether the file is lost for good: gone, or on a bad sector. Anything else (no file descriptor free) may pass.
fn is_lasting(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

#[cfg(test)]
mod tests;
