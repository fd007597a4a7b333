//! Tests of authentication, authorization, and the protection against hostile clients that docs/security.md describes.

mod bus_tls;
mod callout;
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
