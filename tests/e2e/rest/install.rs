//! Tests the install script and the packages that the gateway serves, and the limit of requests without a session.

use std::{fs, path::Path};

use reqwest::Method;
use serde_json::json;
use testkit::{ADMIN, Program, Stack};

use super::client::{Api, Reply, stack};

const URL: &str = "https://vmwatch.example.com";

async fn serving(folder: &Path) -> Stack {
    let stack = stack()
        .without_login_limit()
        .set(Program::Gateway, "VMWATCH_PUBLIC_URL", URL)
        .set(Program::Gateway, "VMWATCH_PACKAGES_DIR", folder.to_str().unwrap());
    stack.start().await
}

async fn get(api: &Api, path: &str) -> Reply {
    Reply::of(api.raw(Method::GET, path)).await
}

#[tokio::test]
async fn install_script_has_the_checksum_of_each_package_that_is_served() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("vmwatch-agent.deb"), "a package").unwrap();
    fs::write(folder.path().join("secret"), "secret").unwrap();
    let stack = serving(folder.path()).await;
    let api = Api::of(stack.gateway(0));

    let script = get(&api, "/install.sh").await;
    assert_eq!(script.status, 200, "{script:?}");
    assert_eq!(
        script.header("content-type"),
        Some("text/x-shellscript; charset=utf-8")
    );
    let digest = "c0cd5ccfdb563a59366e33e73001b78fdb8cca5a6c48e2f90fffcde44b81f1f6";
    assert!(
        script
            .body
            .contains(&format!("PACKAGES='vmwatch-agent.deb {digest}'")),
        "{script:?}"
    );
    assert!(script.body.contains(&format!("GATEWAY='{URL}'")), "{script:?}");
    assert!(script.body.ends_with("\nmain \"$@\"\n"), "{script:?}");

    let package = get(&api, "/packages/vmwatch-agent.deb").await;
    assert_eq!((package.status, package.body.as_str()), (200, "a package"));
    assert_eq!(package.header("content-length"), Some("9"));
    for path in [
        "/packages/secret",
        "/packages/vmwatch-agent.rpm",
        "/packages/..%2fsecret",
        "/packages/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/packages/.",
        "/packages/",
    ] {
        assert_eq!(get(&api, path).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn install_script_contains_nothing_of_the_request() {
    let folder = tempfile::tempdir().unwrap();
    let stack = serving(folder.path()).await;
    let api = Api::of(stack.gateway(0));
    let expected = get(&api, "/install.sh").await.body;
    let hostile = api
        .raw(Method::GET, "/install.sh?evil=1'$(reboot)'")
        .header("host", "evil.example")
        .header("x-forwarded-host", "evil.example")
        .header("x-forwarded-proto", "http")
        .header("forwarded", "host=evil.example")
        .header("referer", "https://evil.example/")
        .header("user-agent", "evil'$(reboot)'");
    let reply = Reply::of(hostile).await;
    assert_eq!((reply.status, reply.body), (200, expected));
}

#[tokio::test]
async fn gateway_without_settings_answers_404_with_the_reason() {
    let stack = stack().start().await;
    let api = Api::of(stack.gateway(0));
    for path in ["/install.sh", "/packages/vmwatch-agent.deb"] {
        let reply = get(&api, path).await;
        assert_eq!(reply.status, 404, "{reply:?}");
        assert_eq!(reply.header("content-type"), Some("text/plain; charset=utf-8"));
        assert!(reply.body.contains("VMWATCH_PUBLIC_URL"), "{reply:?}");
    }
}

#[tokio::test]
async fn enrolments_and_downloads_have_limits_of_their_own_by_source() {
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_LOGIN_BURST", "3")
        .set(Program::Gateway, "VMWATCH_LOGIN_INTERVAL", "1h")
        .start()
        .await;
    let api = Api::of(stack.gateway(0));
    let key = nkeys::KeyPair::new_user().public_key();
    let agent = json!({ "token": "vmj_x", "instance_id": "vm-1", "public_key": key });
    // A browser's headers make no difference, because the request needs no session.
    for _ in 0..3 {
        let foreign = api
            .request(Method::POST, "/agents")
            .header("origin", "https://evil.example")
            .header("sec-fetch-site", "cross-site")
            .json(&agent);
        Reply::of(foreign).await.problem(401, "unauthenticated");
    }
    let limited = api.post("/agents", agent).await;
    limited.problem(429, "throttled");
    for path in ["/install.sh", "/packages/x", "/install.sh"] {
        assert_eq!(get(&api, path).await.status, 404, "{path}");
    }
    for reply in [
        limited,
        get(&api, "/install.sh").await,
        get(&api, "/packages/vmwatch-agent.deb").await,
    ] {
        assert_eq!(reply.status, 429, "{reply:?}");
        let wait: u64 = reply.header("retry-after").unwrap().parse().unwrap();
        assert!((3500..=3600).contains(&wait), "{wait}");
    }
    api.log_in(ADMIN.0, ADMIN.1).await;
}
