//! Tests of the REST API, with all programs running.

pub(crate) mod client;
mod contract;
mod document;
pub(crate) mod events;
mod install;
mod labels;
mod operations;
mod own_sessions;
mod rows;
mod samples;
mod schemathesis;
mod sessions;
mod status;
mod users;
mod vms;
