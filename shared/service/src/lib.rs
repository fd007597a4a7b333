//! What all vmwatch programs have in common: settings from environment variables ([`config`]), logs, metrics and traces
//! ([`telemetry`]), the HTTP listener for health checks ([`health`]), the command line ([`cli`]), and starting and
//! stopping ([`program`]).

#![expect(
    missing_docs,
    reason = "the names of some settings, fields and errors are sufficient documentation"
)]

pub mod cli;
pub mod config;
pub mod health;
pub mod jitter;
pub mod lifetime;
pub mod program;
pub mod telemetry;
