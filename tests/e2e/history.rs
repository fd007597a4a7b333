//! Tests the history of VMs: the rollups must agree with the stored rows, even after late or repeated samples and
//! killed services.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use mongodb::bson::{Bson, DateTime, Document, doc};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Scope,
    history::{Points, Resolution, Stat, TimeRange, VmHistory, VmHistoryQuery, VmSeries},
    lifecycle::Target,
    measures::{Measure, VM_MEASURES, VmMeasures},
    time::unix_millis,
    vms::Get,
    wire::FaultKind,
};

use crate::{
    history_support::{
        DAY, HOUR, MINUTE, Random, SECOND, call, call_in, dirty_buckets, followed, publish, recent_bucket,
        sample, stack, stored,
    },
    rows::{blocks, store_vms, stored_vms, vm_row},
};

fn query(instance: &str, from_ms: u64, to_ms: u64, points: u64) -> VmHistoryQuery {
    VmHistoryQuery {
        instance_id: instance.parse().unwrap(),
        range: TimeRange::new(from_ms, to_ms).unwrap(),
        points: Points::new(points).unwrap(),
        after_ms: None,
    }
}

/// The stored rows aggregated by the database itself, without the rollups: for each bucket start, the number of rows
/// and the minimum, average and maximum of each measure, or `None` if no row has it.
type Direct = BTreeMap<u64, (u64, VmMeasures<Option<Stat>>)>;

async fn direct(stack: &Stack, instance: &str, unit: &str, size: i32, timezone: &str) -> Direct {
    let start =
        doc! { "$dateTrunc": { "date": "$sampled_at", "unit": unit, "binSize": size, "timezone": timezone } };
    let mut group = doc! { "_id": start, "rows": { "$sum": 1 } };
    for Measure { name: measure, .. } in VM_MEASURES.into_array() {
        for operator in ["min", "avg", "max"] {
            group.insert(
                format!("{operator}_{measure}"),
                doc! { format!("${operator}"): format!("${measure}") },
            );
        }
    }
    // The database aggregates a copy of the rows that are stored in blocks.
    let rows = stack
        .database
        .handle()
        .collection::<Document>("copied_vm_samples");
    rows.delete_many(doc! {}).await.unwrap();
    rows.insert_many(stored_vms(&stack.database).await).await.unwrap();
    let pipeline = [
        doc! { "$match": { "instance_id": instance } },
        doc! { "$group": group },
    ];
    let groups: Vec<Document> = rows
        .aggregate(pipeline)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    let number = |value: Option<&Bson>| match value {
        Some(Bson::Double(number)) => Some(*number),
        Some(Bson::Int32(number)) => Some(f64::from(*number)),
        Some(Bson::Null) => None,
        other => panic!("not a number: {other:?}"),
    };
    let of_group = |group: &Document| {
        let at = group.get_datetime("_id").unwrap().timestamp_millis();
        let rows = group.get_i32("rows").unwrap();
        let stats = VM_MEASURES.map(|Measure { name: measure, .. }| {
            Some(Stat {
                min: number(group.get(format!("min_{measure}")))?,
                avg: number(group.get(format!("avg_{measure}")))?,
                max: number(group.get(format!("max_{measure}")))?,
            })
        });
        (u64::try_from(at).unwrap(), (u64::try_from(rows).unwrap(), stats))
    };
    groups.iter().map(of_group).collect()
}

/// Asserts that a series equals the database's own aggregation of the rows.
fn assert_same(series: &VmSeries, direct: &Direct, what: &str) {
    let starts: Vec<_> = series.buckets.iter().map(|bucket| bucket.at_ms).collect();
    assert_eq!(
        starts,
        direct.keys().copied().collect::<Vec<_>>(),
        "{what}: start times of the buckets"
    );
    for bucket in &series.buckets {
        let (rows, expected) = &direct[&bucket.at_ms];
        assert_eq!(
            bucket.count, *rows,
            "{what}: number of rows in the bucket at {}",
            bucket.at_ms
        );
        for ((measure, stat), expected) in bucket.stats.described().zip(expected.into_array()) {
            let measure = measure.name;
            let (Some(stat), Some(expected)) = (stat, expected) else {
                assert_eq!(
                    stat, expected,
                    "{what}: {measure} in the bucket at {}",
                    bucket.at_ms
                );
                continue;
            };
            assert_eq!(
                (stat.min, stat.max),
                (expected.min, expected.max),
                "{what}: {measure} in the bucket at {}",
                bucket.at_ms
            );
            // Averages are rounded to three decimals.
            assert!(
                (stat.avg - expected.avg).abs() <= 0.000_51,
                "{what}: {measure}: {stat:?} {expected:?}"
            );
        }
    }
}

