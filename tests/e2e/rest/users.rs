//! Tests users over the REST API, and the audit of changes to users.

use mongodb::bson::{Document, doc};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, PATIENCE, Program, Stack, eventually};
use vmwatch_api::{
    Principal, Role, Scope,
    users::{UserChange, UserRef, UsersRemove, UsersUpdate},
};
use vmwatch_bus::Context;

use super::client::{Api, Reply, rfc3339, stack};

#[tokio::test]
async fn administrator_can_create_read_change_and_remove_a_user() {
    let stack = stack().replicas(Program::Gateway, 2).start().await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;

    let name = "Zoë/night-shift";
    let new = json!({ "name": name, "password": "a long one", "role": "operator", "scope": { "only": ["vm-1", "vm-2"] } });
    let made = admin.post("/users", new.clone()).await;
    assert_eq!(made.status, 201, "{made:?}");
    let user = made.json();
    assert_eq!(
        (&user["name"], &user["role"], &user["scope"]),
        (&new["name"], &new["role"], &new["scope"])
    );
    assert!(made.body.find("a long one").is_none() && user.get("password_hash").is_none());
    let location = made.header("location").unwrap();
    let path = location.strip_prefix("/api/v1").unwrap();
    assert_eq!(admin.read(path).await, user);
    admin.post("/users", new).await.problem(409, "conflict");

    let zoe = anonymous.log_in(name, "a long one").await;
    let there = zoe.at(stack.gateway(1));
    assert_eq!(there.read("/me").await["scope"], user["scope"]);
    for (method, path, body) in [
        (Method::GET, "/users", Value::Null),
        (Method::GET, path, Value::Null),
        (
            Method::POST,
            "/users",
            json!({ "name": "x", "password": "a long one", "role": "admin" }),
        ),
        (Method::PATCH, path, json!({ "role": "admin" })),
        (Method::DELETE, "/users/admin", Value::Null),
        (
            Method::PUT,
            "/users/admin/password",
            json!({ "password": "a long one" }),
        ),
        (Method::GET, "/audit", Value::Null),
    ] {
        zoe.send(method, path, body).await.problem(403, "forbidden");
    }

    let changed = admin
        .send(Method::PATCH, path, json!({ "role": "viewer", "scope": "all" }))
        .await;
    assert_eq!(
        (changed.status, &changed.json()["role"], &changed.json()["scope"]),
        (200, &json!("viewer"), &json!("all"))
    );
    zoe.is_over().await;
    there.is_over().await;
    let zoe = anonymous.log_in(name, "a long one").await;
    assert_eq!(zoe.read("/me").await["role"], "viewer");
    let same = admin.send(Method::PATCH, path, json!({})).await;
    assert_eq!((same.status, same.json()), (200, changed.json()));

    assert_eq!(admin.delete(path).await.status, 204);
    zoe.is_over().await;
    for (method, body) in [
        (Method::GET, Value::Null),
        (Method::DELETE, Value::Null),
        (Method::PATCH, json!({ "role": "viewer" })),
    ] {
        admin.send(method, path, body).await.problem(404, "not_found");
    }
    let body = json!({ "user_name": name, "password": "a long one" });
    anonymous
        .post("/sessions", body)
        .await
        .problem(401, "unauthenticated");
}

