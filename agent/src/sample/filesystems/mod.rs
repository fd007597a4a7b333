//! Samples the filesystems of the VM.
//!
//! A call to the kernel about a filesystem may never return, for example because its NFS server is dead. Each call therefore
//! runs on a thread of its own. A sample waits for these threads for a limited time; a filesystem that has not answered
//! by then has no row. It is called again only after the first call has returned, so that hanging calls do not add up.

mod mounts;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use metrics::counter;
use rustix::fs::statvfs;
use tracing::{info, warn};
use vmwatch_api::metrics::{FilesystemSample, MOUNT_POINT_BYTES, SAMPLE_FILESYSTEMS};

use self::mounts::ReportedMount;
use super::Roots;

/// Maximum number of calls that run or hang at the same time, each on a thread of its own.
const CALLS: usize = 8;
/// The last call is for local filesystems, so that network filesystems that hang do not prevent their rows.
const NETWORK_CALLS: usize = CALLS - 1;
/// Size of the stack of such a thread. The call needs a few KiB.
const STACK_BYTES: usize = 128 << 10;

/// The size of a filesystem and the space in use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Space {
    used: u64,
    total: u64,
}

/// Asks the kernel for the space of the filesystem that contains a path.
type Measure = dyn Fn(&Path) -> io::Result<Space> + Send + Sync;

/// The answer to a call.
struct Answer {
    mount_point: PathBuf,
    space: io::Result<Space>,
}

/// A call that has not returned yet.
#[derive(Debug)]
struct Call {
    /// Whether the call has exceeded the time limit of a sample. This was logged.
    hangs: bool,
}

/// Samples the filesystems.
pub struct FilesystemSampler {
    /// The list of mounts.
    list: PathBuf,
    /// The folder below which the mount points of the list are.
    root: PathBuf,
    measure: Arc<Measure>,
    calls: HashMap<PathBuf, Call>,
    sender: Sender<Answer>,
    answers: Receiver<Answer>,
    /// What was logged and has not ended yet.
    logged: HashSet<Problem>,
}

/// Why filesystems have no rows. Each is logged once until it ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Problem {
    /// The list of mounts cannot be read.
    List,
    /// There are more filesystems than a sample may have.
    TooMany,
    /// The mount point is too long.
    TooLong,
    /// In a row, the mount point would equal that of another filesystem.
    SameName,
    /// The kernel refused to answer about this filesystem.
    Unreadable(PathBuf),
}

impl FilesystemSampler {
    pub(super) fn new(roots: &Roots) -> Self {
        // If the agent can read the root folder of the VM's first process, it reads the mounts of that process, because
        // those of the agent itself may be those of a container.
        let process = if roots.root.starts_with(&roots.proc) {
            "1"
        } else {
            "self"
        };
        Self::with_measure(
            roots.proc.join(process).join("mountinfo"),
            roots.root.clone(),
            Arc::new(space),
        )
    }

    fn with_measure(list: PathBuf, root: PathBuf, measure: Arc<Measure>) -> Self {
        let (sender, answers) = mpsc::channel();
        Self {
            list,
            root,
            measure,
            calls: HashMap::new(),
            sender,
            answers,
            logged: HashSet::new(),
        }
    }

    /// Samples the filesystems, at most [`SAMPLE_FILESYSTEMS`]. Waits at most as long as the limit for those that do not
    /// answer.
    pub fn read(&mut self, limit: Duration) -> Vec<FilesystemSample> {
        let deadline = Instant::now() + limit;
        while let Ok(late) = self.answers.try_recv() {
            self.returned(&late);
        }
        let mounts = match mounts::read(&self.list) {
            Ok(mounts) => self.reported(mounts),
            Err(error) => {
                if self.is_new(Problem::List) {
                    warn!(%error, list = %self.list.display(), "cannot read the list of mounts; filesystems have no rows");
                }
                return Vec::new();
            }
        };
        self.logged.remove(&Problem::List);
        self.forget(&mounts);
        let mut rows = self.measured(mounts, deadline);
        rows.sort_by(|one, other| one.mount_point.cmp(&other.mount_point));
        rows
    }

    /// The mounts that fit into a sample.
    fn reported(&mut self, mut mounts: Vec<ReportedMount>) -> Vec<ReportedMount> {
        let all = mounts.len();
        // In a row, bytes that are not UTF-8 are replaced by longer ones, which may also make names equal.
        mounts.retain(|mount| mount.mount_point.to_string_lossy().len() <= MOUNT_POINT_BYTES);
        let too_long = all - mounts.len();
        let mut names = HashSet::new();
        mounts.retain(|mount| names.insert(mount.mount_point.to_string_lossy().into_owned()));
        let same_name = all - too_long - mounts.len();
        let too_many = mounts.len().saturating_sub(SAMPLE_FILESYSTEMS);
        mounts.truncate(SAMPLE_FILESYSTEMS);
        for (problem, count, reason) in [
            (Problem::TooLong, too_long, "long_mount_point"),
            (Problem::SameName, same_name, "same_name"),
            (Problem::TooMany, too_many, "too_many"),
        ] {
            if count == 0 {
                self.logged.remove(&problem);
                continue;
            }
            skipped(reason, count);
            if self.is_new(problem) {
                warn!(
                    count,
                    reason, "a sample cannot hold some filesystems; they have no rows"
                );
            }
        }
        mounts
    }