/// Asserts for every resolution that two days of a VM's history equal the aggregated rows.
async fn assert_rolled_up(stack: &Stack, instance: &str, first_day: u64, timezone: &str, what: &str) {
    for (points, resolution, unit, size) in [
        (576, Resolution::FiveMinutes, "minute", 5),
        (48, Resolution::Hour, "hour", 1),
        (2, Resolution::Day, "day", 1),
    ] {
        let series = call::<VmHistory>(stack, &query(instance, first_day, first_day + 2 * DAY, points)).await;
        assert_eq!(series.resolution, resolution);
        let direct = direct(stack, instance, unit, size, timezone).await;
        assert_same(&series, &direct, &format!("{what}, {instance}, {resolution:?}"));
    }
}

/// Two replicas of metrics-svc store unordered and repeated samples of three VMs, in a time zone with an offset of 5:30
/// hours.
#[tokio::test]
async fn rollups_equal_the_directly_aggregated_rows() {
    const ZONE: &str = "+05:30";
    let stack = stack()
        .replicas(Program::Metrics, 2)
        .set(Program::Metrics, "VMWATCH_UTC_OFFSET", ZONE)
        .start()
        .await;
    // The first day starts at midnight in that zone, three days ago.
    let first_day = recent_bucket() / DAY * DAY - 3 * DAY - 5 * HOUR - 30 * MINUTE;
    let vms = ["vm-1", "vm-2", "vm-3"];
    let mut random = Random::new();
    let mut publish_some = async |samples: u64| {
        for _ in 0..samples {
            let instance = vms[usize::try_from(random.below(3)).unwrap()];
            let at_ms = first_day + random.below(27 * HOUR);
            let sample = sample(instance, at_ms, ZONE, random.percentage());
            for _ in 0..=random.below(4) / 3 {
                publish(&stack, &sample).await;
            }
        }
    };
    publish_some(900).await;
    followed(&stack).await;
    for vm in vms {
        assert_rolled_up(&stack, vm, first_day, ZONE, "before late samples").await;
    }
    // These late samples fall into buckets that are already rolled up.
    publish_some(150).await;
    followed(&stack).await;
    for vm in vms {
        assert_rolled_up(&stack, vm, first_day, ZONE, "after late samples").await;
    }
}

#[tokio::test]
async fn rollups_are_complete_if_metrics_svc_is_killed_before_it_computes_them() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "10m")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let from_ms = recent_bucket();
    for second in 0..100 {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 5.0)).await;
    }
    stored(&stack).await;
    assert!(
        dirty_buckets(&stack).await > 0,
        "the rows are stored, and no rollup contains them yet"
    );
    let series = call::<VmHistory>(&stack, &query("vm-1", from_ms - DAY, from_ms + DAY, 600)).await;
    assert!(series.buckets.is_empty(), "{series:?}");
    metrics.process.kill9();
    metrics.process.set("VMWATCH_ROLLUP_INTERVAL", "50ms");
    metrics.restart().await;
    // These samples fall into the second half of the same bucket.
    for second in 100..200 {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 7.0)).await;
    }
    followed(&stack).await;
    let first_day = from_ms / DAY * DAY;
    assert_rolled_up(
        &stack,
        "vm-1",
        first_day,
        "UTC",
        "metrics-svc killed before its rollup pass",
    )
    .await;
}

