//! Tests user names: all spellings of a name belong to one user, and no name can look like another user's name.

use std::net::Ipv4Addr;

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, Program, Stack, codes};

use crate::rest::client::{Api, Reply};

const PASSWORD: &str = "long enough";
/// Spellings of one name. The last one has full-width characters.
const SPELLINGS: [&str; 5] = ["ops", "OPS", "Ops", "oPs", "ＯＰＳ"];
/// Names that no user can have: with a Cyrillic letter, with a space, with a direction override, and with a zero-width
/// space.
const LOOK_ALIKES: [&str; 4] = ["\u{430}dmin", "admin ", "admin\u{202e}", "ad\u{200b}min"];

fn new_user(name: &str, role: &str) -> Value {
    json!({ "name": name, "password": PASSWORD, "role": role })
}

async fn log_in(api: &Api, user: &str, password: &str) -> Reply {
    api.post("/sessions", json!({ "user_name": user, "password": password }))
        .await
}

#[tokio::test]
async fn all_spellings_of_a_name_belong_to_one_user() {
    let stack = Stack::builder()
        .without_login_limit()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    creates_one_user_per_name(&stack, &admin).await;
    refuses_look_alikes_for_new_users(&stack, &admin).await;
    logs_in_by_every_spelling(&stack, &anonymous).await;
    asks_for_the_old_password_whatever_the_spelling(&anonymous, &admin).await;
    answers_look_alikes_as_unknown_users(&stack, &anonymous).await;
    throttles_all_spellings_as_one_user(&stack).await;
    audits_the_stored_name(&admin).await;
    removes_by_any_spelling(&stack, &admin).await;
}

async fn creates_one_user_per_name(stack: &Stack, admin: &Api) {
    let made = admin.post("/users", new_user("Ops", "viewer")).await;
    assert_eq!(
        (made.status, &made.json()["name"]),
        (201, &json!("Ops")),
        "{made:?}"
    );
    for spelling in SPELLINGS {
        let taken = admin.post("/users", new_user(spelling, "viewer")).await;
        taken.problem(409, "conflict");
        let read = admin.read(&format!("/users/{spelling}")).await;
        assert_eq!(read["name"], "Ops", "{spelling}");
    }
    let args = ["user", "add", "oPS"];
    let output = stack.try_command("vmwatch-auth", Program::Auth, &args, "long enough\n", &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("taken"), "{text}");
    let listed = admin.read("/users").await;
    assert_eq!(listed["users"].as_array().map(Vec::len), Some(2), "{listed}");
}

async fn refuses_look_alikes_for_new_users(stack: &Stack, admin: &Api) {
    for name in LOOK_ALIKES {
        let refused = admin.post("/users", new_user(name, "viewer")).await;
        let detail = refused.problem(422, "user_name");
        assert!(detail.starts_with("body: name: must "), "{detail}");
    }
    let detail = admin
        .post("/users", new_user(LOOK_ALIKES[0], "viewer"))
        .await
        .problem(422, "user_name");
    assert!(detail.contains("must not mix scripts"), "{detail}");
    // The JSON schema itself limits the length of a name.
    admin
        .post("/users", new_user("", "viewer"))
        .await
        .problem(400, "invalid");
    let args = ["user", "add", "a b"];
    let output = stack.try_command("vmwatch-auth", Program::Auth, &args, "long enough\n", &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains("without spaces"),
        "{text}"
    );
}

async fn logs_in_by_every_spelling(stack: &Stack, anonymous: &Api) {
    for spelling in SPELLINGS {
        let session = anonymous.log_in(spelling, PASSWORD).await;
        assert_eq!(session.read("/me").await["user_name"], "Ops", "{spelling}");
        let listed = session.read("/sessions").await;
        assert!(!listed["sessions"].as_array().unwrap().is_empty(), "{spelling}");
    }
    stack.gateway(0).login("OPS", PASSWORD).await;
}

