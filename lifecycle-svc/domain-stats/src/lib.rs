//! Reads the counters of all active domains of a libvirt connection with one call.
//!
//! This is the only crate of vmwatch that may have unsafe code. It exists because `virt` 0.4.3 returns the records of
//! `virConnectGetAllDomainStats` as raw pointers and never frees them.

mod domain;
#[cfg(feature = "libvirt")]
mod parameters;
#[cfg(feature = "libvirt")]
mod records;

pub use domain::{Balloon, Device, DomainStats, MAX_DEVICES, MAX_VCPUS, Vcpu};
#[cfg(feature = "libvirt")]
pub use records::read;
