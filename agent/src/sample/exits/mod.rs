//! Listens to the kernel's records of ended processes (taskstats), so that the CPU time of processes that end between
//! two samples is known.
//!
//! A thread receives the records and keeps them in a bounded queue until the next sample. In a storm of short processes
//! the queue keeps the largest of them one by one, and adds up the others by name, user and parent.

mod netlink;
mod taskstats;

use std::{
    collections::HashMap,
    io, mem,
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use metrics::counter;
use tracing::warn;

pub(super) use self::{netlink::Unavailable, taskstats::Exit};
use self::{
    netlink::{Buffer, Received, Socket},
    taskstats::Composer,
};

/// Maximum number of processes that the queue keeps one by one if they started after the previous sample. When there are
/// more, the half with less CPU time is added up.
const MAX_YOUNG: usize = 8192;
/// Maximum number of other processes in the queue.
const MAX_OLD: usize = 16_384;
/// Number of different groups of processes that were added up, after which new groups have no parent. At twice this number,
/// there are no new groups.
const MAX_GROUPS: usize = 4096;
/// Maximum number of ended processes whose parents are remembered.
const MAX_PARENTS: usize = 65_536;
/// Maximum number of records that are received at once. The kernel's buffer holds fewer.
const MAX_DRAINED: usize = 16_384;
/// Pause between two batches of records, during which the kernel buffers further ones. Its buffer is sufficient for 700,000
/// records per second.
const PAUSE: Duration = Duration::from_millis(10);

/// Processes of the same name, user and parent that were added up.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Group {
    pub(super) processes: u32,
    pub(super) cpu_seconds: f64,
    /// Sum of [`missing`].
    pub(super) missing: f64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
}

/// Name, number of the user, and parent.
pub(super) type GroupKey = (String, u32, u32);

/// The processes that ended between two samples.
#[derive(Debug, Default)]
pub(super) struct Exits {
    pub(super) processes: Vec<Exit>,
    pub(super) groups: HashMap<GroupKey, Group>,
    /// The parents of ended processes.
    pub(super) parents: HashMap<u32, u32>,
    /// Number of times that records were dropped by the kernel or by the queue.
    pub(super) lost: u32,
}

/// At most how many seconds of CPU time the record of a process can lack: those since the last clock tick, and those that
/// the kernel needs to release the process.
pub(super) fn missing(cpu_seconds: f64, elapsed: Duration) -> f64 {
    (elapsed.as_secs_f64() - cpu_seconds).clamp(0.0005, 0.01)
}

/// A queue of ended processes.
#[derive(Debug)]
struct Queue {
    old: Vec<Exit>,
    young: Vec<Exit>,
    since: Instant,
    rest: Exits,
}

impl Queue {
    fn new() -> Self {
        Self {
            old: Vec::new(),
            young: Vec::new(),
            since: Instant::now(),
            rest: Exits::default(),
        }
    }

    fn push(&mut self, exit: Exit) {
        if self.rest.parents.len() < MAX_PARENTS {
            self.rest.parents.insert(exit.pid, exit.parent_pid);
        }
        // A process that started before the previous sample may be known from it.
        if exit.started_before(self.since) {
            if self.old.len() < MAX_OLD {
                self.old.push(exit);
            } else {
                self.rest.lose();
            }
            return;
        }
        self.young.push(exit);
        if self.young.len() >= MAX_YOUNG {
            let by_cpu = |one: &Exit, other: &Exit| other.cpu_seconds.total_cmp(&one.cpu_seconds);
            self.young.select_nth_unstable_by(MAX_YOUNG / 2, by_cpu);
            for exit in self.young.split_off(MAX_YOUNG / 2) {
                self.rest.add_up(exit);
            }
        }
    }

    fn take(&mut self) -> Exits {
        self.since = Instant::now();
        let mut exits = mem::take(&mut self.rest);
        exits.processes = mem::take(&mut self.old);
        exits.processes.append(&mut self.young);
        exits
    }
}

