//! Tests which processes of a VM used the most over a time range.

use std::iter;

use serde_json::json;
use testkit::Stack;
use vmwatch_api::{
    Role, Scope,
    alerts::culprits::{MAX_TOP_MS, ProcessTop, TopMeasure, TopQuery, TopReply},
    history::TimeRange,
    metrics::{CpuSeconds, ProcessOwner, ProcessSample, Sample, SumSample},
    processes::{ProcessName, ProcessRowKind},
    time::unix_millis,
};
use vmwatch_blocks::Encoder;

use crate::{
    history_support::{HOUR, MINUTE, SECOND, call, call_in, process, publish, sample, stack, stored},
    large_reads::store_hour,
    rest::client::{Api, rfc3339, stack as rest_stack},
};

/// Interval between two samples.
const INTERVAL: u64 = 10 * SECOND;

/// The start of a minute in the recent past, Unix milliseconds.
fn base() -> u64 {
    (unix_millis() / MINUTE - 10) * MINUTE
}

/// Returns four samples of a VM: of a process that burns CPU time and ends, one that writes, and of short-lived ones.
fn samples(base: u64) -> impl Iterator<Item = Sample> {
    (0..4_u32).map(move |step| {
        let mut sample = sample("vm-1", base + u64::from(step) * INTERVAL, "+00:00", 50.0);
        sample.vm_cpu = Some(CpuSeconds {
            user: 8.0,
            nice: 1.0,
            system: 1.0,
        });
        let ended = step == 3;
        sample.processes = vec![
            ProcessSample {
                cpu_seconds: Some(6.0),
                mem: 10.0,
                disk_read: 0.0,
                disk_write: 0.0,
                shutdown_time: ended.then_some(1_482_236_600.0),
                exit_code: ended.then_some(137),
                owner: ProcessOwner {
                    user: Some("postgres".to_owned()),
                    unit: Some("backup.service".to_owned()),
                    command_line: Some("pg_restore --jobs 4".to_owned()),
                    ..ProcessOwner::default()
                },
                ..process("pg_restore", 4121, 60.0)
            },
            ProcessSample {
                cpu_seconds: Some(0.25),
                mem: 40.0,
                disk_read: 10.0,
                disk_write: 90.0,
                ..process("writer", 20, 2.5)
            },
            ProcessSample {
                cpu_seconds: Some(0.0),
                mem: 0.0,
                disk_read: 0.0,
                disk_write: 0.0,
                ..process("idle", 21, 0.0)
            },
        ];
        sample.sums = vec![SumSample {
            cmd: "sh".to_owned(),
            processes: Some(100 + step),
            cpu_util: 10.0,
            cpu_seconds: 1.0,
            ..SumSample::default()
        }];
        sample
    })
}

fn query(from_ms: u64, to_ms: u64, measure: TopMeasure) -> TopQuery {
    let range = TimeRange::new(from_ms, to_ms).unwrap();
    TopQuery::new("vm-1".parse().unwrap(), range, measure, 10).unwrap()
}

fn amounts(reply: &TopReply) -> Vec<(&str, f64, Option<f64>)> {
    let each = reply.processes.iter();
    each.map(|process| (process.name.as_str(), process.amount, process.share))
        .collect()
}

/// Stores the four samples, each in two parts.
async fn store(stack: &Stack, base: u64) {
    for mut sample in samples(base) {
        let mut part = sample.clone();
        part.processes = sample.processes.split_off(1);
        (part.part, part.vm) = (1, None);
        part.sums.clear();
        publish(stack, &sample).await;
        publish(stack, &part).await;
    }
    stored(stack).await;
}

#[tokio::test]
async fn usage_of_a_process_is_added_over_the_samples_of_the_time_range() {
    let stack = stack().start().await;
    let base = base();
    store(&stack, base).await;
    let top = async |from, to, measure| call::<ProcessTop>(&stack, &query(from, to, measure)).await;

    let all = top(base, base + MINUTE, TopMeasure::Cpu).await;
    assert_eq!((all.samples, all.total, all.partial), (4, Some(40.0), false));
    assert_eq!(
        amounts(&all),
        [
            ("pg_restore", 24.0, Some(0.6)),
            ("sh", 4.0, Some(0.1)),
            ("writer", 1.0, Some(0.025))
        ]
    );
    let [first, sum, _] = all.processes.as_slice() else {
        panic!("{all:?}");
    };
    assert_eq!(
        (first.pid, first.started_ms, first.exit_code, first.ended_ms),
        (4121, 1_482_236_515_630, Some(137), Some(1_482_236_600_000))
    );
    assert_eq!(
        (first.owner.unit.as_deref(), first.owner.command_line.as_deref()),
        (Some("backup.service"), Some("pg_restore --jobs 4"))
    );
    assert_eq!(
        (sum.kind, sum.processes, sum.pid),
        (ProcessRowKind::Sum, Some(103), 0)
    );

    // The range includes its start and not its end.
    let middle = top(base + INTERVAL, base + 3 * INTERVAL, TopMeasure::Cpu).await;
    assert_eq!((middle.samples, middle.total), (2, Some(20.0)));
    assert_eq!(middle.processes[0].exit_code, None);

    // The rates of a sample apply to the whole interval before it, in which the VM read and wrote 375 KiB/s.
    let disk = top(base + INTERVAL, base + 3 * INTERVAL, TopMeasure::Disk).await;
    assert_eq!(disk.total, Some(7500.0));
    assert_eq!(amounts(&disk), [("writer", 2000.0, Some(0.267))]);

    let mem = top(base, base + MINUTE, TopMeasure::Mem).await;
    assert_eq!(mem.total, Some(50.0));
    // The ended process uses no memory in the last sample.
    assert_eq!(
        amounts(&mem),
        [("writer", 40.0, Some(0.4)), ("pg_restore", 7.5, Some(0.075))]
    );

    let mut named = query(base, base + MINUTE, TopMeasure::Cpu);
    named.name = ProcessName::new("idle");
    let named = call::<ProcessTop>(&stack, &named).await;
    assert_eq!((named.samples, named.total), (4, Some(40.0)));
    assert_eq!(amounts(&named), [("idle", 0.0, Some(0.0))]);

    let nothing = top(base + MINUTE, base + 2 * MINUTE, TopMeasure::Disk).await;
    assert_eq!(nothing, TopReply::default());
    let other = Scope::Only(vec!["vm-2".parse().unwrap()]);
    let hidden = call_in::<ProcessTop>(&stack, other, &query(base, base + MINUTE, TopMeasure::Cpu)).await;
    assert_eq!(hidden.unwrap(), TopReply::default());
}

