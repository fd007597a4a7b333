//! The service as it is built without libvirt (`--no-default-features`). What it does, the other tests show: all but
//! those on libvirt run on this build as well.

use std::fs;

use crate::support::World;

#[test]
fn its_program_needs_no_library_of_libvirt() {
    let program = fs::read(env!("CARGO_BIN_EXE_vmwatch-lifecycle")).unwrap();
    // The name of the library in the program's dynamic section.
    let needed = b"libvirt.so";
    assert!(!program.windows(needed.len()).any(|bytes| bytes == needed));
}

#[tokio::test]
async fn a_libvirt_uri_is_refused_by_name() {
    let world = World::new().await;
    let service = world.spawn("lifecycle", &[("VMWATCH_HYPERVISORS", "lab=qemu:///system")]);
    let status = testkit::eventually("it ends", testkit::PATIENCE, async || {
        service.0.ended().ok_or_else(|| service.0.log())
    })
    .await;
    assert_eq!(status.code(), Some(64), "EX_USAGE of sysexits.h");
    let log = service.0.log();
    assert!(log.contains("this build is without libvirt"), "{log}");
}
