//! Tests VMs over the REST API: joined from two services, filtered, sorted, paged, and limited by scope.

use std::time::Instant;

use serde_json::{Value, json};
use testkit::{
    MACHINES, PATIENCE, Program,
    cloud::{At, Cloud},
    eventually, figure,
};
use vmwatch_api::{InstanceId, Role, Scope, inventory::INVENTORY_BUCKET, time::unix_millis};

use super::client::{Api, publish, report, sample, stack};

fn ids(page: &Value) -> Vec<&str> {
    let vms = page["vms"].as_array().unwrap();
    vms.iter().map(|vm| vm["instance_id"].as_str().unwrap()).collect()
}

fn of<'a>(page: &'a Value, instance: &str) -> &'a Value {
    let vms = page["vms"].as_array().unwrap();
    vms.iter()
        .find(|vm| vm["instance_id"] == instance)
        .unwrap_or_else(|| panic!("{instance} is not in {page}"))
}

#[tokio::test]
async fn vm_list_joins_hypervisor_and_agent_data() {
    let stack = stack()
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "6s")
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let [(first, _), (second, _), (running, _)] = MACHINES;
    let before = unix_millis();
    report(&stack, &api, &[(running, 12.5), ("elsewhere", 1.0)]).await;

    let page = api.read("/vms").await;
    assert_eq!(
        (&page["total"], &page["next"], &page["degraded"]),
        (&json!(4), &Value::Null, &json!([]))
    );
    assert_eq!(
        ids(&page),
        [first, second, running, "elsewhere"],
        "VMs are sorted by id"
    );
    let hypervisor = &page["hypervisors"][0];
    assert_eq!(
        (&hypervisor["name"], &hypervisor["reachable"], &hypervisor["late"]),
        (&json!("test"), &json!(true), &json!(false))
    );
    assert!(hypervisor["listed_at"].is_string(), "{hypervisor}");
    let vm = of(&page, running);
    assert_eq!(
        (&vm["name"], &vm["hypervisor"], &vm["state"], &vm["agent"]),
        (
            &json!("vm-2"),
            &json!("test"),
            &json!("running"),
            &json!("reporting")
        )
    );
    assert_eq!(
        (&vm["sample"]["cpu_util"], &vm["sample"]["proc"]),
        (&json!(12.5), &json!(2))
    );
    let last = vm["last_report_at"].as_str().unwrap();
    assert!(*last >= *super::client::rfc3339(before), "{vm}");
    let sparkline = vm["cpu_sparkline"].as_array().unwrap();
    assert_eq!(sparkline.len(), 20);
    // The sample is in the last slot, or in the one before it if a slot has ended since.
    let values: Vec<&Value> = sparkline.iter().filter(|value| !value.is_null()).collect();
    assert_eq!(values, [&json!(12.5)], "{sparkline:?}");
    assert!(sparkline[..18].iter().all(Value::is_null), "{sparkline:?}");
    let off = of(&page, first);
    assert_eq!(
        (&off["state"], &off["agent"], &off["sample"]),
        (&json!("shut_off"), &json!("never"), &Value::Null)
    );
    let elsewhere = of(&page, "elsewhere");
    assert_eq!(
        (&elsewhere["state"], &elsewhere["name"], &elsewhere["agent"]),
        (&Value::Null, &Value::Null, &json!("reporting"))
    );

    for instance in [first, running, "elsewhere"] {
        let mut one = api.read(&format!("/vms/{instance}")).await;
        assert_eq!(one["degraded"].take(), json!([]));
        let listed = of(&page, instance);
        for field in [
            "instance_id",
            "state",
            "sample",
            "last_report_at",
            "agent",
            "hypervisor",
        ] {
            assert_eq!(one[field], listed[field], "{field} of {instance}");
        }
    }
    eventually("a VM without further reports is silent", PATIENCE, async || {
        let page = api.read("/vms?agent=silent").await;
        if ids(&page).len() == 2 {
            Ok(())
        } else {
            Err(page.to_string())
        }
    })
    .await;
}

