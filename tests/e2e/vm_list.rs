//! Tests the list of VMs in metrics-svc: it shows the newest row of each VM, in whatever order rows arrive, and needs
//! one database query per page.

use futures::{StreamExt, stream};
use testkit::{PATIENCE, Program, eventually};
use vmwatch_api::{
    InstanceId, Scope,
    history::{SPARKLINE_STEP_MS, VmGet, VmList, VmSummary},
    lifecycle::{Page, Target},
    metrics::Limit,
    time::unix_millis,
};

use crate::{
    history_support::{MINUTE, SECOND, call, call_in, followed, publish, sample, stack},
    traces::{collector, text},
};

fn page(after: Option<&InstanceId>, limit: u64) -> Page {
    Page {
        after: after.cloned(),
        limit: Limit::new(limit).unwrap(),
    }
}

/// A page with a thousand VMs needs one database query, counted by its trace spans.
#[tokio::test]
async fn list_of_a_thousand_vms_needs_one_database_query() {
    let (address, spans) = collector().await;
    let stack = stack()
        .set(
            Program::Metrics,
            "VMWATCH_OTLP_ENDPOINT",
            &format!("http://{address}"),
        )
        .set(Program::Metrics, "OTEL_BSP_SCHEDULE_DELAY", "100")
        .start()
        .await;
    let now = unix_millis();
    let names: Vec<_> = (0..1000).map(|vm| format!("vm-{vm:04}")).collect();
    stream::iter(&names)
        .for_each_concurrent(32, async |name| {
            publish(&stack, &sample(name, now, "+00:00", 5.0)).await;
        })
        .await;
    followed(&stack).await;

    let started = std::time::Instant::now();
    let all = call::<VmList>(&stack, &page(None, 1000)).await;
    println!("metrics-svc listed 1,000 VMs in {:?}", started.elapsed());
    assert!(!all.more);
    let listed: Vec<_> = all.vms.iter().map(|vm| vm.instance_id.to_string()).collect();
    assert_eq!(listed, names);
    let queries = eventually("the trace of the request arrives", PATIENCE, async || {
        let spans = spans.lock().unwrap();
        let request = spans
            .iter()
            .find(|received| received.span.name == "metrics.vm.list");
        let request = request.ok_or("the request's span has not arrived")?;
        let same = spans
            .iter()
            .filter(|received| received.span.trace_id == request.span.trace_id);
        Ok(same
            .filter(|received| text(&received.span.attributes, "db.system.name").is_some())
            .map(|received| received.span.name.clone())
            .collect::<Vec<_>>())
    })
    .await;
    assert_eq!(queries, ["find vm_samples_instances"]);

    // Reads the whole list in small pages.
    let mut paged: Vec<VmSummary> = Vec::new();
    loop {
        let after = paged.last().map(|vm| vm.instance_id.clone());
        let some = call::<VmList>(&stack, &page(after.as_ref(), 300)).await;
        paged.extend(some.vms);
        if !some.more {
            break;
        }
    }
    assert_eq!(paged, all.vms);

    let mine = Scope::Only(
        ["vm-0007", "vm-0500", "vm-none"]
            .map(|name| name.parse().unwrap())
            .to_vec(),
    );
    let seen = call_in::<VmList>(&stack, mine.clone(), &page(None, 1000))
        .await
        .unwrap();
    let seen: Vec<_> = seen
        .vms
        .iter()
        .map(|vm| vm.instance_id.as_str().to_owned())
        .collect();
    assert_eq!(seen, ["vm-0007", "vm-0500"]);
    let first = call_in::<VmList>(&stack, mine.clone(), &page(None, 1))
        .await
        .unwrap();
    assert!(first.more);
    let rest = call_in::<VmList>(&stack, mine, &page(Some(&first.vms[0].instance_id), 1))
        .await
        .unwrap();
    assert_eq!((rest.vms[0].instance_id.as_str(), rest.more), ("vm-0500", false));
    let none = call_in::<VmList>(&stack, Scope::Only(Vec::new()), &page(None, 1000))
        .await
        .unwrap();
    assert!(none.vms.is_empty());
}

#[tokio::test]
async fn older_row_never_replaces_a_newer_one_in_the_vm_list() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let target = Target {
        instance_id: "vm-1".parse().unwrap(),
    };
    // The time is in the middle of a slot of the sparkline, so that all rows of this test fall into known slots.
    let slot = unix_millis() / SPARKLINE_STEP_MS - 1;
    let newest = slot * SPARKLINE_STEP_MS + 90 * SECOND;
    let before = unix_millis();
    publish(&stack, &sample("vm-1", newest, "+00:00", 50.0)).await;
    followed(&stack).await;
    let first = call::<VmGet>(&stack, &target).await;
    assert_eq!(
        (
            first.at_ms,
            first.values.cpu_util,
            first.values.mem,
            first.values.proc
        ),
        (newest, 50.0, 50.0, 95)
    );
    assert_eq!((first.values.disk_read, first.values.disk_write), (25.0, 350.0));
    assert_eq!(
        (first.values.net_incoming, first.values.net_outgoing),
        (150.0, 250.0)
    );
    assert!(
        (before..=unix_millis()).contains(&first.last_report_ms),
        "{first:?}"
    );

    // These rows are older: one or two seconds, nine minutes, and 70 minutes, which is before the sparkline.
    for (back, cpu) in [
        (SECOND, 60.0),
        (2 * SECOND, 40.0),
        (9 * MINUTE, 70.0),
        (70 * MINUTE, 80.0),
    ] {
        publish(&stack, &sample("vm-1", newest - back, "+00:00", cpu)).await;
        followed(&stack).await;
    }
    let after = call::<VmGet>(&stack, &target).await;
    assert_eq!((after.at_ms, after.values.cpu_util), (newest, 50.0));
    assert!(
        after.last_report_ms > first.last_report_ms,
        "the time of the last report also advances with an older row"
    );
    let shown: Vec<_> = after.cpu_sparkline.iter().flatten().copied().collect();
    assert_eq!(
        shown,
        [70.0, 60.0],
        "the sparkline has the highest value of each three minutes: {after:?}"
    );
    assert_eq!(after.cpu_sparkline.len(), 20);

    publish(&stack, &sample("vm-1", newest + SECOND, "+00:00", 10.0)).await;
    followed(&stack).await;
    let last = call::<VmGet>(&stack, &target).await;
    assert_eq!((last.at_ms, last.values.cpu_util), (newest + SECOND, 10.0));
}
