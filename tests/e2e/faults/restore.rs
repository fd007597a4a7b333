//! Tests backup and restore while the vmwatch programs run, by the steps in docs/operations.md.

use std::{path::Path, process::Command};

use mongodb::bson::doc;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::{ADMIN, PATIENCE, Program, Server, Stack, eventually};
use vmwatch_api::time::unix_millis;

use crate::{
    ingest_support::metric,
    rest::client::{Api, publish, report, sample, stack},
    rows::stored_rows,
};

const PASSWORD: &str = "long enough";

/// A backup: copies of the NATS store and of the database.
struct Backup {
    folder: TempDir,
}

impl Backup {
    /// Copies NATS first, so that each sample is in at least one of the two copies. `between` runs after the first
    /// copy.
    async fn take(stack: &Stack, between: impl AsyncFnOnce()) -> Self {
        let backup = Self {
            folder: tempfile::tempdir_in(stack.folder()).unwrap(),
        };
        stop(&stack.nats.server).await;
        copy(&stack.folder().join("nats"), &backup.folder.path().join("nats"));
        stack.nats.restart().await;
        between().await;
        stop(&stack.database.server).await;
        copy(
            &stack.folder().join("database"),
            &backup.folder.path().join("database"),
        );
        stack.database.restart().await;
        stack.ready().await;
        backup
    }

    /// Restores both copies. The database starts before NATS, because samples in the NATS store will be written to it.
    async fn restore(&self, stack: &Stack) {
        stop(&stack.nats.server).await;
        stop(&stack.database.server).await;
        for store in ["database", "nats"] {
            std::fs::remove_dir_all(stack.folder().join(store)).unwrap();
            copy(&self.folder.path().join(store), &stack.folder().join(store));
        }
        stack.database.restart().await;
        stack.nats.restart().await;
    }
}

/// Stops a server with SIGTERM, like `docker compose stop`.
async fn stop(server: &Server) {
    let Server::Process(process) = server else {
        panic!("only the store of a local process can be copied");
    };
    process.terminate(PATIENCE).await;
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(done.success(), "{} could not be copied", from.display());
}

async fn add_user(admin: &Api, name: &str) {
    let user = json!({ "name": name, "password": PASSWORD, "role": "viewer" });
    assert_eq!(admin.post("/users", user).await.status, 201);
}

/// Requests the path until the answer has the expected status. Before that, only the status 503 or 504 is allowed,
/// which the gateway returns while it reads the restored store.
async fn answers(api: &Api, path: &str, expected: u16) {
    eventually(
        &format!("{path} is answered {expected}"),
        PATIENCE,
        async || match api.get(path).await.status {
            503 | 504 if expected != 503 => Err("unavailable".to_owned()),
            status if status == expected => Ok(()),
            other => panic!("{path} was answered {other}"),
        },
    )
    .await;
}

async fn stored_of(stack: &Stack, instance: &str) -> u64 {
    let of_vm = doc! { "instance_id": instance, "kind": "vm" };
    stored_rows(&stack.database, of_vm).await.unwrap().len() as u64
}

#[tokio::test]
async fn running_programs_continue_after_a_backup_is_restored() {
    let stack = stack().with_local_servers().start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    add_user(&admin, "vic").await;
    let ended_later = Api::of(stack.gateway(0)).log_in("vic", PASSWORD).await;
    report(&stack, &admin, &[("vm-1", 1.0)]).await;

    // This sample is in both copies: it is in the stream during the copy of NATS, and in the database before the
    // database is copied.
    let metrics = &stack.replica(Program::Metrics, 0).process;
    metrics.pause();
    publish(&stack, &sample("vm-waits", unix_millis(), 1.0)).await;
    let backup = Backup::take(&stack, async || {
        metrics.resume();
        eventually("the sample of the backup is stored", PATIENCE, async || {
            let count = stored_of(&stack, "vm-waits").await;
            (count == 1).then_some(()).ok_or(format!("{count}"))
        })
        .await;
    })
    .await;

    // These changes come after the backup, so the restore loses them.
    assert_eq!(ended_later.delete("/sessions/current").await.status, 204);
    add_user(&admin, "carol").await;
    let carol = Api::of(stack.gateway(0)).log_in("carol", PASSWORD).await;
    report(&stack, &admin, &[("vm-2", 2.0)]).await;

    backup.restore(&stack).await;
    stack.ready().await;
    let fresh = eventually("the restored user vic can log in", PATIENCE, async || {
        let body = json!({ "user_name": "vic", "password": PASSWORD });
        let reply = Api::of(stack.gateway(0)).post("/sessions", body).await;
        let token = reply.json()["token"].as_str().map(str::to_owned);
        token.ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    answers(&Api::of(stack.gateway(0)).holding(&fresh), "/me", 200).await;
    answers(&carol, "/me", 401).await;
    // A session that ended after the backup is valid again, as docs/operations.md warns.
    answers(&ended_later, "/me", 200).await;
    answers(&admin, "/users/carol", 404).await;

    let rollbacks = metric(&stack.gateway(0).replica, "vmwatch_store_rollbacks_total").await;
    assert!(
        rollbacks >= 1.0,
        "the gateway did not detect that the NATS store was rolled back"
    );

    answers(&admin, "/vms/vm-1", 200).await;
    // vm-2 first reported after the backup. Its rows are lost, but metrics-svc lists it from memory for some minutes.
    assert_eq!(stored_of(&stack, "vm-2").await, 0);
    // NATS delivers the sample again, and the database recognises it by its id.
    report(&stack, &admin, &[("vm-2", 3.0)]).await;
    assert_eq!(stored_of(&stack, "vm-waits").await, 1);
    let audited = eventually("the restored audit can be read", PATIENCE, async || {
        let reply = admin.get("/audit?limit=100").await;
        let records: Value = reply.json();
        (reply.status == 200)
            .then_some(records.to_string())
            .ok_or(reply.body)
    })
    .await;
    assert!(audited.contains("vic") && !audited.contains("carol"), "{audited}");
}
