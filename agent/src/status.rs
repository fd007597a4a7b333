//! Whether the agent does its work, for `/readyz`.

use std::sync::{Mutex, PoisonError};

type State = Result<(), &'static str>;

/// What the loops say of themselves.
#[derive(Debug)]
pub(crate) struct Status {
    sampling: Mutex<State>,
    publishing: Mutex<State>,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            sampling: Mutex::new(Err("the first reading is not done yet")),
            publishing: Mutex::new(Ok(())),
        }
    }
}

impl Status {
    pub(crate) fn sampling(&self, state: State) {
        *self.sampling.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    pub(crate) fn publishing(&self, state: State) {
        *self.publishing.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Ready is: samples are taken, and nothing is known that keeps them from being stored. An agent that spools
    /// loses nothing and goes on; it is not ready all the same, since nobody sees its rows.
    pub(crate) fn ready(&self) -> State {
        let state = |of: &Mutex<State>| *of.lock().unwrap_or_else(PoisonError::into_inner);
        state(&self.sampling).and(state(&self.publishing))
    }
}