/// metrics-svc is killed repeatedly while it stores samples of one bucket and computes that bucket's rollups.
#[tokio::test]
async fn rollups_are_complete_if_metrics_svc_is_killed_while_it_stores_samples() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "10ms")
        .set(Program::Metrics, "VMWATCH_BATCH_ROWS", "7")
        .start()
        .await;
    let metrics = stack.replica(Program::Metrics, 0);
    let from_ms = recent_bucket();
    let mut random = Random::new();
    for round in 0..5_u64 {
        for sample_of_round in 0..50 {
            let at_ms = from_ms + (round * 50 + sample_of_round) * SECOND;
            publish(&stack, &sample("vm-1", at_ms, "+00:00", random.percentage())).await;
        }
        eventually("samples of this round are stored", PATIENCE, async || {
            let stored = crate::ingest_support::count(&stack.database).await?;
            (stored > round * 50).then_some(()).ok_or(format!("{stored}"))
        })
        .await;
        metrics.process.kill9();
        metrics.restart().await;
    }
    followed(&stack).await;
    assert_eq!(crate::ingest_support::count(&stack.database).await, Ok(250));
    let first_day = from_ms / DAY * DAY;
    assert_rolled_up(&stack, "vm-1", first_day, "UTC", "metrics-svc killed five times").await;
}

/// A rollup survives the expiry of the rows that it was made from, and late rows do not damage it.
#[tokio::test]
async fn rollups_remain_after_rows_expire() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    for second in 0..30 {
        publish(&stack, &sample("vm-1", from_ms + second * SECOND, "+00:00", 5.0)).await;
    }
    followed(&stack).await;
    let all = query("vm-1", from_ms / DAY * DAY, from_ms / DAY * DAY + 2 * DAY, 576);
    let before = call::<VmHistory>(&stack, &all).await;
    assert_eq!(before.buckets.iter().map(|bucket| bucket.count).sum::<u64>(), 30);
    // Deletes the rows as retention does.
    blocks(&stack.database).delete_many(doc! {}).await.unwrap();
    publish(&stack, &sample("vm-1", from_ms + 31 * SECOND, "+00:00", 99.0)).await;
    followed(&stack).await;
    assert_eq!(call::<VmHistory>(&stack, &all).await, before);
}

/// The series of a short range is computed from the rows, in whole buckets that overlap the range.
#[tokio::test]
async fn history_of_short_range_is_computed_from_rows() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    for second in (0..300).step_by(10) {
        let cpu = f64::from(u32::try_from(second).unwrap()) / 10.0;
        publish(
            &stack,
            &sample("vm-1", from_ms + second * SECOND + 1, "+00:00", cpu),
        )
        .await;
    }
    stored(&stack).await;
    let series = call::<VmHistory>(&stack, &query("vm-1", from_ms, from_ms + 5 * MINUTE, 10)).await;
    assert_eq!(
        (series.resolution, series.step_ms),
        (Resolution::Raw, 30 * SECOND)
    );
    let shown: Vec<_> = series
        .buckets
        .iter()
        .map(|bucket| (bucket.at_ms - from_ms, bucket.count))
        .collect();
    assert_eq!(
        shown,
        (0..10).map(|index| (index * 30 * SECOND, 3)).collect::<Vec<_>>()
    );
    let cpu = series.buckets[1].stats.cpu_util.unwrap();
    assert_eq!((cpu.min, cpu.avg, cpu.max), (3.0, 4.0, 5.0));
    let within = query("vm-1", from_ms + 31 * SECOND, from_ms + 59 * SECOND, 1);
    let within = call::<VmHistory>(&stack, &within).await;
    assert_eq!((within.step_ms, within.buckets.len()), (30 * SECOND, 1));
    assert_eq!(within.buckets[0].count, 3);
}

