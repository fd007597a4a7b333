//! Browser test of links to the processes at a moment, such as those of dashboards.

use testkit::{no_requests, run_in_browser};
use vmwatch_api::time::unix_millis;

use crate::rest::client::{process, publish, sample, stack};

const VM: &str = "linked";
const HOUR: u64 = 3_600_000;

#[tokio::test]
async fn link_to_a_moment_shows_its_processes_after_signing_in() {
    let stack = stack().start().await;
    let now = unix_millis();
    for (name, at_ms) in [("then-e2e", now - HOUR), ("today-e2e", now)] {
        let mut body = sample(VM, at_ms, 5.0);
        body.processes = vec![process(name, 4121, 50.0, now - 2 * HOUR)];
        publish(&stack, &body).await;
    }
    let at = (now - HOUR + 1000).to_string();
    let environment = [
        ("VMWATCH_PAGE_VM", VM),
        ("VMWATCH_PAGE_AT", &at),
        ("VMWATCH_PAGE_PROCESSES", "then-e2e,today-e2e"),
    ];
    run_in_browser(&stack, "moment", &environment, no_requests).await;
}