#[tokio::test]
async fn vm_list_can_be_filtered_and_sorted() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let [(first, _), (second, _), (running, _)] = MACHINES;
    report(
        &stack,
        &api,
        &[("a", 5.0), ("b", 50.0), ("c", 0.0), (running, 100.0)],
    )
    .await;
    for (query, expected) in [
        ("", &[first, second, running, "a", "b", "c"][..]),
        ("?order=desc", &["c", "b", "a", running, second, first]),
        ("?sort=cpu", &[running, "b", "a", "c", first, second]),
        ("?sort=cpu&order=asc", &["c", "a", "b", running, first, second]),
        ("?sort=name", &[first, second, running, "a", "b", "c"]),
        ("?sort=name&order=desc", &[running, second, first, "a", "b", "c"]),
        ("?sort=state", &[running, first, second, "a", "b", "c"]),
        ("?state=shut_off", &[first, second]),
        ("?state=running", &[running]),
        ("?agent=never", &[first, second]),
        ("?q=VM-1", &[second]),
        ("?q=TEST", &[first, second, running]),
        ("?q=nothing", &[]),
        ("?state=running&q=b", &[running]),
        ("?hypervisor=test&state=shut_off", &[first, second]),
        ("?hypervisor=tes", &[]),
        ("?label=env", &[]),
        ("?label=hv/os=debian", &[]),
        ("?sort=hypervisor", &[first, second, running, "a", "b", "c"]),
    ] {
        let page = api.read(&format!("/vms{query}")).await;
        assert_eq!(ids(&page), expected, "{query}");
        assert_eq!(page["total"], expected.len(), "{query}");
    }
    for query in [
        "sort=size",
        "order=up",
        "limit=0",
        "limit=1001",
        "limit=x",
        "state=on",
        "cursor=x",
        "q=&nonsense=1",
        "limit=1&limit=2",
        "label==x",
        &format!("label={}", "x".repeat(323)),
        &format!("hypervisor={}", "x".repeat(129)),
        &format!("q={}", "x".repeat(10_240)),
    ] {
        let detail = api.get(&format!("/vms?{query}")).await.problem(400, "invalid");
        assert!(detail.len() < 300, "{detail}");
    }
    let first_page = api.read("/vms?sort=cpu&limit=1").await;
    let next = first_page["next"].as_str().unwrap();
    for same in ["sort=cpu&limit=7", "sort=cpu&order=desc"] {
        assert_eq!(
            api.get(&format!("/vms?{same}&cursor={next}")).await.status,
            200,
            "{same}"
        );
    }
    for other in [
        "",
        "sort=mem",
        "sort=cpu&order=asc",
        "sort=cpu&q=a",
        "sort=cpu&label=a",
    ] {
        let reply = api.get(&format!("/vms?{other}&cursor={next}")).await;
        let detail = reply.problem(422, "contradictory");
        assert!(
            detail.contains("first page without a cursor"),
            "{other}: {detail}"
        );
    }
    for instance in ["a.b", "a*", &"x".repeat(65), "%20"] {
        assert!(
            api.get(&format!("/vms/{instance}"))
                .await
                .problem(400, "invalid")
                .starts_with("instance_id must be")
        );
    }
    api.get("/vms/unknown").await.problem(404, "not_found");
}

