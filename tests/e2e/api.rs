//! Tests requests that the documented API accepts, and its answers to them.

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{Answer, MACHINES, Power, Stack, codes, failure};
use vmwatch_api::{InstanceId, Role, Scope, lifecycle::MachineState};

use crate::rows::{process_row, store_processes, store_vms, vm_row};

/// The documented API accepts every variant of a request that appears in the examples and tables of
/// `docs/api/vm-monitoring-api.md`.
#[tokio::test]
async fn documented_api_accepts_every_documented_request_variant() {
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let session = stack.session(Role::Viewer, Scope::All).await;
    let date = "2017-01-01T21:37:59.001065";
    store_processes(
        &stack,
        (0..12).map(|pid| process_row("vm-1", date, if pid % 2 == 0 { "even" } else { "odd" }, pid)),
    )
    .await;
    let ask = async |change: Value| -> Answer {
        let mut request =
            json!({ "method": codes::PROCESSES, "session_id": session, "data": { "instance_id": "vm-1" } });
        for (key, value) in change.as_object().unwrap() {
            request[key] = value.clone();
        }
        let answer = gateway.post(&request).await;
        assert_eq!((answer.http, answer.status()), (200, 1), "{change}: {answer:?}");
        answer
    };
    let count = |answer: &Answer| answer.json()["data"].as_array().unwrap().len();
    let plain = ask(json!({})).await;
    assert_eq!(count(&plain), 10, "a request without a limit returns 10 rows");

    for same in [
        json!({ "method": "611711" }),
        json!({ "data": { "instance_id": "vm-1;" } }),
        json!({ "data": { "instance_id": " \tvm-1 ; ;;\n" } }),
        json!({ "limit": 10 }),
        json!({ "limit": "10" }),
        json!({ "message_id": "" }),
        json!({ "format": "python" }),
        json!({ "unknown": { "nested": [1] } }),
    ] {
        assert_eq!(ask(same.clone()).await.body, plain.body, "{same}");
    }
    for (limit, rows) in [(json!(1), 1), (json!("4"), 4), (json!(1000), 12)] {
        assert_eq!(count(&ask(json!({ "limit": limit })).await), rows);
    }
    for content_type in [
        None,
        Some("application/json"),
        Some("text/plain; charset=utf-7"),
        Some("nonsense"),
    ] {
        let request =
            json!({ "method": codes::PROCESSES, "session_id": session, "data": { "instance_id": "vm-1" } });
        let answer = gateway
            .send(Method::POST, content_type, request.to_string())
            .await
            .unwrap();
        assert_eq!(answer.body, plain.body, "{content_type:?}");
        assert_eq!(answer.content_type.as_deref(), Some("application/json"));
    }

    let named = |name: &str| json!({ "method": codes::PROCESSES_BY_NAME, "proc_name": name });
    let even = ask(named("even")).await;
    assert_eq!(count(&even), 6);
    let inside =
        json!({ "method": codes::PROCESSES_BY_NAME, "data": { "instance_id": "vm-1", "proc_name": "even" } });
    assert_eq!(ask(inside).await.body, even.body);
    for no_match in ["eve", "Even", "even ", "^even$"] {
        assert_eq!(
            count(&ask(named(no_match)).await),
            0,
            "the process name {no_match:?} matches no row"
        );
    }
    let unnamed = ask(json!({ "method": codes::PROCESSES_BY_NAME })).await;
    assert_eq!(
        unnamed.body,
        plain.body.replace("611711", "611712"),
        "a request without a process name returns the rows of all processes, like method 611711"
    );

    let echoed = ask(json!({ "message_id": "7/é\"😀" })).await.body;
    assert_eq!(
        echoed,
        plain
            .body
            .replace(r#""message_id":"""#, r#""message_id":"7/é\"😀""#)
    );
    let empty = ask(json!({ "data": { "instance_id": "vm-without-rows" } })).await;
    assert!(
        empty
            .body
            .contains(r#""message":"'success query proc information'","data":[],"#),
        "{}",
        empty.body
    );
}

/// The documented API sorts rows by `create_date`, newest first, then by `_id`, in both output formats.
#[tokio::test]
async fn documented_api_returns_newest_rows_first_in_both_formats() {
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let session = stack.session(Role::Viewer, Scope::All).await;
    // The dates are unsorted, contain duplicates, and range from before the retention time to years in the future. The
    // third date has no fraction, because Python omits a fraction of zero.
    let dates = [
        "2017-01-01T21:37:59.680873",
        "2031-05-05T00:00:00.000001",
        "2017-01-01T21:37:59",
        "2017-01-01T21:37:59.680873",
        "1999-12-31T23:59:59.999999",
        "2025-06-01T12:00:00.500000",
    ];
    let rows: Vec<_> = (0..)
        .zip(dates)
        .map(|(proc, date)| vm_row("vm-1", date, proc))
        .collect();
    store_vms(&stack, rows).await;
    store_vms(&stack, [vm_row("vm-10", "2040-01-01T00:00:00.000000", 99)]).await;
    let rows = gateway
        .rows(&session, codes::VM, 1000, json!({ "instance_id": "vm-1" }))
        .await;
    let order: Vec<_> = rows.iter().map(|row| row["proc"].as_i64().unwrap()).collect();
    assert_eq!(order, [1, 5, 3, 0, 2, 4]);
    for limit in 1..=6 {
        let fewer = gateway
            .rows(&session, codes::VM, limit, json!({ "instance_id": "vm-1" }))
            .await;
        assert_eq!(fewer, rows[..fewer.len()]);
        assert_eq!(fewer.len(), limit as usize);
    }

    let request =
        json!({ "method": codes::VM, "session_id": session, "limit": 1, "data": { "instance_id": "vm-1" } });
    let python = gateway.post(&request).await.json();
    let id = rows[0]["_id"].as_str().unwrap();
    assert_eq!(id.len(), 24);
    assert_eq!(
        python["data"],
        json!([format!(
            "{{u'net_incoming': 0.6, u'disk_write': 128.8, u'mem': 8.6, u'net_outgoing': 5.7, u'instance_id': u'vm-1', \
             u'cpu_util': 0.0, u'disk_read': 0.0, u'create_date': u'2031-05-05T00:00:00.000001', \
             u'_id': ObjectId('{id}'), u'proc': 1}}"
        )])
    );
}

/// A user's role and scope limit which VMs the user can read and which actions the user can request.
#[tokio::test]
async fn documented_api_enforces_roles_and_scopes() {
    let stack = Stack::builder().start().await;
    let gateway = stack.gateway(0);
    let [(off, _), (other, _), (running, Power::Running)] = MACHINES else {
        panic!("the harness's third VM is not running")
    };
    let only_off = || Scope::Only(vec![off.parse::<InstanceId>().unwrap()]);
    let viewer = stack.session(Role::Viewer, Scope::All).await;
    let limited = stack.session(Role::Operator, only_off()).await;
    let limited_viewer = stack.session(Role::Viewer, only_off()).await;
    let admin = stack.session(Role::Admin, Scope::All).await;
    let method = json!(codes::START);
    let started = |session: &str| {
        format!(
            r#"{{"status_code":1,"session_id":"{session}","message_id":"","message":"''","data":null,"method":32523}}"#
        )
    };

    for session in [&viewer, &limited_viewer] {
        let answer = gateway.start_vm(session, off).await;
        assert_eq!(
            answer.body,
            failure(3, &method, session, "'this request requires the role operator'")
        );
    }
    let hidden = gateway.start_vm(&limited, other).await;
    let unknown = gateway
        .start_vm(&limited, "0b5c4c56-6d0f-4a0e-8a4f-000000000000")
        .await;
    assert_eq!((hidden.http, hidden.status()), (200, 3));
    assert_eq!(
        hidden.body, unknown.body,
        "a VM outside the user's scope is answered like a VM that does not exist"
    );
    let unknown = gateway.start_vm(&admin, "no-uuid").await;
    assert_eq!(
        unknown.body,
        failure(3, &method, &admin, "'there is no VM with this instance_id'")
    );
    for machine in [off, other] {
        assert_eq!(
            stack.machine_state(machine).await,
            MachineState::ShutOff,
            "no VM was started"
        );
    }

    for _ in 0..2 {
        assert_eq!(
            gateway.start_vm(&limited, &format!("{off};")).await.body,
            started(&limited)
        );
        assert_eq!(stack.machine_state(off).await, MachineState::Running);
    }
    assert_eq!(gateway.start_vm(&admin, running).await.body, started(&admin));

    let sampled = "2017-01-01T21:37:59.001065";
    store_vms(&stack, [off, other].map(|instance| vm_row(instance, sampled, 1))).await;
    store_processes(
        &stack,
        [off, other].map(|instance| process_row(instance, sampled, "init", 1)),
    )
    .await;
    for method in [codes::VM, codes::PROCESSES, codes::PROCESSES_BY_NAME] {
        for (session, instance, rows) in [
            (&limited_viewer, off, 1),
            (&limited_viewer, other, 0),
            (&viewer, other, 1),
        ] {
            let data = json!({ "instance_id": instance, "proc_name": "init" });
            assert_eq!(
                gateway.rows(session, method, 10, data).await.len(),
                rows,
                "{method} {instance}"
            );
        }
    }
}
