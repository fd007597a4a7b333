//! Tests the process names: which VMs ran a process, and in which hours newest rows by name are searched.

use std::{collections::BTreeSet, env};

use mongodb::bson::{Binary, DateTime, Document, doc, spec::BinarySubtype};
use testkit::{PATIENCE, Program, Stack, figure};
use vmwatch_api::{
    InstanceId, Principal, Role, Scope,
    history::TimeRange,
    lifecycle::Target,
    metrics::{LatestByName, Limit, ProcessByName, Sample},
    process_search::{ProcessMatch, ProcessSearch, ProcessSearchPage, ProcessSearchQuery, VmThatRan},
    processes::ProcessName,
    removal::HistoryRemove,
    time::{CreateDate, UtcOffset, unix_millis},
};
use vmwatch_bus::Context;

use crate::{
    history_support::{
        DAY, HOUR, MINUTE, SECOND, call, call_in, dirty_buckets, followed, process, publish, sample, stack,
        stored,
    },
    rows::{blocks, process_row, store_processes},
};

const WEEK: u64 = 7 * DAY;

pub(crate) fn exact(name: &str) -> ProcessSearchQuery {
    search(name, ProcessMatch::Exact, unix_millis() - WEEK, unix_millis())
}

fn prefix(name: &str) -> ProcessSearchQuery {
    search(name, ProcessMatch::Prefix, unix_millis() - WEEK, unix_millis())
}

pub(crate) fn search(name: &str, matching: ProcessMatch, from_ms: u64, to_ms: u64) -> ProcessSearchQuery {
    let range = TimeRange::new(from_ms, to_ms).unwrap();
    let mut query = ProcessSearchQuery::new(ProcessName::new(name).unwrap(), matching, range).unwrap();
    query.limit = Limit::new(100).unwrap();
    query
}

pub(crate) fn ids(page: &ProcessSearchPage) -> Vec<&str> {
    page.vms.iter().map(|vm| vm.instance_id.as_str()).collect()
}

/// A sample with processes that have these names.
pub(crate) fn running(instance: &str, at_ms: u64, names: &[&str]) -> Sample {
    let mut sample = sample(instance, at_ms, "+00:00", 20.0);
    let names = (1..).zip(names);
    sample.processes = names
        .map(|(pid, name)| process(name, pid, f64::from(pid)))
        .collect();
    sample
}

pub(crate) async fn names_of(stack: &Stack, instance: &str) -> Vec<Document> {
    use futures::TryStreamExt;
    let names = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_process_names");
    let found = names.find(doc! { "instance_id": instance }).await.unwrap();
    found.try_collect().await.unwrap()
}

/// All pages of a search, each with at most `limit` VMs.
pub(crate) async fn all_pages(stack: &Stack, query: &ProcessSearchQuery, limit: u64) -> Vec<VmThatRan> {
    let mut query = query.clone();
    query.limit = Limit::new(limit).unwrap();
    let mut vms = Vec::new();
    loop {
        let page = call::<ProcessSearch>(stack, &query).await;
        assert!(page.vms.len() <= usize::try_from(limit).unwrap());
        vms.extend(page.vms);
        query.after = page.next;
        if query.after.is_none() {
            return vms;
        }
    }
}