#[tokio::test]
async fn pages_of_the_vm_list_are_complete_while_samples_arrive() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let names: Vec<_> = (0..20).map(|index| format!("page-{index:02}")).collect();
    let vms: Vec<_> = names.iter().map(|name| (name.as_str(), 50.0)).collect();
    report(&stack, &api, &vms).await;

    let writing = async {
        let mut turn = 0.0;
        loop {
            for name in &names {
                publish(&stack, &sample(name, unix_millis(), turn)).await;
            }
            turn = (turn + 7.0) % 100.0;
        }
    };
    let reading = async {
        for _ in 0..5 {
            let (mut seen, mut cursor) = (Vec::new(), String::new());
            loop {
                let page = api.read(&format!("/vms?q=page-&limit=3{cursor}")).await;
                assert_eq!(page["total"], 20);
                seen.extend(ids(&page).into_iter().map(str::to_owned));
                match page["next"].as_str() {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            assert_eq!(seen, names, "each VM is listed once and in order");
        }
        // A list that is sorted by a changing value still has a last page.
        let (mut pages, mut cursor) = (0, String::new());
        loop {
            let page = api.read(&format!("/vms?q=page-&sort=cpu&limit=3{cursor}")).await;
            pages += 1;
            match page["next"].as_str() {
                Some(next) if pages < 100 => cursor = format!("&cursor={next}"),
                _ => break,
            }
        }
        assert!(pages < 100);
    };
    tokio::select! {
        () = writing => unreachable!("the writer runs until it is cancelled"),
        () = reading => {}
    }
}

#[tokio::test]
async fn vm_outside_scope_is_answered_like_a_nonexistent_vm() {
    let stack = stack().start().await;
    let all = Api::with(&stack, Role::Viewer, Scope::All).await;
    let [(mine, _), (other, _), _] = MACHINES;
    report(&stack, &all, &[(mine, 1.0), (other, 2.0), ("mine-too", 3.0)]).await;
    let scope = Scope::Only(
        ["mine-too", mine]
            .map(|id| id.parse::<InstanceId>().unwrap())
            .into(),
    );
    let limited = Api::with(&stack, Role::Admin, scope).await;
    let page = limited.read("/vms").await;
    assert_eq!((ids(&page), &page["total"]), (vec![mine, "mine-too"], &json!(2)));
    assert_eq!(ids(&limited.read("/vms?state=shut_off").await), [mine]);
    for path in [
        "",
        "/samples",
        "/processes",
        "/processes/history?name=x",
        "/processes/events",
        "/processes/top",
        "/changes",
        "/marks",
    ] {
        let [hidden, unknown] = [other, "unknown"].map(|instance| format!("/vms/{instance}{path}"));
        let (hidden, unknown) = (limited.get(&hidden).await, limited.get(&unknown).await);
        let expected = if path.is_empty() { 404 } else { 200 };
        assert_eq!((hidden.status, unknown.status), (expected, expected), "{path}");
        let without = |body: Value| {
            let mut body = body;
            for varies in ["request_id", "from", "to"] {
                body.as_object_mut().unwrap().remove(varies);
            }
            body
        };
        assert_eq!(without(hidden.json()), without(unknown.json()), "{path}");
    }
}

/// The list shows what it last knew about hypervisors, and says so, while the KV bucket of VMs cannot be followed. While
/// metrics-svc is unreachable, the list has no samples.
#[tokio::test]
async fn vm_list_is_partial_while_one_source_is_unreachable() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let [(off, _), (other, _), (running, _)] = MACHINES;
    report(&stack, &api, &[(running, 12.5), ("elsewhere", 1.0)]).await;

    let lifecycle = stack.replica(Program::Lifecycle, 0);
    lifecycle.process.kill9();
    let jetstream = stack.bus.jetstream_for_tests();
    let bucket = format!("KV_{INVENTORY_BUCKET}");
    assert_eq!(
        api.read("/vms").await["degraded"],
        json!([]),
        "the states are recent"
    );
    jetstream.delete_stream(&bucket).await.unwrap();
    let page = eventually("the list says what is missing", PATIENCE, async || {
        let page = api.read("/vms").await;
        let is_partial = page["degraded"][0]["part"] == "lifecycle";
        is_partial.then(|| page.clone()).ok_or_else(|| page.to_string())
    })
    .await;
    assert_eq!(ids(&page), [off, other, running, "elsewhere"]);
    let vm = of(&page, running);
    assert_eq!(
        (&vm["state"], &vm["name"], &vm["sample"]["cpu_util"]),
        (&json!("running"), &json!("vm-2"), &json!(12.5))
    );
    let one = api.read(&format!("/vms/{off}")).await;
    assert_eq!(
        (&one["state"], &one["degraded"][0]["part"]),
        (&json!("shut_off"), &json!("lifecycle"))
    );
    api.get("/vms/unknown").await.problem(503, "unavailable");
    api.post(&format!("/vms/{off}/actions"), json!({ "action": "start" }))
        .await
        .problem(503, "unavailable");
    lifecycle.restart().await;
    eventually("the list is complete again", PATIENCE, async || {
        let page = api.read("/vms").await;
        let is_whole = page["degraded"] == json!([]) && ids(&page).len() == 4;
        is_whole.then_some(()).ok_or_else(|| page.to_string())
    })
    .await;

    let metrics = stack.replica(Program::Metrics, 0);
    metrics.process.kill9();
    api.becomes_unavailable("/vms/elsewhere").await;
    let page = api.read("/vms?state=running").await;
    let vm = of(&page, running);
    assert_eq!(
        (&vm["agent"], &vm["sample"], &vm["name"]),
        (&Value::Null, &Value::Null, &json!("vm-2"))
    );
    assert_eq!(page["degraded"][0]["part"], "metrics");
    assert_eq!(api.read(&format!("/vms/{off}")).await["agent"], Value::Null);
    let first = api.read("/vms?limit=1").await;
    let next = first["next"].as_str().unwrap();
    let second = api.read(&format!("/vms?limit=1&cursor={next}")).await;
    assert_eq!((ids(&first), ids(&second)), (vec![off], vec![other]));
    for path in ["/vms/elsewhere".to_owned(), format!("/vms/{running}/samples")] {
        api.get(&path).await.problem(503, "unavailable");
    }

    lifecycle.process.kill9();
    api.becomes_unavailable("/vms").await;
    assert_eq!(api.get("/me").await.status, 200);
    metrics.restart().await;
    eventually("the samples are listed again", PATIENCE, async || {
        let reply = api.get("/vms").await;
        let is_read = reply.status == 200 && of(&reply.json(), running)["sample"]["cpu_util"] == 12.5;
        is_read.then_some(()).ok_or_else(|| format!("{reply:?}"))
    })
    .await;
}

