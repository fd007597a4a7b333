//! Tests a VM's history and processes over the REST API.

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, codes, eventually};
use vmwatch_api::{
    Role, Scope,
    metrics::{CpuSeconds, ProcessOwner, ShortLived, SumSample},
    time::unix_millis,
};

use super::client::{Api, Reply, process, publish, rfc3339, sample, stack};

/// Returns a time that is well in the past and at the start of a bucket of whole minutes.
fn base() -> u64 {
    (unix_millis() / 60_000 - 30) * 60_000
}

async fn stored(api: &Api, path: &str, pointer: &str, count: usize) {
    eventually("all samples are stored", PATIENCE, async || {
        let body = api.read(path).await;
        let found = body
            .pointer(pointer)
            .and_then(Value::as_array)
            .map_or(0, Vec::len);
        if found == count {
            Ok(())
        } else {
            Err(body.to_string())
        }
    })
    .await;
}

#[tokio::test]
async fn vm_history_is_returned_as_json_and_csv() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let base = base();
    for step in 0..12_u32 {
        let at = base + u64::from(step) * 10_000;
        publish(&stack, &sample("vm-1", at, f64::from(step))).await;
    }
    let range = format!("from={}&to={}", rfc3339(base), rfc3339(base + 120_000));
    let raw = format!("/vms/vm-1/samples?{range}&points=2000");
    stored(&api, &raw, "/buckets", 12).await;

    let series = api.read(&format!("/vms/vm-1/samples?{range}&points=2")).await;
    assert_eq!(
        (&series["from"], &series["to"]),
        (&json!(rfc3339(base)), &json!(rfc3339(base + 120_000)))
    );
    assert_eq!(series["step_ms"], 60_000);
    let buckets = series["buckets"].as_array().unwrap();
    assert_eq!(buckets.len(), 2, "{series}");
    assert_eq!(buckets[0]["at"], rfc3339(base));
    assert_eq!(buckets[0]["count"], 6);
    assert_eq!(
        buckets[0]["cpu_util"],
        json!({ "min": 0.0, "avg": 2.5, "max": 5.0 })
    );
    assert_eq!(
        buckets[1]["cpu_util"],
        json!({ "min": 6.0, "avg": 8.5, "max": 11.0 })
    );
    assert_eq!(
        buckets[1]["net_incoming"],
        json!({ "min": 1.5, "avg": 1.5, "max": 1.5 })
    );

    let csv = api
        .get(&format!("/vms/vm-1/samples?{range}&points=2&format=csv"))
        .await;
    assert_eq!((csv.status, csv.header("content-type")), (200, Some("text/csv")));
    let lines: Vec<_> = csv.body.lines().collect();
    assert_eq!(lines.len(), 3, "{csv:?}");
    assert!(
        lines[0].starts_with("at,count,cpu_util_min,cpu_util_avg,cpu_util_max,mem_min"),
        "{csv:?}"
    );
    assert!(
        lines[1].starts_with(&format!("{},6,0,2.5,5,20,20,20", rfc3339(base))),
        "{csv:?}"
    );
    let accepting = api
        .request(Method::GET, &format!("/vms/vm-1/samples?{range}&points=2"))
        .header("accept", "text/csv");
    assert_eq!(Reply::of(accepting).await.body, csv.body);

    // This is the same time with another UTC offset.
    let shifted = rfc3339(base + 8 * 3_600_000).replace('Z', "%2B08:00");
    let same = api
        .read(&format!(
            "/vms/vm-1/samples?from={shifted}&to={}&points=2",
            rfc3339(base + 120_000)
        ))
        .await;
    assert_eq!(same, series);
    let last_hour = api.read("/vms/vm-1/samples").await;
    let counts = last_hour["buckets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|bucket| bucket["count"].as_u64().unwrap());
    assert_eq!(counts.sum::<u64>(), 12, "the default range is the last hour");
    for query in [
        "from=yesterday",
        "from=2017-01-01",
        "to=1483277879",
        "points=0",
        "points=2001",
        "format=xml",
        "unknown=1",
    ] {
        api.get(&format!("/vms/vm-1/samples?{query}"))
            .await
            .problem(400, "invalid");
    }
}