/// Names that would be misread if they became part of a pattern, a path or a command of the database.
const SPECIAL: [&str; 6] = ["$ne", "a.b*[c]", "(.*)", "数据库服务", "x\"'\\y", "nginx: worker"];

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one stack is searched in many ways")]
async fn search_finds_the_vms_that_ran_a_process() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    // Both samples are within one hour and one day.
    let hour = (unix_millis() - 3 * HOUR) / HOUR * HOUR;
    let yesterday = hour - DAY;
    let mut first = running("vm-a", hour + MINUTE, &["nginx", "nginx", "bash"]);
    first.processes[1].cpu_util = 150.0;
    publish(&stack, &first).await;
    publish(&stack, &running("vm-a", hour + 7 * MINUTE, &["nginx"])).await;
    publish(&stack, &running("vm-a", yesterday + MINUTE, &["bash", "nginx"])).await;
    publish(&stack, &running("vm-a-2", hour + MINUTE, &["nginx-debug"])).await;
    publish(&stack, &running("vm-b", hour + MINUTE, &SPECIAL)).await;
    publish(&stack, &running("vm-c", hour + MINUTE, &["systemd-timesyn"])).await;
    // A part of a sample that has no VM row, and whose other parts come later.
    let mut whole = running("vm-d", hour + MINUTE, &["worker"; 5]);
    let mut part = whole.clone();
    (part.vm, part.part) = (None, 1);
    part.processes.drain(..2);
    publish(&stack, &part).await;
    followed(&stack).await;
    let found = call::<ProcessSearch>(&stack, &exact("worker")).await;
    assert_eq!(found.vms[0].processes, 3);
    whole.processes.truncate(2);
    publish(&stack, &whole).await;
    followed(&stack).await;

    let found = call::<ProcessSearch>(&stack, &exact("nginx")).await;
    let vm = VmThatRan {
        instance_id: "vm-a".parse().unwrap(),
        vm_name: None,
        names: vec!["nginx".to_owned()],
        first_ms: yesterday + MINUTE,
        last_ms: hour + 7 * MINUTE,
        hours: 2,
        processes: 2,
        cpu_util: 150.0,
        mem: 0.2,
    };
    let expected = std::slice::from_ref(&vm);
    assert_eq!(found.vms, expected);
    assert_eq!((found.next, found.unsearched), (None, vec![]));
    let now = unix_millis();
    assert!(
        found
            .complete_to_ms
            .is_some_and(|at| at > now - MINUTE && at <= now)
    );
    assert_eq!(
        (found.from_ms % HOUR, found.to_ms % HOUR),
        (0, 0),
        "the range is extended to whole hours"
    );

    let found = call::<ProcessSearch>(&stack, &prefix("ngi")).await;
    assert_eq!(ids(&found), ["vm-a", "vm-a-2", "vm-b"]);
    assert_eq!(found.vms[2].names, ["nginx: worker"]);
    for name in SPECIAL {
        let found = call::<ProcessSearch>(&stack, &exact(name)).await;
        assert_eq!(ids(&found), ["vm-b"], "{name}");
        let start: String = name.chars().take(3).collect();
        let found = call::<ProcessSearch>(&stack, &prefix(&start)).await;
        assert!(ids(&found).contains(&"vm-b"), "{start}");
    }
    for name in ["systemd-timesyncd", "systemd-timesyn"] {
        assert_eq!(ids(&call::<ProcessSearch>(&stack, &exact(name)).await), ["vm-c"]);
    }
    for absent in ["ngin", "nginx2", "NGINX", "bash*", "none"] {
        assert!(
            call::<ProcessSearch>(&stack, &exact(absent)).await.vms.is_empty(),
            "{absent}"
        );
    }

    // Only the hours of the range count.
    let within = |from_ms, to_ms| search("nginx", ProcessMatch::Exact, from_ms, to_ms);
    let found = call::<ProcessSearch>(&stack, &within(hour - HOUR, hour)).await;
    assert!(found.vms.is_empty());
    let found = call::<ProcessSearch>(&stack, &within(yesterday - DAY, yesterday + 1)).await;
    assert_eq!(
        (found.vms[0].last_ms, found.vms[0].hours, found.vms[0].processes),
        (yesterday + MINUTE, 1, 1)
    );
    assert_eq!(
        ids(&call::<ProcessSearch>(&stack, &within(hour, hour + 1)).await),
        ["vm-a"]
    );

    // A user finds only VMs in the scope of that user.
    let only = |ids: &[&str]| Scope::Only(ids.iter().map(|id| id.parse().unwrap()).collect());
    let in_scope = async |scope| {
        call_in::<ProcessSearch>(&stack, scope, &prefix("ngi"))
            .await
            .unwrap()
    };
    assert_eq!(
        ids(&in_scope(only(&["vm-b", "vm-a-2"])).await),
        ["vm-a-2", "vm-b"]
    );
    assert_eq!(ids(&in_scope(only(&["vm-c", "vm-x"])).await), [""; 0]);
    assert_eq!(ids(&in_scope(only(&[])).await), [""; 0]);
    assert_eq!(ids(&in_scope(Scope::Unknown).await), [""; 0]);
    let mut long = search(
        "nginx",
        ProcessMatch::Exact,
        unix_millis() - 300 * DAY,
        unix_millis(),
    );
    long.limit = Limit::new(1).unwrap();
    let found = call_in::<ProcessSearch>(&stack, only(&["vm-b", "vm-a"]), &long).await;
    assert_eq!(found.unwrap().vms, expected);

    // The pages contain each VM once.
    let vms = all_pages(&stack, &prefix("ngi"), 1).await;
    assert_eq!(vms, call::<ProcessSearch>(&stack, &prefix("ngi")).await.vms);

    // Samples that arrive again, whole or in other parts, change nothing.
    let before = names_of(&stack, "vm-d").await;
    let found = call::<ProcessSearch>(&stack, &exact("worker")).await;
    assert_eq!(
        found.vms[0].processes, 5,
        "the parts of a sample are counted together"
    );
    for again in [&first, &part, &whole, &part] {
        publish(&stack, again).await;
    }
    followed(&stack).await;
    assert_eq!(names_of(&stack, "vm-d").await, before);
    assert_eq!(call::<ProcessSearch>(&stack, &exact("nginx")).await.vms, expected);

    // A rebuild restores them from the rows.
    let names = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_process_names");
    names.delete_many(doc! {}).await.unwrap();
    assert!(
        call::<ProcessSearch>(&stack, &exact("nginx"))
            .await
            .vms
            .is_empty()
    );
    stack.command(Program::Metrics, &["rebuild"], "");
    assert_eq!(call::<ProcessSearch>(&stack, &exact("nginx")).await.vms, expected);

    // A damaged document is not trusted: the rows are read instead.
    let bytes = vec![1, 2, 3];
    let subtype = BinarySubtype::Generic;
    let damage = doc! { "$set": { "statistics": Binary { subtype, bytes } } };
    names.update_many(doc! {}, damage).await.unwrap();
    assert_eq!(call::<ProcessSearch>(&stack, &exact("nginx")).await.vms, expected);
    assert!(call::<ProcessSearch>(&stack, &exact("none")).await.vms.is_empty());
    stack.command(Program::Metrics, &["rebuild"], "");
    assert_eq!(call::<ProcessSearch>(&stack, &exact("nginx")).await.vms, expected);

    remove(&stack, "vm-a").await;
    assert!(
        call::<ProcessSearch>(&stack, &exact("nginx"))
            .await
            .vms
            .is_empty()
    );
    assert!(names_of(&stack, "vm-a").await.is_empty());
    assert_eq!(
        ids(&call::<ProcessSearch>(&stack, &prefix("ngi")).await),
        ["vm-a-2", "vm-b"]
    );
}

