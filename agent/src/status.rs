//! Whether the agent is ready, as reported by `/readyz`.

use std::{
    borrow::Cow,
    sync::{Mutex, PoisonError},
};

type State = Result<(), &'static str>;

/// The state that each of the agent's two loops reported last.
#[derive(Debug)]
pub(crate) struct Status {
    /// Why the agent has not started, if it waits for an enrolment.
    starting: Mutex<Option<String>>,
    sampling: Mutex<State>,
    publishing: Mutex<State>,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            starting: Mutex::default(),
            sampling: Mutex::new(Err("no sample has been taken yet")),
            publishing: Mutex::new(Ok(())),
        }
    }
}

impl Status {
    /// Sets why the agent waits before it starts.
    pub(crate) fn starting(&self, reason: Option<String>) {
        *self.starting.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    pub(crate) fn sampling(&self, state: State) {
        *self.sampling.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    pub(crate) fn publishing(&self, state: State) {
        *self.publishing.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The agent is ready if sampling works and the last publish did not fail. An agent that spools loses nothing, but
    /// it is not ready, because its rows are not visible to users.
    pub(crate) fn ready(&self) -> Result<(), Cow<'static, str>> {
        if let Some(reason) = &*self.starting.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(reason.clone().into());
        }
        let state = |of: &Mutex<State>| *of.lock().unwrap_or_else(PoisonError::into_inner);
        state(&self.sampling)
            .and(state(&self.publishing))
            .map_err(Cow::from)
    }
}
