//! Handlers of the bus methods of metrics-svc.

use std::{future::ready, sync::Arc};

use vmwatch_api::{
    Scope,
    alerts::culprits::ProcessTop,
    current::VmsCurrent,
    filesystems::FilesystemsAt,
    history::{VmHistory, VmHypervisorHistory},
    lifecycle::Target,
    metrics::{Latest, LatestByName, ProcessByName, ProcessLatest, VmLatest},
    process_changes::ProcessChangesBetween,
    process_search::ProcessSearch,
    processes::{ProcessEvents, ProcessHistory, ProcessesAt},
    rows::RowExport,
    starts::VmStarts,
    status::MetricsStatus,
    vms::{Get, List, VmPage, VmQuery},
    wire::Fault,
};
use vmwatch_bus::{
    Context,
    serve::{Server, bind},
};

use crate::{
    deadline::Deadline,
    history::Histories,
    processes::Processes,
    row_cache::{RowCache, RowQuery},
    status::StatusReader,
    store::{RowKind, RowStore},
    vms::VmList,
};

/// Registers all methods of metrics-svc with the bus server.
pub(crate) fn register(
    server: Server,
    store: &Arc<RowStore>,
    newest: &Arc<RowCache>,
    histories: &Histories,
    processes: &Arc<Processes>,
    vms: &Arc<VmList>,
    status: &Arc<StatusReader>,
) -> Server {
    let server = server.method(MetricsStatus, bind(status, StatusReader::read));
    let server = documented_queries(server, newest);
    let server = list_queries(server, vms);
    let server = server.method(
        VmHistory,
        bind(&histories.agent, |history, context, query| async move {
            history.series(&query, Deadline::of(&context)).await
        }),
    );
    let server = server.method(
        VmHypervisorHistory,
        bind(&histories.hypervisor, |history, context, query| async move {
            history.series(&query, Deadline::of(&context)).await
        }),
    );
    let server = server.method(
        RowExport,
        bind(store, |store, context, query| async move {
            store.export(&query, Deadline::of(&context)).await
        }),
    );
    let server = server.method(
        FilesystemsAt,
        bind(store, |store, context, query| async move {
            store.filesystems(&query, Deadline::of(&context)).await
        }),
    );
    process_queries(server, processes, vms)
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
        newest.vm_rows(latest, Deadline::of(&context)).await
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

/// Registers the methods for the list of VMs.
fn list_queries(server: Server, vms: &Arc<VmList>) -> Server {
    server
        .method(
            List,
            bind(vms, |vms, context, query| ready(list_vms(&vms, &context, &query))),
        )
        .method(
            VmsCurrent,
            bind(vms, |vms, context: Context, query| {
                ready(Ok::<_, Fault>(vms.current(scope_of(&context), query)))
            }),
        )
        .method(
            Get,
            bind(vms, |vms, context, target: Target| async move {
                vms.get(&target.instance_id, Deadline::of(&context)).await
            }),
        )
}

fn list_vms(vms: &VmList, context: &Context, query: &VmQuery) -> Result<VmPage, Fault> {
    vms.list(scope_of(context), query)
}

/// The scope of the principal. Methods with a role always have a principal; if it were missing, no VM would be in scope.
fn scope_of(context: &Context) -> &Scope {
    const NOTHING: &Scope = &Scope::Only(Vec::new());
    context
        .principal
        .as_ref()
        .map_or(NOTHING, |principal| &principal.scope)
}

/// Registers the methods that read current and former processes.
fn process_queries(server: Server, processes: &Arc<Processes>, vms: &Arc<VmList>) -> Server {
    let both = Arc::new((Arc::clone(processes), Arc::clone(vms)));
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
        .method(
            ProcessTop,
            bind(processes, |processes, context, query| async move {
                processes.top(&query, Deadline::of(&context)).await
            }),
        )
        .method(
            ProcessChangesBetween,
            bind(processes, |processes, context, query| async move {
                processes.changes(&query, Deadline::of(&context)).await
            }),
        )
        .method(
            VmStarts,
            bind(processes, |processes, context, query| async move {
                processes.starts(&query, Deadline::of(&context)).await
            }),
        )
        .method(
            ProcessSearch,
            bind(&both, |both, context: Context, query| async move {
                let (processes, vms) = &*both;
                let found = processes.search(scope_of(&context), &query, Deadline::of(&context));
                Ok::<_, Fault>(vms.with_names(found.await?))
            }),
        )
}