fn owner() -> ProcessOwner {
    ProcessOwner {
        user: Some("www-data".to_owned()),
        parent_pid: Some(1),
        unit: Some("culprit.service".to_owned()),
        container: None,
        command_line: Some("/usr/bin/culprit --token ***".to_owned()),
        inherited: false,
    }
}

/// Stores three process tables of a VM, one minute apart. The second contains the process `culprit`, and the third its
/// end. Returns a client, the time of the first table, and the range of all tables.
async fn three_tables(stack: &Stack) -> (Api, u64, String) {
    let api = Api::with(stack, Role::Viewer, Scope::All).await;
    let base = base();
    for (step, cpu) in [1.0, 30.0, 2.0].into_iter().enumerate() {
        let at = base + step as u64 * 60_000;
        let mut sample = sample("vm-1", at, cpu);
        sample.processes = vec![
            process("init", 1, 0.0, base - 1_000_000),
            process("worker", 20, cpu, base - 500_000),
            process("worker", 21, 10.0, base - 400_000),
        ];
        if step == 1 {
            let mut culprit = process("culprit", 99, 80.0, at - 5000);
            culprit.cpu_seconds = Some(4.01);
            culprit.owner = owner();
            sample.processes.push(culprit);
            sample.processes[1].cpu_seconds = Some(1.5);
            sample.vm_cpu = Some(CpuSeconds {
                user: 5.5,
                nice: 0.0,
                system: 0.25,
            });
        }
        if step == 2 {
            // This process has ended. The row has the form in which an agent reports an ended process.
            let mut ended = process("culprit", 99, 0.0, base + 55_000);
            ended.shutdown_time = Some(ended.running_time + 30.0);
            sample.processes.push(ended);
        }
        publish(stack, &sample).await;
    }
    let range = format!("from={}&to={}", rfc3339(base), rfc3339(base + 180_000));
    let history = format!("/vms/vm-1/processes/history?name=worker&{range}&points=2000");
    stored(&api, &history, "/buckets", 3).await;
    (api, base, range)
}

#[tokio::test]
async fn process_table_of_any_time_is_returned() {
    let stack = stack().start().await;
    let (api, base, _) = three_tables(&stack).await;
    let names = |table: &Value| -> Vec<String> {
        let processes = table["processes"].as_array().unwrap();
        processes
            .iter()
            .map(|process| format!("{}/{}", process["name"].as_str().unwrap(), process["pid"]))
            .collect()
    };
    let now = api.read("/vms/vm-1/processes").await;
    assert_eq!(
        (&now["at"], &now["total"]),
        (&json!(rfc3339(base + 120_000)), &json!(4))
    );
    assert_eq!(
        names(&now),
        ["worker/21", "worker/20", "init/1", "culprit/99"],
        "processes with the highest CPU use come first"
    );
    assert!(
        now["processes"][3]["ended_at"].is_string(),
        "the ended process is not in the newest table"
    );
    let at = |offset: u64| format!("at={}", rfc3339(base + offset));
    let then = api.read(&format!("/vms/vm-1/processes?{}", at(90_000))).await;
    assert_eq!(
        then["at"],
        rfc3339(base + 60_000),
        "the table is the newest at or before the requested time"
    );
    assert_eq!(names(&then), ["culprit/99", "worker/20", "worker/21", "init/1"]);
    let culprit = &then["processes"][0];
    assert_eq!(
        (&culprit["cpu_util"], &culprit["ended_at"]),
        (&json!(80.0), &Value::Null)
    );
    assert!(culprit["started_at"].as_str().unwrap().ends_with('Z'));
    let fields = [
        "cpu_seconds",
        "user",
        "parent_pid",
        "unit",
        "container",
        "command_line",
    ];
    assert_eq!(
        fields.map(|field| culprit[field].clone()),
        [
            json!(4.01),
            json!("www-data"),
            json!(1),
            json!("culprit.service"),
            Value::Null,
            json!("/usr/bin/culprit --token ***")
        ]
    );
    // Some values of this VM's other processes are unknown.
    assert_eq!(
        fields.map(|field| then["processes"][3][field].clone()),
        [const { Value::Null }; 6]
    );
    assert_eq!(
        (&then["vm_cpu"], &then["cpu_seconds"]),
        (&json!({ "user": 5.5, "nice": 0.0, "system": 0.25 }), &json!(5.51))
    );
    assert_eq!(now["vm_cpu"], Value::Null);
    for (query, expected) in [
        ("limit=1", &["culprit/99"][..]),
        ("name=worker", &["worker/20", "worker/21"]),
        ("name=work", &[]),
        ("sort=pid", &["init/1", "worker/20", "worker/21", "culprit/99"]),
        ("sort=pid&order=desc&limit=2", &["culprit/99", "worker/21"]),
        ("sort=name", &["culprit/99", "init/1", "worker/20", "worker/21"]),
    ] {
        let table = api
            .read(&format!("/vms/vm-1/processes?{}&{query}", at(60_000)))
            .await;
        assert_eq!(names(&table), expected, "{query}");
    }
    summed_rows_are_marked(&stack, &api, base).await;
    let nothing = api
        .read(&format!("/vms/vm-1/processes?{}", at(0).replace("at=2", "at=1")))
        .await;
    assert_eq!(
        (&nothing["at"], &nothing["processes"]),
        (&Value::Null, &json!([]))
    );
    for query in [
        "sort=rss",
        "order=x",
        "name=",
        "at=now",
        "limit=0",
        "from=2017-01-01T00:00:00Z",
    ] {
        api.get(&format!("/vms/vm-1/processes?{query}"))
            .await
            .problem(400, "invalid");
    }
}

