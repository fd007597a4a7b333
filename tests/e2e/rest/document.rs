//! Runs the shell commands in docs/api/rest.md.

use std::{fs, process::Command};

use testkit::{ADMIN, PATIENCE, Program, THIS_MACHINE, eventually};
use vmwatch_api::{Role, Scope};

use super::client::{Api, shown, stack};

#[tokio::test]
async fn shell_commands_in_the_rest_docs_work() {
    let stack = stack()
        .replicas(Program::Agent, 1)
        .replicas(Program::Alert, 1)
        .start()
        .await;
    let api = Api::with(&stack, Role::Viewer, Scope::All).await;
    for path in ["processes", "processes/history?name=vmwatch-agent"] {
        eventually(
            "the agent's processes and history are stored",
            PATIENCE,
            async || {
                let body = api.read(&format!("/vms/{THIS_MACHINE}/{path}")).await;
                let found = ["processes", "buckets"]
                    .iter()
                    .any(|list| body[list].as_array().is_some_and(|list| !list.is_empty()));
                if found { Ok(()) } else { Err(body.to_string()) }
            },
        )
        .await;
    }
    eventually("the agent's VM is listed", PATIENCE, async || {
        let page = api.read("/vms?agent=reporting").await;
        if page["total"] == 1 {
            Ok(())
        } else {
            Err(page.to_string())
        }
    })
    .await;

    let document = include_str!("../../../docs/api/rest.md");
    let (_, rest) = document.split_once("```sh\n").unwrap();
    let (lines, _) = rest.split_once("```").unwrap();
    assert!(lines.contains("http://127.0.0.1:8086"));
    let lines = lines.replace("http://127.0.0.1:8086", &stack.gateway(0).url(""));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(".dev")).unwrap();
    fs::write(
        folder.path().join(".dev/admin-password"),
        format!("{}\n", ADMIN.1),
    )
    .unwrap();
    let mut command = Command::new("sh");
    // With -e the shell stops at the first command that fails.
    command.args(["-e", "-c", &lines]).current_dir(folder.path());
    let (succeeded, text) = shown(command).await;
    assert!(succeeded, "a command of docs/api/rest.md failed; see above");
    for shown in [
        r#""user_name":"admin""#,
        r#""agent":"reporting""#,
        "at,count,cpu_util_min",
        r#""state":"succeeded""#,
        "event: ready",
        r#""action":"auth.users.remove""#,
    ] {
        assert!(text.contains(shown), "{shown}");
    }
}