#[tokio::test]
async fn users_and_administrators_can_change_passwords() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let new = json!({ "name": "eve", "password": "the first", "role": "viewer" });
    assert_eq!(admin.post("/users", new).await.status, 201);
    let eve = anonymous.log_in("eve", "the first").await;
    let put = async |api: &Api, user: &str, body: Value| {
        api.send(Method::PUT, &format!("/users/{user}/password"), body)
            .await
    };

    put(&eve, "eve", json!({ "password": "the second" }))
        .await
        .problem(403, "forbidden");
    let wrong = put(
        &eve,
        "eve",
        json!({ "password": "the second", "old_password": "a guess" }),
    )
    .await;
    wrong.problem(403, "forbidden");
    let short = put(
        &eve,
        "eve",
        json!({ "password": "2short", "old_password": "the first" }),
    )
    .await;
    assert!(short.problem(400, "invalid").contains("at least 8 characters"));
    put(
        &eve,
        "admin",
        json!({ "password": "the second", "old_password": ADMIN.1 }),
    )
    .await
    .problem(403, "forbidden");
    assert_eq!(
        eve.get("/me").await.status,
        200,
        "refused changes must not end the session"
    );

    let changed = put(
        &eve,
        "eve",
        json!({ "password": "the second", "old_password": "the first" }),
    )
    .await;
    assert_eq!(changed.status, 204, "{changed:?}");
    eve.is_over().await;
    let body = json!({ "user_name": "eve", "password": "the first" });
    anonymous
        .post("/sessions", body)
        .await
        .problem(401, "unauthenticated");
    let eve = anonymous.log_in("eve", "the second").await;

    put(&admin, "nobody", json!({ "password": "the third" }))
        .await
        .problem(404, "not_found");
    // An administrator needs the old password to change its own, so that a stolen session is not enough.
    put(&admin, "admin", json!({ "password": "the third" }))
        .await
        .problem(403, "forbidden");
    assert_eq!(
        put(&admin, "eve", json!({ "password": "the third" }))
            .await
            .status,
        204
    );
    eve.is_over().await;
    anonymous.log_in("eve", "the third").await;
}

/// When a user changes their own password, the check of the old password counts as a login from the client's address,
/// so that password guesses cost the service no more than logins.
#[tokio::test]
async fn changes_of_own_password_count_as_logins_of_the_address() {
    let stack = Stack::builder()
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .set(Program::Gateway, "VMWATCH_LOGIN_BURST", "3")
        .set(Program::Gateway, "VMWATCH_LOGIN_INTERVAL", "1h")
        .start()
        .await;
    let token = stack.session_as("eve", Role::Viewer).await;
    let at = |last| Api::from_address(stack.gateway(0), [127, 0, 0, last].into());
    let guess = async |api: &Api| {
        let body = json!({ "password": "the second", "old_password": "a guess" });
        api.holding(&token)
            .send(Method::PUT, "/users/eve/password", body)
            .await
    };
    let (one, other) = (at(2), at(3));
    for _ in 0..3 {
        guess(&one).await.problem(403, "forbidden");
    }
    let detail = guess(&one).await.problem(429, "throttled");
    assert!(detail.contains("from this address"), "{detail}");
    let login = json!({ "user_name": ADMIN.0, "password": ADMIN.1 });
    one.post("/sessions", login).await.problem(429, "throttled");

    guess(&other).await.problem(403, "forbidden");
    let admin = other.log_in(ADMIN.0, ADMIN.1).await;
    // When an administrator sets another user's password, no old password is checked, so the limit does not apply.
    let admin = one.holding(admin.token.as_ref().unwrap());
    let set = json!({ "password": "the third" });
    let reply = admin.send(Method::PUT, "/users/eve/password", set).await;
    assert_eq!(reply.status, 204, "{reply:?}");
}

#[tokio::test]
async fn last_administrator_cannot_be_removed_or_demoted() {
    let stack = stack().start().await;
    let admin = Api::of(stack.gateway(0)).log_in(ADMIN.0, ADMIN.1).await;
    admin.delete("/users/admin").await.problem(409, "conflict");
    let demoted = admin
        .send(Method::PATCH, "/users/admin", json!({ "role": "operator" }))
        .await;
    assert!(
        demoted
            .problem(409, "conflict")
            .contains("the last administrator")
    );
    let second = json!({ "name": "second", "password": "long enough", "role": "admin" });
    assert_eq!(admin.post("/users", second).await.status, 201);
    assert_eq!(admin.delete("/users/admin").await.status, 204);
    admin.is_over().await;
}

