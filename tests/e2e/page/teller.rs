//! Runs a story of gateway/web/e2e with Node, and does to the stack what the story demands.

use std::process::Stdio;

use testkit::{ADMIN, Stack, figure, node_and_chromium};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::Command,
};

const STORIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../gateway/web/e2e");

/// Runs a browser story on this VM; `meet` answers each line that the story prints as `@demand`.
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
        .expect("Node can be run");
    let mut answers = child.stdin.take().expect("it was asked for");
    let mut lines = BufReader::new(child.stdout.take().expect("it was asked for")).lines();
    while let Some(line) = lines.next_line().await.expect("it writes text") {
        if let Some(demand) = line.strip_prefix('@') {
            let answer = meet(demand).await + "\n";
            answers.write_all(answer.as_bytes()).await.expect("it reads");
        } else if let Some((name, value)) = line
            .strip_prefix("figure ")
            .and_then(|rest| rest.rsplit_once(' '))
        {
            figure(name, value.parse().expect("a number"));
        } else {
            println!("{line}");
        }
    }
    let status = child.wait().await.expect("it ends");
    assert!(status.success(), "the story {story} failed; see above");
}

/// For stories that demand nothing.
pub(crate) async fn nothing(what: &str) -> String {
    panic!("nobody was to demand {what}");
}
