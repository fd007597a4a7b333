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
    sample::{Roots, Sampler},
};
use testkit::figure;
use vmwatch_api::metrics::{Sample, ShortLived};

/// A storm of shells that live some milliseconds each.
const STORM: &str = "while :; do sh -c : ; done";
const BURNER: &str = "while :; do :; done";
/// Compiles a small program again and again.
const COMPILE: &str = "while :; do cc -O0 -c small.c -o $$.o; done";
/// Time between two samples, in seconds.
const INTERVAL: &str = "6";

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

fn accounted(sample: &Sample) -> f64 {
    let rows = sample.processes.iter().filter_map(|row| row.cpu_seconds);
    rows.chain(sample.sums.iter().map(|sum| sum.cpu_seconds)).sum()
}

/// When a workload runs.
#[derive(PartialEq)]
enum Runs {
    /// It runs when each of the two samples is taken.
    Throughout,
    /// It starts after the first sample, and ends before the second.
    Within,
}

/// Takes two samples of a workload. Returns the second one and what it explains of the VM's CPU time, with the kernel's
/// records and without them.
fn run(name: &str, scripts: &[&str], runs: &Runs) -> [(Sample, f64); 2] {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("small.c"), "int answer(void) { return 42; }\n").unwrap();
    let mut samplers = [sampler().with_exit_records(200), sampler()];
    let launch = |seconds| -> Vec<Workload> {
        let start = |script: &&str| Workload::start(seconds, script, folder.path());
        scripts.iter().map(start).collect()
    };
    let running = if *runs == Runs::Throughout {
        launch("60")
    } else {
        Vec::new()
    };
    let from = samplers.each_mut().map(|sampler| {
        sampler.sample().unwrap();
        kernel_seconds()
    });
    if *runs == Runs::Within {
        for mut workload in launch(INTERVAL) {
            workload.0.wait().unwrap();
        }
    } else {
        assert!(Command::new("sleep").arg(INTERVAL).status().unwrap().success());
    }
    let mut from = from.into_iter();
    let results = samplers.each_mut().map(|sampler| {
        let used = kernel_seconds() - from.next().unwrap();
        let sample = sampler.sample().unwrap();
        let share = accounted(&sample) / used;
        let method = sample.short_lived.unwrap().as_str();
        figure(&format!("accounted_share_{name}_{method}"), share);
        (sample, share)
    });
    drop(running);
    results
}

fn assert_explained(results: &[(Sample, f64)]) {
    for (sample, share) in results {
        assert!(
            (0.95..=1.05).contains(share),
            "{share} {:?}: {sample:#?}",
            sample.short_lived
        );
        let mut ids: Vec<_> = sample
            .processes
            .iter()
            .map(|row| (row.pid, row.running_time.to_bits()))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), sample.processes.len(), "a process has two rows");
    }
    let methods = [ShortLived::Recorded, ShortLived::Estimated].map(Some);
    assert_eq!(
        results
            .iter()
            .map(|(sample, _)| sample.short_lived)
            .collect::<Vec<_>>(),
        methods
    );
}

#[test]
fn storm_of_short_lived_shells_is_explained() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    let results = run("storm", &vec![STORM; cpus], &Runs::Throughout);
    assert_explained(&results);
    let (sample, _) = &results[0];
    // The largest have rows of their own, and the others are counted in one.
    let shells = sample.sums.iter().find(|sum| sum.cmd == "sh").unwrap();
    assert!(shells.processes > Some(200), "{shells:?}");
    assert!(shells.owner.user.is_some());
    let own = sample
        .processes
        .iter()
        .filter(|row| row.exit_code == Some(0) && row.cmd == "sh");
    assert!((1..=200).contains(&own.count()));
}

#[test]
fn process_that_starts_and_ends_between_two_samples_is_explained() {
    let results = run("burner_within_interval", &[BURNER], &Runs::Within);
    assert_explained(&results);
    let (sample, _) = &results[0];
    let ended = sample
        .processes
        .iter()
        .filter(|row| row.cmd == "sh" && row.exit_code == Some(143));
    let longest = ended.max_by(|one, other| one.cpu_seconds.unwrap().total_cmp(&other.cpu_seconds.unwrap()));
    let longest = longest.unwrap();
    assert!(
        longest.cpu_seconds > Some(1.0) && longest.shutdown_time.is_some(),
        "{longest:?}"
    );
    assert!(longest.owner.user.is_some() && longest.owner.parent_pid.is_some());
}

#[test]
fn many_small_compilations_are_explained() {
    let results = run("compilations", &[COMPILE; 4], &Runs::Throughout);
    assert_explained(&results);
}

#[test]
fn steady_process_is_explained() {
    let results = run("steady_burner", &[BURNER], &Runs::Throughout);
    assert_explained(&results);
}