#[tokio::test]
async fn pages_of_users_are_complete_while_users_are_added() {
    let stack = stack()
        .set(Program::Auth, "VMWATCH_LOGIN_PERMITS", "4")
        .start()
        .await;
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let add = async |name: String| {
        let user = json!({ "name": name, "password": "long enough", "role": "viewer" });
        assert_eq!(admin.post("/users", user).await.status, 201);
    };
    for index in 0..7 {
        add(format!("user-{index}")).await;
    }
    let (mut seen, mut after) = (Vec::new(), None::<String>);
    loop {
        let position = after
            .as_ref()
            .map_or(String::new(), |name| format!("&after={name}"));
        let page = admin.read(&format!("/users?limit=2{position}")).await;
        let names: Vec<_> = page["users"]
            .as_array()
            .unwrap()
            .iter()
            .map(|user| user["name"].as_str().unwrap().to_owned())
            .collect();
        assert!((1..=2).contains(&names.len()), "{page}");
        seen.extend(names);
        add(format!("aaa-{}", seen.len())).await;
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => break,
        }
    }
    // The list also contains the user of the test's own session.
    let expected: Vec<_> = ["admin".to_owned(), Stack::user_of(Role::Admin, &Scope::All)]
        .into_iter()
        .chain((0..7).map(|index| format!("user-{index}")))
        .collect();
    assert_eq!(seen, expected, "each user is listed once and in order");
}

