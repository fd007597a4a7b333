//! Commands that read: VMs, processes, history, alerts and operations.

use serde_json::Value;
use testkit::{MACHINES, PATIENCE, eventually};
use vmwatch_api::Role;

use super::{ago, running, stored, user};
use crate::rest::client::{rfc3339, stack};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
}

#[tokio::test]
async fn processes_are_listed_at_any_moment() {
    let stack = stack().start().await;
    let (earlier, now) = (ago(7200), ago(1));
    stored(
        &stack,
        &[
            running(earlier, &["postgres", "nginx"]),
            running(now, &["stress\u{1b}[31m", "postgres", "nginx"]),
        ],
    )
    .await;
    let cli = user(&stack, Role::Viewer).await;

    let lines = cli.output(&["ps", "vm-1"]);
    let names: Vec<&str> = lines
        .lines()
        .skip(1)
        .filter_map(|line| line.split("  ").last().map(str::trim))
        .collect();
    assert_eq!(names, ["stress\u{fffd}[31m", "postgres", "nginx"], "{lines}");
    assert!(!lines.contains('\u{1b}'), "a name sends commands to the terminal");
    let title = lines.lines().next().unwrap();
    assert!(
        title.trim_start().starts_with("PID  USER  CPU %  MEM %"),
        "{title}"
    );

    let earlier_text = rfc3339(earlier);
    for at in ["-90m", "1h ago", earlier_text.as_str()] {
        let table = json(&cli.output(&["ps", "vm-1", "--at", at, "--json"]));
        assert_eq!(table["at"], earlier_text, "{at}");
        assert_eq!(table["processes"].as_array().unwrap().len(), 2, "{at}");
        assert_eq!(table["processes"][0]["name"], "postgres");
    }
    let one = json(&cli.output(&["ps", "vm-1", "--json", "-n", "1", "--sort", "name"]));
    assert_eq!(one["processes"][0]["name"], "nginx");
    assert_eq!(
        (one["processes"].as_array().unwrap().len(), &one["total"]),
        (1, &Value::from(3))
    );
    let of_nginx = cli.output(&["ps", "vm-1", "--name", "nginx"]);
    assert_eq!(of_nginx.lines().count(), 2, "{of_nginx}");
}

#[tokio::test]
async fn vm_is_found_by_name_or_id() {
    let stack = stack().start().await;
    stored(&stack, &[running(ago(1), &["nginx"])]).await;
    let cli = user(&stack, Role::Viewer).await;
    eventually("the VMs of the hypervisor are listed", PATIENCE, async || {
        let vms = cli.output(&["vms"]);
        if vms.lines().count() == MACHINES.len() + 2 {
            Ok(())
        } else {
            Err(vms)
        }
    })
    .await;
    let vms = json(&cli.output(&["vms", "--json", "--sort", "cpu", "-n", "1"]));
    assert_eq!(vms[0]["instance_id"], "vm-1", "the only VM with an agent");
    let off = cli.output(&["vms", "--state", "shut_off"]);
    assert!(
        off.contains("vm-0") && off.contains("shut_off") && !off.contains("running"),
        "{off}"
    );

    let (code, error) = cli.failure(&["ps", "nosuch"]);
    assert_eq!(code, 66);
    assert!(
        error.contains("there is no VM with the id or name \"nosuch\""),
        "{error}"
    );
    // Part of a name is not enough.
    assert_eq!(cli.failure(&["ps", "vm-"]).0, 66);
    let by_id = cli.output(&["history", MACHINES[0].0, "--json"]);
    assert_eq!(
        cli.output(&["history", "vm-0", "--json"]).lines().count(),
        by_id.lines().count()
    );
}

#[tokio::test]
async fn process_is_found_in_all_vms() {
    let stack = stack().start().await;
    stored(
        &stack,
        &[
            running(ago(60), &["nginx"]),
            running(ago(1), &["stress", "nginx"]),
        ],
    )
    .await;
    let cli = user(&stack, Role::Viewer).await;
    eventually("the names are stored", PATIENCE, async || {
        let found = cli.output(&["who-ran", "stress"]);
        if found.contains("vm-1") {
            Ok(())
        } else {
            Err(found)
        }
    })
    .await;
    let vms = json(&cli.output(&["who-ran", "str", "--prefix", "--from", "-1d", "--json"]));
    assert_eq!(vms[0]["process_names"], serde_json::json!(["stress"]));
    let none = cli.run(&["who-ran", "nosuch"]);
    assert!(none.status.success() && none.stdout.is_empty());
    assert!(String::from_utf8_lossy(&none.stderr).contains("nosuch ran in no VM"));
}

#[tokio::test]
async fn history_shows_a_line_per_time_bucket() {
    let stack = stack().start().await;
    stored(
        &stack,
        &[running(ago(600), &["nginx"]), running(ago(1), &["nginx"])],
    )
    .await;
    let cli = user(&stack, Role::Viewer).await;
    let vm = cli.output(&["history", "vm-1", "--from", "-15m", "--points", "100"]);
    assert_eq!(vm.lines().count(), 3, "{vm}");
    assert!(vm.lines().skip(1).all(|line| line.contains("  40.0  ")), "{vm}");
    let process = cli.output(&[
        "history",
        "vm-1",
        "--process",
        "nginx",
        "--from",
        "-15m",
        "--points",
        "100",
    ]);
    assert_eq!(process.lines().count(), 3, "{process}");
    assert!(
        process.starts_with("FROM                 PROCESSES  CPU %"),
        "{process}"
    );
}

#[tokio::test]
async fn completion_script_is_valid_and_knows_the_commands() {
    let cli = testkit::Cli::new();
    let script = cli.output(&["completion", "bash"]);
    let path = cli.home().join("completion.bash");
    std::fs::write(&path, script).unwrap();
    let complete = "source \"$0\" && COMP_WORDS=(vmwatch who) COMP_CWORD=1 && _vmwatch vmwatch who vmwatch && echo \"${COMPREPLY[@]}\"";
    let output = std::process::Command::new("bash")
        .arg("-c")
        .arg(complete)
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "who-ran",
        "{output:?}"
    );
}

#[tokio::test]
async fn changes_between_two_moments_are_listed() {
    let stack = stack().start().await;
    let samples = [
        running(ago(7200), &["cron", "nginx"]),
        running(ago(1), &["stress", "nginx"]),
    ];
    stored(&stack, &samples).await;
    let cli = user(&stack, Role::Viewer).await;
    let changes = cli.output(&["changed", "vm-1", "--from", "-1h"]);
    let line = |change: &str| {
        changes
            .lines()
            .find(|line| line.starts_with(change))
            .unwrap_or_default()
    };
    assert!(line("came").ends_with("stress"), "{changes}");
    assert!(line("went").ends_with("cron"), "{changes}");
    assert!(cli.output(&["changed", "vm-1", "--json"]).contains("\"came\""));
}

#[tokio::test]
async fn status_is_for_administrators() {
    let stack = stack().start().await;
    let status = user(&stack, Role::Admin).await.output(&["status"]);
    assert!(
        status.contains("vmwatch-metrics") && status.contains("hypervisor test"),
        "{status}"
    );
    assert_eq!(user(&stack, Role::Viewer).await.failure(&["status"]).0, 77);
}