    /// Calls the kernel about each filesystem that has no call hanging, and returns the rows of those that answer before
    /// the deadline.
    fn measured(&mut self, mounts: Vec<ReportedMount>, deadline: Instant) -> Vec<FilesystemSample> {
        let (hanging, ready): (Vec<_>, Vec<_>) = mounts
            .into_iter()
            .partition(|mount| self.calls.contains_key(&mount.mount_point));
        skipped("hangs", hanging.len());
        let mut waiting = VecDeque::from(ready);
        let mut running: HashMap<PathBuf, ReportedMount> = HashMap::new();
        let mut rows = Vec::new();
        loop {
            while waiting.front().is_some_and(|mount| self.has_call_for(mount)) {
                if let Some(mount) = waiting.pop_front()
                    && self.call(&mount)
                {
                    running.insert(mount.mount_point.clone(), mount);
                }
            }
            if running.is_empty() {
                break;
            }
            match self
                .answers
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(answer) => {
                    self.returned(&answer);
                    if let Some(mount) = running.remove(&answer.mount_point) {
                        rows.extend(self.row(&mount, answer.space));
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        skipped("hangs", running.len());
        skipped("not_asked", waiting.len());
        for mount_point in running.into_keys() {
            warn!(
                mount_point = %mount_point.display(),
                "a filesystem does not answer; it has no rows until it does"
            );
            self.calls.insert(mount_point, Call { hangs: true });
        }
        rows
    }

    fn has_call_for(&self, mount: &ReportedMount) -> bool {
        let most = if mount.is_network { NETWORK_CALLS } else { CALLS };
        self.calls.len() < most
    }

    /// Starts a call about a filesystem. Returns false if there is no thread for it.
    fn call(&mut self, mount: &ReportedMount) -> bool {
        let (measure, sender) = (Arc::clone(&self.measure), self.sender.clone());
        let mount_point = mount.mount_point.clone();
        let below_root = mount_point.strip_prefix("/").unwrap_or(&mount_point);
        let path = self.root.join(below_root);
        let call = move || {
            let space = measure(&path);
            // Nobody waits any more if the agent ends.
            let _ = sender.send(Answer { mount_point, space });
        };
        let thread = thread::Builder::new().name("filesystem".to_owned());
        match thread.stack_size(STACK_BYTES).spawn(call) {
            Ok(_) => {
                self.calls
                    .insert(mount.mount_point.clone(), Call { hangs: false });
                true
            }
            Err(error) => {
                warn!(%error, mount_point = %mount.mount_point.display(), "starting a thread for a filesystem failed; it has no row");
                skipped("no_thread", 1);
                false
            }
        }
    }

    /// Notes that a call has returned.
    fn returned(&mut self, answer: &Answer) {
        let call = self.calls.remove(&answer.mount_point);
        if call.is_some_and(|call| call.hangs) {
            info!(mount_point = %answer.mount_point.display(), "a filesystem answers again");
        }
    }

    /// The row of a filesystem; `None` if the kernel refused the call, or if the filesystem has no size.
    fn row(&mut self, mount: &ReportedMount, space: io::Result<Space>) -> Option<FilesystemSample> {
        let problem = Problem::Unreadable(mount.mount_point.clone());
        let space = match space {
            Ok(space) => space,
            Err(error) => {
                skipped("unreadable", 1);
                if self.is_new(problem) {
                    warn!(
                        %error, mount_point = %mount.mount_point.display(),
                        "the space of a filesystem cannot be read; it has no rows"
                    );
                }
                return None;
            }
        };
        self.logged.remove(&problem);
        (space.total > 0).then(|| FilesystemSample {
            mount_point: mount.mount_point.to_string_lossy().into_owned(),
            filesystem: mount.filesystem.clone(),
            used_bytes: space.used,
            total_bytes: space.total,
        })
    }

    /// Forgets problems of filesystems that are not mounted any more.
    fn forget(&mut self, mounts: &[ReportedMount]) {
        let mounted: HashSet<&Path> = mounts.iter().map(|mount| &*mount.mount_point).collect();
        self.logged.retain(|problem| match problem {
            Problem::Unreadable(mount_point) => mounted.contains(&**mount_point),
            _ => true,
        });
    }

    /// Whether the problem was not logged yet.
    fn is_new(&mut self, problem: Problem) -> bool {
        self.logged.insert(problem)
    }
}

impl std::fmt::Debug for FilesystemSampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut sampler = f.debug_struct("FilesystemSampler");
        sampler.field("list", &self.list).field("calls", &self.calls);
        sampler.finish_non_exhaustive()
    }
}

fn space(path: &Path) -> io::Result<Space> {
    let found = statvfs(path)?;
    let used = found.f_blocks.saturating_sub(found.f_bfree);
    Ok(Space {
        used: used.saturating_mul(found.f_frsize),
        total: found.f_blocks.saturating_mul(found.f_frsize),
    })
}

/// Counts filesystems that have no row in a sample.
fn skipped(reason: &'static str, count: usize) {
    if count > 0 {
        counter!("vmwatch_agent_filesystems_skipped_total", "reason" => reason).increment(count as u64);
    }
}
