//! Signing in, contexts and their file.

use std::{fs, os::unix::fs::PermissionsExt as _};

use testkit::{ADMIN, Cli};

use crate::rest::client::{Api, stack};

#[tokio::test]
async fn login_keeps_the_session_in_a_file_of_its_owner() {
    let stack = stack().start().await;
    let url = stack.gateway(0).url("");
    let cli = Cli::new();
    let args = [
        "login",
        &url,
        "--user",
        ADMIN.0,
        "--password-file",
        "-",
        "--context",
        "lab",
    ];
    let output = cli.run_with_input(&args, ADMIN.1);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    assert!(
        errors.starts_with("signed in as admin (admin) until "),
        "{errors}"
    );

    let path = cli.home().join(".config/vmwatch/config.toml");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains(ADMIN.1), "the file contains the password");
    let token = text
        .lines()
        .find_map(|line| line.strip_prefix("token = \"")?.strip_suffix('"'));
    let api = Api::of(stack.gateway(0)).holding(token.unwrap());
    assert_eq!(api.read("/me").await["user_name"], "admin");

    assert_eq!(
        cli.output(&["vms", "--json"]).trim_start().chars().next(),
        Some('[')
    );
    let contexts = cli.output(&["context", "list"]);
    assert!(contexts.contains("lab") && contexts.contains(&url), "{contexts}");
    assert!(!contexts.contains(token.unwrap()), "{contexts}");

    cli.output(&["logout"]);
    assert_eq!(api.get("/me").await.status, 401, "the session has ended");
    let (code, error) = cli.failure(&["vms"]);
    assert_eq!(code, 77);
    assert!(
        error.contains("not signed in to") && error.contains("vmwatch login"),
        "{error}"
    );
}

#[tokio::test]
async fn wrong_password_is_refused_and_not_repeated() {
    let stack = stack().start().await;
    let url = stack.gateway(0).url("");
    let cli = Cli::new();
    let output = cli.run_with_input(
        &["login", &url, "--user", "admin", "--password-file", "-"],
        "wrong pass word\n",
    );
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(77), "{errors}");
    assert!(!errors.contains("wrong pass word"), "{errors}");
    assert!(!cli.home().join(".config").exists(), "nothing is stored");
}

#[tokio::test]
async fn password_is_asked_for_in_the_terminal_without_showing_it() {
    let stack = stack().start().await;
    let cli = Cli::new();
    let mut terminal = cli.terminal(&["login", &stack.gateway(0).url(""), "--user", ADMIN.0], 120, 10);
    terminal.shows("Password of admin at ").await;
    terminal.send(&format!("{}\r", ADMIN.1));
    assert!(terminal.ended().await.success(), "{}", terminal.text());
    assert!(!terminal.output().contains(ADMIN.1), "{}", terminal.output());
    cli.output(&["vms"]);
}

#[tokio::test]
async fn file_that_others_may_read_is_not_used() {
    let cli = Cli::new();
    let folder = cli.home().join(".config/vmwatch");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("config.toml");
    fs::write(
        &path,
        "current = \"lab\"\n[contexts.lab]\nurl = \"https://vmwatch.example.com\"\n",
    )
    .unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let (code, error) = cli.failure(&["vms"]);
    assert_eq!(code, 64);
    assert!(error.contains("run `chmod 600` on it"), "{error}");
}
