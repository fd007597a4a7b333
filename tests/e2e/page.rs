//! Tests how the gateway serves the web page, and runs the browser tests of gateway/web/e2e in Chromium, with all
//! programs running.

mod alerts;
mod changes;
mod faults;
mod moment;
mod proxy;
mod shop;
mod stories;

use reqwest::Method;
use testkit::Stack;

use crate::rest::client::{Api, Reply};

#[tokio::test]
async fn gateway_serves_page_with_strict_security_policy() {
    let stack = Stack::builder().start().await;
    let anonymous = Api::of(stack.gateway(0));
    let get = async |path: &str, accept: &str, encoding: &str| {
        let request = anonymous.raw(Method::GET, path).header("accept", accept);
        Reply::of(request.header("accept-encoding", encoding)).await
    };
    let page = get("/", "*/*", "identity").await;
    assert_eq!(
        page.status, 200,
        "the gateway was built without its page: {page:?}"
    );
    for (name, value) in [
        ("content-type", "text/html; charset=utf-8"),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "same-origin"),
    ] {
        assert_eq!(page.header(name), Some(value));
    }
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';"),
        "{policy}"
    );
    assert!(!policy.contains("unsafe"), "{policy}");

    // The gateway serves the same page for every view. The page itself reads the view from the address.
    for view in ["/vms/vm-1?range=1h", "/operations", "/no/such/view"] {
        assert_eq!(get(view, "text/html,*/*;q=0.8", "identity").await.body, page.body);
    }
    get("/vms/vm-1", "application/json", "identity")
        .await
        .problem(404, "not_found");
    get("/assets/old.js", "text/html", "identity")
        .await
        .problem(404, "not_found");
    let posted = Reply::of(
        anonymous
            .raw(Method::POST, "/operations")
            .header("accept", "text/html"),
    )
    .await;
    posted.problem(404, "not_found");

    // Files whose names contain a hash of their content never change. The gateway serves them compressed.
    let files: Vec<_> = page
        .body
        .split('"')
        .filter(|text| text.starts_with("/assets/"))
        .collect();
    assert!(
        files.len() >= 3,
        "the page must link to a script, a style sheet and an icon: {}",
        page.body
    );
    let undecoded = reqwest::Client::builder().no_gzip().build().unwrap();
    for file in files {
        let plain = get(file, "*/*", "identity").await;
        assert_eq!(plain.status, 200, "{file}");
        assert_eq!(
            plain.header("cache-control"),
            Some("public, max-age=31536000, immutable")
        );
        let packed = undecoded
            .get(stack.gateway(0).url(file))
            .header("accept-encoding", "gzip");
        let packed = Reply::of(packed).await;
        assert_eq!(packed.header("content-encoding"), Some("gzip"), "{file}");
        assert_eq!(plain.header("content-encoding"), None, "{file}");
    }
}