pub(crate) async fn remove(stack: &Stack, instance: &str) {
    let principal = Principal {
        user: "admin".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    };
    let context = Context::new(PATIENCE).as_principal(principal).with_fresh_key();
    let instance_id: InstanceId = instance.parse().unwrap();
    let removed = stack
        .bus
        .call::<HistoryRemove>(&context, &Target { instance_id })
        .await;
    removed.unwrap();
}

/// Number of different names that one guest has in a day: a million under `./dev soak`.
fn many_names() -> u32 {
    let is_long = env::var_os("VMWATCH_TEST_SOAK").is_some_and(|minutes| !minutes.is_empty());
    if is_long { 1_000_000 } else { 25_000 }
}

/// A guest cannot make the names of a day grow without bound. Further names are stored as one, and found in the rows of the
/// VM, which keep them.
#[tokio::test]
async fn guest_with_many_names_is_searched_by_its_rows() {
    let stack = stack().start().await;
    let hour = (unix_millis() - 3 * HOUR) / HOUR * HOUR;
    publish(&stack, &running("vm-other", hour, &["bash"])).await;
    let count = many_names();
    for start in (0..count).step_by(1000) {
        let mut sample = sample("vm-many", hour + u64::from(start) * 3, "+00:00", 1.0);
        sample.processes = (start..(start + 1000).min(count))
            .map(|pid| process(&format!("name-{pid:07}"), pid, 1.0))
            .collect();
        publish(&stack, &sample).await;
    }
    followed(&stack).await;
    let documents = names_of(&stack, "vm-many").await;
    let stored: BTreeSet<&str> = documents
        .iter()
        .flat_map(|document| document.get_array("names").unwrap())
        .filter_map(|name| name.as_str())
        .collect();
    assert_eq!((stored.len(), stored.contains("(other)")), (20_001, true));
    assert!(documents[0].get_datetime("full").is_ok());

    let names: BTreeSet<String> = (0..count).map(|pid| format!("name-{pid:07}")).collect();
    let left_out = names.iter().find(|name| !stored.contains(name.as_str())).unwrap();
    let kept = *stored.last().unwrap();
    for (name, processes) in [(kept, 1), (left_out.as_str(), 1), ("(other)", 1000)] {
        let found = call::<ProcessSearch>(&stack, &exact(name)).await;
        assert_eq!(ids(&found), ["vm-many"], "{name}");
        assert_eq!(
            (found.vms[0].hours, found.vms[0].processes),
            (1, processes),
            "{name}"
        );
        assert_eq!(found.unsearched, []);
    }
    assert_eq!(by_name(&stack, "vm-many", left_out, 10).await.len(), 1);
    assert_eq!(by_name(&stack, "vm-many", "(other)", 10).await, [""; 0]);
    let other = call::<ProcessSearch>(&stack, &exact("bash")).await;
    assert_eq!(ids(&other), ["vm-other"]);
    // The rows of a VM outside the scope are not read.
    let scope = Scope::Only(vec!["vm-other".parse().unwrap()]);
    let found = call_in::<ProcessSearch>(&stack, scope, &exact(left_out))
        .await
        .unwrap();
    assert!(found.vms.is_empty());
    let resident = crate::ingest_support::resident(&stack.replica(Program::Metrics, 0).process);
    assert!(resident < 512 << 10, "{resident} KiB");
    figure(
        "process_names_of_many_metrics_svc_kib",
        f64::from(u32::try_from(resident).unwrap()),
    );
}