/// The documented API does not answer summed rows.
async fn summed_rows_are_marked(stack: &Stack, api: &Api, base: u64) {
    let mut sample = sample("vm-2", base, 1.0);
    let mut ended = process("sh", 77, 5.0, base - 20_000);
    ended.exit_code = Some(137);
    ended.owner.inherited = true;
    sample.processes = vec![ended];
    sample.vm.as_mut().unwrap().lost_exit_records = 3;
    sample.short_lived = Some(ShortLived::Recorded);
    sample.sums = vec![SumSample {
        cmd: "sh".to_owned(),
        processes: Some(1200),
        cpu_util: 80.0,
        cpu_seconds: 48.5,
        ..SumSample::default()
    }];
    publish(stack, &sample).await;
    stored(api, "/vms/vm-2/processes", "/processes", 2).await;
    let table = api.read("/vms/vm-2/processes").await;
    assert_eq!(table["short_lived"], "recorded");
    // metrics-svc counts the lost records after it has stored the rows.
    let metrics = stack.replica(Program::Metrics, 0);
    eventually("the lost records are counted", PATIENCE, async || {
        let lost = metrics.metric("vmwatch_exit_records_lost_by_agents_total").await;
        (lost == Some(3.0))
            .then_some(())
            .ok_or_else(|| format!("{lost:?}"))
    })
    .await;
    let fields = [
        "kind",
        "processes",
        "pid",
        "started_at",
        "exit_code",
        "owner_inherited",
    ];
    let of_row = |row: usize| fields.map(|field| table["processes"][row][field].clone());
    let null = Value::Null;
    assert_eq!(
        of_row(0),
        [
            json!("sum"),
            json!(1200),
            null.clone(),
            null.clone(),
            null,
            json!(false)
        ]
    );
    let process = of_row(1);
    assert_eq!(
        [&process[0], &process[1], &process[2], &process[4], &process[5]],
        [
            &json!("process"),
            &json!(1),
            &json!(77),
            &json!(137),
            &json!(true)
        ]
    );
    let session = stack.session(Role::Viewer, Scope::All).await;
    for (method, data) in [
        (codes::PROCESSES, json!({ "instance_id": "vm-2" })),
        (
            codes::PROCESSES_BY_NAME,
            json!({ "instance_id": "vm-2", "proc_name": "sh" }),
        ),
    ] {
        let rows = stack.gateway(0).rows(&session, method, 100, data).await;
        assert_eq!(rows.iter().map(|row| &row["pid"]).collect::<Vec<_>>(), [77]);
    }
}

