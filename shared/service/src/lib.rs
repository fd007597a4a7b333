//! The common parts of every vmwatch program: settings from environment variables ([`config`]), logs, metrics and
//! traces ([`telemetry`]), the listener for probes ([`health`]), the command line ([`cli`]), and start and stop
//! ([`program`]).

#![expect(
    missing_docs,
    reason = "the names of some settings, fields and errors say everything"
)]

pub mod cli;
pub mod config;
pub mod health;
pub mod jitter;
pub mod lifetime;
pub mod program;
pub mod telemetry;
