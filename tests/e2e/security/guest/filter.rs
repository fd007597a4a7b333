//! Loads the packet filter of deploy/nats/guests.nft in a separate network namespace, where it affects no other program
//! and needs no privileges.

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
};

use testkit::Stack;

/// The guest connects from this address. Everything else in the namespace connects from 127.0.0.1.
pub(super) const GUEST_ADDRESS: &str = "127.0.0.2";
/// This variable is set in the process that runs inside the namespace.
const INSIDE: &str = "VMWATCH_TEST_NAMESPACE";
/// The folders of `nft` and `ip` on Debian, which are not in every user's PATH.
const ADMIN_PROGRAMS: &str = "/usr/sbin:/sbin";

/// Returns whether this process is inside the namespace. If not, runs this test again inside a new namespace and
/// asserts that it passes there.
pub(super) fn is_inside(test: &str) -> bool {
    if env::var_os(INSIDE).is_some() {
        return true;
    }
    let path = format!("{}:{ADMIN_PROGRAMS}", env::var("PATH").unwrap_or_default());
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c"])
        .arg(r#"ip link set lo up && exec "$0" "$@""#)
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .env("PATH", path)
        // Containers cannot be reached from the namespace, so the servers run as processes.
        .env("VMWATCH_TEST_BACKEND", "processes")
        .stdin(Stdio::null())
        .status()
        .expect("`unshare` of util-linux is installed");
    assert!(
        status.success(),
        "{test} failed in its namespace; it needs user namespaces, `ip` and `nft` (`./dev install`)"
    );
    false
}

/// Loads the filter for the guest's address and the port of this NATS server.
pub(super) fn limit_guest(stack: &Stack) {
    let port = stack.nats.url().rsplit_once(':').unwrap().1;
    let deployed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/nats/guests.nft");
    let rules = fs::read_to_string(deployed)
        .unwrap()
        .replace("192.0.2.0/24", GUEST_ADDRESS)
        .replace("{ 4222, 8443 }", &format!("{{ {port} }}"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guests.nft");
    fs::write(&file, rules).unwrap();
    let loaded = Command::new("nft").arg("--file").arg(&file).output().unwrap();
    assert!(
        loaded.status.success(),
        "nft failed: {}",
        String::from_utf8_lossy(&loaded.stderr)
    );
}