/// `vmwatch-metrics load` adds the VM to the list of VMs and rolls up the rows of an older database. A chart of a year
/// reads about as many buckets as a chart of a day.
#[tokio::test]
async fn history_of_a_year_is_computed_from_daily_rollups() {
    let stack = stack().start().await;
    let end_ms = recent_bucket() / DAY * DAY;
    let mut lines = String::new();
    let mut random = Random::new();
    // One row for each hour of the year, and one for each minute of the last day.
    let moments = (1..365 * 24)
        .map(|hour| hour * HOUR)
        .chain((1..24 * 60).map(|minute| minute * MINUTE));
    let moments: std::collections::BTreeSet<u64> = moments.collect();
    for back in &moments {
        let sample = sample("vm-1", end_ms - back, "+00:00", random.percentage());
        let vm = sample.vm.unwrap();
        let row = serde_json::json!({
            "instance_id": "vm-1", "create_date": sample.create_date, "proc": vm.proc, "cpu_util": vm.cpu_util,
            "mem": vm.mem, "disk_read": vm.disk_read, "disk_write": vm.disk_write,
            "net_incoming": sample.net_incoming, "net_outgoing": sample.net_outgoing,
        });
        lines.push_str(&row.to_string());
        lines.push('\n');
    }
    let output = stack.command(Program::Metrics, &["load", "-"], &lines);
    assert!(
        output.contains(&format!("loaded {} rows", moments.len())),
        "{output}"
    );

    let year = query("vm-1", end_ms - 365 * DAY, end_ms, 300);
    let series = call::<VmHistory>(&stack, &year).await;
    assert_eq!((series.resolution, series.step_ms), (Resolution::Day, 2 * DAY));
    let counted: u64 = series.buckets.iter().map(|bucket| bucket.count).sum();
    assert_eq!(counted, moments.len() as u64);
    let day = query("vm-1", end_ms - DAY, end_ms, 300);
    let series = call::<VmHistory>(&stack, &day).await;
    assert_eq!(
        (series.resolution, series.buckets.len()),
        (Resolution::FiveMinutes, 288)
    );
    for (name, query) in [("a day", &day), ("a year", &year)] {
        let mut times = Vec::new();
        for _ in 0..20 {
            let started = std::time::Instant::now();
            call::<VmHistory>(&stack, query).await;
            times.push(started.elapsed());
        }
        times.sort_unstable();
        println!(
            "reading the history of {name}: {:?} (median of 20 reads)",
            times[10]
        );
    }

    let vm = call::<Get>(
        &stack,
        &Target {
            instance_id: "vm-1".parse().unwrap(),
        },
    )
    .await
    .vm;
    assert_eq!(vm.sample.unwrap().at_ms, end_ms - MINUTE);
    assert_eq!(vm.last_report_ms, Some(end_ms - MINUTE));
}

/// Rows that older software wrote directly into the database appear in the rollups and in the list of VMs after
/// `vmwatch-metrics rebuild`, or after the first start of metrics-svc.
#[tokio::test]
async fn rebuild_command_and_first_service_start_create_rollups_of_rows_written_in_2017() {
    let stack = stack().start().await;
    let rows = (0..48).map(|hour| {
        vm_row(
            "vm-old",
            &format!("2017-01-{:02}T{:02}:30:00", 1 + hour / 24, hour % 24),
            hour,
        )
    });
    store_vms(&stack, rows).await;
    let target = Target {
        instance_id: "vm-old".parse().unwrap(),
    };
    assert!(call_in::<Get>(&stack, Scope::All, &target).await.is_err());
    let output = stack.command(Program::Metrics, &["rebuild"], "");
    assert!(
        output.contains("rebuilt the rollups, the process names and the list of 1 VMs"),
        "{output}"
    );
    let vm = call::<Get>(&stack, &target).await.vm;
    let sample = vm.sample.unwrap();
    // This time is 2017-01-02T23:30:00Z.
    assert_eq!((sample.at_ms, sample.values.proc), (1_483_399_800_000, Some(47)));
    assert!(vm.cpu_sparkline.iter().all(Option::is_none));
    let year = query("vm-old", 1_483_228_800_000, 1_483_228_800_000 + 2 * DAY, 2);
    let series = call::<VmHistory>(&stack, &year).await;
    let counts: Vec<_> = series.buckets.iter().map(|bucket| bucket.count).collect();
    assert_eq!((series.resolution, counts), (Resolution::Day, vec![24, 24]));

    // Deletes the rollups, so that the next start of metrics-svc is the first with this database and builds them.
    let database = stack.database.handle();
    for name in ["state", "1d", "instances"] {
        let collection = database.collection::<Document>(&format!("vm_samples_{name}"));
        collection.delete_many(doc! {}).await.unwrap();
    }
    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    metrics.restart().await;
    eventually("metrics-svc finds the VM of the old rows", PATIENCE, async || {
        let found = call_in::<Get>(&stack, Scope::All, &target).await;
        found.map(drop).map_err(|fault| fault.to_string())
    })
    .await;
    assert_eq!(call::<VmHistory>(&stack, &year).await, series);
}

