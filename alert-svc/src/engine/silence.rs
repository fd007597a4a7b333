//! Decides how long agents have been silent, and whether vmwatch itself receives no samples. It does no I/O.
//!
//! ```text
//! stream of samples, backlog, arrivals ──> flow ──> standstill ──> time that counts as silence
//!                                           └ mass: most agents fell silent at once
//! ```

mod flow;
mod mass;
mod standstill;

pub(super) use self::{
    flow::{Evidence, Flow, Health},
    mass::{Agent, Mass},
    standstill::Standstills,
};
