//! Checks the dependencies between the crates of this workspace with `cargo tree`.

use std::{collections::BTreeSet, path::Path, process::Command};

const PROGRAMS: [&str; 7] = [
    "gateway",
    "auth-svc",
    "metrics-svc",
    "lifecycle-svc",
    "alert-svc",
    "agent",
    "vmwatch-cli",
];
const DATABASE: [&str; 3] = ["mongodb", "bson", "vmwatch-store"];
/// Maximum number of packages in the agent's dependency tree, including the agent itself.
const AGENT_PACKAGES: usize = 228;

/// Returns the normal dependencies of a package, direct and indirect, each as `name version`. Dependencies of tests and
/// build scripts are left out.
fn dependencies(package: &str, options: &[&str]) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "--edges=normal", "--prefix=none"])
        .args(["--package", package])
        .args(options)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree: {error}");
    let listed = String::from_utf8(output.stdout).unwrap();
    let packages: BTreeSet<String> = listed
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some(format!("{} {}", words.next()?, words.next()?))
        })
        .collect();
    assert!(
        packages.iter().any(|found| name(found) == package),
        "the dependency tree of {package} does not contain {package} itself"
    );
    packages
}

fn name(package: &str) -> &str {
    package.split(' ').next().unwrap()
}

/// Returns which of these names are in the list of packages.
fn found<'a>(packages: &BTreeSet<String>, names: &[&'a str]) -> Vec<&'a str> {
    let is_found = |wanted: &&str| packages.iter().any(|package| name(package) == *wanted);
    names.iter().copied().filter(is_found).collect()
}

#[test]
fn no_program_crate_depends_on_another() {
    for program in PROGRAMS {
        let packages = dependencies(program, &[]);
        assert_eq!(found(&packages, &PROGRAMS), [program]);
    }
}

#[test]
fn database_driver_is_linked_only_into_services_with_a_database() {
    for program in ["gateway", "lifecycle-svc", "agent", "vmwatch-cli"] {
        assert!(
            found(&dependencies(program, &[]), &DATABASE).is_empty(),
            "{program}"
        );
    }
    for service in ["auth-svc", "metrics-svc", "alert-svc"] {
        assert_eq!(
            found(&dependencies(service, &[]), &DATABASE),
            DATABASE,
            "{service}"
        );
    }
}

#[test]
fn agent_has_no_http_framework_and_few_dependencies() {
    let packages = dependencies("agent", &[]);
    assert!(found(&packages, &["axum", "utoipa"]).is_empty());
    assert!(
        packages.len() <= AGENT_PACKAGES,
        "the agent's dependency tree has {} packages",
        packages.len()
    );
}

#[test]
fn command_line_uses_only_the_rest_api() {
    let packages = dependencies("vmwatch-cli", &[]);
    let shared = [
        "vmwatch-api",
        "vmwatch-bus",
        "vmwatch-service",
        "async-nats",
        "virt",
    ];
    assert_eq!(found(&packages, &shared), ["vmwatch-api"]);
}

#[test]
fn api_crate_depends_on_no_crate_that_does_io() {
    let direct = dependencies("vmwatch-api", &["--all-features", "--depth=1"]);
    let direct: Vec<&str> = direct.iter().map(|package| name(package)).collect();
    assert_eq!(
        direct,
        [
            "hex",
            "jiff",
            "precis-profiles",
            "serde",
            "serde_json",
            "sha2",
            "thiserror",
            "unicode-security",
            "utoipa",
            "vmwatch-api"
        ],
        "vmwatch-api has a new direct dependency; add it to this list only if it does no I/O"
    );
    let io = [
        "tokio",
        "mio",
        "socket2",
        "rustix",
        "futures",
        "hyper",
        "async-nats",
        "axum",
        "tracing",
    ];
    let packages = dependencies("vmwatch-api", &["--all-features"]);
    assert!(found(&packages, &io).is_empty());
}

#[test]
fn shared_crates_depend_only_on_lower_layers() {
    let shared = ["vmwatch-api", "vmwatch-service", "vmwatch-bus", "vmwatch-store"];
    for (package, expected) in [
        ("vmwatch-service", &shared[..2]),
        ("vmwatch-bus", &shared[..3]),
        ("vmwatch-store", &[shared[0], shared[1], shared[3]]),
    ] {
        assert_eq!(found(&dependencies(package, &[]), &shared), expected, "{package}");
    }
    assert!(found(&dependencies("vmwatch-service", &[]), &["async-nats", "axum"]).is_empty());
    assert!(found(&dependencies("vmwatch-bus", &[]), &["axum"]).is_empty());
}
