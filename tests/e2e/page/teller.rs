//! Runs a browser test of gateway/web/e2e with Node.js. The browser test prints requests for changes of the running
//! programs, which the Rust test executes.

use std::process::Stdio;

use testkit::{ADMIN, Stack, figure, node_and_chromium};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
};

const STORIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../gateway/web/e2e");

/// Runs a browser test with these environment variables. When it prints `@NAME`, `meet` executes the request NAME and
/// returns the answer for the browser test.
pub(crate) async fn tell(
    stack: &Stack,
    story: &str,
    environment: &[(&str, &str)],
    mut meet: impl AsyncFnMut(&str) -> String,
) {
    let [node, chromium] = node_and_chromium();
    let path = format!("{STORIES}/{story}.mjs");
    assert!(
        std::path::Path::new(STORIES)
            .join("../node_modules/playwright-core")
            .is_dir(),
        "the page's packages are missing: run `npm ci` in gateway/web, as ./dev does"
    );
    let mut child = Command::new(node)
        .arg(path)
        .env("VMWATCH_PAGE_URL", stack.gateway(0).url(""))
        .env("VMWATCH_PAGE_USER", ADMIN.0)
        .env("VMWATCH_PAGE_PASSWORD", ADMIN.1)
        .env("VMWATCH_PAGE_CHROMIUM", chromium)
        .envs(environment.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("Node.js starts");
    let mut answers = child.stdin.take().expect("stdin is piped");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    while let Some(line) = lines.next_line().await.expect("the browser test writes text") {
        if let Some(demand) = line.strip_prefix('@') {
            let answer = meet(demand).await + "\n";
            answers
                .write_all(answer.as_bytes())
                .await
                .expect("the browser test reads answers");
        } else if let Some((name, value)) = line
            .strip_prefix("figure ")
            .and_then(|rest| rest.rsplit_once(' '))
        {
            figure(name, value.parse().expect("the figure is a number"));
        } else {
            println!("{line}");
        }
    }
    let status = child
        .wait()
        .await
        .expect("the exit status of the browser test is available");
    assert!(status.success(), "the browser test {story} failed; see above");
}

/// Refuses every request, for browser tests that make none.
pub(crate) async fn nothing(what: &str) -> String {
    panic!("the browser test made an unexpected request: {what}");
}
