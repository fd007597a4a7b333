//! Tests of a build without libvirt (`--no-default-features`). The tests that do not need libvirt run on this build as
//! well.

use std::fs;

use crate::support::World;

#[test]
fn does_not_link_libvirt() {
    let program = fs::read(env!("CARGO_BIN_EXE_vmwatch-lifecycle")).unwrap();
    // The library's name in the program's dynamic section.
    let needed = b"libvirt.so";
    assert!(!program.windows(needed.len()).any(|bytes| bytes == needed));
}

#[tokio::test]
async fn rejects_libvirt_uri() {
    let world = World::new().await;
    let service = world.spawn("lifecycle", &[("VMWATCH_HYPERVISORS", "lab=qemu:///system")]);
    let status = testkit::eventually("the service ends", testkit::PATIENCE, async || {
        service.0.ended().ok_or_else(|| service.0.log())
    })
    .await;
    assert_eq!(status.code(), Some(64), "EX_USAGE of sysexits.h");
    let log = service.0.log();
    assert!(log.contains("this build does not support libvirt"), "{log}");
}
