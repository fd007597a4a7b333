//! What processes cost, as the kernel counts it.

use anyhow::Context;
use procfs::process::Process;

/// CPU that a process has used since its start, in seconds; the kernel counts in ticks of 10 ms.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = process(pid)?.stat()?;
    #[expect(clippy::cast_precision_loss, reason = "ticks of one run")]
    let seconds = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
    Ok(seconds)
}

/// As [`cpu_seconds`], of a process and those that it has started.
pub(crate) fn cpu_seconds_of_family(pid: u32) -> anyhow::Result<f64> {
    let mut seconds = cpu_seconds(pid)?;
    for other in procfs::process::all_processes()?.flatten() {
        // Who has ended meanwhile is none of ours: these live as long as the round.
        if other.stat().is_ok_and(|stat| u32::try_from(stat.ppid) == Ok(pid)) {
            seconds += cpu_seconds(u32::try_from(other.pid)?)?;
        }
    }
    Ok(seconds)
}

/// The memory that a process has resident now, in MB.
pub(crate) fn resident_mb(pid: u32) -> anyhow::Result<f64> {
    let kib = process(pid)?
        .status()?
        .vmrss
        .context("the kernel tells no VmRSS")?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 KiB")]
    let mb = kib as f64 * 1024.0 / 1e6;
    Ok(mb)
}

/// The most memory that a process ever had resident, in MB.
pub(crate) fn peak_resident_mb(pid: u32) -> anyhow::Result<f64> {
    let kib = process(pid)?
        .status()?
        .vmhwm
        .context("the kernel tells no VmHWM")?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 KiB")]
    let mb = kib as f64 * 1024.0 / 1e6;
    Ok(mb)
}

/// The file name of the program that it runs.
pub(crate) fn program(pid: u32) -> anyhow::Result<String> {
    let exe = process(pid)?.exe()?;
    Ok(exe.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

fn process(pid: u32) -> anyhow::Result<Process> {
    let pid = i32::try_from(pid)?;
    Process::new(pid).with_context(|| format!("process {pid} cannot be read"))
}