async fn by_name(stack: &Stack, instance: &str, name: &str, limit: u64) -> Vec<String> {
    let latest = LatestByName {
        instance_id: instance.parse().unwrap(),
        proc_name: Some(name.to_owned()),
        limit: Limit::new(limit).unwrap(),
        before: None,
    };
    let page = call::<ProcessByName>(stack, &latest).await;
    let rows: Vec<serde_json::Value> = serde_json::from_str(page.rows.as_json()).unwrap();
    rows.iter()
        .map(|row| row["create_date"].as_str().unwrap().to_owned())
        .collect()
}

/// Damages the blocks of all hours but these, so that decoding one of them is counted.
async fn damage_other_hours(stack: &Stack, hours: &[u64]) -> u64 {
    let hours: Vec<_> = hours
        .iter()
        .map(|hour| DateTime::from_millis(i64::try_from(*hour).unwrap()))
        .collect();
    let (subtype, bytes) = (BinarySubtype::Generic, vec![0; 9]);
    let damage = doc! { "$set": { "data": Binary { subtype, bytes } } };
    let others = doc! { "kind": "process", "hour": { "$nin": hours } };
    let changed = blocks(&stack.database).update_many(others, damage).await.unwrap();
    changed.modified_count
}

#[tokio::test]
async fn newest_rows_by_name_are_read_only_from_hours_in_which_it_ran() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .start()
        .await;
    let now = unix_millis() / HOUR * HOUR;
    let ran = [now - 30 * HOUR, now - 7 * HOUR];
    let mut dates = Vec::new();
    for hour in (4..60).map(|hours| now - hours * HOUR) {
        let names = if ran.contains(&hour) {
            &["bash", "backup"][..]
        } else {
            &["bash"]
        };
        let sample = running("vm-1", hour + 5 * SECOND, names);
        if ran.contains(&hour) {
            dates.insert(0, sample.create_date.to_string());
        }
        publish(&stack, &sample).await;
    }
    dates.sort_by(|one, other| other.cmp(one));
    followed(&stack).await;
    // The newest hours are read in any case.
    let readable = [&ran[..], &[4, 5, 6].map(|hours| now - hours * HOUR)].concat();
    assert!(damage_other_hours(&stack, &readable).await > 50);

    let metrics = stack.replica(Program::Metrics, 0);
    assert_eq!(by_name(&stack, "vm-1", "backup", 100).await, dates);
    assert_eq!(by_name(&stack, "vm-1", "backup", 1).await, dates[..1]);
    assert_eq!(by_name(&stack, "vm-1", "none", 100).await, [""; 0]);
    assert_eq!(metrics.metric("vmwatch_blocks_unreadable_total").await, None);
    // The other process ran in all hours, so that the damaged blocks are noticed.
    assert_eq!(by_name(&stack, "vm-1", "bash", 100).await.len(), 5);
    assert!(metrics.metric("vmwatch_blocks_unreadable_total").await > Some(50.0));
}

