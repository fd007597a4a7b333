//! Reads the CPU time and the memory of processes from the kernel.

use anyhow::Context;
use procfs::process::Process;

/// Returns the CPU time in seconds that a process has used since its start. The kernel counts in ticks of 10 ms.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = process(pid)?.stat()?;
    #[expect(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 ticks")]
    let seconds = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
    Ok(seconds)
}

/// Returns the CPU time of a process and its children in seconds.
pub(crate) fn cpu_seconds_of_family(pid: u32) -> anyhow::Result<f64> {
    let mut seconds = cpu_seconds(pid)?;
    for other in procfs::process::all_processes()?.flatten() {
        // A process that ended after it was listed is skipped: it is not a child, because children outlive the round.
        if other.stat().is_ok_and(|stat| u32::try_from(stat.ppid) == Ok(pid)) {
            seconds += cpu_seconds(u32::try_from(other.pid)?)?;
        }
    }
    Ok(seconds)
}

/// Returns the resident memory of a process in MB.
pub(crate) fn resident_mb(pid: u32) -> anyhow::Result<f64> {
    let kib = process(pid)?
        .status()?
        .vmrss
        .context("the kernel does not report VmRSS")?;
    #[expect(clippy::cast_precision_loss, reason = "the value is far below 2^52 KiB")]
    let mb = kib as f64 * 1024.0 / 1e6;
    Ok(mb)
}

/// Returns the peak resident memory of a process in MB.
pub(crate) fn peak_resident_mb(pid: u32) -> anyhow::Result<f64> {
    let kib = process(pid)?
        .status()?
        .vmhwm
        .context("the kernel does not report VmHWM")?;
    #[expect(clippy::cast_precision_loss, reason = "the value is far below 2^52 KiB")]
    let mb = kib as f64 * 1024.0 / 1e6;
    Ok(mb)
}

/// Returns the file name of a process's executable.
pub(crate) fn program(pid: u32) -> anyhow::Result<String> {
    let exe = process(pid)?.exe()?;
    Ok(exe.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

fn process(pid: u32) -> anyhow::Result<Process> {
    let pid = i32::try_from(pid)?;
    Process::new(pid).with_context(|| format!("process {pid} cannot be read"))
}
