//! Handlers of the bus methods of metrics-svc.

use std::sync::Arc;

use vmwatch_api::{
    Scope,
    history::{VmGet, VmHistory, VmList, VmPage, VmSummary},
    lifecycle::{Page, Target},
    metrics::{Latest, LatestByName, ProcessByName, ProcessLatest, VmLatest},
    no_such_vm,
    processes::{ProcessEvents, ProcessHistory, ProcessesAt},
    wire::Fault,
};
use vmwatch_bus::{
    Context,
    serve::{Server, bind},
};

use crate::{
    MetricsError,
    deadline::Deadline,
    history::History,
    processes::Processes,
    row_cache::{RowCache, RowQuery},
    store::RowKind,
};

/// Registers all methods of metrics-svc with the bus server.
pub(crate) fn register(
    server: Server,
    newest: &Arc<RowCache>,
    history: &Arc<History>,
    processes: &Arc<Processes>,
) -> Server {
    let server = documented_queries(server, newest);
    let server = history_queries(server, history);
    process_queries(server, processes)
}

/// Registers the methods that the documented API uses.
fn documented_queries(server: Server, newest: &Arc<RowCache>) -> Server {
    let question = |kind, latest: Latest, cmd| RowQuery {
        kind,
        instance: latest.instance_id,
        cmd,
        limit: latest.limit,
        before: latest.before,
    };
    let of_vm = move |newest: Arc<RowCache>, context: Context, latest| async move {
        let question = question(RowKind::Vm, latest, None);
        newest.rows(question, Deadline::of(&context)).await
    };
    let of_processes = move |newest: Arc<RowCache>, context: Context, latest| async move {
        let question = question(RowKind::Process, latest, None);
        newest.rows(question, Deadline::of(&context)).await
    };
    let by_name = move |newest: Arc<RowCache>, context: Context, by_name: LatestByName| async move {
        let latest = Latest {
            instance_id: by_name.instance_id,
            limit: by_name.limit,
            before: by_name.before,
        };
        let question = question(RowKind::Process, latest, by_name.proc_name);
        newest.rows(question, Deadline::of(&context)).await
    };
    server
        .method(VmLatest, bind(newest, of_vm))
        .method(ProcessLatest, bind(newest, of_processes))
        .method(ProcessByName, bind(newest, by_name))
}

/// Registers the methods for the list of VMs and their history.
fn history_queries(server: Server, history: &Arc<History>) -> Server {
    server
        .method(VmList, bind(history, list_vms))
        .method(VmGet, bind(history, get_vm))
        .method(
            VmHistory,
            bind(history, |history, context, query| async move {
                history.series(&query, Deadline::of(&context)).await
            }),
        )
}

async fn list_vms(history: Arc<History>, context: Context, page: Page) -> Result<VmPage, MetricsError> {
    // The method requires a role, so a principal is always present; if it were missing, no VM would be in scope.
    let nothing = Scope::Only(Vec::new());
    let scope = context
        .principal
        .as_ref()
        .map_or(&nothing, |principal| &principal.scope);
    history.instances.list(&page, scope, Deadline::of(&context)).await
}

async fn get_vm(history: Arc<History>, context: Context, target: Target) -> Result<VmSummary, Fault> {
    let deadline = Deadline::of(&context);
    let found = history.instances.get(&target.instance_id, deadline).await?;
    found.ok_or_else(no_such_vm)
}

/// Registers the methods for processes, now and at earlier times.
fn process_queries(server: Server, processes: &Arc<Processes>) -> Server {
    server
        .method(
            ProcessesAt,
            bind(processes, |processes, context, query| async move {
                processes.table(&query, Deadline::of(&context)).await
            }),
        )
        .method(
            ProcessHistory,
            bind(processes, |processes, context, query| async move {
                processes.series(&query, Deadline::of(&context)).await
            }),
        )
        .method(
            ProcessEvents,
            bind(processes, |processes, context, query| async move {
                processes.events(&query, Deadline::of(&context)).await
            }),
        )
}