/// Rows whose names were not collected yet are found by name, and a search says that it lacks them.
#[tokio::test]
async fn rows_without_names_are_found_and_search_says_up_to_when_it_is_complete() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_ROLLUP_INTERVAL", "10m")
        .start()
        .await;
    let before = unix_millis();
    let old = running("vm-1", before - 30 * HOUR, &["backup"]);
    publish(&stack, &old).await;
    stored(&stack).await;
    assert_eq!(dirty_buckets(&stack).await, 1);
    assert_eq!(
        by_name(&stack, "vm-1", "backup", 10).await,
        [old.create_date.as_str()]
    );
    let found = call::<ProcessSearch>(&stack, &exact("backup")).await;
    assert!(found.vms.is_empty());
    assert!(
        found
            .complete_to_ms
            .is_some_and(|at| at <= unix_millis() && at + 2 * SECOND > before)
    );
    testkit::eventually("time passes", PATIENCE, async || {
        let found = call::<ProcessSearch>(&stack, &exact("backup")).await;
        let late = unix_millis() - found.complete_to_ms.unwrap();
        (late > 2 * SECOND)
            .then_some(())
            .ok_or_else(|| format!("{late} ms"))
    })
    .await;
}

/// Rows that other software has written and that `compact-flat` or `load` have moved into blocks are found like any others.
/// Their names are kept as long as the rows, which never expire without an internal date.
#[tokio::test]
async fn names_of_moved_and_loaded_rows_are_found() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .start()
        .await;
    let date = "2017-01-01T21:37:59.001065";
    store_processes(&stack, [process_row("vm-flat", date, "lvmetad", 479)]).await;
    let line = mongodb::bson::Bson::Document(process_row("vm-loaded", date, "lvmetad", 480));
    let line = format!("{}\n", line.into_relaxed_extjson());
    stack.command(Program::Metrics, &["load", "-"], &line);
    let of_2017 = search(
        "lvmetad",
        ProcessMatch::Exact,
        1_483_228_800_000,
        1_483_401_600_000,
    );
    assert_eq!(ids(&call::<ProcessSearch>(&stack, &of_2017).await), ["vm-loaded"]);

    let delete_after = ("VMWATCH_COMPACTION_DELETE_AFTER".to_owned(), "1s".to_owned());
    let (user, metrics) = ("vmwatch-metrics", Program::Metrics);
    let moved = stack.try_command(user, metrics, &["compact-flat"], "", &[delete_after]);
    let moved = String::from_utf8_lossy(&moved.stdout).into_owned();
    assert!(moved.contains("deleted within 0 s"), "{moved}");
    let found = call::<ProcessSearch>(&stack, &of_2017).await;
    assert_eq!(ids(&found), ["vm-flat", "vm-loaded"]);
    for instance in ["vm-flat", "vm-loaded"] {
        assert_eq!(by_name(&stack, instance, "lvmetad", 10).await, [date]);
        assert_eq!(by_name(&stack, instance, "other", 10).await, [""; 0]);
        let names = names_of(&stack, instance).await;
        assert!(!names[0].contains_key("expires"), "{}", names[0]);
    }

    // From then on the rows expire, and so do their names. Compaction merges only blocks that expire.
    let queue = stack.database.handle().collection::<Document>("blocks_hours");
    queue.delete_many(doc! {}).await.unwrap();
    stack.command(Program::Metrics, &["backfill-dates"], "");
    let instances: BTreeSet<_> = queue
        .distinct("instance_id", doc! {})
        .await
        .unwrap()
        .into_iter()
        .map(|id| id.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(instances, ["vm-flat", "vm-loaded"].map(str::to_owned).into());
    let blocks: Vec<Document> = {
        use futures::TryStreamExt;
        let blocks = blocks(&stack.database).find(doc! {}).await.unwrap();
        blocks.try_collect().await.unwrap()
    };
    for block in blocks {
        let names = names_of(&stack, block.get_str("instance_id").unwrap()).await;
        assert_eq!(names[0].get("expires"), block.get("expires"), "{}", names[0]);
    }
    assert_eq!(
        ids(&call::<ProcessSearch>(&stack, &of_2017).await),
        ["vm-flat", "vm-loaded"]
    );
}

