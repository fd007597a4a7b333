//! Compares the CPU time in the rows that the agent samples with the kernel's own counters, for processes that live
//! shorter than the time between two samples.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic fails the test"
)]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use agent::{
    Selection,
    sample::{ProcessReading, Roots, Sampler},
};
use testkit::figure;
use vmwatch_api::metrics::ShortLived;

/// A storm of shells that live some milliseconds each.
const STORM: &str = "while :; do sh -c : ; done";
const BURNER: &str = "while :; do :; done";
/// Compiles a small program again and again.
const COMPILE: &str = "while :; do cc -O0 -c small.c -o $$.o; done";
/// Time between two samples, in seconds.
const INTERVAL: &str = "3";
/// Number of samples after the first one, which only reads the counters.
const SAMPLES: usize = 2;
/// Two rows with the same pid are of one process if it started within this time in seconds. The start in a record is
/// computed from its arrival.
const SAME_START: f64 = 1.0;

/// A shell script that runs until it is dropped, but at most for this time in seconds.
struct Workload(Child);

impl Workload {
    fn start(seconds: &str, script: &str, folder: &Path) -> Self {
        let child = Command::new("timeout")
            .args([seconds, "sh", "-c", script])
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // `timeout` passes SIGTERM on to the shell.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// CPU time of the VM in seconds, without the time of interrupts.
fn kernel_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap();
    let ticks = stat.split_whitespace().skip(1).take(3);
    ticks.map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
}

fn sampler() -> Sampler {
    let offset = "+00:00".parse().unwrap();
    Sampler::new("vm-1".parse().unwrap(), offset, Selection::All, Roots::default()).unwrap()
}

/// Number of processes and threads that were started since the VM booted.
fn started() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap();
    let line = stat.lines().find_map(|line| line.strip_prefix("processes "));
    line.unwrap().parse().unwrap()
}

/// When a workload runs.
enum Runs {
    /// From before the first sample, for this time in seconds.
    From(&'static str),
    /// It starts after each sample, and ends before the next one.
    Within,
}

/// The samples of a workload, without the first one.
struct Measured {
    readings: Vec<ProcessReading>,
    method: ShortLived,
    /// CPU seconds of all rows, divided by those of the kernel.
    share: f64,
    /// The same with the seconds that the agent left out because they exceeded those of the VM.
    unlimited_share: f64,
    /// Number of processes in the first sample, and of those that were started since then.
    processes: u64,
}

/// Takes the samples of a workload with the kernel's records, and without them.
fn run(name: &str, scripts: &[&str], runs: &Runs) -> [Measured; 2] {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("small.c"), "int answer(void) { return 42; }\n").unwrap();
    let launch = |seconds| -> Vec<Workload> {
        let start = |script: &&str| Workload::start(seconds, script, folder.path());
        scripts.iter().map(start).collect()
    };
    let running = match runs {
        Runs::From(seconds) => launch(seconds),
        Runs::Within => Vec::new(),
    };
    let mut samplers = [sampler().with_exit_records(200), sampler()];
    let started_before = started();
    let mut moments = samplers.each_mut().map(|sampler| vec![take(sampler)]);
    for _ in 0..SAMPLES {
        match runs {
            Runs::From(_) => assert!(Command::new("sleep").arg(INTERVAL).status().unwrap().success()),
            Runs::Within => {
                for mut workload in launch(INTERVAL) {
                    workload.0.wait().unwrap();
                }
            }
        }
        for (sampler, moments) in samplers.iter_mut().zip(&mut moments) {
            moments.push(take(sampler));
        }
    }
    drop(running);
    let newly_started = started() - started_before;
    moments.map(|moments| measured(name, moments, newly_started))
}

/// Samples the processes. Returns also the CPU time of the VM until then.
fn take(sampler: &mut Sampler) -> (f64, ProcessReading) {
    let memory_bytes = sampler.vm.read().unwrap().memory_bytes;
    (kernel_seconds(), sampler.processes.read(memory_bytes).unwrap())
}

fn measured(name: &str, moments: Vec<(f64, ProcessReading)>, newly_started: u64) -> Measured {
    let used = moments[SAMPLES].0 - moments[0].0;
    let mut readings: Vec<_> = moments.into_iter().map(|(_, reading)| reading).collect();
    let first = readings.remove(0);
    let seconds = |reading: &ProcessReading| {
        let rows = reading.rows.iter().filter_map(|row| row.cpu_seconds);
        let sums = reading.sums.iter().map(|sum| sum.cpu_seconds);
        rows.chain(sums).sum::<f64>()
    };
    let explained: f64 = readings.iter().map(seconds).sum();
    let excess: f64 = readings.iter().map(|reading| reading.excess_seconds).sum();
    let method = readings[0].short_lived.unwrap();
    let (share, unlimited_share) = (explained / used, (explained + excess) / used);
    figure(&format!("accounted_share_{name}_{}", method.as_str()), share);
    figure(
        &format!("accounted_share_{name}_{}_without_limit", method.as_str()),
        unlimited_share,
    );
    Measured {
        readings,
        method,
        share,
        unlimited_share,
        processes: first.rows.len() as u64 + newly_started,
    }
}

