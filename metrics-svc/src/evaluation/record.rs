//! Makes the evaluation record of a sample part from the documents of its rows.

use std::collections::BTreeMap;

use bson::{RawDocument, RawDocumentBuf};
use tracing::warn;
use vmwatch_api::{
    InstanceId,
    alerts::evaluation::{EvaluationRecord, FilesystemUse, Source, WatchedProcesses},
    processes::{ProcessName, ProcessRowKind},
};

use super::WatchedTable;
use crate::{
    MetricsError,
    documents::{Documents, SAMPLED_AT},
    processes::{row::StoredProcess, tidy},
    vm_row::{VmRow, number},
};

/// Returns the evaluation record of a sample part; `None` if its VM or its time is not known. A part of which all rows are
/// past their retention has a record without values, because it proves that the agent is not silent.
pub(crate) fn record(documents: &Documents, watched: &WatchedTable) -> Option<EvaluationRecord> {
    let (instance_id, at_ms) = identity(documents)?;
    let arrived_us = documents.arrival.unwrap_or(0);
    let (source, vm) = match documents.hypervisor.first() {
        Some(row) => (Source::Hypervisor, Some(row)),
        None => (Source::Agent, documents.vms.first()),
    };
    let vm = vm.and_then(|row| readable(VmRow::from_document(row)));
    Some(EvaluationRecord {
        instance_id,
        source,
        at_ms,
        arrived_ms: u64::try_from(arrived_us.div_euclid(1000)).unwrap_or(0),
        part: documents.part,
        vm: vm.map(|row| row.values.into()),
        filesystems: documents
            .filesystems
            .iter()
            .filter_map(|row| usage(row))
            .collect(),
        has_processes: !documents.processes.is_empty(),
        processes: watched_processes(&documents.processes, watched),
        watched_revision: watched.revision(),
    })
}

/// The VM and the effective date (Unix milliseconds) of a sample part.
fn identity(documents: &Documents) -> Option<(InstanceId, u64)> {
    if let Some(row) = documents.first().or(documents.filesystems.first()) {
        let at = row.get_datetime(SAMPLED_AT).ok()?.timestamp_millis();
        let instance = row.get_str("instance_id").ok()?;
        return Some((instance.parse().ok()?, u64::try_from(at).ok()?));
    }
    let expired = documents.expired.as_ref()?.event.as_ref()?;
    Some((expired.instance_id.clone(), expired.at_ms))
}

fn usage(row: &RawDocument) -> Option<FilesystemUse> {
    let value = |key| row.get(key).ok().flatten().and_then(number);
    let (used, total) = (value("used_bytes")?, value("total_bytes")?);
    // A filesystem without size, such as one of the kernel, is not full.
    (total > 0.0).then_some(())?;
    Some(FilesystemUse {
        mount_point: row.get_str("mount_point").ok()?.to_owned(),
        used: tidy(used / total * 100.0),
    })
}

/// Adds up the rows of each watched name. The processes of a summed row have ended mostly, so that they count towards the
/// usage but are not running processes; the same applies to the last row of an ended process.
fn watched_processes(rows: &[RawDocumentBuf], watched: &WatchedTable) -> Vec<WatchedProcesses> {
    if watched.is_empty() {
        return Vec::new();
    }
    let mut found: BTreeMap<ProcessName, WatchedProcesses> = BTreeMap::new();
    for row in rows {
        let name = row.get_str("cmd").unwrap_or_default();
        if !watched.contains(name) {
            continue;
        }
        let (Some(name), Some(stored)) = (ProcessName::new(name), readable(StoredProcess::read(row))) else {
            continue;
        };
        let sum = found.entry(name).or_insert_with_key(|name| WatchedProcesses {
            name: name.clone(),
            processes: 0,
            cpu_util: 0.0,
            mem: 0.0,
        });
        let row = stored.row;
        let runs = row.kind == ProcessRowKind::Process && row.ended_ms.is_none();
        sum.processes += u32::from(runs);
        sum.cpu_util += row.cpu_util;
        if row.ended_ms.is_none() {
            sum.mem += row.mem;
        }
    }
    let rounded = found.into_values().map(|sum| WatchedProcesses {
        cpu_util: tidy(sum.cpu_util),
        mem: tidy(sum.mem),
        ..sum
    });
    rounded.collect()
}

