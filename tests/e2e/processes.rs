//! Tests process tables of any time, the history of selected processes, and their starts and ends.

use mongodb::bson::{Document, doc, oid::ObjectId};
use testkit::Stack;
use vmwatch_api::{
    Scope,
    history::{Points, Stat, TimeRange},
    metrics::Limit,
    processes::{
        Order, ProcessEventKind, ProcessEvents, ProcessEventsQuery, ProcessHistory, ProcessHistoryQuery,
        ProcessName, ProcessSelector, ProcessSort, ProcessTable, ProcessesAt, ProcessesAtQuery,
    },
    time::{CreateDate, UtcOffset, unix_millis},
};

use crate::{
    history_support::{DAY, HOUR, MINUTE, SECOND, call, call_in, process, publish, sample, stack, stored},
    rows::store_processes,
};

fn at(instance: &str, at_ms: Option<u64>) -> ProcessesAtQuery {
    ProcessesAtQuery {
        instance_id: instance.parse().unwrap(),
        at_ms,
        sort: ProcessSort::Cpu,
        order: None,
        name: None,
        limit: Limit::new(1000).unwrap(),
        after: None,
    }
}

fn names(table: &ProcessTable) -> Vec<&str> {
    table
        .processes
        .iter()
        .map(|process| process.name.as_str())
        .collect()
}

/// A process row as it is stored.
#[derive(Clone, Copy)]
struct Row {
    at_ms: u64,
    name: &'static str,
    pid: i32,
    started_ms: u64,
    ended_ms: Option<u64>,
    cpu_util: f64,
}

impl Row {
    fn document(self) -> Document {
        let seconds = |millis: u64| f64::from(u32::try_from(millis / 1000).unwrap());
        doc! {
            "_id": ObjectId::new(), "instance_id": "vm-1",
            "create_date": CreateDate::at_millis(self.at_ms, UtcOffset::UTC).as_str(),
            "cmd": self.name, "pid": self.pid, "cpu_util": self.cpu_util, "mem": 0.1, "disk_read": 1.0,
            "disk_write": 0.5, "net_incoming": 0.6, "net_outgoing": 5.7,
            "running_time": seconds(self.started_ms), "shutdown_time": self.ended_ms.map(seconds),
        }
    }
}

async fn store(stack: &Stack, rows: &[Row]) {
    store_processes(stack, rows.iter().map(|row| row.document())).await;
}

/// Returns the time `millis` milliseconds before the start of the current second.
fn ago(millis: u64) -> u64 {
    unix_millis() / SECOND * SECOND - millis
}

#[tokio::test]
async fn process_table_is_the_newest_at_or_before_the_requested_time() {
    let stack = stack().start().await;
    let moments = [ago(29 * HOUR), ago(28 * HOUR), ago(2 * MINUTE), ago(MINUTE)];
    for (index, &at_ms) in (0_u32..).zip(&moments) {
        let mut sample = sample("vm-1", at_ms + 7, "+00:00", 5.0);
        sample.processes = (0..50)
            .map(|pid| process(&format!("worker-{index}"), 100 + pid, f64::from(pid)))
            .collect();
        publish(&stack, &sample).await;
    }
    stored(&stack).await;
    let table_at = async |at_ms| call::<ProcessesAt>(&stack, &at("vm-1", at_ms)).await;
    for (asked, expected) in [
        (None, Some(3)),
        (Some(moments[3] + 7), Some(3)),
        // One millisecond before this table was taken, the previous table is returned.
        (Some(moments[3] + 6), Some(2)),
        (Some(ago(HOUR)), Some(1)),
        (Some(moments[1] + 7), Some(1)),
        (Some(moments[0] + HOUR / 2), Some(0)),
        (Some(moments[0]), None),
        (Some(moments[1] + 8 * DAY), Some(3)),
    ] {
        let table = table_at(asked).await;
        assert_eq!(
            table.at_ms,
            expected.map(|index: usize| moments[index] + 7),
            "query for the time {asked:?}"
        );
        let name = expected.map(|index| format!("worker-{index}"));
        assert_eq!(table.processes.first().map(|process| process.name.clone()), name);
        assert_eq!(table.total, if expected.is_some() { 50 } else { 0 });
    }
    // A query with exactly the time of a table returns the same table.
    let table = table_at(None).await;
    assert_eq!(table_at(table.at_ms).await, table);

    let hidden = call_in::<ProcessesAt>(&stack, Scope::Only(Vec::new()), &at("vm-1", None))
        .await
        .unwrap();
    assert_eq!(hidden, call::<ProcessesAt>(&stack, &at("vm-none", None)).await);
    assert_eq!(hidden, ProcessTable::default());
}

