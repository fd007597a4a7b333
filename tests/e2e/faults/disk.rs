//! The disk that holds the store of NATS is full.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::PathBuf,
};

use mongodb::bson::{Document, doc};
use rustix::process::geteuid;
use serde_json::json;
use tempfile::TempDir;
use testkit::{ADMIN, PATIENCE, Process, Program, Spec, Stack, THIS_MACHINE, codes, eventually, figure};

use super::login_request;
use crate::ingest_support::metric;

/// The mount option for a size that fits the empty buckets and streams.
const DISK: &str = "size=24m";
/// The line that the holder prints after mounting.
const MOUNTED: &str = "mounted";

/// A small file system in a mount namespace of its own, which a process keeps alive. The mounts of this machine do not
/// change, and no root is needed.
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

    /// The path outside of the mount namespace: below the root folder of the holder.
    fn path(&self) -> PathBuf {
        let root = format!("/proc/{}/root", self.holder.id());
        PathBuf::from(root + self.folder.path().to_str().unwrap())
    }

    /// Leaves no byte free.
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

/// The number of samples that the agent made and that are not stored: lost or in transit.
async fn missing(stack: &Stack) -> f64 {
    let stored = stack.database.handle().collection::<Document>("vm_samples");
    let stored = stored.count_documents(doc! { "instance_id": THIS_MACHINE }).await;
    let made = metric(stack.replica(Program::Agent, 0), "vmwatch_agent_samples_total").await;
    made - stored.unwrap() as f64
}

async fn logs_in(stack: &Stack) {
    eventually("a login succeeds", PATIENCE, async || {
        let answer = stack.gateway(0).post(&login_request()).await;
        (answer.status() == 1).then_some(()).ok_or(answer.body)
    })
    .await;
}

/// Nothing that was acknowledged is lost. NATS needs free space and a restart; the programs need no action.
#[tokio::test]
async fn recovers_from_full_disk_of_nats() {
    let disk = Disk::mount().await;
    let stack = Stack::builder()
        .replicas(Program::Agent, 1)
        // Each sample is one row of the VM.
        .set(Program::Agent, "VMWATCH_AGENT_PROCESS_INTERVAL", "1h")
        .with_permissions()
        .with_bus_store(&disk.path())
        .start()
        .await;
    let gateway = stack.gateway(0);
    let session = gateway.login(ADMIN.0, ADMIN.1).await;
    let agent = stack.replica(Program::Agent, 0);
    let rows = json!({ "instance_id": THIS_MACHINE });
    eventually("the rows of the agent are stored", PATIENCE, async || {
        let rows = gateway.rows(&session, codes::VM, 3, rows.clone()).await;
        (!rows.is_empty()).then_some(()).ok_or("none yet".to_owned())
    })
    .await;

    let missing_before = missing(&stack).await;
    disk.fill();
    eventually("a login fails", PATIENCE, async || {
        let answer = gateway.post(&login_request()).await;
        (answer.status() != 1).then_some(()).ok_or(answer.body)
    })
    .await;
    eventually("NATS logs the cause", PATIENCE, async || {
        let log = stack.nats.server.log();
        log.contains("no space left on device").then_some(()).ok_or(log)
    })
    .await;
    eventually("samples are spooled", PATIENCE, async || {
        let parts = metric(agent, "vmwatch_agent_spool_parts").await;
        (parts >= 3.0).then_some(()).ok_or(parts.to_string())
    })
    .await;
    // Reads do not need the disk.
    assert!(
        !gateway
            .rows(&session, codes::VM, 3, rows.clone())
            .await
            .is_empty()
    );

    disk.free();
    // The server does not resume without a restart, so docs/operations.md asks for a restart.
    assert_ne!(gateway.post(&login_request()).await.status(), 1);
    stack.nats.server.kill9();
    stack.nats.restart().await;
    stack.ready().await;
    logs_in(&stack).await;
    assert!(!gateway.rows(&session, codes::VM, 3, rows).await.is_empty());
    eventually("all samples are stored", PATIENCE, async || {
        let missing = missing(&stack).await;
        (missing <= missing_before.max(1.0))
            .then_some(())
            .ok_or_else(|| format!("{missing} are missing, {missing_before} before"))
    })
    .await;
    let dropped = metric(agent, "vmwatch_agent_parts_dropped_total").await;
    assert_eq!(dropped, 0.0);
    figure("faults_full_disk_dropped_parts", dropped);
}
