//! Checks the REST API against its OpenAPI document with schemathesis: every check, with thousands of generated
//! requests.

use std::process::Command;

use testkit::schemathesis;
use vmwatch_api::{Role, Scope};

use super::client::{Api, report, shown, stack};

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/schemathesis/schemathesis.toml");

#[tokio::test]
async fn api_conforms_to_openapi_document() {
    let stack = stack().without_login_limit().start().await;
    let api = Api::with(&stack, Role::Admin, Scope::All).await;
    // The requests find these VMs.
    report(&stack, &api, &[("vm-1", 12.5), ("0", 1.0)]).await;
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(schemathesis());
    command
        .args(["--config-file", CONFIG, "run", "--no-color"])
        .arg(stack.gateway(0).url("/api/openapi.json"))
        // The token is in the environment, because all processes of the machine can read arguments.
        .env("VMWATCH_TEST_TOKEN", api.token.as_deref().unwrap())
        .current_dir(folder.path());
    let (succeeded, text) = shown(command).await;
    assert!(succeeded, "schemathesis found failures; see above");
    assert!(
        text.contains("Tested: 21") && text.contains("Selected: 21/23"),
        "schemathesis did not test all routes but two"
    );
}