impl Exits {
    /// Counts a process whose record was lost.
    fn lose(&mut self) {
        self.lost = self.lost.saturating_add(1);
        counter!("vmwatch_agent_exit_records_lost_total").increment(1);
    }

    /// Adds a process to the group of its name, user and parent. If there are too many groups, its parent counts as unknown.
    pub(super) fn add_up(&mut self, exit: Exit) {
        let mut key = (exit.name, exit.user, exit.parent_pid);
        if self.groups.len() >= MAX_GROUPS && !self.groups.contains_key(&key) {
            key.2 = 0;
        }
        if self.groups.len() >= 2 * MAX_GROUPS && !self.groups.contains_key(&key) {
            self.lose();
            return;
        }
        let group = self.groups.entry(key).or_default();
        group.processes = group.processes.saturating_add(1);
        group.cpu_seconds += exit.cpu_seconds;
        group.missing += missing(exit.cpu_seconds, exit.elapsed);
        group.read_bytes = group.read_bytes.saturating_add(exit.read_bytes);
        group.written_bytes = group.written_bytes.saturating_add(exit.written_bytes);
    }
}

/// Receives the kernel's records until it is dropped.
#[derive(Debug)]
pub(super) struct ExitListener {
    socket: Arc<Socket>,
    intake: Arc<Mutex<Intake>>,
}

impl ExitListener {
    /// Registers with the kernel and starts the thread that receives the records.
    pub(super) fn start() -> Result<Self, Unavailable> {
        let socket = Arc::new(Socket::open()?);
        let intake = Arc::new(Mutex::new(Intake::new()));
        let (shared, weak) = (Arc::clone(&socket), Arc::downgrade(&intake));
        thread::Builder::new()
            .name("exits".to_owned())
            .spawn(move || listen(&shared, &weak))
            .map_err(|error| Unavailable::Call("starting a thread", error))?;
        Ok(Self { socket, intake })
    }

    /// Takes the processes that ended since the previous call.
    pub(super) fn take(&self) -> Exits {
        let mut intake = self.intake.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread reports the error when it receives the next record.
        let _ = intake.drain(&self.socket);
        intake.queue.take()
    }

    /// Whether the thread still receives records.
    pub(super) fn is_running(&self) -> bool {
        Arc::weak_count(&self.intake) > 0
    }
}

/// Receives records until the listener is dropped or the socket fails. Between two batches of records it pauses, because each
/// wake-up costs more CPU time than a record.
fn listen(socket: &Socket, intake: &Weak<Mutex<Intake>>) {
    let mut buffer = Buffer::new();
    loop {
        let first = socket.wait(&mut buffer);
        let Some(intake) = intake.upgrade() else { return };
        let mut lock = intake.lock().unwrap_or_else(PoisonError::into_inner);
        let drained = first.and_then(|received| {
            lock.add(received, Moment::now());
            lock.drain(socket)
        });
        if let Err(error) = drained {
            warn!(%error, "receiving records of ended processes failed; their CPU time is estimated from now on");
            return;
        }
        drop(lock);
        drop(intake);
        thread::sleep(PAUSE);
    }
}

/// Time at which records were received.
#[derive(Debug, Clone, Copy)]
struct Moment {
    at: Instant,
    /// The same in Unix seconds.
    unix: f64,
}

impl Moment {
    fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            at: Instant::now(),
            unix: unix.unwrap_or_default().as_secs_f64(),
        }
    }
}

/// Composes the records of threads, and queues the processes that ended.
#[derive(Debug)]
struct Intake {
    queue: Queue,
    composer: Composer,
    buffer: Buffer,
}

impl Intake {
    fn new() -> Self {
        Self {
            queue: Queue::new(),
            composer: Composer::default(),
            buffer: Buffer::new(),
        }
    }

    /// Adds the records that the kernel's buffer holds, at most [`MAX_DRAINED`].
    fn drain(&mut self, socket: &Socket) -> io::Result<()> {
        let now = Moment::now();
        for _ in 0..MAX_DRAINED {
            let received = socket.receive(&mut self.buffer)?;
            if !self.add(received, now) {
                break;
            }
        }
        Ok(())
    }

