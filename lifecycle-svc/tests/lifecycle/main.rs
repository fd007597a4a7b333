//! lifecycle-svc as a process, over a real NATS server: on libvirt's test hypervisor, and on clouds that this test plays.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what fails here is the test"
)]

mod cloud;
mod faults;
#[cfg(feature = "libvirt")]
mod libvirt;
mod nova;
mod nova_either;
mod nova_https;
#[cfg(feature = "libvirt")]
mod qemu;
#[cfg_attr(
    not(feature = "libvirt"),
    expect(dead_code, reason = "some of it only the tests on libvirt use")
)]
mod support;
#[cfg(not(feature = "libvirt"))]
mod without_libvirt;
