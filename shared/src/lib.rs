//! The contract of vmwatch, and the one way of speaking it.
//!
//! Charter: something belongs here only if **two or more** of the programs need it and would be wrong if they
//! disagreed about it. What has one user lives with that user. Three layers, each knowing only those above it:
//!
//! - [`api`]: every method of every service as a type, in one table. Plain data, no I/O.
//! - [`wire`]: the reply envelope, the status codes and the public fault. Plain data, no I/O.
//! - [`bus`]: calling and serving those methods over NATS, with deadline, principal, trace, bounds and drain.
//!
//! Beside them stand what every program starts with: [`program`], [`config`], [`telemetry`], [`health`],
//! [`http_server`], [`store`], [`limits`] and [`lifetime`].

pub mod api;
pub mod bus;
pub mod cli;
pub mod config;
pub mod health;
pub mod http_server;
pub mod http_tls;
pub mod jitter;
pub mod lifetime;
pub mod limits;
pub mod program;
pub mod store;
pub mod telemetry;
pub mod time;
pub mod wire;
