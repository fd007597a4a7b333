//! Compares the rows that the agent samples from real processes with the kernel's own counters.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use agent::{
    Selection,
    sample::{Roots, Sampler},
};
use testkit::{PATIENCE, eventually};
use vmwatch_api::metrics::{ProcessSample, Sample};

/// A child process that is killed when the value is dropped.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(
            command
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }

    fn file(&self, name: &str) -> Vec<u8> {
        fs::read(format!("/proc/{}/{name}", self.0.id())).unwrap()
    }

    /// Returns a field of `/proc/<pid>/stat`, numbered as in proc(5).
    fn stat(&self, number: usize) -> u64 {
        let stat = String::from_utf8_lossy(&self.file("stat")).into_owned();
        let after_name = stat.rsplit_once(')').unwrap().1;
        after_name
            .split_whitespace()
            .nth(number - 3)
            .unwrap()
            .parse()
            .unwrap()
    }

    fn cpu_seconds(&self) -> f64 {
        // A clock tick is 10 ms on all supported systems (`getconf CLK_TCK`).
        f64::from(u32::try_from(self.stat(14) + self.stat(15)).unwrap()) / 100.0
    }

    /// Reads the value of `key` from a `/proc/<pid>` file whose lines are `key: value`.
    fn number_in(&self, file: &str, key: &str) -> f64 {
        number_in(&String::from_utf8_lossy(&self.file(file)), key)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Killing fails only if the process has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn number_in(text: &str, key: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn system_number(file: &str, key: &str) -> f64 {
    number_in(&fs::read_to_string(format!("/proc/{file}")).unwrap(), key)
}

fn sampler() -> Sampler {
    let mut sampler = Sampler::new(
        "vm-1".parse().unwrap(),
        "+08:00".parse().unwrap(),
        Selection::All,
        Roots::default(),
    )
    .unwrap();
    sampler.sample().unwrap();
    sampler
}

fn rows_of(sample: &Sample, pid: u32) -> Vec<&ProcessSample> {
    sample.processes.iter().filter(|row| row.pid == pid).collect()
}

fn user_name(id: u32) -> String {
    let output = Command::new("id")
        .args(["-nu", &id.to_string()])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn unix_now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

/// A counter's value and the time of reading it, once before and once after a sample.
struct Around {
    before: (f64, Instant),
    after: (f64, Instant),
}

impl Around {
    fn reading<T>(counter: impl Fn() -> f64, read: impl FnOnce() -> T) -> (Self, T) {
        let before = (counter(), Instant::now());
        let value = read();
        let after = (counter(), Instant::now());
        (Self { before, after }, value)
    }

    /// Returns the lowest and highest rate that a correct sampler can report for the time between two samples.
    fn rate_until(&self, next: &Self) -> (f64, f64) {
        let shortest = (next.before.1 - self.after.1).as_secs_f64();
        let longest = (next.after.1 - self.before.1).as_secs_f64();
        let rate = |change: f64, time: f64| change.max(0.0) / time;
        (
            rate(next.before.0 - self.after.0, longest),
            rate(next.after.0 - self.before.0, shortest),
        )
    }
}

fn assert_within(what: &str, value: f64, (least, most): (f64, f64)) {
    // Rows are rounded to one decimal.
    assert!(
        (least - 0.051..=most + 0.051).contains(&value),
        "{what}: {value} is not within {least} and {most}"
    );
    assert!(least > 0.0, "{what}: the counter must have increased");
}

const BUSY: &str = "
import os, sys
held = b'x' * 100_000_000
with open(sys.argv[1], 'wb') as file:
    while True:
        file.seek(0)
        file.write(held[:1_000_000])
        os.fsync(file.fileno())
        for _ in range(100_000): pass
";

#[tokio::test]
async fn row_of_a_busy_process_matches_the_kernels_counters() {
    // The folder is in cargo's target folder and not in `/tmp`, which may be a tmpfs: writes to a tmpfs do not reach a
    // disk.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let busy = Running::start(
        Command::new("python3")
            .args(["-c", BUSY])
            .arg(folder.path().join("file")),
    );
    let pid = busy.0.id();
    let works_until = async |seconds: f64| {
        eventually(
            "the process uses CPU time and writes to disk",
            PATIENCE,
            async || {
                let done = (busy.cpu_seconds(), busy.number_in("io", "write_bytes"));
                (done.0 > seconds && done.1 > 1e6)
                    .then_some(())
                    .ok_or(format!("{done:?}"))
            },
        )
        .await;
    };
    let cpu = || 100.0 * busy.cpu_seconds();
    let written = || busy.number_in("io", "write_bytes:") / 1024.0;

    works_until(0.2).await;
    let mut sampler = sampler();
    let (writes, (uses, _)) = Around::reading(written, || Around::reading(cpu, || sampler.sample().unwrap()));
    works_until(busy.cpu_seconds() + 0.5).await;
    let mut memory = 0.0;
    let (next_writes, (next_uses, sample)) = Around::reading(written, || {
        memory = 100.0 * busy.number_in("status", "VmRSS:") / system_number("meminfo", "MemTotal:");
        Around::reading(cpu, || sampler.sample().unwrap())
    });

    let rows = rows_of(&sample, pid);
    assert_eq!(rows.len(), 1);
    let row = rows[0];
    assert_within("cpu_util", row.cpu_util, uses.rate_until(&next_uses));
    assert_within("disk_write", row.disk_write, writes.rate_until(&next_writes));
    assert!((row.mem - memory).abs() < 0.11, "{} and {memory}", row.mem);
    assert_eq!(row.cmd.as_bytes(), busy.file("comm").trim_ascii_end());
    assert_eq!(row.shutdown_time, None);
    let vm = sample.vm.unwrap();
    let cpu = vm.cpu_util.unwrap();
    assert!(cpu > 0.0 && cpu <= 100.0, "{vm:?}");
    assert!(vm.proc.unwrap() as usize >= sample.processes.len() / 2, "{vm:?}");
    assert_eq!(vm.restricted, None);
}

#[test]
fn start_time_of_a_process_row_matches_the_kernel_and_ps() {
    let sleeper = Running::start(Command::new("sleep").arg("600"));
    let pid = sleeper.0.id();
    let mut sampler = sampler();
    let first = rows_of(&sampler.sample().unwrap(), pid)[0].running_time;
    let again = rows_of(&sampler.sample().unwrap(), pid)[0].running_time;
    assert!(first.to_bits() == again.to_bits(), "{first} and {again}");

    let ticks = u32::try_from(sleeper.stat(22)).unwrap();
    let boot = system_number("stat", "btime");
    assert!(
        (first - (boot + f64::from(ticks) / 100.0)).abs() < 0.006,
        "{first}"
    );
    assert!((first - unix_now()).abs() < 10.0, "{first}");

    let ps = Command::new("sh")
        .args([
            "-c",
            &format!("date -d \"$(TZ=UTC LC_ALL=C ps -o lstart= -p {pid}) UTC\" +%s"),
        ])
        .output()
        .unwrap();
    let ps: f64 = String::from_utf8(ps.stdout).unwrap().trim().parse().unwrap();
    // The agent and `ps` both round the boot time to seconds, but differently.
    assert!((first - ps).abs() < 2.0, "{first} and {ps}");
}

#[test]
fn ended_process_gets_exactly_one_final_row() {
    let mut ended = Running::start(Command::new("sh").args(["-c", "while :; do :; done"]));
    let pid = ended.0.id();
    let mut sampler = sampler();
    let running = rows_of(&sampler.sample().unwrap(), pid)[0].running_time;

    let before = unix_now();
    ended.0.kill().unwrap();
    // A zombie process has ended although it is not reaped yet.
    let until_zombie = Instant::now() + PATIENCE;
    while !String::from_utf8_lossy(&ended.file("stat")).contains(") Z ") {
        assert!(Instant::now() < until_zombie);
        std::thread::sleep(Duration::from_millis(1));
    }
    let sample = sampler.sample().unwrap();
    let after = unix_now();
    let rows = rows_of(&sample, pid);
    assert_eq!(rows.len(), 1, "{rows:?}");
    let shutdown = rows[0].shutdown_time.unwrap();
    assert!(
        before <= shutdown && shutdown <= after,
        "{before} {shutdown} {after}"
    );
    assert!(rows[0].running_time.to_bits() == running.to_bits());

    assert!(rows_of(&sampler.sample().unwrap(), pid).is_empty());
    ended.0.wait().unwrap();
    assert!(rows_of(&sampler.sample().unwrap(), pid).is_empty());
}

#[test]
fn process_names_of_arbitrary_bytes_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        &b"a) S 1 (b"[..],
        br"back\slash",
        b"two\nlines",
        b"systemd-journald",
        b"latin-1 \xe9\xff",
        "很长的进程名字".as_bytes(),
    ] {
        let program = folder.path().join(OsStr::from_bytes(name));
        fs::copy("/bin/sleep", &program).unwrap();
        let sleeper = Running::start(Command::new(&program).arg("600"));
        let sample = sampler().sample().unwrap();
        let rows = rows_of(&sample, sleeper.0.id());
        let comm = sleeper.file("comm");
        let kept = comm.strip_suffix(b"\n").unwrap();
        assert_eq!(kept, &name[..name.len().min(15)]);
        // The kernel truncates long names, and the agent completes them from the name of the program.
        assert_eq!(rows[0].cmd, String::from_utf8_lossy(name));
        let owner = &rows[0].owner;
        assert_eq!(owner.parent_pid, Some(std::process::id()));
        let user = fs::metadata(format!("/proc/{}", sleeper.0.id())).unwrap().uid();
        assert_eq!(owner.user.as_ref(), Some(&user_name(user)));
    }
}
