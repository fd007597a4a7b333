//! Tests what is answered from rows of hypervisors: the list of VMs, histories, exports, live events, and 611611 for VMs
//! without an agent.

use futures::StreamExt;
use mongodb::bson::doc;
use serde_json::{Value, json};
use testkit::{PATIENCE, Program, Stack, codes, eventually};
use vmwatch_api::{
    InstanceId, Role, Scope,
    events::{EVENT_STREAM, LiveEvent, kind_filter},
    hypervisor_samples::{HYPERVISOR_ROW_KEYS, HypervisorSample},
    lifecycle::Target,
    metrics::{Latest, Limit, RowId, RowPosition, VM_ROW_KEYS, VmLatest},
    time::{CreateDate, UtcOffset, unix_millis},
    vms::{Agent, Get, ListedVm},
};

use crate::{
    history_support::{self, MINUTE, SECOND, call, call_in, publish, sample, stored},
    hypervisor_samples::{measured, publish_measured, rolled_up},
    python_repr::Python,
    rest::client::{self, Api, rfc3339},
    rows::blocks,
};

/// A sample of a hypervisor that knows only the number of cores, as the first one after the start of a VM.
fn first_measured(instance: &str, at_ms: u64) -> HypervisorSample {
    HypervisorSample {
        cpu_util: None,
        disk_read: None,
        disk_write: None,
        net_incoming: None,
        net_outgoing: None,
        steal: None,
        ..measured(instance, at_ms, 0.0)
    }
}

/// The rows that 611611 answers, in Python's format.
async fn documented(stack: &Stack, session: &str, instance: &str) -> Vec<String> {
    let data = json!({ "instance_id": instance });
    let request = json!({ "method": codes::VM, "session_id": session, "limit": 10, "data": data });
    let answer = stack.gateway(0).post(&request).await;
    assert_eq!(answer.status(), 1, "{answer:?}");
    serde_json::from_value(answer.json()["data"].take()).unwrap()
}

