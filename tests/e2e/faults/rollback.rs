//! Tests a NATS store that is rolled back to an older state, as after a power loss or a restored backup, while all
//! programs keep running.

use std::{fs, path::Path, time::Instant};

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, Gateway, MACHINES, PATIENCE, Program, Stack, eventually, figure};
use vmwatch_api::{Role, Scope, sessions::USER_BUCKET};

use crate::{
    ingest_support::metric,
    rest::{
        client::Api,
        events::{Follower, tell},
    },
};

/// A copy of the NATS store. The server is stopped while its store is copied or restored.
struct StoreCopy<'a> {
    stack: &'a Stack,
    copy: tempfile::TempDir,
}

impl<'a> StoreCopy<'a> {
    /// Copies the current store of the NATS server.
    async fn take(stack: &'a Stack) -> Self {
        let copy = tempfile::tempdir_in(stack.folder()).unwrap();
        stack.nats.server.kill9();
        copy_folder(&stack.folder().join("nats"), &copy.path().join("nats"));
        stack.nats.restart().await;
        stack.ready().await;
        Self { stack, copy }
    }

    /// Restores the copy and starts the NATS server with it.
    async fn put_back(self) {
        let store = self.stack.folder().join("nats");
        self.stack.nats.server.kill9();
        fs::remove_dir_all(&store).unwrap();
        fs::rename(self.copy.path().join("nats"), &store).unwrap();
        self.stack.nats.restart().await;
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

async fn status(api: &Api) -> u16 {
    api.get("/me").await.status
}

async fn is_valid(api: &Api) {
    eventually("the session is valid", PATIENCE, async || {
        match status(api).await {
            200 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .await;
}

/// Sessions that only the lost part of the NATS store contained are invalid. New sessions are valid at once.
#[tokio::test]
async fn running_programs_recover_after_the_nats_store_is_rolled_back() {
    let stack = Stack::builder()
        .replicas(Program::Gateway, 2)
        .with_permissions()
        .with_local_servers()
        .start()
        .await;
    let here = Api::of(stack.gateway(0));
    let admin = here.log_in(ADMIN.0, ADMIN.1).await;
    let vic = json!({ "name": "vic", "password": "long enough", "role": "operator" });
    assert_eq!(admin.post("/users", vic).await.status, 201);
    let vic = here.log_in("vic", "long enough").await;
    let known_events = tell(&stack, "vm-1").await;

    let copy = StoreCopy::take(&stack).await;
    let mut ghosts = Vec::new();
    for _ in 0..6 {
        ghosts.push(here.log_in(ADMIN.0, ADMIN.1).await);
    }
    let there = stack.gateway(1);
    for ghost in &ghosts {
        assert_eq!((status(ghost).await, status(&ghost.at(there)).await), (200, 200));
    }
    assert_eq!(admin.delete("/users/vic").await.status, 204);
    let operator = Api::with(&stack, Role::Operator, Scope::All).await;
    let started = operator
        .post(
            &format!("/vms/{}/actions", MACHINES[0].0),
            json!({ "action": "start" }),
        )
        .await;
    assert_eq!(started.status, 202, "{started:?}");
    let lost_event = tell(&stack, "vm-1").await;
    let mut reader = Follower::of(&admin, "", None).await;
    reader.expect("ready").await;

    copy.put_back().await;
    let back = Instant::now();
    for gateway in [stack.gateway(0), there] {
        let fresh = logs_in(gateway).await;
        // Until the gateway has read the restored store, it must answer 503 and not 401.
        eventually("a new session is valid", PATIENCE, async || {
            match status(&fresh).await {
                200 => Ok(()),
                503 => Err("the gateway is reading the store again".to_owned()),
                other => panic!("the gateway answered a new session with {other}"),
            }
        })
        .await;
        for ghost in &ghosts {
            assert_eq!(
                status(&ghost.at(gateway)).await,
                401,
                "a session that the store has lost is refused"
            );
        }
        is_valid(&admin.at(gateway)).await;
        // The restored KV bucket contains the user and the session; the database does not contain the user.
        vic.at(gateway).is_over().await;
        assert!(metric(&gateway.replica, "vmwatch_store_rollbacks_total").await >= 1.0);
    }
    figure(
        "store_rollback_to_fresh_session_ms",
        back.elapsed().as_secs_f64() * 1e3,
    );
    for program in [Program::Auth, Program::Lifecycle] {
        let noticed = metric(stack.replica(program, 0), "vmwatch_store_rollbacks_total").await;
        assert!(noticed >= 1.0, "{program:?} did not detect the rollback");
    }
    let operations = admin.read("/operations").await;
    assert_eq!(
        operations["operations"],
        json!([]),
        "the operation is not in the restored store"
    );

    // Readers of live events reconnect and are informed that events may be missing.
    while reader.next().await.is_some() {}
    assert!(lost_event > known_events);
    let mut reader = Follower::of(&admin, "", Some(lost_event)).await;
    reader.expect("gap").await;
    let published = tell(&stack, "vm-1").await;
    let event = reader.expect("machine").await;
    assert_eq!(event.id, Some(published));

    loses_users(&stack, &admin).await;
}

async fn logs_in(gateway: &Gateway) -> Api {
    let api = Api::of(gateway);
    eventually("a login succeeds", PATIENCE, async || {
        let body = json!({ "user_name": ADMIN.0, "password": ADMIN.1 });
        let reply = api.send(Method::POST, "/sessions", body).await;
        match reply.status {
            201 => Ok(api.holding(reply.json()["token"].as_str().unwrap())),
            _ => Err(format!("{reply:?}")),
        }
    })
    .await
}

/// If the NATS store has lost the KV bucket of users, gateways answer 503 until auth-svc has filled it from the
/// database.
async fn loses_users(stack: &Stack, admin: &Api) {
    let auth = stack.replica(Program::Auth, 0);
    auth.process.terminate(PATIENCE).await;
    let deleted = stack
        .bus
        .jetstream_for_tests()
        .delete_key_value(USER_BUCKET)
        .await;
    deleted.unwrap();
    for index in [0, 1] {
        let gateway = stack.gateway(index);
        eventually(
            "the gateway answers 503 to every session",
            PATIENCE,
            async || match (
                status(&admin.at(gateway)).await,
                gateway.replica.readiness().await,
            ) {
                (503, Err(_)) => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )
        .await;
    }
    auth.restart().await;
    stack.ready().await;
    for index in [0, 1] {
        let me: Value = admin.at(stack.gateway(index)).read("/me").await;
        assert_eq!(me["role"], "admin");
    }
}
