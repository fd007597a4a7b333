//! Tests that a join token permits no more than its creator may do when it is used.

use serde_json::{Value, json};
use testkit::Stack;
use vmwatch_api::{
    Scope,
    enrollment::{CreatedJoinToken, JoinTokensCreate, NewJoinToken},
    users::{UsersAdd, UsersRemove, UsersUpdate},
    wire::FaultKind,
};

use super::{agent, as_admin, builder, call_as, enroll, key, refused, token_record};

/// Adds an administrator with this scope.
async fn add(stack: &Stack, name: &str, scope: &Value) {
    let new = json!({ "name": name, "password": "correct horse", "role": "admin", "scope": scope });
    let new = serde_json::from_value(new).unwrap();
    as_admin::<UsersAdd>(stack, &new).await.unwrap();
}

async fn change_user(stack: &Stack, change: Value) {
    let change = serde_json::from_value(change).unwrap();
    as_admin::<UsersUpdate>(stack, &change).await.unwrap();
}

async fn remove(stack: &Stack, name: &str) {
    let user = serde_json::from_value(json!({ "name": name })).unwrap();
    as_admin::<UsersRemove>(stack, &user).await.unwrap();
}

fn new_token(vms: &Value) -> NewJoinToken {
    let new = json!({ "valid_seconds": 3600, "uses": 9, "vms": vms, "replace": false });
    serde_json::from_value(new).unwrap()
}

/// Creates a token for any VM as this user.
async fn token_of(stack: &Stack, name: &str) -> CreatedJoinToken {
    let new = new_token(&json!("any"));
    let created = call_as::<JoinTokensCreate>(stack, name, Scope::All, &new).await;
    created.unwrap()
}

#[tokio::test]
async fn token_is_refused_once_its_creator_is_no_administrator() {
    let stack = builder().start().await;
    let no_longer = "is no longer an administrator";
    for name in ["demoted", "removed"] {
        add(&stack, name, &json!("all")).await;
        let token = token_of(&stack, name).await;
        let first = (format!("{name}-1"), key());
        enroll(&stack, &token, &first.0, &first.1).await.unwrap();
        if name == "demoted" {
            change_user(&stack, json!({ "name": name, "role": "operator" })).await;
        } else {
            remove(&stack, name).await;
        }
        let vm = format!("{name}-2");
        let refusal = enroll(&stack, &token, &vm, &key()).await;
        refused(refusal, FaultKind::Forbidden, no_longer);
        assert_eq!(agent(&stack, &vm).await, None);
        assert_eq!(token_record(&stack, &token).await.used, 1);
        // An agent that did not receive the answer can still repeat its request.
        enroll(&stack, &token, &first.0, &first.1).await.unwrap();

        if name == "demoted" {
            change_user(&stack, json!({ "name": name, "role": "admin" })).await;
            enroll(&stack, &token, &vm, &key()).await.unwrap();
        } else {
            // Another user of the same name has not created the token.
            add(&stack, name, &json!("all")).await;
            let refusal = enroll(&stack, &token, &vm, &key()).await;
            refused(refusal, FaultKind::Forbidden, no_longer);
        }
    }
}

#[tokio::test]
async fn token_allows_only_vms_in_the_scope_of_its_creator() {
    let stack = builder().start().await;
    let scope = json!({ "only": ["vm-1", "vm-2"] });
    add(&stack, "limited", &scope).await;
    let outside = "not one of those that the creator of the join token may see";
    let create = async |vms: &Value| {
        let scope = serde_json::from_value(scope.clone()).unwrap();
        call_as::<JoinTokensCreate>(&stack, "limited", scope, &new_token(vms)).await
    };
    let refusal = create(&json!({ "only": ["vm-1", "vm-3"] })).await.unwrap_err();
    assert_eq!(refusal.kind, FaultKind::Forbidden);
    assert!(refusal.message.contains(outside), "{refusal:?}");
    create(&json!({ "only": ["vm-1"] })).await.unwrap();

    for vms in [json!("any"), json!({ "prefix": "vm-" })] {
        let token = create(&vms).await.unwrap();
        let refusal = enroll(&stack, &token, "vm-3", &key()).await;
        refused(refusal, FaultKind::Forbidden, outside);
    }
    let token = create(&json!("any")).await.unwrap();
    enroll(&stack, &token, "vm-1", &key()).await.unwrap();
    // The scope at the time of the use counts.
    change_user(
        &stack,
        json!({ "name": "limited", "scope": { "only": ["vm-3"] } }),
    )
    .await;
    let refusal = enroll(&stack, &token, "vm-2", &key()).await;
    refused(refusal, FaultKind::Forbidden, outside);
    enroll(&stack, &token, "vm-3", &key()).await.unwrap();
}
