//! Tests sessions over the REST API: they are created, used and ended, with a bearer token or a cookie.

use reqwest::Method;
use serde_json::{Value, json};
use testkit::{ADMIN, PATIENCE, Program, codes, eventually};
use vmwatch_api::{Role, Scope};

use super::client::{Api, Reply, stack};

/// A session is valid for both APIs, whichever of them created it.
#[tokio::test]
async fn session_is_valid_for_both_apis() {
    let stack = stack().replicas(Program::Gateway, 2).start().await;
    let [first, second] = [0, 1].map(|index| stack.gateway(index));
    let reply = Api::of(first)
        .post("/sessions", json!({ "user_name": ADMIN.0, "password": ADMIN.1 }))
        .await;
    assert_eq!(reply.status, 201, "{reply:?}");
    let session = reply.json();
    assert_eq!(
        (&session["user_name"], &session["role"], &session["scope"]),
        (&json!("admin"), &json!("admin"), &json!("all"))
    );
    assert!(
        reply.header("set-cookie").is_none(),
        "a login that asks for no cookie gets none"
    );
    let token = session["token"].as_str().unwrap();
    let here = Api::of(first).holding(token);
    let there = here.at(second);

    let me = there.read("/me").await;
    assert_eq!(me["user_name"], "admin");
    assert_eq!(me["expires_at"], session["expires_at"]);
    let request = json!({ "method": codes::VM, "session_id": token, "data": { "instance_id": "vm-1" } });
    assert_eq!(
        second.post(&request).await.status(),
        1,
        "the documented API accepts a session of the REST API"
    );

    let legacy = first.login(ADMIN.0, ADMIN.1).await;
    assert_eq!(here.holding(&legacy).read("/me").await["user_name"], "admin");

    let reply = here.delete("/sessions/current").await;
    assert_eq!((reply.status, reply.body.as_str()), (204, ""), "{reply:?}");
    for api in [&here, &there] {
        api.is_over().await;
    }
    assert_eq!(
        second.post(&request).await.status(),
        3,
        "the documented API also refuses the ended session"
    );
    assert_eq!(
        here.holding(&legacy).get("/me").await.status,
        200,
        "other sessions stay valid"
    );
}

#[tokio::test]
async fn session_is_checked_before_anything_else() {
    let stack = stack().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let good = stack.session(Role::Admin, Scope::All).await;
    for token in [
        "",
        "x",
        &good[..35],
        &good.to_uppercase(),
        "00000000-0000-0000-0000-000000000000",
    ] {
        for path in [
            "/me",
            "/vms?limit=0&nonsense=1",
            "/vms/a.b",
            "/users",
            "/operations/x",
            "/events",
        ] {
            let reply = anonymous.holding(token).get(path).await;
            reply.problem(401, "unauthenticated");
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        }
    }
    for value in [format!("Basic {good}"), good.clone(), format!("Bearer  {good} x")] {
        let request = anonymous
            .request(Method::GET, "/me")
            .header("authorization", &value);
        Reply::of(request).await.problem(401, "unauthenticated");
    }
    // Refusals of a wrong user name and of a wrong password differ only in the request id.
    let refused = async |user: &str| {
        let reply = anonymous
            .post("/sessions", json!({ "user_name": user, "password": "wrong" }))
            .await;
        reply.problem(401, "unauthenticated");
        let mut document = reply.json();
        document["request_id"] = Value::Null;
        document
    };
    assert_eq!(refused(ADMIN.0).await, refused("mallory").await);
}

/// The page's session is in a cookie that scripts cannot read. The gateway accepts it only from the page itself.
#[tokio::test]
async fn session_cookie_is_accepted_only_from_the_page() {
    let stack = stack().start().await;
    let gateway = stack.gateway(0);
    let anonymous = Api::of(gateway);
    let (origin, login) = (
        gateway.url(""),
        json!({ "user_name": ADMIN.0, "password": ADMIN.1, "cookie": true }),
    );
    let logged_in = async |headers: &[(&str, &str)]| {
        let mut request = anonymous.request(Method::POST, "/sessions").json(&login);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Reply::of(request).await
    };
    // A page of another origin cannot log its visitor in.
    logged_in(&[("origin", "http://evil.example")])
        .await
        .problem(403, "forbidden");
    logged_in(&[("sec-fetch-site", "cross-site"), ("origin", &origin)])
        .await
        .problem(403, "forbidden");
    logged_in(&[]).await.problem(403, "forbidden");

    let over_tls = logged_in(&[
        ("sec-fetch-site", "same-origin"),
        ("origin", "https://vmwatch.example"),
    ])
    .await;
    let cookie = over_tls.header("set-cookie").unwrap();
    assert!(cookie.starts_with("__Host-vmwatch_session="), "{cookie}");
    for part in [
        "; Path=/",
        "; HttpOnly",
        "; SameSite=Strict",
        "; Secure",
        "; Max-Age=",
    ] {
        assert!(cookie.contains(part), "{cookie}");
    }

    let reply = logged_in(&[("origin", &origin)]).await;
    assert_eq!(reply.status, 201, "{reply:?}");
    assert!(
        reply.json().get("token").is_none(),
        "the body must not contain the token"
    );
    let cookie = reply.header("set-cookie").unwrap();
    assert!(
        cookie.contains("; HttpOnly; SameSite=Strict") && !cookie.contains("Secure"),
        "{cookie}"
    );
    let pair = cookie.split(';').next().unwrap().to_owned();
    let page = |method: Method, path: &str| {
        anonymous
            .request(method, path)
            .header("cookie", format!("a=b; {pair}"))
    };

    assert_eq!(
        Reply::of(page(Method::GET, "/me")).await.status,
        200,
        "a read needs only the cookie"
    );
    let new = json!({ "name": "eve", "password": "long enough", "role": "viewer" });
    for headers in [
        &[][..],
        &[("origin", "http://evil.example")],
        &[("origin", "null")],
        &[("sec-fetch-site", "cross-site"), ("origin", origin.as_str())],
        &[("sec-fetch-site", "same-site")],
    ] {
        let mut request = page(Method::POST, "/users").json(&new);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Reply::of(request).await.problem(403, "forbidden");
    }
    let request = page(Method::POST, "/users")
        .json(&new)
        .header("sec-fetch-site", "same-origin");
    assert_eq!(Reply::of(request).await.status, 201);

    let out = page(Method::DELETE, "/sessions/current").header("origin", &origin);
    let reply = Reply::of(out).await;
    assert_eq!(reply.status, 204);
    assert!(
        reply
            .header("set-cookie")
            .unwrap()
            .contains("=; Path=/; Max-Age=0;"),
        "the logout makes the browser delete the cookie"
    );
    eventually("the gateway refuses the session", PATIENCE, async || {
        let reply = Reply::of(page(Method::GET, "/me")).await;
        if reply.status == 401 {
            Ok(())
        } else {
            Err(format!("{reply:?}"))
        }
    })
    .await;
}
