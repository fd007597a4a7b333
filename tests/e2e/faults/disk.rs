//! Tests the recovery from a full disk that holds the NATS store.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::PathBuf,
};

use mongodb::bson::doc;
use rustix::process::geteuid;
use serde_json::json;
use tempfile::TempDir;
use testkit::{ADMIN, PATIENCE, Process, Program, Spec, Stack, THIS_MACHINE, codes, eventually, figure};

use super::login_request;
use crate::{ingest_support::metric, rows::stored_rows};

/// Size of the disk, as a mount option. Empty KV buckets and streams fit into it.
const DISK: &str = "size=24m";
/// The process that holds the mount prints this line after mounting.
const MOUNTED: &str = "mounted";

/// A small file system in its own mount namespace. A process keeps the namespace alive. The mounts of this machine do
/// not change, and no root access is needed.
struct Disk {
    holder: Process,
    folder: TempDir,
}

impl Disk {
    async fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = tempfile::tempdir().unwrap().keep().join("disk.log");
        let mut args = vec!["--mount"];
        if !geteuid().is_root() {
            args.extend(["--user", "--map-root-user"]);
        }
        let script =
            format!("mount -t tmpfs -o {DISK} tmpfs \"$0\" && echo {MOUNTED} && exec tail -f /dev/null");
        let mut args: Vec<_> = args.into_iter().map(str::to_owned).collect();
        args.extend(["sh", "-c", &script, folder.path().to_str().unwrap()].map(str::to_owned));
        let holder = Process::start(Spec {
            name: "disk".to_owned(),
            program: "unshare".into(),
            args,
            env: Vec::new(),
            log,
        });
        eventually("the disk is mounted", PATIENCE, async || {
            let log = holder.log();
            log.contains(MOUNTED).then_some(()).ok_or(log)
        })
        .await;
        Self { holder, folder }
    }

    /// Returns the path of the mounted disk as seen from outside of the mount namespace, through `/proc/<pid>/root` of
    /// the process that holds the mount.
    fn path(&self) -> PathBuf {
        let root = format!("/proc/{}/root", self.holder.id());
        PathBuf::from(root + self.folder.path().to_str().unwrap())
    }

    /// Fills the disk until no byte is free.
    fn fill(&self) {
        let mut ballast = File::create(self.path().join("ballast")).unwrap();
        let mut size = 1 << 20;
        while size > 0 {
            match ballast.write(&vec![0; size]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => size /= 2,
                Err(error) => panic!("the disk cannot be filled: {error}"),
            }
        }
    }

    fn free(&self) {
        fs::remove_file(self.path().join("ballast")).unwrap();
    }
}

/// Returns the number of samples that the agent took but the database does not contain, because they are still in
/// transit or were lost.
async fn missing(stack: &Stack) -> f64 {
    let of_vm = doc! { "instance_id": THIS_MACHINE, "kind": "vm" };
    let stored = stored_rows(&stack.database, of_vm).await.unwrap().len();
    let made = metric(stack.replica(Program::Agent, 0), "vmwatch_agent_samples_total").await;
    made - stored as f64
}

async fn logs_in(stack: &Stack) {
    eventually("a login succeeds", PATIENCE, async || {
        let answer = stack.gateway(0).post(&login_request()).await;
        (answer.status() == 1).then_some(()).ok_or(answer.body)
    })
    .await;
}

/// No acknowledged sample is lost while the disk of NATS is full. To recover, NATS needs free space and a restart; the
/// vmwatch programs recover without intervention.
#[tokio::test]
async fn full_disk_of_nats_loses_no_acknowledged_sample() {
    let disk = Disk::mount().await;
    let stack = Stack::builder()
        .replicas(Program::Agent, 1)
        // With this interval the agent sends no process rows, so that each sample is one VM row.
        .set(Program::Agent, "VMWATCH_AGENT_PROCESS_INTERVAL", "1h")
        .with_permissions()
        .with_bus_store(&disk.path())
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = gateway.login(ADMIN.0, ADMIN.1).await;
    let agent = stack.replica(Program::Agent, 0);
    let rows = json!({ "instance_id": THIS_MACHINE });
    eventually("a row of the agent is stored", PATIENCE, async || {
        let rows = gateway.rows(&session, codes::VM, 3, rows.clone()).await;
        (!rows.is_empty())
            .then_some(())
            .ok_or("no row is stored".to_owned())
    })
    .await;

    let missing_before = missing(&stack).await;
    disk.fill();
    eventually("a login fails", PATIENCE, async || {
        let answer = gateway.post(&login_request()).await;
        (answer.status() != 1).then_some(()).ok_or(answer.body)
    })
    .await;
    eventually("NATS logs that its disk is full", PATIENCE, async || {
        let log = stack.nats.server.log();
        log.contains("no space left on device").then_some(()).ok_or(log)
    })
    .await;
    eventually("the agent spools samples", PATIENCE, async || {
        let parts = metric(agent, "vmwatch_agent_spool_parts").await;
        (parts >= 3.0).then_some(()).ok_or(parts.to_string())
    })
    .await;
    // The gateway can still read VM rows while the disk of the NATS server is full.
    assert!(
        !gateway
            .rows(&session, codes::VM, 3, rows.clone())
            .await
            .is_empty()
    );

    disk.free();
    // After space is freed, NATS resumes only when it is restarted, as docs/operations.md says.
    assert_ne!(gateway.post(&login_request()).await.status(), 1);
    stack.nats.server.kill9();
    stack.nats.restart().await;
    stack.ready().await;
    logs_in(&stack).await;
    assert!(!gateway.rows(&session, codes::VM, 3, rows).await.is_empty());
    eventually("all samples are stored", PATIENCE, async || {
        let missing = missing(&stack).await;
        (missing <= missing_before.max(1.0)).then_some(()).ok_or_else(|| {
            format!("{missing} samples are missing; before the disk was full: {missing_before}")
        })
    })
    .await;
    let dropped = metric(agent, "vmwatch_agent_parts_dropped_total").await;
    assert_eq!(dropped, 0.0);
    figure("faults_full_disk_dropped_parts", dropped);
}
