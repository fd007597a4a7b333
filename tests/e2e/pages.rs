//! Tests lists that are too large for one NATS message: they are returned in pages, without losing an entry.

use std::collections::BTreeSet;

use mongodb::bson::{Bson, DateTime, Document, doc};
use serde_json::{Value, json};
use testkit::Stack;
use vmwatch_api::{
    InstanceId, Method, PAGE_BYTES, Role, Scope,
    audit::{self, AUDIT_SUBJECT_PREFIX, AuditFilter},
    history::{Points, TimeRange, VmHistory, VmHistoryQuery},
    metrics::{Latest, LatestByName, Limit, ProcessByName, ProcessLatest, RowPosition},
    processes::{
        ProcessEvents, ProcessEventsQuery, ProcessHistory, ProcessHistoryQuery, ProcessName, ProcessSelector,
        ProcessSort, ProcessesAt, ProcessesAtQuery,
    },
    time::{CreateDate, UtcOffset, unix_millis},
    users::{UserPage, UsersList},
};

use crate::{
    history_support::{SECOND, call, stored},
    rest::client::{Api, process, publish, sample, stack},
    rows::{process_row, store_processes, store_vms, vm_row},
};

/// The maximum number of processes on one page of the REST API.
const PROCESSES: u32 = 1000;
/// Returns a process name of which JSON encodes each byte as six bytes.
fn hostile_name() -> String {
    "\u{1}".repeat(256)
}

fn vm() -> InstanceId {
    "vm-1".parse().unwrap()
}

/// Publishes the process table of a hostile guest, in as many messages as an agent sends.
pub(crate) async fn publish_hostile_table(stack: &Stack, instance: &str, at_ms: u64) {
    let pids: Vec<u32> = (1..=PROCESSES).collect();
    // 16 rows with such names are just below the maximum size of a sample part.
    for (index, chunk) in (0..).zip(pids.chunks(16)) {
        let mut body = sample(instance, at_ms, 5.0);
        body.part = index;
        body.vm = body.vm.filter(|_| index == 0);
        body.processes = chunk
            .iter()
            .map(|&pid| {
                let mut process = process(&hostile_name(), pid, 1.0, at_ms - 60 * SECOND);
                // Half of the processes have ended, all at the same time.
                process.shutdown_time = (pid % 2 == 0).then_some(process.running_time + 30.0);
                process
            })
            .collect();
        publish(stack, &body).await;
    }
    stored(stack).await;
}

/// Asserts that a reply is not larger than the maximum size of a page.
fn check_size<M: Method>(reply: &M::Reply) {
    let bytes = serde_json::to_vec(reply).unwrap().len();
    assert!(bytes < PAGE_BYTES + 1024, "{}: {bytes} bytes", M::INFO.subject);
}

fn distinct(pids: &[i64]) {
    let set: BTreeSet<_> = pids.iter().copied().collect();
    assert_eq!(set, (1..=i64::from(PROCESSES)).collect());
    assert_eq!(pids.len(), PROCESSES as usize, "each process is listed once");
}

/// Reads all pages of a list of process rows. Returns the pids and the number of pages.
async fn rows_on_the_bus(stack: &Stack, by_name: bool) -> (Vec<i64>, usize) {
    let (mut limit, mut before): (Limit, Option<RowPosition>) = (Limit::new(1000).unwrap(), None);
    let (mut pids, mut pages) = (Vec::new(), 0);
    loop {
        let page = if by_name {
            let query = LatestByName {
                instance_id: vm(),
                limit,
                proc_name: Some(hostile_name()),
                before,
            };
            call::<ProcessByName>(stack, &query).await
        } else {
            let query = Latest {
                instance_id: vm(),
                limit,
                before,
            };
            call::<ProcessLatest>(stack, &query).await
        };
        check_size::<ProcessLatest>(&page);
        pages += 1;
        let rows: Vec<Value> = serde_json::from_str(page.rows.as_json()).unwrap();
        pids.extend(rows.iter().map(|row| row["pid"].as_i64().unwrap()));
        let Some(next) = page.next else {
            return (pids, pages);
        };
        (limit, before) = (next.limit, Some(next.before));
    }
}

