//! Bad input, and failures of the gateway: each has its exit code.

use std::{fs, process::Command};

use testkit::{Cli, Program};
use vmwatch_api::{Role, Scope};

use super::{ago, running, stored, user};
use crate::rest::client::stack;

#[tokio::test]
async fn invalid_arguments_are_refused_before_a_request() {
    // No gateway listens there, so a request would fail with another exit code.
    let cli = Cli::new()
        .set("VMWATCH_URL", "http://127.0.0.1:9")
        .set("VMWATCH_TOKEN", "x");
    for (args, text) in [
        (
            vec!["ps", "vm-1", "--at", "noon"],
            "\"noon\" is no time; write now, -2h",
        ),
        (vec!["ps", "vm-1", "--at", "yesterday 25:00"], "is no time"),
        (vec!["ps", "vm-1", "--at", ""], "\"\" is no time"),
        (vec!["history", "vm-1", "--from", "tomorrow"], "is no time"),
        (vec!["vms", "--limit", "0"], "0 is not in 1..=100000"),
        (
            vec!["vms", "--url", "http://vmwatch.example.com"],
            "http:// only for this machine",
        ),
        (
            vec!["vms", "--url", "https://a.example", "--context", "b"],
            "cannot be used with",
        ),
        (vec!["top", "vm-1"], "top needs a terminal; `vmwatch ps`"),
        (vec!["nosuch"], "unrecognized subcommand"),
        (vec!["vms", "--token", "secret"], "unexpected argument '--token'"),
        (
            vec!["vms", "--token-file", "/nonexistent"],
            "/nonexistent: No such file",
        ),
        (
            vec!["vms", "--ca-file", "/dev/null"],
            "/dev/null: contains no certificate",
        ),
    ] {
        let (code, error) = cli.failure(&args);
        assert_eq!(code, 64, "{args:?}: {error}");
        assert!(error.contains(text), "{args:?}: {error}");
    }
    let (code, error) = cli.failure(&["ps", "vm-1", "--at", "-2h"]);
    assert_eq!(code, 69, "{error}");
    assert!(
        error.contains("http://127.0.0.1:9 cannot be reached: "),
        "{error}"
    );
    let (code, error) = Cli::new().failure(&["vms"]);
    assert_eq!(code, 64);
    assert!(error.contains("run `vmwatch login URL`"), "{error}");
}

#[tokio::test]
async fn refusals_of_the_gateway_have_exit_codes() {
    let stack = stack().start().await;
    let cli = user(&stack, Role::Viewer).await;
    let (code, error) = cli.failure(&["vms", "--sort", "size"]);
    assert_eq!(code, 64, "{error}");
    assert!(error.contains("(request "), "{error}");
    let expired = Cli::with_token(stack.gateway(0), "9afdb1ec-d396-4ba3-af7a-1e38fd8751ca");
    let (code, error) = expired.failure(&["vms"]);
    assert_eq!(code, 77);
    assert!(
        error.contains("not valid any more; run `vmwatch login`"),
        "{error}"
    );
    let other = Cli::new()
        .set("VMWATCH_URL", &format!("{}/other", stack.gateway(0).url("")))
        .set("VMWATCH_TOKEN", "x");
    assert_eq!(other.failure(&["vms"]).0, 66);
}

#[tokio::test]
async fn token_comes_from_a_file_or_the_environment() {
    let stack = stack().start().await;
    let token = stack.session(Role::Viewer, Scope::All).await;
    let cli = Cli::new().set("VMWATCH_URL", &stack.gateway(0).url(""));
    let path = cli.home().join("token");
    fs::write(&path, format!("{token}\n")).unwrap();
    let path = path.display().to_string();
    cli.output(&["vms", "--token-file", &path]);
    let output = cli.run_with_input(&["vms", "--token-file", "-"], &token);
    assert!(output.status.success());
    cli.set("VMWATCH_TOKEN_FILE", &path).output(&["vms"]);
}

#[tokio::test]
async fn closed_pipe_ends_a_command_quietly() {
    let stack = stack().start().await;
    stored(&stack, &[running(ago(1), &["nginx"])]).await;
    let cli = user(&stack, Role::Viewer).await;
    // `true` ends before the gateway has answered.
    let script = cli.home().join("pipe.sh");
    let program = cli.program().display().to_string();
    fs::write(
        &script,
        format!("'{program}' vms --json | true\necho \"${{PIPESTATUS[0]}}\"\n"),
    )
    .unwrap();
    let mut command = Command::new("bash");
    command.arg(&script).envs(cli.variables());
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0", "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[tokio::test]
async fn certificate_of_the_gateway_is_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(path("tls.crt"), made.cert.pem()).unwrap();
    fs::write(path("tls.key"), made.signing_key.serialize_pem()).unwrap();
    let stack = stack()
        .set(Program::Gateway, "VMWATCH_TLS_CERTIFICATE_FILE", &path("tls.crt"))
        .set(Program::Gateway, "VMWATCH_TLS_KEY_FILE", &path("tls.key"));
    let stack = stack.start().await;
    let token = stack.session(Role::Viewer, Scope::All).await;
    let url = stack
        .gateway(0)
        .url("")
        .replace("http://127.0.0.1", "https://localhost");
    let cli = Cli::new().set("VMWATCH_URL", &url).set("VMWATCH_TOKEN", &token);
    let (code, error) = cli.failure(&["vms"]);
    assert_eq!(code, 69, "{error}");
    assert!(error.contains("invalid peer certificate"), "{error}");
    cli.output(&["vms", "--ca-file", &path("tls.crt")]);
}
