//! Tests alerts: rules, silences, channels, what metrics-svc publishes for them, and what follows from them.

mod api;
mod engine;
mod engine_outages;
mod engine_support;
mod evaluation;
mod preview;