async fn table_on_the_bus(stack: &Stack, sort: ProcessSort) -> (Vec<i64>, usize) {
    let mut query = ProcessesAtQuery {
        instance_id: vm(),
        at_ms: None,
        sort,
        order: None,
        name: None,
        limit: Limit::new(1000).unwrap(),
        after: None,
    };
    let (mut pids, mut pages) = (Vec::new(), 0);
    loop {
        let page = call::<ProcessesAt>(stack, &query).await;
        check_size::<ProcessesAt>(&page);
        assert_eq!(page.total, u64::from(PROCESSES));
        pages += 1;
        pids.extend(page.processes.iter().map(|process| i64::from(process.pid)));
        let Some(next) = page.next else {
            return (pids, pages);
        };
        query.after = Some(next);
    }
}

async fn events_on_the_bus(stack: &Stack, range: TimeRange) -> (usize, usize) {
    let mut query = ProcessEventsQuery {
        instance_id: vm(),
        range,
        limit: Limit::new(1000).unwrap(),
        before: None,
    };
    let (mut positions, mut pages) = (Vec::new(), 0);
    loop {
        let page = call::<ProcessEvents>(stack, &query).await;
        check_size::<ProcessEvents>(&page);
        pages += 1;
        positions.extend(
            page.events
                .iter()
                .map(vmwatch_api::processes::ProcessEvent::position),
        );
        if page.next.is_none() {
            break;
        }
        query.before = page.next;
    }
    assert!(
        positions.is_sorted_by(|newer, older| newer > older),
        "each event is listed once, newest first"
    );
    (positions.len(), pages)
}

/// Reads all pages of a list of the REST API. Returns all items and the number of pages.
async fn all_of(api: &Api, path: &str, items: &str, cursor: &str) -> (Vec<Value>, usize) {
    let (mut all, mut pages) = (Vec::new(), 0);
    let mut page = api.read(path).await;
    loop {
        pages += 1;
        all.extend(page[items].as_array().unwrap().iter().cloned());
        let next = match &page["next"] {
            Value::Null => return (all, pages),
            Value::String(next) => next.clone(),
            other => other.to_string(),
        };
        page = api.read(&format!("{path}&{cursor}={next}")).await;
    }
}

#[tokio::test]
async fn process_lists_are_complete_despite_names_that_fill_a_message() {
    let stack = stack().start().await;
    let at_ms = unix_millis() / SECOND * SECOND - 5 * SECOND;
    publish_hostile_table(&stack, "vm-1", at_ms).await;

    for by_name in [false, true] {
        let (pids, pages) = rows_on_the_bus(&stack, by_name).await;
        distinct(&pids);
        assert!(pages > 1, "the list has {pages} pages instead of several");
    }
    for sort in [ProcessSort::Cpu, ProcessSort::Pid, ProcessSort::Name] {
        let (pids, pages) = table_on_the_bus(&stack, sort).await;
        distinct(&pids);
        assert!(pages > 1, "the list has {pages} pages instead of several");
        // All rows have the same values and the same name, so they are sorted by pid.
        assert!(pids.is_sorted(), "{sort:?}");
    }
    let range = TimeRange::new(at_ms - 120 * SECOND, at_ms).unwrap();
    let (events, pages) = events_on_the_bus(&stack, range).await;
    assert_eq!(events, PROCESSES as usize * 3 / 2);
    assert!(pages > 1, "the list has {pages} pages instead of several");

    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    for limit in [1000, 130] {
        let path = format!("/vms/vm-1/processes?sort=name&limit={limit}");
        let (rows, pages) = all_of(&api, &path, "processes", "cursor").await;
        distinct(
            &rows
                .iter()
                .map(|row| row["pid"].as_i64().unwrap())
                .collect::<Vec<_>>(),
        );
        assert!(rows.iter().all(|row| row["name"] == hostile_name().as_str()) && pages > 1);
        let path = format!("/vms/vm-1/processes/events?limit={limit}");
        let (rows, pages) = all_of(&api, &path, "events", "cursor").await;
        assert!(rows.len() == PROCESSES as usize * 3 / 2 && pages > 1);
    }
    let gone = format!("/vms/vm-1/processes?cursor={}.{}", at_ms - 1, "0".repeat(24));
    api.get(&gone).await.problem(404, "not_found");

    // The API of 2017 has no pages, so one answer contains all rows.
    let token = api.token.clone().unwrap();
    for (method, format) in [(611_711, "json"), (611_711, "python"), (611_712, "json")] {
        let body = json!({
            "method": method, "data": { "instance_id": "vm-1" }, "session_id": token, "limit": 1000,
            "proc_name": hostile_name(), "format": format,
        });
        let answer = stack.gateway(0).post(&body).await.json();
        assert_eq!(answer["status_code"], 1, "{}", answer["message"]);
        let pids = answer["data"].as_array().unwrap().iter().map(|row| match row {
            Value::String(python) => {
                let digits = python.split_once("u'pid': ").unwrap().1;
                digits.split_once(',').unwrap().0.parse().unwrap()
            }
            row => row["pid"].as_i64().unwrap(),
        });
        distinct(&pids.collect::<Vec<_>>());
    }
}