#[tokio::test]
async fn documented_rows_are_those_of_the_hypervisor_only_without_rows_of_an_agent() {
    let stack = Stack::builder()
        .set(Program::Metrics, "VMWATCH_NEWEST_ROWS_KEPT", "0s")
        .without_rates()
        .start()
        .await;
    let session = stack.session(Role::Viewer, Scope::All).await;
    let at_ms = unix_millis() - 20 * SECOND;
    publish_measured(&stack, &first_measured("alone", at_ms)).await;
    publish_measured(&stack, &measured("alone", at_ms + 10 * SECOND, 2.5)).await;
    publish_measured(&stack, &measured("both", at_ms + 10 * SECOND, 2.5)).await;
    publish(&stack, &sample("both", at_ms, "+00:00", 50.0)).await;
    stored(&stack).await;

    let rows = documented(&stack, &session, "alone").await;
    let python = Python::judge("[list(eval(row, {'ObjectId': str}).items()) for row in q]");
    let read = python.borrow_mut().ask(&json!(rows));
    let date = |at_ms| CreateDate::at_millis(at_ms, UtcOffset::UTC);
    let [newest, first] = [&read[0], &read[1]];
    let keys = |row: &Value| -> Vec<String> {
        let pairs = row.as_array().unwrap().iter();
        pairs.map(|pair| pair[0].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(
        (keys(newest), keys(first)),
        (
            VM_ROW_KEYS.map(str::to_owned).to_vec(),
            VM_ROW_KEYS.map(str::to_owned).to_vec()
        )
    );
    let without_id = |row: &str| {
        let (before, rest) = row.split_once("ObjectId('").unwrap();
        format!("{before}{}", rest.split_once(')').unwrap().1)
    };
    assert_eq!(
        without_id(&rows[0]),
        format!(
            "{{u'net_incoming': 7.5, u'disk_write': 17.5, u'mem': 0.0, u'net_outgoing': 12.5, u'instance_id': u'alone', \
             u'cpu_util': 2.5, u'disk_read': 1.25, u'create_date': u'{}', u'_id': , u'proc': 0}}",
            date(at_ms + 10 * SECOND)
        )
    );
    assert_eq!(
        without_id(&rows[1]),
        format!(
            "{{u'net_incoming': 0.0, u'disk_write': 0.0, u'mem': 0.0, u'net_outgoing': 0.0, u'instance_id': u'alone', \
             u'cpu_util': 0.0, u'disk_read': 0.0, u'create_date': u'{}', u'_id': , u'proc': 0}}",
            date(at_ms)
        )
    );

    let both = documented(&stack, &session, "both").await;
    assert_eq!(both.len(), 1, "{both:?}");
    assert!(both[0].contains("u'cpu_util': 50.0"), "{both:?}");
    // The page after the last row of the agent has no rows of the hypervisor.
    let beyond = Latest {
        instance_id: "both".parse().unwrap(),
        limit: Limit::new(10).unwrap(),
        before: Some(RowPosition {
            effective_us: i64::try_from(at_ms * 1000).unwrap(),
            create_date: "0000-01-01T00:00:00".parse().unwrap(),
            id: RowId::new(&"0".repeat(24)).unwrap(),
        }),
    };
    publish_measured(&stack, &measured("both", at_ms - SECOND, 2.5)).await;
    stored(&stack).await;
    let page = call::<VmLatest>(&stack, &beyond).await;
    assert_eq!(page.rows.as_json(), "[]");

    // The rows of the agent expire.
    let of_agent = doc! { "instance_id": "both", "kind": "vm" };
    blocks(&stack.database).delete_many(of_agent).await.unwrap();
    let both = documented(&stack, &session, "both").await;
    assert_eq!(both.len(), 2, "{both:?}");
    assert!(
        both[0].contains("u'cpu_util': 2.5") && both[0].contains("u'proc': 0"),
        "{both:?}"
    );
    assert_eq!(documented(&stack, &session, "unknown").await, [""; 0]);
}

/// Reads a VM. Until its first sample is stored, the answer is a fault.
async fn get(stack: &Stack, id: &str) -> Result<ListedVm, String> {
    let target = Target {
        instance_id: id.parse().unwrap(),
    };
    let reply = call_in::<Get>(stack, Scope::All, &target).await;
    reply.map(|detail| detail.vm).map_err(|fault| fault.to_string())
}

/// Every replica lists what a hypervisor measured, also after a restart, as long as it is recent.
#[tokio::test]
async fn list_has_the_newest_sample_of_the_hypervisor_in_every_replica() {
    let stack = history_support::stack()
        .replicas(Program::Metrics, 2)
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "1h")
        .start()
        .await;
    let now = unix_millis();
    publish(&stack, &sample("both", now, "+00:00", 10.0)).await;
    for vm in ["both", "alone"] {
        publish_measured(&stack, &measured(vm, now, 40.0)).await;
    }
    let is_listed = async |vm: &str, agent: Agent, of_agent: Option<f64>, peak: f64| {
        eventually("all replicas list the samples", PATIENCE, async || {
            for _ in 0..20 {
                let vm = get(&stack, vm).await?;
                let measured = vm.hypervisor_sample.map(|sample| (sample.at_ms, sample.values));
                let is_right = vm.agent == Some(agent)
                    && vm.sample.and_then(|sample| sample.values.cpu_util) == of_agent
                    && measured.is_some_and(|(at_ms, values)| {
                        (at_ms, values.cpu_util, values.mem) == (now, Some(40.0), None)
                    })
                    && vm.cpu_sparkline.iter().flatten().copied().collect::<Vec<_>>() == [peak];
                if !is_right {
                    return Err(format!("{vm:?}"));
                }
            }
            Ok(())
        })
        .await;
    };
    is_listed("both", Agent::Reporting, Some(10.0), 10.0).await;
    is_listed("alone", Agent::Never, None, 40.0).await;
    rolled_up(&stack).await;
    for replica in 0..2 {
        let metrics = stack.replica(Program::Metrics, replica);
        metrics.process.kill9();
        metrics.restart().await;
    }
    is_listed("alone", Agent::Never, None, 40.0).await;

    // Each row has one live event, even if it is delivered again.
    publish_measured(&stack, &measured("alone", now, 40.0)).await;
    publish_measured(&stack, &measured("alone", now + 1, 41.0)).await;
    stored(&stack).await;
    let events = events(&stack, 3).await;
    let of_alone: Vec<_> = events.iter().filter(|(id, _)| id.as_str() == "alone").collect();
    assert_eq!(of_alone.len(), 2, "{events:?}");
    assert_eq!(of_alone[1].1, Some(41.0));

    for replica in 0..2 {
        let metrics = stack.replica(Program::Metrics, replica);
        metrics.process.set("VMWATCH_SILENT_AFTER", "1s");
        metrics.process.kill9();
        metrics.restart().await;
    }
    eventually(
        "an old sample of the hypervisor is not listed",
        PATIENCE,
        async || {
            for _ in 0..20 {
                let vm = get(&stack, "alone").await?;
                if vm.hypervisor_sample.is_some() || vm.cpu_sparkline.iter().any(Option::is_some) {
                    return Err(format!("{vm:?}"));
                }
            }
            Ok(())
        },
    )
    .await;
}

/// The VMs and the CPU usage of the first live events of hypervisors.
async fn events(stack: &Stack, count: usize) -> Vec<(InstanceId, Option<f64>)> {
    let jetstream = stack.bus.jetstream_for_tests();
    let stream = jetstream.get_stream(EVENT_STREAM).await.unwrap();
    let consumer = stream
        .create_consumer(async_nats::jetstream::consumer::pull::OrderedConfig {
            filter_subject: kind_filter("hypervisor_sample"),
            ..Default::default()
        })
        .await
        .unwrap();
    let messages = consumer.messages().await.unwrap().take(count);
    let read = messages.map(
        |message| match serde_json::from_slice(&message.unwrap().payload).unwrap() {
            LiveEvent::HypervisorSample(event) => (event.instance_id, event.values.cpu_util),
            other => panic!("{other:?}"),
        },
    );
    tokio::time::timeout(PATIENCE, read.collect()).await.unwrap()
}

/// Exports the rows that the hypervisor measured of the VM `alone`, as JSON Lines and as CSV.
async fn exports_rows(api: &Api, range: &str) {
    let rows = api.get(&format!("/vms/alone/rows?kind=hypervisor&{range}")).await;
    let lines: Vec<Value> = rows
        .body
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "{rows:?}");
    assert_eq!(
        (&lines[0]["cpu_util"], &lines[0]["cores"], &lines[0]["hypervisor"]),
        (&Value::Null, &json!(4), &json!("lab")),
        "values that the hypervisor does not know are null"
    );
    assert_eq!(
        (&lines[1]["cpu_util"], &lines[1]["mem"]),
        (&json!(2.5), &Value::Null)
    );
    let csv = api
        .get(&format!("/vms/alone/rows?kind=hypervisor&format=csv&{range}"))
        .await
        .body;
    let mut lines = csv.split("\r\n");
    assert_eq!(lines.next(), Some(HYPERVISOR_ROW_KEYS.join(",").as_str()));
    let [first, second] = [lines.next().unwrap(), lines.next().unwrap()];
    assert!(
        first.starts_with(",,,,alone,,,") && first.ends_with(",4,,lab"),
        "{csv}"
    );
    assert!(
        second.starts_with("7.5,17.5,,12.5,alone,2.5,1.25,") && second.ends_with(",4,0.25,lab"),
        "{csv}"
    );
    api.get(&format!("/vms/alone/rows?kind=hypervisor&name=a&{range}"))
        .await
        .problem(422, "contradictory");
}

