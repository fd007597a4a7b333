//! Whom vmwatch lets in, what it gives to whom, and what a hostile client can do to others (docs/security.md).

mod listener;
mod tls;
mod tokens;
mod wire;