/// Returns a user whose scope has the maximum number of VMs, with ids of the maximum length.
fn large_user(number: usize) -> Document {
    let instances = (0..500).map(|index| Bson::from(format!("{number:032}{index:032}")));
    doc! {
        "_id": format!("user-{number:03}"), "name": format!("user-{number:03}"), "password_hash": "",
        "role": "viewer", "created": DateTime::now(),
        "scope": { "only": instances.collect::<Vec<_>>() }, "sessions_not_before": DateTime::now(),
    }
}

/// Returns an operation as lifecycle-svc records it, with many steps.
fn large_operation(number: usize) -> Value {
    let id = format!("{number:032x}");
    let event = json!({ "at_ms": 1, "state": "succeeded", "text": "x".repeat(4000) });
    json!({
        "operation": {
            "id": id, "verb": "start", "instance_id": "vm-1", "user": "ann", "request_id": "r",
            "requested_at_ms": unix_millis(), "deadline_ms": 1, "finished_at_ms": 2, "state": "succeeded",
            "machine": "running", "history": [event],
        },
        "method": "lifecycle.start", "lease": { "owner": "nobody", "until_ms": 1 }, "acts": 1,
    })
}

#[tokio::test]
async fn lists_of_users_operations_and_audit_have_bounded_pages() {
    const USERS: usize = 60;
    const RECORDS: usize = 500;
    let stack = stack().start().await;
    let users = stack.database.handle().collection::<Document>("users");
    users.insert_many((0..USERS).map(large_user)).await.unwrap();
    let jetstream = stack.bus.jetstream_for_tests();
    let operations = jetstream.get_key_value("vmwatch_operations").await.unwrap();
    for number in 0..RECORDS {
        let operation = large_operation(number).to_string();
        operations
            .put(format!("{number:032x}"), operation.into())
            .await
            .unwrap();
        let record = json!({
            "at_ms": unix_millis(), "action": "test.pages", "user": "ann", "request_id": "r", "result": "succeeded",
            "detail": "x".repeat(4000),
        });
        let subject = format!("{AUDIT_SUBJECT_PREFIX}test.pages");
        let sent = jetstream.publish(subject, record.to_string().into()).await;
        sent.unwrap().await.unwrap();
    }

    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    let (listed, pages) = all_of(&api, "/users?limit=1000", "users", "after").await;
    // The list includes the first administrator and the user of the test's own session.
    assert!(
        listed.len() == USERS + 2 && pages > 1,
        "{} items on {pages} pages",
        listed.len()
    );
    let (listed, pages) = all_of(&api, "/audit?limit=1000&action=test.pages", "records", "before").await;
    assert!(
        listed.len() == RECORDS && pages > 1,
        "{} items on {pages} pages",
        listed.len()
    );
    testkit::eventually("all operations are listed", testkit::PATIENCE, async || {
        let (listed, pages) = all_of(&api, "/operations?limit=1000", "operations", "cursor").await;
        let ids: BTreeSet<_> = listed.iter().map(|row| row["id"].to_string()).collect();
        let whole = listed.len() == RECORDS && ids.len() == RECORDS && pages > 1;
        whole
            .then_some(())
            .ok_or_else(|| format!("{} items on {pages} pages", listed.len()))
    })
    .await;

    let first = UserPage {
        after: None,
        limit: Limit::new(1000).unwrap(),
    };
    let admin = vmwatch_bus::Context::new(testkit::PATIENCE).as_principal(vmwatch_api::Principal {
        user: "test".to_owned(),
        role: Role::Admin,
        scope: Scope::All,
    });
    check_size::<UsersList>(&stack.bus.call::<UsersList>(&admin, &first).await.unwrap());
    let newest = AuditFilter {
        limit: Limit::new(1000).unwrap(),
        ..AuditFilter::default()
    };
    check_size::<audit::List>(&stack.bus.call::<audit::List>(&admin, &newest).await.unwrap());
}

