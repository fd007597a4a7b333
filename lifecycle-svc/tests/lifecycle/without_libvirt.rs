//! Tests of a build without libvirt (`--no-default-features`). All tests that do not need libvirt run with this build
//! as well.

use std::fs;

use crate::support::World;

#[test]
fn build_without_libvirt_does_not_link_it() {
    let program = fs::read(env!("CARGO_BIN_EXE_vmwatch-lifecycle")).unwrap();
    // A program that links libvirt names the library in its dynamic section.
    let needed = b"libvirt.so";
    assert!(!program.windows(needed.len()).any(|bytes| bytes == needed));
}

#[tokio::test]
async fn build_without_libvirt_rejects_libvirt_uris() {
    let world = World::new().await;
    let service = world.spawn("lifecycle", &[("VMWATCH_HYPERVISORS", "lab=qemu:///system")]);
    let status = testkit::eventually("lifecycle-svc ends", testkit::PATIENCE, async || {
        service.0.ended().ok_or_else(|| service.0.log())
    })
    .await;
    assert_eq!(status.code(), Some(64), "the exit code is EX_USAGE of sysexits.h");
    let log = service.0.log();
    assert!(log.contains("does not support libvirt"), "{log}");
}