#[tokio::test]
async fn process_history_and_process_events_are_returned() {
    let stack = stack().start().await;
    let (api, _, range) = three_tables(&stack).await;
    let together = api
        .read(&format!(
            "/vms/vm-1/processes/history?name=worker&{range}&points=2000"
        ))
        .await;
    let middle = &together["buckets"][1];
    assert_eq!(
        (&middle["cpu_util"]["max"], &middle["processes"]["max"]),
        (&json!(40.0), &json!(2.0)),
        "values of processes with the same name are added: {together}"
    );
    let one = api
        .read(&format!("/vms/vm-1/processes/history?pid=20&{range}"))
        .await;
    assert_eq!(one["buckets"].as_array().unwrap().len(), 3);
    for query in ["name=", "pid=-1", "pid=x", "name=a&points=0"] {
        api.get(&format!("/vms/vm-1/processes/history?{query}"))
            .await
            .problem(400, "invalid");
    }

    let events = eventually("process events are stored", PATIENCE, async || {
        let events = api.read(&format!("/vms/vm-1/processes/events?{range}")).await;
        if events["events"]
            .as_array()
            .unwrap()
            .iter()
            .any(|event| event["kind"] == "ended")
        {
            Ok(events)
        } else {
            Err(events.to_string())
        }
    })
    .await;
    let listed: Vec<_> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["name"] == "culprit")
        .map(|event| (event["kind"].as_str().unwrap(), event["pid"].as_u64().unwrap()))
        .collect();
    assert!(listed.contains(&("started", 99)), "{events}");
    api.get("/vms/vm-1/processes/events?limit=0")
        .await
        .problem(400, "invalid");

    let found = eventually("the process names are stored", PATIENCE, async || {
        let found = api
            .read(&format!("/processes?name=wor&match=prefix&{range}&limit=1"))
            .await;
        let is_found = found["vms"][0]["instance_id"] == "vm-1";
        is_found.then_some(()).ok_or_else(|| found.to_string())?;
        Ok::<_, String>(found)
    })
    .await;
    let vm = &found["vms"][0];
    assert_eq!(
        (&vm["process_names"], &vm["max_processes"], &found["next"]),
        (&json!(["worker"]), &json!(2), &Value::Null),
        "{found}"
    );
    for (query, status, code) in [
        ("", 400, "invalid"),
        ("name=", 400, "invalid"),
        ("name=x&match=regex", 400, "invalid"),
        ("name=x&cursor=.", 400, "invalid"),
        ("name=wo&match=prefix", 422, "contradictory"),
        (
            "name=x&from=2017-01-01T00:00:00Z&to=2018-06-01T00:00:00Z",
            422,
            "contradictory",
        ),
        (
            "name=x&from=2017-01-02T00:00:00Z&to=2017-01-01T00:00:00Z",
            422,
            "contradictory",
        ),
    ] {
        api.get(&format!("/processes?{query}"))
            .await
            .problem(status, code);
    }
}

/// Parameters that conflict with each other are answered with a different error code than invalid parameters.
#[tokio::test]
async fn conflicting_history_parameters_are_rejected() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let backwards = "from=2017-01-02T00:00:00Z&to=2017-01-01T00:00:00Z";
    let empty = "from=2017-01-01T00:00:00Z&to=2017-01-01T00:00:00Z";
    for path in [
        format!("samples?{backwards}"),
        format!("samples?{empty}"),
        format!("processes/events?{backwards}"),
        format!("processes/top?{backwards}"),
        format!("changes?{backwards}"),
        format!("changes?{empty}"),
        format!("marks?{backwards}"),
        "processes/top?from=2017-01-01T00:00:00Z&to=2017-01-02T00:00:00.001Z".to_owned(),
        format!("processes/history?name=x&{backwards}"),
        "processes/history".to_owned(),
    ] {
        api.get(&format!("/vms/vm-1/{path}"))
            .await
            .problem(422, "contradictory");
    }
}
