//! The bus methods of metrics-svc.

use std::sync::Arc;

use vmwatch_api::{
    Scope,
    history::{VmGet, VmHistory, VmList},
    metrics::{Latest, LatestByName, ProcessByName, ProcessLatest, VmLatest},
    no_such_vm,
    processes::{ProcessEvents, ProcessHistory, ProcessesAt},
};
use vmwatch_bus::serve::Server;

use crate::{
    deadline::Deadline,
    history::History,
    processes::Processes,
    row_cache::{RowCache, RowQuery},
    store::RowKind,
};

/// Adds every method to the server.
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

/// Methods of the documented API.
fn documented_queries(server: Server, newest: &Arc<RowCache>) -> Server {
    let (vms, processes, named) = (Arc::clone(newest), Arc::clone(newest), Arc::clone(newest));
    let question = |kind, latest: Latest, cmd| RowQuery {
        kind,
        instance: latest.instance_id,
        cmd,
        limit: latest.limit,
        before: latest.before,
    };
    server
        .method::<VmLatest, _, _>(move |context, latest| {
            let newest = Arc::clone(&vms);
            let question = question(RowKind::Vm, latest, None);
            async move { newest.rows(question, Deadline::of(&context)).await }
        })
        .method::<ProcessLatest, _, _>(move |context, latest| {
            let newest = Arc::clone(&processes);
            let question = question(RowKind::Process, latest, None);
            async move { newest.rows(question, Deadline::of(&context)).await }
        })
        .method::<ProcessByName, _, _>(move |context, by_name| {
            let newest = Arc::clone(&named);
            let LatestByName {
                instance_id,
                limit,
                proc_name,
                before,
            } = by_name;
            let latest = Latest {
                instance_id,
                limit,
                before,
            };
            let question = question(RowKind::Process, latest, proc_name);
            async move { newest.rows(question, Deadline::of(&context)).await }
        })
}

/// Methods for VMs and their history.
fn history_queries(server: Server, history: &Arc<History>) -> Server {
    let (list, get, past) = (Arc::clone(history), Arc::clone(history), Arc::clone(history));
    server
        .method::<VmList, _, _>(move |context, page| {
            let history = Arc::clone(&list);
            async move {
                // The method requires a role, so a principal is always present; without one nothing is in scope.
                let nothing = Scope::Only(Vec::new());
                let scope = context
                    .principal
                    .as_ref()
                    .map_or(&nothing, |principal| &principal.scope);
                Ok(history
                    .instances
                    .list(&page, scope, Deadline::of(&context))
                    .await?)
            }
        })
        .method::<VmGet, _, _>(move |context, target| {
            let history = Arc::clone(&get);
            async move {
                let found = history
                    .instances
                    .get(&target.instance_id, Deadline::of(&context))
                    .await?;
                found.ok_or_else(no_such_vm)
            }
        })
        .method::<VmHistory, _, _>(move |context, query| {
            let history = Arc::clone(&past);
            async move { Ok(history.series(&query, Deadline::of(&context)).await?) }
        })
}

/// Methods for processes at any time.
fn process_queries(server: Server, processes: &Arc<Processes>) -> Server {
    let (table, series, events) = (
        Arc::clone(processes),
        Arc::clone(processes),
        Arc::clone(processes),
    );
    server
        .method::<ProcessesAt, _, _>(move |context, query| {
            let processes = Arc::clone(&table);
            async move { Ok(processes.table(&query, Deadline::of(&context)).await?) }
        })
        .method::<ProcessHistory, _, _>(move |context, query| {
            let processes = Arc::clone(&series);
            async move { Ok(processes.series(&query, Deadline::of(&context)).await?) }
        })
        .method::<ProcessEvents, _, _>(move |context, query| {
            let processes = Arc::clone(&events);
            async move { Ok(processes.events(&query, Deadline::of(&context)).await?) }
        })
}
