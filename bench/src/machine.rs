//! Describes the machine on which a benchmark runs.

use procfs::{CpuInfo, Current, LoadAverage, Meminfo};
use serde_json::{Value, json};

/// Describes the machine and its load at the start. Results of a busy machine are unreliable.
pub(crate) fn description() -> Value {
    let cpus = CpuInfo::current().ok();
    let model = cpus
        .as_ref()
        .and_then(|cpus| cpus.model_name(0))
        .unwrap_or("unknown");
    json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory_mib": Meminfo::current().map_or(0, |memory| memory.mem_total >> 20),
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "load_1min_at_start": LoadAverage::current().map_or(-1.0, |load| load.one),
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
    })
}