/// The decoded row; `None` if the row, which this service has just encoded, cannot be decoded.
fn readable<T>(row: Result<T, MetricsError>) -> Option<T> {
    row.inspect_err(|error| warn!(cause = error.cause(), "a row cannot be decoded for evaluation"))
        .ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use serde_json::json;
    use vmwatch_api::{
        events::{UnstoredEvent, UnstoredReason},
        hypervisor_samples::HypervisorSample,
        metrics::Sample,
        time::UtcOffset,
    };

    use super::*;
    use crate::documents::ExpiredRows;

    const AT_MS: u64 = 1_483_277_879_001;

    fn arrival() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(AT_MS + 2500)
    }

    fn process(name: &str, pid: u32, cpu_util: f64, ended: bool) -> serde_json::Value {
        json!({
            "cmd": name, "pid": pid, "cpu_util": cpu_util, "mem": 0.1, "disk_read": 0.0, "disk_write": 0.0,
            "running_time": 1_482_236_515.63, "shutdown_time": ended.then_some(1_483_277_870.0),
        })
    }

    fn documents(sample: &serde_json::Value) -> Documents {
        let sample: Sample = serde_json::from_value(sample.clone()).unwrap();
        Documents::from_sample(&sample, UtcOffset::UTC, arrival()).unwrap()
    }

    fn watched(names: &[&str]) -> WatchedTable {
        let watched = serde_json::from_value(json!({ "names": names })).unwrap();
        WatchedTable::new(7, &watched)
    }

    #[test]
    fn record_has_the_values_of_the_sample() {
        let sample = json!({
            "instance_id": "vm-1", "create_date": "2017-01-01T13:37:59.001065", "part": 3,
            "net_incoming": 0.6, "net_outgoing": 5.7,
            "vm": { "cpu_util": 12.5, "disk_read": 0.0, "disk_write": 128.8, "proc": 95, "load": 1.5 },
            "processes": [
                process("nginx", 1, 0.1, false), process("nginx", 2, 0.2, false), process("nginx", 3, 4.0, true),
                process("sshd", 4, 1.0, false), process("cron", 5, 1.0, true),
            ],
            "sums": [{ "cmd": "nginx", "processes": 9, "cpu_util": 10.0, "cpu_seconds": 1.0 }],
            "filesystems": [
                { "mount_point": "/", "filesystem": "ext4", "used_bytes": 1_u64 << 40, "total_bytes": 3_u64 << 40 },
                { "mount_point": "/empty", "filesystem": "tmpfs", "used_bytes": 0, "total_bytes": 0 },
            ],
        });
        let record = record(&documents(&sample), &watched(&["nginx", "cron", "absent"])).unwrap();
        assert_eq!(
            serde_json::to_value(record).unwrap(),
            json!({
                "instance_id": "vm-1", "source": "agent", "at_ms": AT_MS, "arrived_ms": AT_MS + 2500, "part": 3,
                "vm": {
                    "cpu_util": 12.5, "mem": null, "disk_read": 0.0, "disk_write": 128.8, "net_incoming": 0.6,
                    "net_outgoing": 5.7, "proc": 95, "cores": null, "steal": null, "load": 1.5, "swap": null,
                    "pressure_cpu": null, "pressure_mem": null, "pressure_io": null,
                },
                "filesystems": [{ "mount_point": "/", "used": 33.333 }],
                "has_processes": true,
                "processes": [
                    { "name": "cron", "processes": 0, "cpu_util": 1.0, "mem": 0.0 },
                    { "name": "nginx", "processes": 2, "cpu_util": 14.3, "mem": 0.2 },
                ],
                "watched_revision": 7,
            })
        );
    }

    #[test]
    fn hypervisor_sample_has_measures_only() {
        let sample: HypervisorSample = serde_json::from_value(json!({
            "instance_id": "vm-1", "create_date": "2017-01-01T13:37:59.001065", "hypervisor": "lab", "cpu_util": 1.5,
        }))
        .unwrap();
        let documents = Documents::from_hypervisor_sample(&sample, UtcOffset::UTC, arrival()).unwrap();
        let record = record(&documents, &watched(&["nginx"])).unwrap();
        let vm = record.vm.unwrap();
        assert_eq!((record.source, record.at_ms), (Source::Hypervisor, AT_MS));
        assert_eq!((vm.cpu_util, vm.mem), (Some(1.5), None));
        assert!(!record.has_processes && record.filesystems.is_empty());
    }

    #[test]
    fn part_with_expired_rows_only_has_a_record_without_values() {
        let documents = Documents {
            arrival: Some(i64::try_from(AT_MS).unwrap() * 1000),
            expired: Some(ExpiredRows {
                count: 2,
                event: Some(UnstoredEvent {
                    instance_id: "vm-1".parse().unwrap(),
                    at_ms: 5,
                    arrived_ms: AT_MS,
                    reason: UnstoredReason::Expired,
                }),
            }),
            ..Documents::default()
        };
        let expired = record(&documents, &WatchedTable::default()).unwrap();
        assert_eq!((expired.at_ms, expired.arrived_ms, expired.vm), (5, AT_MS, None));
        assert!(record(&Documents::default(), &WatchedTable::default()).is_none());
    }
}
