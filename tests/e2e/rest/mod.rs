//! Stories of the REST API, over whole stacks.

pub(crate) mod client;
mod contract;
mod document;
mod events;
mod operations;
mod samples;
mod schemathesis;
mod sessions;
mod users;
mod vms;
