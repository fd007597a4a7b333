//! Measures the CPU time that one sample costs: `cargo run --release -p agent --example cost [PROCESSES]`.
//!
//! Starts sleeping processes (300 by default), samples the machine, and prints this thread's CPU time and the number of
//! bytes per sampled process. For comparison it also prints those of a sample as JSON, and the CPU time that the `procfs`
//! crate needs to read a process's `stat` and `io` files. Each printed time is the median of all rounds, because other
//! load on the machine affects a median least.

use std::{
    process::{Child, Command},
    time::Duration,
};

use agent::{
    Selection,
    sample::{Roots, Sampler},
    split,
};
use anyhow::Context as _;
use procfs::process::all_processes;
use rustix::time::{ClockId, clock_gettime};
use vmwatch_blocks::Encoder;

const ROUNDS: u32 = 50;

fn main() -> anyhow::Result<()> {
    let count = std::env::args().nth(1).map_or(Ok(300), |text| text.parse())?;
    let mut sleepers = Vec::new();
    for _ in 0..count {
        sleepers.push(Sleeper(Command::new("sleep").arg("600").spawn()?));
    }
    let mut sampler = Sampler::new(
        "cost".parse()?,
        "+00:00".parse()?,
        Selection::All,
        Roots::default(),
    )?;
    sampler.sample()?;
    let mut rows = 0;
    let ours = cpu_time_of(|| {
        let sample = sampler.sample()?;
        rows += sample.processes.len();
        Ok(())
    })?;
    let rows = f64::from(u32::try_from(rows)?) / f64::from(ROUNDS);
    let mut encoder = Encoder::new()?;
    let (mut parts, mut json) = (Vec::new(), Vec::new());
    let split_up = cpu_time_of(|| {
        parts = split(sampler.sample()?, &mut encoder)?;
        Ok(())
    })?;
    let as_json = cpu_time_of(|| {
        json = serde_json::to_vec(&sampler.sample()?)?;
        Ok(())
    })?;
    let vm_alone = cpu_time_of(|| {
        sampler.vm.read()?;
        Ok(())
    })?;
    let procfs = cpu_time_of(|| {
        for process in all_processes()?.flatten() {
            let _ = (process.stat(), process.io());
        }
        Ok(())
    })?;
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!("processes                          {rows:8.0}");
    println!(
        "sampling, per process              {:8.1} µs",
        micros(ours) / rows
    );
    println!(
        "  with encoding                    {:8.1} µs",
        micros(split_up) / rows
    );
    println!(
        "  with encoding as JSON            {:8.1} µs",
        micros(as_json) / rows
    );
    println!(
        "  procfs crate reading stat and io {:8.1} µs",
        micros(procfs) / rows
    );
    let bytes = |count: usize| u32::try_from(count).map(|bytes| f64::from(bytes) / rows);
    let parts_bytes = parts.iter().map(|part| part.body.len()).sum();
    println!(
        "encoded, per process               {:8.1} bytes",
        bytes(parts_bytes)?
    );
    println!(
        "as JSON, per process               {:8.1} bytes",
        bytes(json.len())?
    );
    println!("sampling only the VM's row         {:8.0} µs", micros(vm_alone));
    Ok(())
}

/// Returns this thread's median CPU time for one round of `work`.
fn cpu_time_of(mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let before = this_thread();
        work()?;
        rounds.push(this_thread().saturating_sub(before));
    }
    rounds.sort();
    rounds
        .get(rounds.len() / 2)
        .copied()
        .context("no round was measured")
}

fn this_thread() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // CPU time is never negative.
    time.try_into().unwrap_or_default()
}

/// A sleeping process that is killed when the value is dropped.
struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Killing fails only if the process has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
