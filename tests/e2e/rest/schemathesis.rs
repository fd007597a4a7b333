//! Checks the REST API against its OpenAPI document with schemathesis, by thousands of generated requests.

use std::process::Command;

use testkit::{Program, schemathesis};
use vmwatch_api::{Role, Scope};

use super::client::{Api, report, shown, stack};

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/schemathesis/schemathesis.toml");

#[tokio::test]
async fn rest_api_conforms_to_its_openapi_document() {
    let stack = stack()
        .replicas(Program::Alert, 1)
        .without_login_limit()
        .start()
        .await;
    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    // Generated requests that name one of these VMs find an existing VM.
    report(&stack, &api, &[("vm-1", 12.5), ("0", 1.0)]).await;
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(schemathesis());
    command
        .args(["--config-file", CONFIG, "run", "--no-color"])
        .arg(stack.gateway(0).url("/api/openapi.json"))
        // The token is in an environment variable, because all users of the machine can read command-line arguments.
        .env("VMWATCH_TEST_TOKEN", api.token.as_deref().unwrap())
        .current_dir(folder.path());
    let (succeeded, text) = shown(command).await;
    assert!(succeeded, "schemathesis found failures; see above");
    assert!(
        text.contains("Tested: 60") && text.contains("Selected: 60/62"),
        "schemathesis must test 56 of the 58 routes"
    );
}