    /// Adds a received record, or counts a lost one. Returns `false` if nothing was received.
    fn add(&mut self, received: Received, now: Moment) -> bool {
        match received {
            Received::Nothing => return false,
            Received::Lost => lost(&mut self.queue, "the kernel dropped records of ended processes"),
            Received::Record(Ok(record)) => {
                if let Some(exit) = self.composer.add(record, now.at, now.unix) {
                    self.queue.push(exit);
                }
            }
            Received::Record(Err(error)) => lost(&mut self.queue, &error.to_string()),
        }
        true
    }
}

/// Counts a record that the kernel dropped or that cannot be read. Logs it unless a loss was already counted since the
/// previous sample.
fn lost(queue: &mut Queue, reason: &str) {
    if queue.rest.lost == 0 {
        warn!(
            reason,
            "records of ended processes were lost; a part of their CPU time is estimated"
        );
    }
    queue.rest.lose();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(pid: u32, cpu_seconds: f64, elapsed: f64) -> Exit {
        Exit {
            pid,
            name: "sh".to_owned(),
            parent_pid: 1,
            cpu_seconds,
            elapsed: Duration::from_secs_f64(elapsed),
            user: 0,
            code: 0,
            at: Instant::now(),
            ended: 1_482_236_600.0,
            read_bytes: 0,
            written_bytes: 0,
        }
    }

    #[test]
    fn queue_keeps_the_largest_of_a_storm_and_adds_up_the_rest() {
        let mut queue = Queue::new();
        queue.since = Instant::now().checked_sub(Duration::from_mins(1)).unwrap();
        let many = u32::try_from(3 * MAX_YOUNG).unwrap();
        for pid in 0..many {
            queue.push(exit(pid, f64::from(pid % 1000) / 1024.0, 1.0));
        }
        // A process that was there at the previous sample must stay, however little CPU time it used.
        queue.push(exit(7, 0.0, 600.0));
        let taken = queue.take();
        assert!(taken.processes.len() <= MAX_YOUNG && taken.lost == 0);
        assert!(
            taken
                .processes
                .iter()
                .any(|exit| exit.elapsed > Duration::from_mins(1))
        );
        let group = &taken.groups[&("sh".to_owned(), 0, 1)];
        let count = u32::try_from(taken.processes.len()).unwrap() + group.processes;
        assert_eq!(count, many + 1);
        let sum: f64 = taken.processes.iter().map(|exit| exit.cpu_seconds).sum();
        let expected: f64 = (0..many).map(|pid| f64::from(pid % 1000) / 1024.0).sum();
        assert!((sum + group.cpu_seconds - expected).abs() < 1e-6);
        let smallest = taken
            .processes
            .iter()
            .filter(|exit| exit.elapsed < Duration::from_mins(1));
        assert!(smallest.map(|exit| exit.cpu_seconds).fold(1.0, f64::min) > 0.3);
        assert!(queue.take().processes.is_empty());
    }

    #[test]
    fn groups_beyond_the_bound_have_no_parent() {
        let mut exits = Exits::default();
        for parent_pid in 1..=u32::try_from(MAX_GROUPS).unwrap() + 10 {
            exits.add_up(Exit {
                parent_pid,
                ..exit(7, 1.0, 1.0)
            });
        }
        assert_eq!((exits.groups.len(), exits.lost), (MAX_GROUPS + 1, 0));
        assert_eq!(exits.groups[&("sh".to_owned(), 0, 0)].processes, 10);
    }

    #[test]
    fn processes_beyond_the_bound_of_the_queue_are_counted() {
        let mut queue = Queue::new();
        for pid in 0..u32::try_from(MAX_OLD).unwrap() + 5 {
            queue.push(exit(pid, 0.0, 600.0));
        }
        let taken = queue.take();
        assert_eq!((taken.processes.len(), taken.lost), (MAX_OLD, 5));
    }
}
