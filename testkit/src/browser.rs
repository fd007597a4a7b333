//! Runs a browser test of gateway/web/e2e with Node.js. To change the running programs, the browser test prints
//! requests, which the Rust test executes.

use std::{collections::HashMap, path::Path, process::Stdio};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
};

use crate::{ADMIN, Stack, figure, node_and_chromium};

const STORIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../gateway/web/e2e");

/// Runs a browser test with these environment variables, and returns the figures that it measured. When it prints
/// `@NAME`, `execute` executes the request NAME and returns the answer for the browser test. Panics if the browser test
/// fails.
pub async fn run_in_browser(
    stack: &Stack,
    story: &str,
    environment: &[(&str, &str)],
    mut execute: impl AsyncFnMut(&str) -> String,
) -> HashMap<String, f64> {
    let [node, chromium] = node_and_chromium();
    let path = format!("{STORIES}/{story}.mjs");
    assert!(
        Path::new(STORIES)
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
    let mut figures = HashMap::new();
    while let Some(line) = lines.next_line().await.expect("the browser test writes text") {
        if let Some(request) = line.strip_prefix('@') {
            let answer = execute(request).await + "\n";
            answers
                .write_all(answer.as_bytes())
                .await
                .expect("the browser test reads answers");
        } else if let Some((name, value)) = line
            .strip_prefix("figure ")
            .and_then(|rest| rest.rsplit_once(' '))
        {
            let value = value.parse().expect("the figure is a number");
            figure(name, value);
            figures.insert(name.to_owned(), value);
        } else {
            println!("{line}");
        }
    }
    let status = child
        .wait()
        .await
        .expect("the exit status of the browser test is available");
    assert!(status.success(), "the browser test {story} failed; see above");
    figures
}

/// Request handler for browser tests that must not make requests to the Rust test: panics if one arrives.
pub async fn no_requests(request: &str) -> String {
    panic!("the browser test made an unexpected request: {request}");
}
