//! Tests tokens that are expired, truncated, foreign or unknown, and tokens that are sent in the wrong way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use futures::{StreamExt, stream};
use reqwest::Method;
use serde_json::json;
use testkit::{ADMIN, Stack, codes, failure, figure};
use vmwatch_api::{
    api_tokens::{API_TOKEN_BUCKET, ApiToken, ApiTokenRecord},
    time::unix_millis,
};

use super::{created, stack};
use crate::rest::client::{Api, Reply};

fn random() -> ApiToken {
    let (mut id, mut secret) = ([0; 8], [0; 32]);
    getrandom::fill(&mut id).unwrap();
    getrandom::fill(&mut secret).unwrap();
    ApiToken::from_random(id, secret)
}

/// Stores a copy of a token's record for another token, with another expiry.
async fn store(stack: &Stack, of: &str, token: &ApiToken, expires_at_ms: u64) {
    let bucket = stack
        .bus
        .jetstream_for_tests()
        .get_key_value(API_TOKEN_BUCKET)
        .await
        .unwrap();
    let record = bucket.get(of).await.unwrap().unwrap();
    let mut record: ApiTokenRecord = serde_json::from_slice(&record).unwrap();
    record.secret_hash = token.secret_hash();
    record.expires_at_ms = expires_at_ms;
    let record = serde_json::to_vec(&record).unwrap();
    bucket.put(token.id.to_string(), record.into()).await.unwrap();
}

#[tokio::test]
async fn all_invalid_tokens_get_the_same_answer() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let answer = created(&admin, json!({ "name": "good" })).await;
    let good = answer["token"].as_str().unwrap();
    let id = answer["api_token"]["id"].as_str().unwrap();
    assert_eq!(admin.holding(good).get("/me").await.status, 200);

    // A token is valid until its expiry and refused afterwards.
    let (expired, expiring) = (random(), random());
    store(&stack, id, &expired, unix_millis() - 1).await;
    let expires_at_ms = unix_millis() + 3000;
    store(&stack, id, &expiring, expires_at_ms).await;
    let api = admin.holding(&expiring.to_string());
    let me = api.read("/me").await;
    assert!(
        unix_millis() < expires_at_ms && me["user_name"] == "admin",
        "{me}"
    );
    api.answers("the token expires", 401).await;
    assert!(unix_millis() >= expires_at_ms, "the token expired too early");

    let secret = good.rsplit('_').next().unwrap();
    let wrong_secret = format!("vmt_{id}_{}", "0".repeat(64));
    let bad = [
        expired.to_string(),
        // The id of one token with the secret of another, and tokens of another deployment.
        format!("vmt_{}_{secret}", expired.id),
        wrong_secret,
        random().to_string(),
        good[..good.len() - 1].to_owned(),
        good[..20].to_owned(),
        "vmt_".to_owned(),
        format!("{good}0"),
        good.to_uppercase().replace("VMT", "vmt"),
        format!("vmt_{}", "x".repeat(4000)),
    ];
    let mut details = Vec::new();
    for token in &bad {
        let reply = admin.holding(token).get("/me").await;
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"), "{token}");
        details.push(reply.problem(401, "unauthenticated"));
    }
    assert!(details.iter().all(|detail| *detail == details[0]), "{details:?}");
    assert!(details[0].contains("API token is not valid"), "{details:?}");

    // The token is accepted only as `Authorization: Bearer`.
    let request = || anonymous.request(Method::GET, "/me");
    for wrong in [
        request().header("cookie", format!("vmwatch_session={good}")),
        request().header("cookie", format!("__Host-vmwatch_session={good}")),
        request().header("authorization", good),
        request().header("authorization", format!("Token {good}")),
        request().basic_auth("admin", Some(good)),
        request().header("x-api-key", good),
        anonymous.request(Method::GET, &format!("/me?token={good}")),
        anonymous.request(Method::GET, &format!("/me?access_token={good}")),
        request().bearer_auth(good).header("authorization", "Bearer x"),
        admin.request(Method::GET, "/me").bearer_auth(good),
    ] {
        Reply::of(wrong).await.problem(401, "unauthenticated");
    }
    // The documented API refuses it as `session_id`, and an `Authorization` header has no effect there.
    let body = json!({ "method": codes::VM, "session_id": good, "data": { "instance_id": "vm-1" } });
    let answer = stack.gateway(0).post(&body).await;
    let text = "'invalid or expired session'";
    assert_eq!(
        (answer.http, answer.body),
        (200, failure(3, &json!(codes::VM), good, text))
    );
    let body = json!({ "method": codes::VM, "data": { "instance_id": "vm-1" } });
    let request = admin.holding(good).raw(Method::POST, "/wsgi_app.py").json(&body);
    assert!(Reply::of(request).await.body.contains(text));
}

/// Counts all reads of the KV bucket of API tokens.
async fn bucket_reads(stack: &Stack) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    for subject in ["STREAM.INFO", "DIRECT.GET"] {
        let subject = format!("$JS.API.{subject}.KV_{API_TOKEN_BUCKET}");
        let mut seen = stack.bus.client_for_tests().subscribe(subject).await.unwrap();
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            while seen.next().await.is_some() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    stack.bus.settled().await;
    count
}

/// However many tokens are guessed, the gateway reads the KV bucket at the same bounded rate as for guessed sessions,
/// and users with a session or a token are not affected.
#[tokio::test]
async fn unknown_tokens_cause_bounded_kv_bucket_reads() {
    const GUESSES: usize = 10_000;
    let stack = stack().start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    let answer = created(&admin, json!({ "name": "good" })).await;
    let good = admin.holding(answer["token"].as_str().unwrap());
    let reads = bucket_reads(&stack).await;
    let began = Instant::now();
    let hits = stream::iter(0..GUESSES)
        .map(|_| {
            let guess = admin.holding(&random().to_string());
            async move { guess.get("/me").await.status }
        })
        .buffer_unordered(64)
        .filter(|status| std::future::ready(*status != 401))
        .count()
        .await;
    let seconds = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "the count is in the thousands")]
    let reads = reads.load(Ordering::Relaxed) as f64;
    assert_eq!(hits, 0);
    figure("api_token_guess_bucket_reads_per_s", reads / seconds);
    assert!(reads > 0.0, "no read of the bucket was counted");
    // The gateway may read 50 unknown tokens per second; the gateway and auth-svc each read the bucket's state once per
    // second.
    assert!(
        reads / seconds <= 53.0 + 60.0 / seconds,
        "the bucket was read {reads} times in {seconds} s"
    );
    assert_eq!(
        (good.get("/me").await.status, admin.get("/me").await.status),
        (200, 200)
    );
}
