//! What every vmwatch program starts with: settings from environment variables ([`config`]), logs, metrics and traces
//! ([`telemetry`]), the listener for probes ([`health`]), the command line ([`cli`]), and start and end ([`program`]).

pub mod cli;
pub mod config;
pub mod health;
pub mod jitter;
pub mod lifetime;
pub mod program;
pub mod telemetry;