fn assert_explained(results: &[Measured; 2]) {
    let methods = results.each_ref().map(|result| result.method);
    assert_eq!(methods, [ShortLived::Recorded, ShortLived::Estimated]);
    for result in results {
        for share in [result.share, result.unlimited_share] {
            assert!(
                (0.95..=1.05).contains(&share),
                "{share} {:?}: {:#?}",
                result.method,
                busy(&result.readings)
            );
        }
        assert_no_process_twice(&result.readings);
        let ended = ended(&result.readings);
        assert!(
            ended <= result.processes,
            "{ended} processes ended, but there were {}",
            result.processes
        );
    }
}

/// The rows with some CPU time, by sample.
fn busy(readings: &[ProcessReading]) -> Vec<Vec<String>> {
    let of = |reading: &ProcessReading| {
        let rows = reading.rows.iter().filter(|row| row.cpu_seconds > Some(0.05));
        let rows = rows.map(|row| format!("{} {}: {:?} s", row.cmd, row.pid, row.cpu_seconds));
        let sums = reading.sums.iter();
        let sums = sums.map(|sum| format!("{} {:?}: {} s", sum.cmd, sum.processes, sum.cpu_seconds));
        rows.chain(sums).collect()
    };
    readings.iter().map(of).collect()
}

/// Number of ended processes in rows of their own and in summed rows.
fn ended(readings: &[ProcessReading]) -> u64 {
    let of = |reading: &ProcessReading| {
        let rows = reading.rows.iter().filter(|row| row.shutdown_time.is_some());
        let sums = reading.sums.iter().filter_map(|sum| sum.processes);
        rows.count() as u64 + sums.map(u64::from).sum::<u64>()
    };
    readings.iter().map(of).sum()
}

/// An ended process has no other row in its last sample, and none in later ones.
fn assert_no_process_twice(readings: &[ProcessReading]) {
    for (index, reading) in readings.iter().enumerate() {
        for (place, row) in reading.rows.iter().enumerate() {
            let is_same = |other: &&vmwatch_api::metrics::ProcessSample| {
                other.pid == row.pid && (other.running_time - row.running_time).abs() < SAME_START
            };
            let again = reading.rows.iter().skip(place + 1).find(is_same);
            assert_eq!(again, None, "the same process as {row:?}");
            if row.shutdown_time.is_some() {
                let mut later = readings.iter().skip(index + 1);
                let again = later.find_map(|later| later.rows.iter().find(is_same));
                assert_eq!(again, None, "the same process as {row:?}");
            }
        }
    }
}

#[test]
fn storm_of_short_lived_shells_is_explained() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let results = run("storm", &vec![STORM; cpus], &Runs::From("60"));
    assert_explained(&results);
    // The largest have rows of their own, and the others are counted in one.
    for reading in &results[0].readings {
        let shells = reading.sums.iter().find(|sum| sum.cmd == "sh").unwrap();
        assert!(shells.processes > Some(200), "{shells:?}");
        assert!(shells.owner.user.is_some());
        let own = reading
            .rows
            .iter()
            .filter(|row| row.exit_code == Some(0) && row.cmd == "sh");
        assert!((1..=200).contains(&own.count()));
    }
}

#[test]
fn process_that_starts_and_ends_between_two_samples_is_explained() {
    let results = run("burner_within_interval", &[BURNER], &Runs::Within);
    assert_explained(&results);
    for reading in &results[0].readings {
        let ended = reading
            .rows
            .iter()
            .filter(|row| row.cmd == "sh" && row.exit_code == Some(143));
        let longest =
            ended.max_by(|one, other| one.cpu_seconds.unwrap().total_cmp(&other.cpu_seconds.unwrap()));
        let longest = longest.unwrap();
        assert!(
            longest.cpu_seconds > Some(1.0) && longest.shutdown_time.is_some(),
            "{longest:?}"
        );
        assert!(longest.owner.user.is_some() && longest.owner.parent_pid.is_some());
    }
}

#[test]
fn does_not_count_time_of_ended_process_again() {
    let results = run("burner_that_ends", &[BURNER], &Runs::From("4.5"));
    assert_explained(&results);
}

#[test]
fn many_small_compilations_are_explained() {
    let results = run("compilations", &[COMPILE; 4], &Runs::From("60"));
    assert_explained(&results);
}

#[test]
fn steady_process_is_explained() {
    let results = run("steady_burner", &[BURNER], &Runs::From("60"));
    assert_explained(&results);
}