/// A hypervisor that hangs keeps its last known VMs, and delays neither the list nor the VMs of other hypervisors.
#[tokio::test]
async fn hung_hypervisor_affects_only_its_own_part_of_the_vm_list() {
    const HUNG: &str = "aaaaaaaa-1111-4111-8111-111111111111";
    const HEALTHY: &str = "bbbbbbbb-2222-4222-8222-222222222222";
    let folder = tempfile::tempdir().unwrap();
    let hung = Cloud::start(&[(HUNG, "ACTIVE")]).await;
    let healthy = Cloud::start(&[(HEALTHY, "SHUTOFF")]).await;
    let entries = [
        hung.entry(folder.path(), "hung"),
        healthy.entry(folder.path(), "healthy"),
    ];
    let stack = stack()
        .set(Program::Lifecycle, "VMWATCH_HYPERVISORS", &entries.join(","))
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let listed = async |states: [&str; 2], outdated: &[&str]| {
        eventually("the list is as expected", PATIENCE, async || {
            let page = api.read("/vms").await;
            let vms = page["vms"].as_array().unwrap();
            let found: Vec<_> = vms
                .iter()
                .map(|vm| vm["state"].as_str().unwrap_or_default())
                .collect();
            let parts = page["hypervisors"].as_array().unwrap();
            let is_outdated = |part: &&Value| part["reachable"] == false || part["late"] == true;
            let names: Vec<_> = parts
                .iter()
                .filter(is_outdated)
                .map(|part| &part["name"])
                .collect();
            (found == states && names == outdated)
                .then_some(())
                .ok_or_else(|| page.to_string())
        })
        .await;
    };
    listed(["running", "shut_off"], &[]).await;
    hung.hold(At::List);
    listed(["running", "shut_off"], &["hung"]).await;
    healthy.settle(HEALTHY, "ACTIVE");
    listed(["running", "running"], &["hung"]).await;
    let mut times = Vec::new();
    for _ in 0..100 {
        let began = Instant::now();
        assert_eq!(api.read("/vms").await["total"], 2);
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    figure("rest_list_beside_hung_hypervisor_p99_ms", times[98]);
    hung.settle(HUNG, "SHUTOFF");
    hung.release(At::List);
    listed(["shut_off", "running"], &[]).await;
}

/// A thousand reporting VMs are returned in one page, which fits into a NATS message.
#[tokio::test]
async fn vm_list_returns_a_thousand_vms_in_one_page() {
    let stack = stack().start().await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    let names: Vec<_> = (0..1000)
        .map(|index| format!("{index:04}-{}", "x".repeat(59)))
        .collect();
    for name in &names {
        publish(&stack, &sample(name, unix_millis(), 33.3)).await;
    }
    let page = eventually("all VMs are listed", PATIENCE, async || {
        let page = api.read("/vms?q=xxx&limit=1000").await;
        if page["total"] == 1000 {
            Ok(page)
        } else {
            Err(page["total"].to_string())
        }
    })
    .await;
    assert_eq!((ids(&page).len(), &page["next"]), (1000, &Value::Null));
    assert_eq!(page["degraded"], json!([]));
    let before = std::time::Instant::now();
    api.read("/vms?sort=cpu&limit=1000").await;
    println!("the gateway listed 1,000 VMs in {:?}", before.elapsed());
}
