//! Tests the comparison of a VM's processes at two moments.

use serde_json::{Value, json};
use testkit::Stack;
use vmwatch_api::{
    Role, Scope,
    alerts::culprits::TopMeasure,
    history::TimeRange,
    metrics::{Limit, OTHER_PROCESSES, ProcessOwner, ProcessSample, SumSample},
    process_changes::{ChangedGroups, ChangesQuery, ProcessChanges, ProcessChangesBetween},
    time::unix_millis,
};

use crate::{
    history_support::{MINUTE, SECOND, call, call_in, publish, sample, stack, stored},
    rest::client::{Api, rfc3339, stack as rest_stack},
};

/// The start of the first boot of the VM, and of the second one, as offsets from the base.
const BOOTS: [u64; 2] = [0, 20 * MINUTE];
/// The moments of the samples: two in the first boot, and one in the second.
const SAMPLES: [u64; 3] = [10 * MINUTE, 15 * MINUTE, 30 * MINUTE];

/// The start of a minute, 40 minutes ago.
fn base() -> u64 {
    (unix_millis() / MINUTE - 40) * MINUTE
}

fn process(name: &str, pid: u32, cpu_util: f64, started_ms: u64) -> ProcessSample {
    ProcessSample {
        cmd: name.to_owned(),
        pid,
        cpu_util,
        mem: 1.0,
        running_time: f64::from(u32::try_from(started_ms / SECOND).unwrap()),
        ..ProcessSample::default()
    }
}

/// A worker of the web server.
fn worker(pid: u32, cpu_util: f64, started_ms: u64) -> ProcessSample {
    ProcessSample {
        owner: ProcessOwner {
            user: Some("www-data".to_owned()),
            unit: Some("nginx.service".to_owned()),
            ..ProcessOwner::default()
        },
        ..process("nginx", pid, cpu_util, started_ms)
    }
}

/// The processes of each sample.
fn tables(base: u64) -> [Vec<ProcessSample>; 3] {
    let [first, second] = BOOTS.map(|boot| base + boot);
    let ended = ProcessSample {
        shutdown_time: Some(1_482_236_600.0),
        ..process("backup", 30, 40.0, first + MINUTE)
    };
    [
        vec![
            process("init", 1, 0.0, first),
            worker(20, 2.0, first + SECOND),
            worker(21, 2.0, first + SECOND),
            process("backup", 30, 40.0, first + MINUTE),
            process("redis", 40, 1.0, first + SECOND),
        ],
        vec![
            process("init", 1, 0.0, first),
            worker(20, 40.0, first + SECOND),
            worker(22, 2.0, first + 11 * MINUTE),
            ended,
            process("redis", 41, 1.0, first + 12 * MINUTE),
            process("burner", 50, 99.0, first + 13 * MINUTE),
        ],
        vec![
            process("init", 1, 0.0, second),
            worker(20, 1.5, second + SECOND),
            process("redis", 41, 1.0, second + SECOND),
            process("java", 50, 150.0, second + 2 * SECOND),
        ],
    ]
}

async fn store(stack: &Stack, base: u64) {
    for (at, processes) in SAMPLES.into_iter().zip(tables(base)) {
        let mut sample = sample("vm-1", base + at, "+00:00", 50.0);
        sample.processes = processes;
        publish(stack, &sample).await;
    }
    stored(stack).await;
}

fn query(from_ms: u64, to_ms: u64) -> ChangesQuery {
    ChangesQuery {
        instance_id: "vm-1".parse().unwrap(),
        moments: TimeRange::new(from_ms, to_ms).unwrap(),
        by: TopMeasure::Cpu,
        limit: Limit::default(),
    }
}

fn names(list: &ChangedGroups) -> Vec<&str> {
    assert_eq!(list.total, list.groups.len() as u64);
    list.groups.iter().map(|group| group.name.as_str()).collect()
}

