//! Tests that no log of any level, no trace and no metrics page contains a secret.

use std::{fs, path::Path};

use reqwest::Client;
use serde_json::json;
use testkit::{ADMIN, PATIENCE, Program, Stack, THIS_MACHINE, codes, eventually, figure};
use vmwatch_api::{Role, Scope, auth::Token};

use crate::traces::collector;

/// The most verbose log filter for the vmwatch programs.
const EVERYTHING: &str = "info,gateway=trace,vmwatch_api=trace,vmwatch_bus=trace,vmwatch_service=trace,vmwatch_store=trace,auth_svc=trace,\
     metrics_svc=trace,lifecycle_svc=trace,alert_svc=trace,agent=trace";

/// Returns all files below a folder, with their contents.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.display().to_string(), fs::read(&path).unwrap_or_default()));
        }
    }
    found
}

/// The passwords that this test uses and then searches for in logs, traces and metrics.
const FIRST: &str = "first-secret-of-eve";
const SECOND: &str = "second-secret-of-eve";
const WRONG: &str = "a-guess-that-is-wrong";

/// Logs in, guesses a password, changes one, and sends requests of every kind. Returns the session tokens.
async fn use_secrets(stack: &Stack) -> Vec<String> {
    let gateway = stack.gateway(0);
    stack.command(Program::Auth, &["user", "add", "eve"], &format!("{FIRST}\n"));
    let admin = gateway.login(ADMIN.0, ADMIN.1).await;
    let eve = gateway.login("eve", FIRST).await;
    let guessed = json!({ "method": codes::LOGIN, "data": { "user_name": "eve", "password": WRONG } });
    assert_eq!(gateway.post(&guessed).await.status(), 3);
    // These requests have secrets in the wrong fields or are malformed.
    for body in [
        json!({ "method": codes::VM, "session_id": admin, "data": { "instance_id": "vm-1" }, "password": WRONG }),
        json!({ "method": codes::LOGIN, "data": { "user_name": WRONG, "password": [FIRST] } }),
        json!({ "method": 1, "session_id": eve }),
    ] {
        gateway.post(&body).await;
    }
    let http = Client::new();
    let url = |path: &str| gateway.url(&format!("/api/v1{path}"));
    let changes = [
        http.put(url("/users/eve/password"))
            .bearer_auth(&eve)
            .json(&json!({ "password": SECOND, "old_password": FIRST })),
        http.post(url("/sessions"))
            .json(&json!({ "user_name": "eve", "password": SECOND, "more": WRONG })),
        http.post(url("/sessions"))
            .json(&json!({ "user_name": "eve", "password": SECOND })),
        http.get(url("/vms")).bearer_auth(&admin),
        http.get(url("/vms"))
            .header("cookie", format!("vmwatch_session={admin}")),
        http.get(url("/users")).bearer_auth(&admin),
        http.get(url("/me")).bearer_auth(&eve),
    ];
    let mut tokens = vec![admin, eve];
    for change in changes {
        let body = change.send().await.unwrap().text().await.unwrap();
        let answer: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        tokens.extend(answer["token"].as_str().map(str::to_owned));
    }
    assert_eq!(tokens.len(), 3, "the login of eve returned no third token");
    tokens.push(stack.session(Role::Viewer, Scope::All).await);
    tokens.extend(use_api_tokens(stack, tokens.last().map_or("", String::as_str)).await);
    tokens
}

/// Creates an API token, and sends requests with it and with malformed forms of it. Returns the token and its secret.
async fn use_api_tokens(stack: &Stack, session: &str) -> [String; 2] {
    let http = Client::new();
    let url = |path: &str| stack.gateway(0).url(&format!("/api/v1{path}"));
    let create = http.post(url("/tokens")).bearer_auth(session);
    let answer = create.json(&json!({ "name": "x" })).send().await.unwrap();
    let answer: serde_json::Value = answer.json().await.unwrap();
    let token = answer["token"].as_str().unwrap().to_owned();
    let secret = token.rsplit('_').next().unwrap().to_owned();
    for (form, status) in [
        (token.clone(), 200),
        (format!("{token}x"), 401),
        (format!("vmt_0000000000000000_{secret}"), 401),
    ] {
        let reply = http.get(url("/vms")).bearer_auth(form).send().await.unwrap();
        assert_eq!(reply.status(), status);
    }
    // The token in a query or a path, where clients put it by mistake.
    for (request, status) in [
        (http.get(url(&format!("/vms?access_token={token}"))), 401),
        (http.get(url(&format!("/vms?{token}=1"))).bearer_auth(&token), 400),
        (
            http.delete(url(&format!("/tokens/{token}"))).bearer_auth(session),
            400,
        ),
        (http.get(url(&format!("/{token}"))), 404),
    ] {
        assert_eq!(request.send().await.unwrap().status(), status);
    }
    let change = http.post(url("/tokens")).bearer_auth(&token);
    let reply = change.json(&json!({ "name": token })).send().await.unwrap();
    assert_eq!(reply.status(), 403);
    [token, secret]
}

