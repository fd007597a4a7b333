//! Tests the list of VMs in metrics-svc: every replica shows the newest row of each VM, in whatever order rows arrive, and
//! answers from memory.

use futures::{StreamExt, stream};
use mongodb::bson::{Document, doc};
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Scope,
    history::SPARKLINE_STEP_MS,
    lifecycle::Target,
    metrics::Limit,
    time::unix_millis,
    vms::{Get, List, ListedVm, VmPage, VmQuery},
};

use crate::{
    history_support::{MINUTE, SECOND, call, call_in, followed, publish, sample, stack, stored},
    rows::{store_vms, vm_row},
    traces::{collector, text},
};

fn page(limit: u64) -> VmQuery {
    VmQuery {
        limit: Limit::new(limit).unwrap(),
        ..VmQuery::default()
    }
}

fn target(id: &str) -> Target {
    Target {
        instance_id: id.parse().unwrap(),
    }
}

fn ids(page: &VmPage) -> Vec<&str> {
    page.vms.iter().map(|vm| vm.instance_id.as_str()).collect()
}

async fn get(stack: &Stack, id: &str) -> ListedVm {
    call::<Get>(stack, &target(id)).await.vm
}

/// A page with a thousand VMs needs no database query, counted by its trace spans.
#[tokio::test]
async fn list_of_a_thousand_vms_is_answered_from_memory() {
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
    stored(&stack).await;

    let started = std::time::Instant::now();
    let all = call::<List>(&stack, &page(1000)).await;
    println!("metrics-svc listed 1,000 VMs in {:?}", started.elapsed());
    assert_eq!(
        (ids(&all), all.total, &all.next),
        (names.iter().map(String::as_str).collect(), 1000, &None)
    );
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
    assert_eq!(queries, [""; 0]);

    // Reads the whole list in small pages.
    let mut paged = Vec::new();
    let mut query = page(300);
    loop {
        let some = call::<List>(&stack, &query).await;
        paged.extend(ids(&some).into_iter().map(str::to_owned));
        query.cursor = some.next;
        if query.cursor.is_none() {
            break;
        }
    }
    assert_eq!(paged, names);

    let mine = Scope::Only(
        ["vm-0007", "vm-0500", "vm-none"]
            .map(|name| name.parse().unwrap())
            .to_vec(),
    );
    let seen = call_in::<List>(&stack, mine.clone(), &page(1000)).await.unwrap();
    assert_eq!((ids(&seen), seen.total), (vec!["vm-0007", "vm-0500"], 2));
    let mut query = page(1);
    query.cursor = call_in::<List>(&stack, mine.clone(), &query).await.unwrap().next;
    let rest = call_in::<List>(&stack, mine, &query).await.unwrap();
    assert_eq!((ids(&rest), rest.total, &rest.next), (vec!["vm-0500"], 2, &None));
    let none = call_in::<List>(&stack, Scope::Only(Vec::new()), &page(1000)).await;
    assert!(none.unwrap().vms.is_empty());
}

#[tokio::test]
async fn older_row_never_replaces_a_newer_one_in_the_vm_list() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    // The time is in the middle of a slot of the sparkline, so that all rows of this test fall into known slots.
    let slot = unix_millis() / SPARKLINE_STEP_MS - 1;
    let newest = slot * SPARKLINE_STEP_MS + 90 * SECOND;
    let before = unix_millis();
    publish(&stack, &sample("vm-1", newest, "+00:00", 50.0)).await;
    followed(&stack).await;
    let first = get(&stack, "vm-1").await;
    let shown = first.sample.unwrap();
    assert_eq!(
        (
            shown.at_ms,
            shown.values.cpu_util,
            shown.values.mem,
            shown.values.proc
        ),
        (newest, Some(50.0), Some(50.0), Some(95))
    );
    assert_eq!(
        (shown.values.disk_read, shown.values.disk_write),
        (Some(25.0), Some(350.0))
    );
    assert_eq!(
        (shown.values.net_incoming, shown.values.net_outgoing),
        (Some(150.0), Some(250.0))
    );
    let reported = first.last_report_ms.unwrap();
    assert!((before..=unix_millis()).contains(&reported), "{first:?}");

    // These rows are one second, two seconds, nine minutes and 70 minutes older than the newest row. The oldest is from
    // before the start of the sparkline.
    for (back, cpu) in [
        (SECOND, 60.0),
        (2 * SECOND, 40.0),
        (9 * MINUTE, 70.0),
        (70 * MINUTE, 80.0),
    ] {
        publish(&stack, &sample("vm-1", newest - back, "+00:00", cpu)).await;
        followed(&stack).await;
    }
    both(&stack, "vm-1", |vm| {
        let sample = vm.sample.unwrap();
        let shown: Vec<_> = vm.cpu_sparkline.iter().flatten().copied().collect();
        (sample.at_ms, sample.values.cpu_util) == (newest, Some(50.0))
            // The time of the last report also advances with an older row.
            && vm.last_report_ms > Some(reported)
            // The sparkline has the highest value of each three minutes.
            && shown == [70.0, 60.0]
            && vm.cpu_sparkline.len() == 20
    })
    .await;

    publish(&stack, &sample("vm-1", newest + SECOND, "+00:00", 10.0)).await;
    both(&stack, "vm-1", |vm| {
        let sample = vm.sample.unwrap();
        (sample.at_ms, sample.values.cpu_util) == (newest + SECOND, Some(10.0))
    })
    .await;
}

/// Waits until 20 answers in a row are as expected, so that both replicas have answered.
async fn both(stack: &Stack, id: &str, is_expected: impl Fn(&ListedVm) -> bool) {
    eventually("both replicas answer as expected", PATIENCE, async || {
        for _ in 0..20 {
            let vm = get(stack, id).await;
            if !is_expected(&vm) {
                return Err(format!("{vm:?}"));
            }
        }
        Ok(())
    })
    .await;
}

/// A replica that has missed live events reads from the database what is newer, and forgets VMs that have left it.
#[tokio::test]
async fn vm_list_follows_the_database_after_an_outage_of_nats() {
    let stack = stack().start().await;
    store_vms(&stack, [vm_row("vm-old", "2017-01-01T00:30:00", 1)]).await;
    stack.command(Program::Metrics, &["rebuild"], "");
    publish(&stack, &sample("vm-new", unix_millis(), "+00:00", 5.0)).await;
    followed(&stack).await;
    assert_eq!(get(&stack, "vm-old").await.sample.unwrap().values.proc, Some(1));
    assert_eq!(ids(&call::<List>(&stack, &page(10)).await), ["vm-new", "vm-old"]);

    let instances = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_instances");
    let newer = doc! { "$set": { "newest.at": mongodb::bson::DateTime::from_millis(i64::MAX / 2_000_000), "newest.proc": 7 } };
    instances
        .update_one(doc! { "_id": "vm-new" }, newer)
        .await
        .unwrap();
    instances.delete_one(doc! { "_id": "vm-old" }).await.unwrap();
    stack.nats.server.kill9();
    stack.nats.restart().await;
    eventually("the list equals the database", PATIENCE, async || {
        let listed = call_in::<List>(&stack, Scope::All, &page(10)).await;
        let listed = listed.map_err(|fault| fault.to_string())?;
        let procs: Vec<_> = listed
            .vms
            .iter()
            .map(|vm| vm.sample.unwrap().values.proc)
            .collect();
        (procs == [Some(7)])
            .then_some(())
            .ok_or_else(|| format!("{listed:?}"))
    })
    .await;
}
