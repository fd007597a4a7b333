//! Tests that reads decode many times more than their memory: 256 MiB of decoded rows, or 2 GiB with `VMWATCH_TEST_SOAK`.

use std::{env, fs};

use mongodb::bson::{Binary, DateTime, doc, spec::BinarySubtype};
use testkit::{Program, Stack, figure};
use vmwatch_api::{
    history::{Points, TimeRange},
    processes::{ProcessHistory, ProcessHistoryQuery, ProcessName, ProcessSelector},
    rows::{RowExport, RowExportQuery, RowFilter, RowKind},
    time::{CreateDate, UtcOffset, unix_millis},
};
use vmwatch_blocks::{Encoder, Kind, Rows, Value};

use crate::{
    history_support::{HOUR, MINUTE, call, stack},
    rows::blocks,
};

/// Number of parts that an hour has; together they take twice the memory that a request may decode.
const PARTS: u32 = 8;
/// Number of processes of a part, and the length of their names: 16 MiB.
const PROCESSES: u32 = 4096;
const NAME: usize = 4096;
/// By how much reads may grow the memory of metrics-svc, in KiB: by the limit of a request, and by half as much for a block,
/// the database's answers and the allocator.
const GROWTH: u64 = 96 << 10;

/// Number of hours that are read: each has 128 MiB of rows.
fn hours() -> u64 {
    let is_long = env::var_os("VMWATCH_TEST_SOAK").is_some_and(|minutes| !minutes.is_empty());
    if is_long { 16 } else { 2 }
}

/// Stores an hour of rows as a generation of level 1. One process of each part has a short name.
pub(crate) async fn store_hour(stack: &Stack, encoder: &mut Encoder, hour: u64) {
    let millis = |ms: u64| DateTime::from_millis(i64::try_from(ms).unwrap());
    let at_ms = hour + 7 * MINUTE;
    let date = CreateDate::at_millis(at_ms, UtcOffset::UTC);
    let hour_text = &CreateDate::at_millis(hour, UtcOffset::UTC).as_str()[..19].to_owned();
    for part in 0..PARTS {
        let mut rows = Rows::new(Kind::Process, "vm-1", 0);
        for process in 0..PROCESSES {
            let pid = part * PROCESSES + process;
            let name = match process {
                0 => "worker".to_owned(),
                _ => format!("{pid:0>NAME$}"),
            };
            let fields = [
                ("cmd", Value::Text(&name)),
                ("pid", Value::Int32(i32::try_from(pid).unwrap())),
                ("cpu_util", Value::Double(2.0)),
                ("mem", Value::Double(0.5)),
                ("disk_read", Value::Double(0.0)),
                ("disk_write", Value::Double(0.0)),
                ("running_time", Value::Double(1_482_236_515.0)),
                ("shutdown_time", Value::Null),
            ];
            rows.push(date.as_str(), None, None, fields).unwrap();
        }
        let [block] = <[_; 1]>::try_from(encoder.encode(&rows)).unwrap();
        let document = doc! {
            "_id": format!("process/vm-1/{hour_text}Z/0000000001/{part:05}"),
            "instance_id": "vm-1", "kind": "process", "level": 1, "generation": 1_i64,
            "part": i32::try_from(part).unwrap(), "parts": i32::try_from(PARTS).unwrap(),
            "hour": millis(hour), "from": millis(at_ms), "to": millis(at_ms),
            "rows": i32::try_from(PROCESSES).unwrap(),
            "expires": millis(unix_millis() + HOUR),
            "data": Binary { subtype: BinarySubtype::Generic, bytes: block.bytes },
        };
        blocks(&stack.database).insert_one(document).await.unwrap();
    }
}

/// A value of a process's memory in KiB.
fn memory(stack: &Stack, key: &str) -> u64 {
    let process = &stack.replica(Program::Metrics, 0).process;
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn series_and_export_decode_more_rows_than_fit_into_memory() {
    let stack = stack().start().await;
    let hours = hours();
    let first = (unix_millis() / HOUR - hours - 3) * HOUR;
    let mut encoder = Encoder::new().unwrap();
    for hour in 0..hours {
        store_hour(&stack, &mut encoder, first + hour * HOUR).await;
    }
    let before = memory(&stack, "VmRSS:");
    let range = TimeRange::new(first, first + hours * HOUR).unwrap();
    let name = ProcessName::new("worker").unwrap();
    let mut series = ProcessHistoryQuery {
        instance_id: "vm-1".parse().unwrap(),
        process: ProcessSelector::new(Some(name.clone()), None).unwrap(),
        range,
        points: Points::new(hours).unwrap(),
        after_ms: None,
    };
    let mut found = Vec::new();
    loop {
        let page = call::<ProcessHistory>(&stack, &series).await;
        found.extend(page.buckets.iter().map(|bucket| bucket.cpu_util.max));
        series.after_ms = page.next;
        if page.next.is_none() {
            break;
        }
    }
    let all = f64::from(PARTS) * 2.0;
    assert_eq!(found, vec![all; usize::try_from(hours).unwrap()]);

    let mut export = RowExportQuery {
        instance_id: "vm-1".parse().unwrap(),
        kind: RowKind::Process,
        filter: Some(RowFilter::Name(name)),
        range,
        after: None,
    };
    let mut rows = 0;
    loop {
        let page = call::<RowExport>(&stack, &export).await;
        let of_page: Vec<serde_json::Value> = serde_json::from_str(page.rows.as_json()).unwrap();
        rows += of_page.len();
        export.after = page.next;
        if export.after.is_none() {
            break;
        }
    }
    assert_eq!(rows, usize::try_from(hours * u64::from(PARTS)).unwrap());
    let peak = memory(&stack, "VmHWM:");
    figure(
        "large_reads_growth_metrics_svc_kib",
        f64::from(u32::try_from(peak.saturating_sub(before)).unwrap()),
    );
    assert!(
        peak < before + GROWTH,
        "{peak} KiB at most, {before} KiB before the reads"
    );
}