/// The encoding of the statistics of names that were seen once in an hour of the day.
fn statistics(names: usize, hour: u32) -> Binary {
    let mut rows = Vec::new();
    for _ in 0..names {
        rows.extend((hour * 3_600_000).to_le_bytes());
        rows.extend((hour * 3_600_000).to_le_bytes());
        rows.extend(&(1_u32 << hour).to_le_bytes()[..3]);
        rows.extend(1_u32.to_le_bytes());
        rows.extend(2.5_f64.to_le_bytes());
        rows.extend(0.5_f64.to_le_bytes());
    }
    let mut bytes = vec![1];
    bytes.extend(crc32fast::hash(&rows).to_le_bytes());
    bytes.extend(rows);
    let subtype = BinarySubtype::Generic;
    Binary { subtype, bytes }
}

/// Stores what is known of VMs with these process names on some days up to today.
pub(crate) async fn seed(stack: &Stack, vms: u32, days: u64, names: impl Fn(u32) -> Vec<String>) {
    let collection = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_process_names");
    let today = unix_millis() / DAY;
    let mut documents = Vec::new();
    for vm in 0..vms {
        let mut names = names(vm);
        names.sort_unstable();
        for day in today + 1 - days..=today {
            let date = CreateDate::at_millis(day * DAY, UtcOffset::UTC);
            let instance = format!("vm-{vm:04}");
            documents.push(doc! {
                "_id": format!("{instance} {}", &date.as_str()[..10]),
                "instance_id": instance,
                "day": DateTime::from_millis(i64::try_from(day * DAY).unwrap()),
                "names": &names,
                "statistics": statistics(names.len(), 0),
                "generation": 1_i64,
            });
        }
    }
    // A larger write takes the development database very long.
    for batch in documents.chunks(500) {
        collection.insert_many(batch).await.unwrap();
    }
}

/// A name that most VMs of a large fleet ran is searched in the order of the VMs, so that the first page is not read from
/// all of them.
#[tokio::test]
async fn name_that_all_vms_ran_is_found_page_by_page() {
    let stack = stack().start().await;
    let (vms, days) = (900, 5);
    seed(&stack, vms, days, |vm| {
        let rare = (vm % 100 == 7).then(|| format!("rare-{vm}"));
        ["common".to_owned()].into_iter().chain(rare).collect()
    })
    .await;
    let names = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_process_names");
    let full =
        doc! { "$set": { "full": DateTime::from_millis(i64::try_from(unix_millis() / DAY * DAY).unwrap()) } };
    let one = doc! { "instance_id": "vm-0500" };
    names.update_one(one, full).await.unwrap();

    let found = all_pages(&stack, &exact("common"), 100).await;
    let expected: Vec<String> = (0..vms).map(|vm| format!("vm-{vm:04}")).collect();
    let ids: Vec<&str> = found.iter().map(|vm| vm.instance_id.as_str()).collect();
    assert_eq!(ids, expected);
    let all_alike = found
        .iter()
        .all(|vm| (u64::from(vm.hours), vm.processes, vm.cpu_util) == (days, 1, 2.5));
    assert!(all_alike, "{:?}", found[0]);
    let mut page = exact("common");
    page.limit = Limit::new(100).unwrap();
    let began = std::time::Instant::now();
    let first = call::<ProcessSearch>(&stack, &page).await;
    figure(
        "process_search_all_of_900_vms_ms",
        began.elapsed().as_secs_f64() * 1000.0,
    );
    assert_eq!((first.vms.len(), first.next.unwrap().as_str()), (100, "vm-0099"));

    let rare = all_pages(&stack, &prefix("rare-"), 4).await;
    let ids: Vec<&str> = rare.iter().map(|vm| vm.instance_id.as_str()).collect();
    assert_eq!(ids.len(), 9);
    assert_eq!((ids[0], ids[8]), ("vm-0007", "vm-0807"));
    let began = std::time::Instant::now();
    call::<ProcessSearch>(&stack, &prefix("rare-")).await;
    figure(
        "process_search_9_of_900_vms_ms",
        began.elapsed().as_secs_f64() * 1000.0,
    );
}