#[tokio::test]
async fn audit_records_user_changes_and_can_be_read_to_its_beginning() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let refused = json!({ "user_name": "mallory", "password": "a guess" });
    let refused = anonymous.post("/sessions", refused).await;
    let admin = anonymous.log_in(ADMIN.0, ADMIN.1).await;
    let middle = vmwatch_api::time::unix_millis();
    for index in 0..5 {
        let user = json!({ "name": format!("user-{index}"), "password": "long enough", "role": "viewer" });
        assert_eq!(admin.post("/users", user).await.status, 201);
    }
    admin.delete("/users/admin").await.problem(409, "conflict");

    let all = admin.read("/audit").await;
    let records = all["records"].as_array().unwrap();
    assert_eq!(all["next"], Value::Null);
    // The oldest records are those of the services: the setup of streams and the creation of the first administrator.
    let is_own = |record: &&Value| record["user"].as_str().unwrap().starts_with("vmwatch-");
    let own: Vec<_> = records.iter().filter(is_own).collect();
    assert!(own.len() >= 2 && records.iter().rev().take(own.len()).all(|record| is_own(&record)));
    let of_auth = |record: &&&Value| record["action"].as_str().unwrap().starts_with("auth.");
    let (of_auth, own) = (own.iter().filter(of_auth).count(), own.len());
    let entries: Vec<_> = records
        .iter()
        .map(|record| {
            (
                record["action"].as_str().unwrap(),
                record["target"].as_str(),
                record["result"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(entries[0], ("auth.users.remove", Some("admin"), "refused"));
    assert_eq!(entries[1], ("auth.users.remove", Some("admin"), "requested"));
    assert_eq!(entries[2], ("auth.users.add", Some("user-4"), "succeeded"));
    assert_eq!(entries[3], ("auth.users.add", Some("user-4"), "requested"));
    assert_eq!(entries.len(), 14 + own, "{entries:#?}");
    let login = &records[13];
    assert_eq!(
        (&login["action"], &login["user"], &login["result"]),
        (&json!("auth.login"), &json!("mallory"), &json!("refused"))
    );
    assert_eq!(login["source"], "127.0.0.1");
    assert_eq!(login["request_id"].as_str(), refused.header("x-request-id"));
    assert!(!all.to_string().contains("a guess") && !all.to_string().contains("long enough"));

    let count = async |query: &str| {
        admin.read(&format!("/audit?{query}")).await["records"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(count("user=mallory").await, 1);
    assert_eq!(count("target=user-3").await, 2);
    assert_eq!(count("action=auth.login").await, 2);
    assert_eq!(count("action=auth").await, 14 + of_auth);
    assert_eq!(count("action=auth.log").await, 0);
    assert_eq!(count(&format!("from={}", rfc3339(middle))).await, 12);
    assert_eq!(count(&format!("to={}", rfc3339(middle))).await, 2 + own);
    assert_eq!(count("user=admin&action=auth.users.add&limit=3").await, 3);

    let (mut pages, mut seen, mut before) = (0, Vec::new(), String::new());
    loop {
        let page = admin.read(&format!("/audit?limit=3{before}")).await;
        seen.extend(page["records"].as_array().unwrap().clone());
        pages += 1;
        // Records that are appended while the test reads come before its cursor, because pages run from new to old.
        anonymous.log_in(ADMIN.0, ADMIN.1).await;
        match page["next"].as_str() {
            Some(next) => before = format!("&before={next}"),
            None => break,
        }
    }
    assert_eq!((pages, &seen), (records.len().div_ceil(3), records));
}

/// A session that is created while its user's password is being changed does not survive the change.
#[tokio::test]
async fn password_change_ends_all_sessions_of_the_user() {
    let stack = stack()
        .set(Program::Auth, "VMWATCH_LOGIN_PERMITS", "4")
        .start()
        .await;
    let anonymous = Api::of(stack.gateway(0));
    let admin = Api::with(&stack, Role::Admin, Scope::All).await;
    let new = json!({ "name": "eve", "password": "password-0", "role": "viewer" });
    assert_eq!(admin.post("/users", new).await.status, 201);
    for turn in 0..5 {
        let (old, next) = (format!("password-{turn}"), format!("password-{}", turn + 1));
        let logins = futures::future::join_all(
            (0..6).map(|_| anonymous.post("/sessions", json!({ "user_name": "eve", "password": old }))),
        );
        let change = admin.send(Method::PUT, "/users/eve/password", json!({ "password": next }));
        let (logins, change) = tokio::join!(logins, change);
        assert_eq!(change.status, 204, "{change:?}");
        let tokens = logins
            .iter()
            .filter(|reply: &&Reply| reply.status == 201)
            .map(|reply| reply.json()["token"].as_str().unwrap().to_owned());
        for token in tokens {
            eventually("the gateway refuses the session", PATIENCE, async || {
                let reply = anonymous.holding(&token).get("/me").await;
                if reply.status == 401 {
                    Ok(())
                } else {
                    Err(format!("{reply:?}"))
                }
            })
            .await;
        }
    }
}

/// Two replicas of auth-svc receive requests at the same time that would take the role of both administrators. One
/// administrator must keep the role.
#[tokio::test]
async fn concurrent_demotions_leave_one_administrator() {
    const ROUNDS: usize = 20;
    let stack = Stack::builder()
        .replicas(Program::Gateway, 0)
        .replicas(Program::Metrics, 0)
        .replicas(Program::Lifecycle, 0)
        .replicas(Program::Auth, 2)
        .start()
        .await;
    let users = stack.database.handle().collection::<Document>("users");
    let first = users.find_one(doc! { "_id": ADMIN.0 }).await.unwrap().unwrap();
    let mut second = first.clone();
    second.extend(doc! { "_id": "second", "name": "second" });
    let both = doc! { "_id": { "$in": [ADMIN.0, "second"] } };
    let context = || {
        Context::new(PATIENCE).as_principal(Principal {
            user: "test".to_owned(),
            role: Role::Admin,
            scope: Scope::All,
        })
    };
    for round in 0..ROUNDS {
        users.delete_many(both.clone()).await.unwrap();
        users.insert_many([&first, &second]).await.unwrap();
        let end = async |name: &str| {
            let change = UserChange {
                name: name.parse().unwrap(),
                role: Some(Role::Viewer),
                scope: None,
            };
            if round % 2 == 0 {
                let updated = stack.bus.call::<UsersUpdate>(&context(), &change).await;
                updated.map(drop)
            } else {
                let user = UserRef {
                    name: name.parse().unwrap(),
                };
                let removed = stack.bus.call::<UsersRemove>(&context(), &user).await;
                removed.map(drop)
            }
        };
        let outcomes = tokio::join!(end(ADMIN.0), end("second"));
        let administrators = doc! { "role": "admin" };
        let left = users.count_documents(administrators).await.unwrap();
        assert_eq!(left, 1, "round {round}: {outcomes:?}");
        assert!(
            outcomes.0.is_ok() != outcomes.1.is_ok(),
            "round {round}: {outcomes:?}"
        );
    }
}
