//! Requests that a service refuses because the user lacks permission; the service records them in the audit.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;
use vmwatch_api::{MethodInfo, wire::Fault};

use super::Context;

/// A request that was refused because its principal lacks permission.
#[derive(Debug, Clone)]
pub struct Refused {
    pub method: MethodInfo,
    pub context: Context,
    /// The encoded parameters of the request; they have not been validated.
    pub body: Bytes,
    /// The fault that is returned to the caller.
    pub fault: Fault,
}

type Hook = dyn Fn(Refused) -> BoxFuture<'static, ()> + Send + Sync;

/// A callback for refused requests; nothing happens until one is set.
#[derive(Clone, Default)]
pub(super) struct Refusals(Arc<OnceLock<Box<Hook>>>);

impl Refusals {
    /// Sets the callback for refused requests. Only the first call has an effect.
    pub(super) fn call<Done>(&self, hook: impl Fn(Refused) -> Done + Send + Sync + 'static)
    where
        Done: Future<Output = ()> + Send + 'static,
    {
        // A second callback is a defect of the program and is ignored.
        let _ = self.0.set(Box::new(move |refused| Box::pin(hook(refused))));
    }

    /// Calls the callback for refused requests and returns the fault for the caller.
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