/// The history of a VM outside the user's scope is answered like that of a VM that does not exist.
#[tokio::test]
async fn history_of_vm_outside_scope_is_answered_like_a_nonexistent_vm() {
    let stack = stack().start().await;
    let from_ms = recent_bucket();
    publish(&stack, &sample("vm-1", from_ms, "+00:00", 5.0)).await;
    followed(&stack).await;
    let other = || Scope::Only(vec!["vm-2".parse().unwrap()]);
    let past = |instance| query(instance, from_ms, from_ms + MINUTE, 10);
    assert_eq!(call::<VmHistory>(&stack, &past("vm-1")).await.buckets.len(), 1);
    let hidden = call_in::<VmHistory>(&stack, other(), &past("vm-1"))
        .await
        .unwrap();
    assert_eq!(
        hidden,
        call_in::<VmHistory>(&stack, other(), &past("vm-2"))
            .await
            .unwrap()
    );
    let target = |instance: &str| Target {
        instance_id: instance.parse().unwrap(),
    };
    let hidden = call_in::<Get>(&stack, other(), &target("vm-1"))
        .await
        .unwrap_err();
    // While the VMs of hypervisors are unknown, a VM may exist that has no rows.
    stack.command(Program::Lifecycle, &["setup"], "");
    let missing = eventually("the KV bucket of VMs has been read", PATIENCE, async || {
        let found = call_in::<Get>(&stack, other(), &target("vm-2")).await;
        let fault = found.map(|vm| format!("{vm:?}")).unwrap_err();
        (fault.kind == FaultKind::NotFound)
            .then(|| fault.clone())
            .ok_or_else(|| fault.to_string())
    })
    .await;
    assert_eq!((hidden.kind, hidden.message), (missing.kind, missing.message));
}

/// Retention deletes the rows of a bucket one by one. A late row that arrives after the first deletions must still be
/// added to the bucket's rollup.
#[tokio::test]
async fn late_row_is_added_to_rollup_after_older_rows_expired() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_VM_RETENTION", "1h")
        .start()
        .await;
    let start_ms = (unix_millis() - 55 * MINUTE) / (5 * MINUTE) * (5 * MINUTE);
    let row = async |second: u64, cpu: f64| {
        let at_ms = start_ms + (200 + second) * SECOND;
        publish(&stack, &sample("vm-1", at_ms, "+00:00", cpu)).await;
    };
    for second in 0..10 {
        row(second, 10.0).await;
    }
    followed(&stack).await;
    let rollup = async |resolution: &str| {
        let rollups = stack
            .database
            .handle()
            .collection::<Document>(&format!("vm_samples_{resolution}"));
        let bucket = rollups.find_one(doc! {}).await.unwrap().unwrap();
        let sums = bucket.get_document("sums").unwrap();
        let cpu = sums.get_array("cpu_util").unwrap();
        (sums.get_i64("n").unwrap(), cpu[3].as_f64().unwrap())
    };
    assert_eq!(rollup("5m").await, (10, 10.0));
    // Deletes rows as the database does when they expire.
    let cut = DateTime::from_millis(i64::try_from(start_ms + 205 * SECOND).unwrap());
    let expired = blocks(&stack.database)
        .delete_many(doc! { "from": { "$lt": cut } })
        .await
        .unwrap();
    assert_eq!(expired.deleted_count, 5);

    // The late row is published twice, as after a lost acknowledgement.
    for _ in 0..2 {
        row(20, 90.0).await;
        followed(&stack).await;
        for resolution in ["5m", "1h", "1d"] {
            assert_eq!(rollup(resolution).await, (11, 90.0), "{resolution}");
        }
    }
}