#[tokio::test]
async fn logs_traces_and_metrics_contain_no_secret() {
    let (address, spans) = collector().await;
    let programs = [
        Program::Gateway,
        Program::Auth,
        Program::Metrics,
        Program::Lifecycle,
        Program::Alert,
        Program::Agent,
    ];
    let mut builder = Stack::builder()
        .replicas(Program::Alert, 1)
        .replicas(Program::Agent, 1)
        .with_permissions();
    for program in programs {
        builder = builder
            .set(program, "VMWATCH_LOG", EVERYTHING)
            .set(program, "VMWATCH_OTLP_ENDPOINT", &format!("http://{address}"))
            .set(program, "OTEL_BSP_SCHEDULE_DELAY", "100");
    }
    let stack = builder.start().await;
    let tokens = use_secrets(&stack).await;
    eventually("all programs have sent traces", PATIENCE, async || {
        let spans = format!("{:?}", spans.lock().unwrap());
        let missing = ["vmwatch-gateway", "vmwatch-auth", "vmwatch-metrics"]
            .into_iter()
            .find(|name| !spans.contains(name));
        missing.map_or(Ok(()), |name| Err(format!("no trace of {name} has arrived")))
    })
    .await;

    let mut secrets: Vec<(String, String)> = [ADMIN.1, FIRST, SECOND, WRONG]
        .map(|password| ("a password".to_owned(), password.to_owned()))
        .into();
    secrets.extend(tokens.into_iter().map(|token| ("a token".to_owned(), token)));
    for user in [
        "vmwatch-gateway",
        "vmwatch-auth",
        "vmwatch-metrics",
        "vmwatch-lifecycle",
        "vmwatch-alert",
    ] {
        secrets.push((format!("the password of {user}"), stack.nats.password_of(user)));
    }
    let seed = stack.folder().join(format!("identity-{THIS_MACHINE}/agent.seed"));
    let seed = fs::read_to_string(seed).unwrap();
    secrets.push(("the seed of the agent".to_owned(), seed));
    let sealing = fs::read_to_string(stack.folder().join("alert-key")).unwrap();
    secrets.push(("the key that seals the secrets of channels".to_owned(), sealing));
    let mut texts = vec![(
        "the received traces".to_owned(),
        format!("{:?}", spans.lock().unwrap()).into_bytes(),
    )];
    texts.extend(
        files(stack.folder())
            .into_iter()
            .filter(|(name, _)| Path::new(name).extension().is_some_and(|kind| kind == "log")),
    );
    for program in programs {
        let metrics = stack.replica(program, 0).metrics().await;
        texts.push((format!("the metrics of {program:?}"), metrics.into_bytes()));
    }
    assert!(
        texts.len() >= 13,
        "the logs of two servers and six programs, the traces and six metrics pages are searched"
    );
    let traced = texts
        .iter()
        .any(|(name, text)| name.contains("vmwatch-auth") && contains(text, b"TRACE"));
    let debugged = texts
        .iter()
        .any(|(name, text)| name.contains("vmwatch-gateway") && contains(text, b"DEBUG"));
    assert!(traced || debugged, "no program logged at a verbose level");
    for (name, text) in &texts {
        for (what, secret) in &secrets {
            assert!(
                secret.len() > 8 && !contains(text, secret.as_bytes()),
                "{name} contains {what}: {secret}"
            );
        }
    }
    assert_stores_hold_no_token(&stack, &secrets);
    figure(
        "secrets_looked_for",
        f64::from(u32::try_from(secrets.len()).unwrap()),
    );
    figure("places_with_a_secret", 0.0);
}

/// Sessions are stored by the digest of their token, so that a copy of the stores gives nobody a session.
fn assert_stores_hold_no_token(stack: &Stack, secrets: &[(String, String)]) {
    let stores = files(stack.folder());
    let holds = |wanted: &str| {
        stores
            .iter()
            .find(|(_, bytes)| contains(bytes, wanted.as_bytes()))
    };
    let tokens = secrets.iter().filter(|(what, _)| what == "a token");
    for (_, token) in tokens {
        // The others belong to an API token, of which other tests check how it is stored.
        let Ok(parsed) = token.parse::<Token>() else {
            continue;
        };
        assert!(holds(&parsed.key()).is_some(), "the digest is stored");
        for form in [token.clone(), token.replace('-', "")] {
            let holder = holds(&form).map(|(name, _)| name);
            assert!(holder.is_none(), "{holder:?} contains the token {form}");
        }
    }
}

fn contains(text: &[u8], wanted: &[u8]) -> bool {
    text.windows(wanted.len()).any(|window| window == wanted)
}
