//! Requests refused for lack of permission, which a service records in the audit.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use futures::future::BoxFuture;
use vmwatch_api::{MethodInfo, wire::Fault};

use super::Context;

/// A request that its principal has no permission for.
#[derive(Debug, Clone)]
pub struct Refused {
    pub method: MethodInfo,
    pub context: Context,
    /// The encoded parameters; they may be invalid.
    pub body: Bytes,
    /// The fault returned to the caller.
    pub fault: Fault,
}

type Hook = dyn Fn(Refused) -> BoxFuture<'static, ()> + Send + Sync;

/// The hook called for refused requests; does nothing until it is set.
#[derive(Clone, Default)]
pub(super) struct Refusals(Arc<OnceLock<Box<Hook>>>);

impl Refusals {
    /// Sets the hook. Only the first call has an effect.
    pub(super) fn call<Done>(&self, hook: impl Fn(Refused) -> Done + Send + Sync + 'static)
    where
        Done: Future<Output = ()> + Send + 'static,
    {
        // Setting a second hook is a defect of the program; it is dropped.
        let _ = self.0.set(Box::new(move |refused| Box::pin(hook(refused))));
    }

    /// Calls the hook and returns the fault for the caller.
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