#[tokio::test]
async fn process_table_is_sorted_filtered_and_limited() {
    let stack = stack().start().await;
    let mut sample = sample("vm-1", ago(SECOND), "+00:00", 5.0);
    let mut row = |name: &str, pid, cpu, mem, read, write| {
        sample.processes.push(vmwatch_api::metrics::ProcessSample {
            mem,
            disk_read: read,
            disk_write: write,
            ..process(name, pid, cpu)
        });
    };
    row("nginx", 30, 5.0, 1.0, 0.0, 9.0);
    row("nginx", 20, 5.0, 2.0, 4.0, 4.0);
    row("postgres", 10, 120.5, 40.0, 100.0, 0.0);
    row("bash", 40, 0.0, 0.1, 0.0, 0.0);
    publish(&stack, &sample).await;
    stored(&stack).await;
    for (sort, order, pids) in [
        (ProcessSort::Cpu, None, [10, 20, 30, 40]),
        (ProcessSort::Cpu, Some(Order::Asc), [40, 20, 30, 10]),
        (ProcessSort::Mem, None, [10, 20, 30, 40]),
        (ProcessSort::Disk, None, [10, 30, 20, 40]),
        (ProcessSort::Pid, None, [10, 20, 30, 40]),
        (ProcessSort::Pid, Some(Order::Desc), [40, 30, 20, 10]),
        (ProcessSort::Name, None, [40, 20, 30, 10]),
        (ProcessSort::Name, Some(Order::Desc), [10, 20, 30, 40]),
    ] {
        for limit in [1000, 2] {
            let limit = Limit::new(limit).unwrap();
            let table = call::<ProcessesAt>(
                &stack,
                &ProcessesAtQuery {
                    sort,
                    order,
                    limit,
                    ..at("vm-1", None)
                },
            )
            .await;
            let shown: Vec<_> = table.processes.iter().map(|process| process.pid).collect();
            assert_eq!(
                shown,
                pids[..usize::from(limit.get()).min(4)],
                "{sort:?} {order:?}"
            );
            assert_eq!(table.total, 4);
        }
    }
    let name = ProcessName::new("nginx");
    let table = call::<ProcessesAt>(
        &stack,
        &ProcessesAtQuery {
            name,
            ..at("vm-1", None)
        },
    )
    .await;
    assert_eq!((names(&table), table.total), (vec!["nginx", "nginx"], 2));
    let process = &table.processes[0];
    assert_eq!((process.started_ms, process.ended_ms), (1_482_236_515_630, None));
}

fn past(name: Option<&str>, pid: Option<u32>, from_ms: u64, to_ms: u64, points: u64) -> ProcessHistoryQuery {
    ProcessHistoryQuery {
        instance_id: "vm-1".parse().unwrap(),
        process: ProcessSelector::new(name.and_then(ProcessName::new), pid).unwrap(),
        range: TimeRange::new(from_ms, to_ms).unwrap(),
        points: Points::new(points).unwrap(),
        after_ms: None,
    }
}

/// The history of several processes is returned as one series. The test has two workers with the same name, of which
/// one ends; a pid that is reused under another name; and a process that changes its name because it executes another
/// program.
#[tokio::test]
#[expect(
    clippy::too_many_lines,
    reason = "one history of three processes, checked in several ways"
)]
async fn process_history_is_returned_as_one_series() {
    let stack = stack().start().await;
    let start = unix_millis() / HOUR * HOUR - 2 * HOUR;
    let row = |minute: u64, name, pid, cpu_util| Row {
        at_ms: start + minute * MINUTE,
        name,
        pid,
        started_ms: start - DAY,
        ended_ms: None,
        cpu_util,
    };
    let mut rows = Vec::new();
    for minute in 0..60 {
        let share = f64::from(u32::try_from(minute).unwrap());
        rows.push(row(minute, "nginx", 1, share));
        if minute < 30 {
            rows.push(row(minute, "nginx", 2, 0.1));
        }
        rows.push(row(minute, if minute < 20 { "sh" } else { "java" }, 3, 200.0));
        rows.push(row(minute, "idle", 4, 0.0));
    }
    // This is the last row of pid 2; another process with the same pid follows.
    rows.push(Row {
        ended_ms: Some(start + 30 * MINUTE - SECOND),
        cpu_util: 0.0,
        ..row(30, "nginx", 2, 0.0)
    });
    let successor = Row {
        started_ms: start + 40 * MINUTE,
        ..row(41, "backup", 2, 7.0)
    };
    rows.push(successor);
    rows.push(Row {
        at_ms: start + 42 * MINUTE,
        ended_ms: Some(start + 41 * MINUTE + SECOND),
        ..successor
    });
    store(&stack, &rows).await;

    let series = call::<ProcessHistory>(&stack, &past(Some("nginx"), None, start, start + HOUR, 6)).await;
    assert_eq!(series.step_ms, 10 * MINUTE);
    let counts: Vec<_> = series
        .buckets
        .iter()
        .map(|bucket| (bucket.at_ms - start, bucket.count))
        .collect();
    assert_eq!(
        counts,
        (0..6)
            .map(|bucket| (bucket * 10 * MINUTE, 10))
            .collect::<Vec<_>>()
    );
    let first = &series.buckets[0];
    assert_eq!(
        first.processes,
        Stat {
            min: 2.0,
            avg: 2.0,
            max: 2.0
        }
    );
    assert_eq!(
        first.cpu_util,
        Stat {
            min: 0.1,
            avg: 4.6,
            max: 9.1
        }
    );
    assert_eq!(
        first.mem,
        Stat {
            min: 0.2,
            avg: 0.2,
            max: 0.2
        }
    );
    assert_eq!(
        first.disk_read,
        Stat {
            min: 2.0,
            avg: 2.0,
            max: 2.0
        }
    );
    // The last row of an ended process does not count as running.
    assert_eq!(
        series.buckets[3].processes,
        Stat {
            min: 1.0,
            avg: 1.0,
            max: 1.0
        }
    );

    let one = call::<ProcessHistory>(&stack, &past(Some("nginx"), Some(1), start, start + HOUR, 1)).await;
    assert_eq!((one.buckets.len(), one.buckets[0].count), (1, 60));
    assert_eq!(
        one.buckets[0].cpu_util,
        Stat {
            min: 0.0,
            avg: 29.5,
            max: 59.0
        }
    );
    // A query by pid alone returns a process under both of its names, and an ended process together with the later
    // process of the same pid.
    let by_pid = async |pid, to_ms| {
        let series = call::<ProcessHistory>(&stack, &past(None, Some(pid), start, to_ms, 60)).await;
        series.buckets.iter().map(|bucket| bucket.count).sum::<u64>()
    };
    assert_eq!(by_pid(1, start + HOUR).await, 60);
    assert_eq!(by_pid(2, start + HOUR).await, 31 + 2);
    assert_eq!(by_pid(2, start + 10 * MINUTE).await, 10);
    assert_eq!(by_pid(3, start + HOUR).await, 60);
    assert_eq!(by_pid(9, start + HOUR).await, 0);

    // The range is extended to whole buckets. They end at most two hours after the range, which is long before the
    // first rows.
    let nothing = past(Some("nginx"), None, start - DAY, start - 12 * HOUR, 10);
    let nothing = call::<ProcessHistory>(&stack, &nothing).await;
    let hidden = past(Some("nginx"), None, start, start + HOUR, 10);
    assert_eq!((nothing.step_ms, nothing.buckets.len()), (0, 0));
    assert_eq!(
        call_in::<ProcessHistory>(&stack, Scope::Only(Vec::new()), &hidden)
            .await
            .unwrap(),
        nothing
    );
}