/// Samples of an agent that does not report CPU seconds.
#[tokio::test]
async fn cpu_seconds_are_computed_from_the_usage_if_they_are_not_reported() {
    let stack = stack().start().await;
    let base = base();
    for (at_ms, cpu_util) in [(base, 50.0), (base + 20 * SECOND, 150.0)] {
        let mut sample = sample("vm-1", at_ms, "+00:00", 50.0);
        sample.processes = vec![process("burner", 7, cpu_util)];
        publish(&stack, &sample).await;
    }
    stored(&stack).await;
    for (from_ms, seconds) in [(base, 40.0), (base + 1, 30.0)] {
        let query = query(from_ms, base + MINUTE, TopMeasure::Cpu);
        let reply = call::<ProcessTop>(&stack, &query).await;
        assert_eq!(amounts(&reply), [("burner", seconds, None)]);
        assert_eq!(reply.total, None);
    }
}

/// Two hours with twice the rows each that one request may decode: the answer has the newest of them and says so.
#[tokio::test]
async fn answer_is_partial_if_the_time_range_has_too_many_rows() {
    let stack = stack().start().await;
    let first = (unix_millis() / HOUR - 5) * HOUR;
    let mut encoder = Encoder::new().unwrap();
    for hour in [first, first + HOUR] {
        store_hour(&stack, &mut encoder, hour).await;
    }
    let mut query = query(first, first + 2 * HOUR, TopMeasure::Mem);
    query.name = ProcessName::new("worker");
    let reply = call::<ProcessTop>(&stack, &query).await;
    assert!(reply.partial);
    assert_eq!(reply.samples, 1, "{reply:?}");
    assert!((1..8).contains(&reply.processes.len()), "{reply:?}");
}

#[tokio::test]
async fn top_processes_are_served_by_rest() {
    let stack = rest_stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let base = base();
    store(&stack, base).await;
    let range = format!("from={}&to={}", rfc3339(base), rfc3339(base + MINUTE));
    let top = api
        .read(&format!("/vms/vm-1/processes/top?{range}&by=cpu&limit=2"))
        .await;
    let each = top["processes"].as_array().unwrap();
    assert_eq!(each.len(), 2, "{top}");
    let fields = [
        "kind",
        "name",
        "pid",
        "processes",
        "user",
        "amount",
        "share",
        "exit_code",
    ];
    let of = |row: usize| fields.map(|field| each[row][field].clone());
    assert_eq!(
        json!(of(0)),
        json!(["process", "pg_restore", 4121, 1, "postgres", 24.0, 0.6, 137])
    );
    assert_eq!(
        json!(of(1)),
        json!(["sum", "sh", null, 103, null, 4.0, 0.1, null])
    );
    assert_eq!(
        (&top["by"], &top["samples"], &top["total"], &top["partial"]),
        (&json!("cpu"), &json!(4), &json!(40.0), &json!(false))
    );
    let by_disk = api
        .read(&format!("/vms/vm-1/processes/top?{range}&by=disk"))
        .await;
    assert_eq!(by_disk["processes"][0]["name"], "writer");
    let by_default = api.read("/vms/vm-1/processes/top?name=writer").await;
    assert_eq!(
        (&by_default["by"], &by_default["samples"]),
        (&json!("cpu"), &json!(4))
    );

    let day = rfc3339(base + MAX_TOP_MS + 1);
    let invalid = ["limit=0", "limit=101", "by=net", "name=", "at=now"].into_iter();
    let invalid = invalid.map(|query| (query.to_owned(), 400, "invalid"));
    let too_long = format!("from={}&to={day}", rfc3339(base));
    for (query, status, code) in invalid.chain(iter::once((too_long, 422, "contradictory"))) {
        api.get(&format!("/vms/vm-1/processes/top?{query}"))
            .await
            .problem(status, code);
    }
}
