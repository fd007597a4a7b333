//! Tests alerts: rules, silences, channels, what metrics-svc publishes for them, and what follows from them.

mod api;
mod channels;
mod engine;
mod engine_outages;
mod engine_support;
mod evaluation;
mod live;
mod metrics_outage;
mod preview;
mod removal;
mod sending;