#[tokio::test]
async fn process_starts_and_ends_are_listed_newest_first() {
    let stack = stack().start().await;
    let start = ago(2 * HOUR);
    let boot = start - HOUR;
    let row = |minute: u64, name, pid, started_ms| Row {
        at_ms: start + minute * MINUTE,
        name,
        pid,
        started_ms,
        ended_ms: None,
        cpu_util: 0.0,
    };
    let cut = start + 30 * MINUTE;
    let mut rows = Vec::new();
    for minute in 0..60 {
        // The VM is off for some minutes around minute 30, then all processes start again.
        let up = if minute < 28 { boot } else { cut };
        if (28..32).contains(&minute) {
            continue;
        }
        rows.push(row(minute, "systemd", 1, up));
        if (10..28).contains(&minute) {
            rows.push(row(minute, "lost-with-the-vm", 50, start + 10 * MINUTE));
        }
        if (40..45).contains(&minute) {
            rows.push(row(minute, "backup", 60, start + 40 * MINUTE));
        }
    }
    rows.push(Row {
        ended_ms: Some(start + 45 * MINUTE),
        ..row(45, "backup", 60, start + 40 * MINUTE)
    });
    store(&stack, &rows).await;
    let events = async |from_ms, to_ms, limit| {
        let query = ProcessEventsQuery {
            instance_id: "vm-1".parse().unwrap(),
            range: TimeRange::new(from_ms, to_ms).unwrap(),
            limit: Limit::new(limit).unwrap(),
            before: None,
        };
        let page = call::<ProcessEvents>(&stack, &query).await;
        let events = page.events.into_iter().map(|event| {
            let minute = event.at_ms.cast_signed() - start.cast_signed();
            (event.kind, event.name, event.pid, minute / MINUTE.cast_signed())
        });
        (events.collect::<Vec<_>>(), page.next.is_some())
    };
    let (started, ended) = (ProcessEventKind::Started, ProcessEventKind::Ended);
    let event = |kind, name: &str, pid, minute| (kind, name.to_owned(), pid, minute);
    let all = [
        event(ended, "backup", 60, 45),
        event(started, "backup", 60, 40),
        event(started, "systemd", 1, 30),
        event(started, "lost-with-the-vm", 50, 10),
    ];
    assert_eq!(events(start, start + HOUR, 10).await, (all.to_vec(), false));
    assert_eq!(events(start, start + HOUR, 4).await, (all.to_vec(), false));
    assert_eq!(events(start, start + HOUR, 3).await, (all[..3].to_vec(), true));
    // If a range ends while the process is still running, it contains the start of the process but not the end.
    assert_eq!(
        events(start + 35 * MINUTE, start + 42 * MINUTE, 10).await,
        (all[1..2].to_vec(), false)
    );
    // The end of a range is exclusive.
    assert_eq!(events(start, start + 10 * MINUTE, 10).await, (Vec::new(), false));
    assert_eq!(
        events(boot, start, 10).await,
        (vec![event(started, "systemd", 1, -60)], false)
    );
}
