//! Authentication, authorization, and protection against hostile clients (docs/security.md).

mod bus_tls;
mod corpus;
mod guest;
mod headers;
mod leaks;
mod listener;
mod names;
mod passwords;
mod revocation;
mod servers_tls;
mod tls;
mod tokens;
mod walk;
mod wire;
