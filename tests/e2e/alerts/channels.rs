//! Tests channels: their number, the change of the key that seals their secrets, and listeners that cannot be resolved.

use std::{fs, process::Output};

use mongodb::bson::{Document, doc};
use serde_json::Value;
use testkit::{PATIENCE, Program, Stack, eventually};
use vmwatch_api::{Role, Scope};

use super::api::{created, put, stack, webhook};
use crate::rest::client::Api;

const MAX_CHANNELS: usize = 100;

async fn channels(admin: &Api) -> Vec<Value> {
    let list = admin.read("/alert-channels").await;
    list["channels"].as_array().unwrap().clone()
}

#[tokio::test]
async fn number_of_channels_is_limited() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let made = created(&admin, "/alert-channels", webhook("first")).await;
    let stored = stack.database.handle().collection::<Document>("alert_channels");
    let first = stored.find_one(doc! {}).await.unwrap().unwrap();
    let copies = (1..MAX_CHANNELS).map(|number| {
        let mut copy = first.clone();
        copy.insert("_id", format!("{number:032x}"));
        copy
    });
    stored.insert_many(copies).await.unwrap();
    let refused = admin.post("/alert-channels", webhook("one too many")).await;
    let detail = refused.problem(409, "conflict");
    assert!(detail.contains("100 channels"), "{detail}");
    assert_eq!(channels(&admin).await.len(), MAX_CHANNELS);
    // The existing ones can be changed, and one can be replaced.
    let path = format!("/alert-channels/{}", made["id"].as_str().unwrap());
    let change = serde_json::json!({ "revision": 1, "spec": webhook("renamed")["spec"] });
    assert_eq!(put(&admin, &path, change).await.status, 200);
    assert_eq!(admin.delete(&format!("{path}?revision=2")).await.status, 204);
    created(&admin, "/alert-channels", webhook("another one")).await;
}

fn rekey(stack: &Stack, key_file: &str) -> Output {
    let settings = [("VMWATCH_ALERT_KEY_FILE".to_owned(), key_file.to_owned())];
    stack.try_command("vmwatch-alert", Program::Alert, &["rekey"], "", &settings)
}

fn printed(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn secrets_are_sealed_again_with_a_new_key() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let mut signed = webhook("signed");
    signed["secret"] = "a secret text".into();
    created(&admin, "/alert-channels", signed).await;
    created(&admin, "/alert-channels", webhook("without a secret")).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    let file = alert_svc.process.setting("VMWATCH_ALERT_KEY_FILE");
    let old = fs::read_to_string(&file).unwrap();
    let (old, new) = (old.trim(), "a7".repeat(32));

    // The new key alone opens nothing, and nothing is changed.
    fs::write(&file, &new).unwrap();
    let failed = rekey(&stack, &file);
    assert!(!failed.status.success(), "{}", printed(&failed));
    assert!(printed(&failed).contains("signed: "), "{}", printed(&failed));
    assert!(
        !printed(&failed).contains("a secret text"),
        "{}",
        printed(&failed)
    );

    fs::write(&file, format!("{new}\n{old}\n")).unwrap();
    for expected in [
        "1 secrets sealed again, 0 were sealed",
        "0 secrets sealed again, 1 were sealed",
    ] {
        let done = rekey(&stack, &file);
        assert!(done.status.success(), "{}", printed(&done));
        assert!(printed(&done).contains(expected), "{}", printed(&done));
    }
    // Afterwards the new key suffices: it opens the secret, which a further key then seals.
    fs::write(&file, format!("{}\n{new}\n", "b8".repeat(32))).unwrap();
    let done = rekey(&stack, &file);
    assert!(done.status.success(), "{}", printed(&done));
    assert!(
        printed(&done).contains("1 secrets sealed again"),
        "{}",
        printed(&done)
    );
    alert_svc.process.kill9();
    alert_svc.restart().await;
    for channel in channels(&admin).await {
        assert_eq!(channel["problem"], Value::Null, "{channel}");
        assert_eq!(
            channel["has_secret"],
            channel["spec"]["name"] == "signed",
            "{channel}"
        );
    }
}

#[tokio::test]
async fn listener_that_cannot_be_resolved_is_shown_on_each_channel() {
    let stack = stack().start().await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    created(&admin, "/alert-channels", webhook("ops")).await;
    let alert_svc = stack.replica(Program::Alert, 0);
    alert_svc.process.kill9();
    alert_svc
        .process
        .set("VMWATCH_ALERT_INTERNAL", "127.0.0.1:9080,gateway.invalid:9080");
    // Rules are evaluated nevertheless, so the service is ready.
    alert_svc.restart().await;
    let problem = eventually("the channel shows the problem", PATIENCE, async || {
        let all = channels(&admin).await;
        let problem = all[0]["problem"].as_str().map(str::to_owned);
        problem.ok_or_else(|| format!("{all:?}"))
    })
    .await;
    assert!(problem.contains("gateway.invalid:9080"), "{problem}");
    assert!(problem.contains("VMWATCH_ALERT_INTERNAL"), "{problem}");
    let unresolved = alert_svc.metric("vmwatch_alert_listeners_unresolved").await;
    assert_eq!(unresolved, Some(1.0));
    let refused = admin.post("/alert-channels", webhook("another one")).await;
    let detail = refused.problem(422, "alert");
    assert!(detail.contains("gateway.invalid:9080"), "{detail}");
}