#[tokio::test]
async fn rest_api_answers_what_the_hypervisor_measured() {
    let stack = client::stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    // Both rows are in one minute, so that one time bucket of the chart contains them, and is computed from rows.
    let at_ms = (unix_millis() / MINUTE - 1) * MINUTE;
    publish_measured(&stack, &first_measured("alone", at_ms)).await;
    publish_measured(&stack, &measured("alone", at_ms + 10 * SECOND, 2.5)).await;
    publish(&stack, &sample("both", at_ms, "+00:00", 50.0)).await;
    publish_measured(&stack, &measured("both", at_ms, 2.5)).await;
    let range = format!("from={}&to={}", rfc3339(at_ms), rfc3339(at_ms + 20 * SECOND));
    let vm = eventually("the VM is listed", PATIENCE, async || {
        let reply = api.get("/vms/alone").await;
        let vm = reply.json();
        (reply.status == 200 && vm["hypervisor_sample"]["cpu_util"] == 2.5)
            .then_some(vm)
            .ok_or(format!("{reply:?}"))
    })
    .await;
    assert_eq!(
        (&vm["agent"], &vm["sample"], &vm["last_report_at"]),
        (&json!("never"), &Value::Null, &Value::Null)
    );
    let sample = &vm["hypervisor_sample"];
    assert_eq!(
        (
            &sample["at"],
            &sample["steal"],
            &sample["mem"],
            &sample["restricted"]
        ),
        (
            &json!(rfc3339(at_ms + 10 * SECOND)),
            &json!(0.25),
            &Value::Null,
            &Value::Null
        )
    );
    stored(&stack).await;

    let history = async |vm: &str, source: &str| {
        let series = api
            .read(&format!("/vms/{vm}/samples?points=1&{range}{source}"))
            .await;
        let bucket = &series["buckets"][0];
        (
            bucket["count"].clone(),
            bucket["cpu_util"]["avg"].clone(),
            bucket["mem"]["avg"].clone(),
        )
    };
    let hypervisor = "&source=hypervisor";
    assert_eq!(
        history("alone", hypervisor).await,
        (json!(2), json!(2.5), Value::Null)
    );
    assert_eq!(history("alone", "").await.0, Value::Null);
    assert_eq!(
        history("both", hypervisor).await,
        (json!(1), json!(2.5), Value::Null)
    );
    for source in ["", "&source=agent"] {
        assert_eq!(
            history("both", source).await,
            (json!(1), json!(50.0), json!(50.0))
        );
    }
    api.get("/vms/alone/samples?source=guest")
        .await
        .problem(400, "invalid");

    exports_rows(&api, &range).await;

    // A VM outside the scope is like one that was never measured.
    let mine = Scope::Only(vec!["mine".parse::<InstanceId>().unwrap()]);
    let limited = Api::with(&stack, Role::Viewer, mine).await;
    let hidden = limited
        .read(&format!("/vms/alone/samples?{range}{hypervisor}"))
        .await;
    assert_eq!(hidden["buckets"], json!([]));
    let hidden = limited
        .get(&format!("/vms/alone/rows?kind=hypervisor&{range}"))
        .await;
    assert_eq!((hidden.status, hidden.body.as_str()), (200, ""));
    limited.get("/vms/alone").await.problem(404, "not_found");
}
