//! Tests the limits of the process names and of the search: large pages, scopes without names, slow reads, and VMs that are
//! removed meanwhile.

use std::time::Duration;

use mongodb::bson::{DateTime, Document, doc};
use testkit::{MongoProxy, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    InstanceId, Principal, Role, Scope,
    metrics::Limit,
    process_search::{ProcessMatch, ProcessSearch, ProcessSearchPage, ProcessSearchQuery},
    time::unix_millis,
};
use vmwatch_bus::Context;
use vmwatch_store::MONGODB_URI;

use crate::{
    history_support::{DAY, HOUR, call, followed, publish, stack},
    process_search::{all_pages, exact, ids, names_of, remove, running, search, seed},
};

/// Calls the search as a viewer, with a deadline.
async fn search_within(
    stack: &Stack,
    limit: Duration,
    scope: Scope,
    query: &ProcessSearchQuery,
) -> ProcessSearchPage {
    let principal = Principal {
        user: "test".to_owned(),
        role: Role::Viewer,
        scope,
    };
    let context = Context::new(limit).as_principal(principal);
    stack.bus.call::<ProcessSearch>(&context, query).await.unwrap()
}

/// Sets all documents of process names to full.
async fn fill(stack: &Stack) {
    let names = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_process_names");
    let full = vec![doc! { "$set": { "full": "$day" } }];
    names.update_many(doc! {}, full).await.unwrap();
}

/// Lets a replica of metrics-svc reach the database through a proxy.
async fn behind_a_proxy(stack: &Stack, replica: usize, collection: &'static str) -> MongoProxy {
    let proxy = MongoProxy::start(stack.database.uri(), collection).await;
    let metrics = stack.replica(Program::Metrics, replica);
    metrics.process.set(MONGODB_URI.name, proxy.uri());
    metrics.process.kill9();
    metrics.restart().await;
    proxy
}

/// More full documents than a page reads end the page between two VMs, so that no day of a VM is lost.
#[tokio::test]
async fn page_that_ends_at_full_documents_loses_no_day() {
    let stack = stack().start().await;
    let (vms, days) = (7, 300);
    seed(&stack, vms, days, |_| vec!["other".to_owned()]).await;
    fill(&stack).await;
    // Only the last day of the last VM has the name; the first page ends before it.
    let last = "vm-0006";
    publish(&stack, &running(last, unix_millis(), &["wanted"])).await;
    followed(&stack).await;
    let now = unix_millis();
    let query = search("wanted", ProcessMatch::Exact, now - (days - 2) * DAY, now);
    let found = all_pages(&stack, &query, 100).await;
    let ids: Vec<_> = found.iter().map(|vm| vm.instance_id.as_str()).collect();
    assert_eq!(ids, [last]);
}

/// A search in a large scope whose VMs have no names ends each page in time, and the next page continues.
#[tokio::test]
async fn search_in_a_scope_without_names_makes_progress() {
    let stack = stack().start().await;
    publish(&stack, &running("vm-9999", unix_millis() - HOUR, &["wanted"])).await;
    followed(&stack).await;
    let vms = (0..6000).chain([9999]);
    let vms: Vec<InstanceId> = vms.map(|vm| format!("vm-{vm:04}").parse().unwrap()).collect();
    let now = unix_millis();
    let mut query = search("wanted", ProcessMatch::Exact, now - 300 * DAY, now);
    query.limit = Limit::new(100).unwrap();
    let mut found = Vec::new();
    loop {
        let scope = Scope::Only(vms.clone());
        let page = search_within(&stack, Duration::from_secs(5), scope, &query).await;
        found.extend(page.vms.iter().map(|vm| vm.instance_id.to_string()));
        assert!(page.next.is_none() || page.next > query.after, "{:?}", page.next);
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    assert_eq!(found, ["vm-9999"]);
}

/// A VM whose rows take too long to read is reported as not searched, and the others are searched.
#[tokio::test]
async fn search_that_takes_too_long_reports_the_vm_as_not_searched() {
    let stack = stack().start().await;
    seed(&stack, 2, 6, |_| vec!["other".to_owned()]).await;
    fill(&stack).await;
    seed_wanted(&stack).await;
    let proxy = behind_a_proxy(&stack, 0, "blocks").await;
    proxy.delay_queries(Duration::from_millis(700));
    let (mut query, mut found, mut unsearched) = (exact("wanted"), Vec::new(), Vec::new());
    loop {
        let page = search_within(&stack, Duration::from_secs(4), Scope::All, &query).await;
        found.extend(ids(&page).iter().map(|&id| id.to_owned()));
        unsearched.extend(page.unsearched.iter().map(ToString::to_string));
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    assert_eq!(found, ["vm-1000"]);
    assert_eq!(unsearched, ["vm-0000", "vm-0001"]);
    proxy.delay_queries(Duration::ZERO);
    assert_eq!(
        call::<ProcessSearch>(&stack, &exact("wanted")).await.unsearched,
        []
    );
}

async fn seed_wanted(stack: &Stack) {
    publish(stack, &running("vm-1000", unix_millis() - HOUR, &["wanted"])).await;
    followed(stack).await;
}

/// Work that has read rows before their VM was removed writes names, rollups and the newest row afterwards.
#[tokio::test]
async fn deletes_derived_data_written_after_removal() {
    let stack = stack().replicas(Program::Metrics, 2).start().await;
    let other = stack.replica(Program::Metrics, 1);
    other.process.set("VMWATCH_ROLLUP_INTERVAL", "10m");
    other.process.kill9();
    other.restart().await;
    let proxy = behind_a_proxy(&stack, 0, "vm_samples_process_names").await;
    proxy.hold("insert", 0);
    let at = unix_millis() - HOUR;
    publish(&stack, &running("vm-1", at, &["worker"])).await;
    proxy.holds().await;
    remove(&stack, "vm-1").await;
    proxy.release();
    eventually("the pass has continued", PATIENCE, async || {
        let names = names_of(&stack, "vm-1").await;
        let entries = entries(&stack).await;
        (names.len() == 1 && entries == 1)
            .then_some(())
            .ok_or_else(|| format!("{names:?}, {entries} entries"))
    })
    .await;

    // The VM reports again. What was computed from these rows stays.
    publish(&stack, &running("vm-1", at + 60_000, &["newer"])).await;
    followed(&stack).await;
    let removals = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_removals");
    let long_ago = doc! { "$set": { "at": DateTime::from_millis(0) } };
    removals.update_many(doc! {}, long_ago).await.unwrap();
    eventually("only newer names are left", PATIENCE, async || {
        let left = removals.count_documents(doc! {}).await.unwrap();
        let names = names_of(&stack, "vm-1").await;
        let names: Vec<_> = names
            .iter()
            .map(|names| names.get_array("names").unwrap())
            .collect();
        (left == 0 && names == [&mongodb::bson::bson!(["newer"]).as_array().unwrap().clone()])
            .then_some(())
            .ok_or_else(|| format!("{left} removals, {names:?}"))
    })
    .await;
    assert_eq!(entries(&stack).await, 1);
}

/// Number of VMs in the list of VMs.
async fn entries(stack: &Stack) -> u64 {
    let entries = stack
        .database
        .handle()
        .collection::<Document>("vm_samples_instances");
    entries.count_documents(doc! {}).await.unwrap()
}
