//! Compares README.md, docs/settings.md and ARCHITECTURE.md with the code.

use std::{fmt::Write as _, fs, net::SocketAddr, path::Path};

use vmwatch_service::config::{Environment, Setting, Value};

/// The text of docs/settings.md above the generated tables.
const SETTINGS_HEAD: &str = "# Settings

Every program reads its settings from environment variables, reports all invalid ones at once (exit code 64), and lists
them with `--help`. Durations are written `500ms`, `10s`, `5m`, `12h`, `30d`; sizes `512KiB`, `64MiB`, `1GiB`. An empty
variable counts as not set. This page is generated from the programs' own lists.
";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The settings of each program, followed by the groups of settings that several programs share.
fn programs() -> [(&'static str, Vec<Setting>); 6] {
    [
        ("vmwatch-gateway", gateway::config::SETTINGS.concat()),
        ("vmwatch-auth", auth_svc::config::SETTINGS.concat()),
        ("vmwatch-metrics", metrics_svc::config::SETTINGS.concat()),
        ("vmwatch-lifecycle", lifecycle_svc::config::SETTINGS.concat()),
        ("vmwatch-alert", alert_svc::config::SETTINGS.concat()),
        ("vmwatch-agent", agent::config::SETTINGS.concat()),
    ]
}

fn groups() -> [(&'static str, &'static [Setting]); 5] {
    [
        ("Every program: the bus", vmwatch_bus::SETTINGS),
        (
            "Every program: logs and traces",
            vmwatch_service::telemetry::SETTINGS,
        ),
        (
            "The gateway and every service: limits of requests",
            vmwatch_bus::limits::SETTINGS,
        ),
        (
            "The gateway and every service: stopping",
            vmwatch_bus::serve::SETTINGS,
        ),
        (
            "vmwatch-auth, vmwatch-metrics and vmwatch-alert: the database",
            vmwatch_store::SETTINGS,
        ),
    ]
}

fn settings_page() -> String {
    let table = |title: &str, settings: &[Setting]| {
        let mut rows = String::new();
        for Setting {
            name,
            value,
            default,
            help,
        } in settings
        {
            let default = if default.is_empty() {
                String::new()
            } else {
                format!("`{default}`")
            };
            writeln!(rows, "| `{name}` | {value} | {default} | {help} |").unwrap();
        }
        format!("\n## {title}\n\n| setting | value | default | meaning |\n|---|---|---|---|\n{rows}")
    };
    let shared: Vec<Setting> = groups()
        .iter()
        .flat_map(|(_, settings)| settings.iter().copied())
        .collect();
    let mut page = SETTINGS_HEAD.to_owned();
    for (program, settings) in programs() {
        let own: Vec<Setting> = settings
            .into_iter()
            .filter(|setting| !shared.contains(setting))
            .collect();
        page += &table(program, &own);
    }
    for (title, settings) in groups() {
        page += &table(title, settings);
    }
    page
}

/// `docs/settings.md` must equal the page that is generated from the code. With `VMWATCH_BLESS=1` the test rewrites the
/// page instead.
#[test]
fn settings_page_lists_every_setting_of_every_program() {
    let path = root().join("docs/settings.md");
    let expected = settings_page();
    if std::env::var_os("VMWATCH_BLESS").is_some() {
        fs::write(&path, &expected).unwrap();
    }
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        expected,
        "docs/settings.md is out of date; run this test with VMWATCH_BLESS=1 and review the change"
    );
}

#[test]
fn setting_defaults_are_within_their_ranges() {
    let env = Environment::from_variables([]);
    let settings = programs().into_iter().flat_map(|(_, settings)| settings);
    let mut ranges = 0;
    for setting in settings.filter(|setting| !setting.default.is_empty()) {
        let valid = match setting.value {
            Value::Number(..) | Value::OneOf(_) => env.number::<u64>(&setting).is_ok(),
            Value::Duration(..) => env.duration(&setting).is_ok(),
            Value::Size(..) => env.size(&setting).is_ok(),
            Value::Flag => env.get::<bool>(&setting).is_ok(),
            Value::Address => env.get::<SocketAddr>(&setting).is_ok(),
            Value::Text | Value::File | Value::Folder => continue,
        };
        assert!(valid, "{setting:?}: {:?}", env.problems());
        ranges += 1;
    }
    assert!(ranges > 60, "only {ranges} settings have a range");
}

#[test]
fn readme_has_at_most_150_lines_and_no_broken_links() {
    let text = read("README.md");
    assert!(text.lines().count() <= 150);
    let links: Vec<&str> = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|link| !link.contains("://"))
        .collect();
    assert!(links.len() > 10, "found only {} links in README.md", links.len());
    for link in links {
        let path = link.split('#').next().unwrap();
        assert!(
            root().join(path).exists(),
            "README.md links to {link}, which does not exist"
        );
    }
}

/// Every path that ARCHITECTURE.md names exists.
#[test]
fn architecture_page_names_only_existing_files() {
    let text = read("ARCHITECTURE.md");
    let mut checked = 0;
    for quoted in text.split('`').skip(1).step_by(2) {
        let is_path = quoted.contains('/')
            && !quoted.contains([' ', '<', '{', '*', ':', '$'])
            && !quoted.starts_with('/');
        if is_path {
            assert!(
                root().join(quoted.trim_end_matches('/')).exists(),
                "ARCHITECTURE.md names {quoted}, which does not exist"
            );
            checked += 1;
        }
    }
    assert!(checked > 20, "found only {checked} paths in ARCHITECTURE.md");
}

/// Every test file that these pages name exists. A name is relative to the page's folder below `tests/e2e`, to
/// `tests/e2e` itself, or to the root of the repository.
#[test]
fn docs_name_only_existing_test_files() {
    for (page, folder) in [
        ("docs/faults.md", "faults"),
        ("docs/security.md", "security"),
        ("docs/operations.md", ""),
    ] {
        let text = read(page);
        let code = text.split('`').skip(1).step_by(2);
        let named: Vec<_> = code
            .filter(|code| [".rs", ".py", ".mjs"].iter().any(|end| code.ends_with(end)))
            .collect();
        assert!(!named.is_empty(), "{page} names no test file");
        let tests = root().join("tests/e2e");
        for name in named {
            let paths = [root().join(name), tests.join(name), tests.join(folder).join(name)];
            assert!(
                paths.iter().any(|path| path.is_file()),
                "{page} names the test file {name}, which does not exist"
            );
        }
    }
}
