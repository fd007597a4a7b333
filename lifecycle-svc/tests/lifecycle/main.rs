//! Tests lifecycle-svc as a process with a real NATS server, with libvirt's test driver and with simulated clouds.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic here fails the test"
)]

mod faults;
mod inventory;
mod labels;
#[cfg(feature = "libvirt")]
mod large_list;
#[cfg(feature = "libvirt")]
mod libvirt;
#[cfg(feature = "libvirt")]
mod libvirt_states;
#[cfg(feature = "libvirt")]
mod measures;
mod nova;
mod nova_either;
mod nova_https;
mod nova_large;
mod nova_states;
#[cfg(feature = "libvirt")]
mod qemu;
#[cfg_attr(
    not(feature = "libvirt"),
    expect(dead_code, reason = "only the libvirt tests use some of these helpers")
)]
mod support;
mod two_owners;
#[cfg(not(feature = "libvirt"))]
mod without_libvirt;
