//! The methods of metrics-svc.

use std::sync::Arc;

use shared::{
    api::metrics::{Latest, LatestByName, ProcessByName, ProcessLatest, VmLatest},
    bus::serve::Server,
};

use crate::store::{Query, RowKind, RowStore};

/// Adds every method to the server.
pub(crate) fn register(server: Server, store: &Arc<RowStore>) -> Server {
    let (vms, processes, named) = (Arc::clone(store), Arc::clone(store), Arc::clone(store));
    server
        .method::<VmLatest, _, _>(move |context, Latest { instance_id, limit }| {
            let store = Arc::clone(&vms);
            async move {
                let query = Query {
                    kind: RowKind::Vm,
                    instance: &instance_id,
                    cmd: None,
                    limit,
                };
                Ok(store.latest(query, context.remaining()).await?)
            }
        })
        .method::<ProcessLatest, _, _>(move |context, Latest { instance_id, limit }| {
            let store = Arc::clone(&processes);
            async move {
                let query = Query {
                    kind: RowKind::Process,
                    instance: &instance_id,
                    cmd: None,
                    limit,
                };
                Ok(store.latest(query, context.remaining()).await?)
            }
        })
        .method::<ProcessByName, _, _>(
            move |context,
                  LatestByName {
                      instance_id,
                      limit,
                      proc_name,
                  }| {
                let store = Arc::clone(&named);
                async move {
                    let cmd = proc_name.as_deref();
                    let query = Query {
                        kind: RowKind::Process,
                        instance: &instance_id,
                        cmd,
                        limit,
                    };
                    Ok(store.latest(query, context.remaining()).await?)
                }
            },
        )
}