/// Administrators set other users' passwords without the old password. Another spelling of the administrator's own name
/// does not count as another user.
async fn asks_for_the_old_password_whatever_the_spelling(anonymous: &Api, admin: &Api) {
    let body = json!({ "password": "another one" });
    for name in ["ADMIN", "Admin", "ａdmin"] {
        let path = format!("/users/{name}/password");
        let reply = admin.send(Method::PUT, &path, body.clone()).await;
        reply.problem(403, "forbidden");
    }
    let ops = anonymous.log_in("ops", PASSWORD).await;
    let change = json!({ "password": "another one", "old_password": PASSWORD });
    let reply = ops.send(Method::PUT, "/users/OPS/password", change).await;
    assert_eq!(reply.status, 204, "{reply:?}");
    ops.is_over().await;
    let reply = admin
        .send(
            Method::PUT,
            "/users/oPs/password",
            json!({ "password": PASSWORD }),
        )
        .await;
    assert_eq!(reply.status, 204, "{reply:?}");
}

async fn answers_look_alikes_as_unknown_users(stack: &Stack, anonymous: &Api) {
    let documented = async |user: &str| {
        let data = json!({ "user_name": user, "password": ADMIN.1 });
        let answer = stack
            .gateway(0)
            .post(&json!({ "method": codes::LOGIN, "data": data }))
            .await;
        (answer.http, answer.body)
    };
    let unknown = documented("mallory").await;
    let detail = log_in(anonymous, "mallory", ADMIN.1)
        .await
        .problem(401, "unauthenticated");
    for name in LOOK_ALIKES {
        assert_eq!(documented(name).await, unknown, "{name:?}");
        let refused = log_in(anonymous, name, ADMIN.1).await;
        assert_eq!(refused.problem(401, "unauthenticated"), detail, "{name:?}");
    }
}

async fn throttles_all_spellings_as_one_user(stack: &Stack) {
    // The guesses come from a separate address, because only the first ten failures of an address have their own audit
    // records.
    let attacker = Api::from_address(stack.gateway(0), Ipv4Addr::new(127, 0, 0, 8));
    for spelling in SPELLINGS {
        log_in(&attacker, spelling, "a guess")
            .await
            .problem(401, "unauthenticated");
    }
    for spelling in SPELLINGS {
        log_in(&attacker, spelling, PASSWORD)
            .await
            .problem(429, "throttled");
    }
    // Only the address of the guesses is throttled.
    let elsewhere = Api::from_address(stack.gateway(0), Ipv4Addr::new(127, 0, 0, 9));
    elsewhere.log_in("OPS", PASSWORD).await;
}

async fn audits_the_stored_name(admin: &Api) {
    let page = admin.read("/audit?user=oPS&limit=1000").await;
    let records = page["records"].as_array().unwrap();
    let results = |action: &str, result: &str| {
        let wanted = |record: &&Value| record["action"] == action && record["result"] == result;
        records.iter().filter(wanted).count()
    };
    assert!(results("auth.login", "succeeded") >= 6, "{page}");
    assert!(results("auth.login", "refused") >= 5, "{page}");
    assert!(
        records.iter().all(|record| record["user"] == "Ops"),
        "every audit record has the stored spelling of the name: {page}"
    );
    let page = admin.read("/audit?target=Ops&limit=1000").await;
    let targets = page["records"].as_array().unwrap();
    assert!(
        targets
            .iter()
            .any(|record| record["action"] == "auth.users.set_password"),
        "{page}"
    );
    let page = admin.read("/audit?action=auth.login&limit=1000").await;
    assert!(page.to_string().contains(r"\\u{430}dmin"), "{page}");
    assert!(!page.to_string().contains('\u{430}'), "{page}");
}

async fn removes_by_any_spelling(stack: &Stack, admin: &Api) {
    let elsewhere = Api::from_address(stack.gateway(0), Ipv4Addr::new(127, 0, 0, 9));
    let ops = elsewhere.log_in("ops", PASSWORD).await;
    assert_eq!(admin.delete("/users/oPS").await.status, 204);
    ops.is_over().await;
    admin.delete("/users/Ops").await.problem(404, "not_found");
    let made = admin.post("/users", new_user("OPS", "operator")).await;
    assert_eq!(made.status, 201, "{made:?}");
    let session = elsewhere.log_in("ops", PASSWORD).await;
    let me = session.read("/me").await;
    assert_eq!(
        (&me["user_name"], &me["role"]),
        (&json!("OPS"), &json!("operator"))
    );
    assert_eq!(
        ops.get("/me").await.status,
        401,
        "the session of the removed user is invalid"
    );
}