#[tokio::test]
async fn processes_are_compared_within_a_boot_and_across_a_reboot() {
    let stack = stack().start().await;
    let base = base();
    store(&stack, base).await;
    let [one, two, three] = SAMPLES.map(|at| base + at);

    // The newest sample at or before each moment counts.
    let same_boot = call::<ProcessChangesBetween>(&stack, &query(one + MINUTE, two)).await;
    let at = |changes: &ProcessChanges| [changes.before, changes.after].map(|table| table.unwrap().at_ms);
    assert_eq!(at(&same_boot), [one, two]);
    assert_eq!((same_boot.rebooted, same_boot.incomplete), (Some(false), false));
    assert_eq!(names(&same_boot.came), ["burner"]);
    // The process that ended before the second sample does not run at the second moment.
    assert_eq!(names(&same_boot.went), ["backup"]);
    assert_eq!(names(&same_boot.grew), ["nginx"]);
    assert_eq!(names(&same_boot.restarted), ["redis"]);
    let nginx = &same_boot.grew.groups[0];
    let (before, after) = (nginx.before.unwrap(), nginx.after.unwrap());
    assert_eq!((before.processes, before.cpu_util), (2, 4.0));
    assert_eq!((after.processes, after.cpu_util, nginx.kept), (2, 42.0, 1));
    assert_eq!(nginx.unit.as_deref(), Some("nginx.service"));

    let rebooted = call::<ProcessChangesBetween>(&stack, &query(two, three)).await;
    assert_eq!((at(&rebooted), rebooted.rebooted), ([two, three], Some(true)));
    let boots = [rebooted.before, rebooted.after].map(|table| table.unwrap().booted_ms);
    assert_eq!(boots, BOOTS.map(|boot| Some(base + boot)));
    // Equal pids mean nothing after a reboot.
    assert_eq!(names(&rebooted.came), ["java"]);
    assert_eq!(names(&rebooted.went), ["burner"]);
    assert_eq!((rebooted.grew.total, rebooted.restarted.total), (0, 0));

    let same_table = call::<ProcessChangesBetween>(&stack, &query(three, three + MINUTE)).await;
    assert_eq!(at(&same_table), [three, three]);
    let totals = [
        &same_table.came,
        &same_table.went,
        &same_table.grew,
        &same_table.restarted,
    ];
    assert_eq!(totals.map(|list| list.total), [0; 4]);

    let nothing = call::<ProcessChangesBetween>(&stack, &query(one - MINUTE, two)).await;
    assert_eq!((nothing.before, nothing.came.total), (None, 0));
    assert_eq!(nothing.after.unwrap().at_ms, two);

    let other = Scope::Only(vec!["vm-2".parse().unwrap()]);
    let hidden = call_in::<ProcessChangesBetween>(&stack, other, &query(one, two)).await;
    assert_eq!(hidden.unwrap(), ProcessChanges::default());
}

#[tokio::test]
async fn comparison_states_that_the_agent_reports_only_some_processes() {
    let stack = stack().start().await;
    let base = base();
    for at in [0, MINUTE] {
        let mut sample = sample("vm-1", base + at, "+00:00", 50.0);
        sample.processes = vec![process("nginx", 7, 1.0, base - MINUTE)];
        sample.sums = vec![SumSample {
            cmd: OTHER_PROCESSES.to_owned(),
            processes: Some(80),
            ..SumSample::default()
        }];
        publish(&stack, &sample).await;
    }
    stored(&stack).await;
    let changes = call::<ProcessChangesBetween>(&stack, &query(base, base + MINUTE)).await;
    assert_eq!((changes.incomplete, changes.rebooted), (true, None));
    assert_eq!(changes.restarted.total, 0);
}

#[tokio::test]
async fn changes_are_served_by_rest() {
    let stack = rest_stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let base = base();
    store(&stack, base).await;
    let [one, two, three] = SAMPLES.map(|at| base + at);
    let read = async |from: u64, to: u64, more: &str| {
        let moments = format!("from={}&to={}", rfc3339(from), rfc3339(to));
        api.read(&format!("/vms/vm-1/changes?{moments}{more}")).await
    };
    let changes = read(one, two, "&by=cpu&limit=10").await;
    assert_eq!(
        (&changes["rebooted"], &changes["by"], &changes["before"]),
        (
            &json!(false),
            &json!("cpu"),
            &json!({ "at": rfc3339(one), "processes": 5, "booted_at": rfc3339(base) }),
        )
    );
    let usage = |cpu_util: f64, started_ms: u64| {
        json!({
            "processes": 2, "cpu_util": cpu_util, "mem": 2.0, "disk_read": 0.0, "disk_write": 0.0,
            "started_at": rfc3339(started_ms),
        })
    };
    let started = base + SECOND;
    let nginx = json!({
        "name": "nginx", "user": "www-data", "unit": "nginx.service", "container": null, "kept": 1,
        "before": usage(4.0, started), "after": usage(42.0, started),
    });
    assert_eq!(changes["grew"], json!({ "total": 1, "groups": [nginx] }));
    assert_eq!(changes["came"]["groups"][0]["before"], Value::Null);
    assert_eq!(changes["went"]["groups"][0]["after"], Value::Null);

    let limited = read(two, three, "&by=mem&limit=1").await;
    assert_eq!(
        (&limited["by"], &limited["rebooted"]),
        (&json!("mem"), &json!(true))
    );
    for query in ["by=net", "limit=0", "limit=1001", "from=yesterday", "at=now"] {
        api.get(&format!("/vms/vm-1/changes?{query}"))
            .await
            .problem(400, "invalid");
    }
}
