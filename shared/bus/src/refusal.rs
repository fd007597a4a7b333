//! Requests that are refused for who asks, so that a service can put them into the audit.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;
use vmwatch_api::{MethodInfo, wire::Fault};

use super::Context;

/// A request whose principal may not do what it asks for.
#[derive(Debug, Clone)]
pub struct Refused {
    /// What was asked for.
    pub method: MethodInfo,
    /// By whom, from where.
    pub context: Context,
    /// The parameters as they came, decoded or not.
    pub body: Bytes,
    /// What the caller is told.
    pub fault: Fault,
}

type Hook = dyn Fn(Refused) -> BoxFuture<'static, ()> + Send + Sync;

/// What a server does about such requests: nothing, unless it is told.
#[derive(Clone, Default)]
pub(super) struct Refusals(Arc<OnceLock<Box<Hook>>>);

impl Refusals {
    /// From now on this is done. The first to say wins.
    pub(super) fn call<Done>(&self, hook: impl Fn(Refused) -> Done + Send + Sync + 'static)
    where
        Done: Future<Output = ()> + Send + 'static,
    {
        // A second hook would be a defect of the program, and is dropped.
        let _ = self.0.set(Box::new(move |refused| Box::pin(hook(refused))));
    }

    /// Does it, and gives back the fault for the caller.
    pub(super) async fn note(
        &self,
        method: MethodInfo,
        context: Context,
        body: Bytes,
        fault: Fault,
    ) -> Fault {
        if let Some(hook) = self.0.get() {
            hook(Refused {
                method,
                context,
                body,
                fault: fault.clone(),
            })
            .await;
        }
        fault
    }
}
