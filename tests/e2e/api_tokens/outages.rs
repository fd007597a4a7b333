//! Tests API tokens while their KV bucket cannot be read, and across restarts.

use reqwest::Method;
use serde_json::json;
use testkit::{ADMIN, PATIENCE, Program, eventually};
use vmwatch_api::api_tokens::API_TOKEN_BUCKET;

use super::{add, created, stack, with_token};
use crate::rest::client::Api;

/// A gateway that cannot know whether a token was revoked refuses it.
#[tokio::test]
async fn tokens_are_refused_while_their_kv_bucket_is_unreachable() {
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_SESSIONS_STALE_AFTER", "3s")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let admin = Api::of(gateway).log_in(ADMIN.0, ADMIN.1).await;
    let kept = with_token(&admin, json!({ "name": "kept" })).await;
    let revoked = created(&admin, json!({ "name": "revoked" })).await;
    let id = revoked["api_token"]["id"].as_str().unwrap();
    let revoked = admin.holding(revoked["token"].as_str().unwrap());

    stack.nats.server.pause();
    kept.answers("the token is refused", 503).await;
    let detail = kept.get("/me").await.problem(503, "unavailable");
    assert!(detail.contains("API tokens cannot be checked"), "{detail}");
    stack.nats.server.resume();
    kept.answers("the token is valid again", 200).await;
    revoked.answers("the other token is valid again", 200).await;

    // A gateway that starts after a revocation does not accept the token.
    eventually("the token is revoked", PATIENCE, async || {
        let reply = admin.delete(&format!("/tokens/{id}")).await;
        matches!(reply.status, 204 | 404)
            .then_some(())
            .ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    stack.replica(Program::Gateway, 0).process.kill9();
    stack.replica(Program::Gateway, 0).restart().await;
    kept.answers("the token is valid after a restart of the gateway", 200)
        .await;
    revoked.get("/me").await.problem(401, "unauthenticated");

    // Sessions do not depend on the KV bucket of API tokens.
    let jetstream = stack.bus.jetstream_for_tests();
    jetstream.delete_key_value(API_TOKEN_BUCKET).await.unwrap();
    eventually("the token is refused", PATIENCE, async || {
        let reply = kept.get("/me").await;
        (reply.status != 200)
            .then_some(())
            .ok_or_else(|| format!("{reply:?}"))
    })
    .await;
    for _ in 0..20 {
        let status = kept.get("/me").await.status;
        assert!(matches!(status, 401 | 503), "{status}");
        assert_eq!(admin.get("/me").await.status, 200);
    }
}

/// A new password ends the sessions of the owner. Tokens are independent of passwords, so they stay valid.
#[tokio::test]
async fn tokens_outlive_a_change_of_the_owners_password() {
    let stack = stack().replicas(Program::Auth, 2).start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let eve = add(&admin, "eve", "viewer").await;
    let token = with_token(&eve, json!({ "name": "kept" })).await;
    let password = json!({ "password": "another one", "old_password": "long enough" });
    let changed = eve.send(Method::PUT, "/users/eve/password", password).await;
    assert_eq!(changed.status, 204, "{changed:?}");
    eve.is_over().await;
    assert_eq!(token.read("/me").await["user_name"], "eve");
    for replica in [0, 1] {
        stack.replica(Program::Auth, replica).process.kill9();
        stack.replica(Program::Auth, replica).restart().await;
    }
    assert_eq!(token.read("/me").await["user_name"], "eve");
    let again = admin.log_in("eve", "another one").await;
    let listed = again.read("/tokens").await;
    assert_eq!(listed["tokens"].as_array().unwrap().len(), 1, "{listed}");
}