#[tokio::test]
async fn charts_with_the_longest_numbers_are_complete() {
    const POINTS: u64 = 2000;
    let stack = stack().start().await;
    let first_ms = unix_millis() / SECOND * SECOND - (POINTS + 10) * SECOND;
    let date = |second: u64| CreateDate::at_millis(first_ms + second * SECOND, UtcOffset::UTC);
    // These numbers have 17 digits and an exponent.
    let number = 1.234_567_890_123_456_7e-300;
    let numbers = |row: Document| {
        let row = row.into_iter().map(|(key, value)| match value {
            Bson::Double(_) if key != "running_time" => (key, Bson::Double(number)),
            other => (key, other),
        });
        row.collect::<Document>()
    };
    store_vms(
        &stack,
        (0..POINTS).map(|second| numbers(vm_row("vm-1", date(second).as_str(), 1))),
    )
    .await;
    store_processes(
        &stack,
        (0..POINTS).map(|second| numbers(process_row("vm-1", date(second).as_str(), "p", 1))),
    )
    .await;
    let range = TimeRange::new(first_ms, first_ms + POINTS * SECOND).unwrap();
    let query = VmHistoryQuery {
        instance_id: vm(),
        range,
        points: Points::new(POINTS).unwrap(),
        after_ms: None,
    };
    let page = call::<VmHistory>(&stack, &query).await;
    check_size::<VmHistory>(&page);
    assert!(page.next.is_some(), "the chart must need two pages");
    let query = ProcessHistoryQuery {
        instance_id: vm(),
        process: ProcessSelector::new(ProcessName::new("p"), None).unwrap(),
        range,
        points: query.points,
        after_ms: None,
    };
    check_size::<ProcessHistory>(&call::<ProcessHistory>(&stack, &query).await);

    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let moment = crate::rest::client::rfc3339;
    let range = format!(
        "from={}&to={}&points={POINTS}",
        moment(range.from_ms()),
        moment(range.to_ms())
    );
    for path in [
        format!("/vms/vm-1/samples?{range}"),
        format!("/vms/vm-1/processes/history?name=p&{range}"),
    ] {
        let series = api.read(&path).await;
        let buckets = series["buckets"].as_array().unwrap();
        let moments: BTreeSet<_> = buckets.iter().map(|bucket| bucket["at"].to_string()).collect();
        let count = (buckets.len() as u64, moments.len() as u64);
        assert_eq!(count, (POINTS, POINTS), "{path}");
        assert_eq!(series["step_ms"], 1000);
    }
}
