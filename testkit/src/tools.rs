//! Finds programs that tests need: those of vmwatch in cargo's target folder, and others by environment variables, in
//! PATH, or where `./dev install` installs them.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The path of a vmwatch program in the same cargo target folder as this test.
pub(crate) fn own(name: &str) -> PathBuf {
    // The path of this test is target/<profile>/deps/e2e-<hash>, or target/<profile>/bench.
    let this = env::current_exe().expect("the path of this test is known");
    let folder = this.parent().expect("this test is in a folder");
    let folder = folder
        .parent()
        .filter(|_| folder.ends_with("deps"))
        .unwrap_or(folder);
    let program = folder.join(name);
    assert!(
        program.is_file(),
        "{} is missing; run `cargo build --workspace --bins` first",
        program.display()
    );
    if let Some(source) = newer_source(&program) {
        // Cargo shows this warning only if the test fails, which is when it matters.
        eprintln!(
            "warning: {name} is older than {source}; run `cargo build --workspace --bins`",
            source = source.display()
        );
    }
    program
}

/// Returns a source file that was changed after the program was built. The source files are listed in cargo's
/// dependency file.
fn newer_source(program: &Path) -> Option<PathBuf> {
    let modified = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let built = modified(program)?;
    let list = fs::read_to_string(program.with_extension("d")).ok()?;
    let (_, sources) = list.split_once(": ")?;
    sources
        .split_whitespace()
        .map(PathBuf::from)
        .find(|source| modified(source).is_some_and(|changed| changed > built))
}

/// The path of nats-server, which must be version 2.11 or newer.
pub fn nats_server() -> PathBuf {
    find(
        "VMWATCH_TEST_NATS_SERVER",
        "nats-server",
        "nats-server/nats-server",
    )
}

/// The path of the database server: mongod, or the stand-in that `./dev install` installs.
pub(crate) fn database() -> PathBuf {
    find(
        "VMWATCH_TEST_DATABASE",
        "mongod",
        "secantus-0.5.3-beta.196/bin/secantusd-rs",
    )
}

/// The path of schemathesis, a tool that tests HTTP APIs.
///
/// # Panics
/// If schemathesis is not installed.
pub fn schemathesis() -> PathBuf {
    find(
        "VMWATCH_TEST_SCHEMATHESIS",
        "schemathesis",
        "schemathesis/bin/schemathesis",
    )
}

/// The paths of Node.js and Chromium, which run the tests of the web page.
///
/// # Panics
/// If Node.js or Chromium is not installed.
pub fn node_and_chromium() -> [PathBuf; 2] {
    [
        find("VMWATCH_TEST_NODE", "node", "node/bin/node"),
        find("VMWATCH_TEST_CHROMIUM", "chromium", "chromium"),
    ]
}

/// The path of nginx, a reverse proxy.
///
/// # Panics
/// If nginx is not installed.
pub fn nginx() -> PathBuf {
    find("VMWATCH_TEST_NGINX", "nginx", "nginx/nginx")
}

/// The path of Alertmanager, a receiver of alerts.
pub(crate) fn alertmanager() -> PathBuf {
    find(
        "VMWATCH_TEST_ALERTMANAGER",
        "prometheus-alertmanager",
        "alertmanager/prometheus-alertmanager",
    )
}

/// The path of Prometheus, which scrapes metrics and answers queries in `PromQL`.
///
/// # Panics
/// If Prometheus is not installed.
pub fn prometheus() -> PathBuf {
    find("VMWATCH_TEST_PROMETHEUS", "prometheus", "prometheus/prometheus")
}

/// The path of a Python that has aiosmtpd, a mail server.
pub(crate) fn mail_python() -> PathBuf {
    find(
        "VMWATCH_TEST_MAIL_PYTHON",
        "python-with-aiosmtpd",
        "aiosmtpd/bin/python",
    )
}

/// The folder with `vmlinuz` and `initramfs.gz`, the kernel and file system of the test guest.
pub(crate) fn guest_image() -> PathBuf {
    if let Some(given) = env::var_os("VMWATCH_TEST_GUEST").filter(|given| !given.is_empty()) {
        return PathBuf::from(given);
    }
    let entries = fs::read_dir(cache().join("guest"))
        .into_iter()
        .flatten()
        .flatten();
    let images = entries
        .map(|entry| entry.path())
        .filter(|path| path.join("initramfs.gz").is_file());
    images
        .max_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
        .expect("the test guest is missing; run `./dev install`, or set VMWATCH_TEST_GUEST to its folder")
}

/// The path in the environment variable, or the program in PATH, or the one that `./dev install` has installed.
fn find(variable: &str, name: &str, installed: &str) -> PathBuf {
    if let Some(given) = env::var_os(variable).filter(|given| !given.is_empty()) {
        let given = PathBuf::from(given);
        assert!(given.is_file(), "{variable}: {} does not exist", given.display());
        return given;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join(name));
    let installed = cache().join("tools").join(installed);
    on_path
        .chain([installed.clone()])
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| {
            panic!(
                "the tests need {name}, which is neither in PATH nor at {}; run `./dev install`, or set {variable}",
                installed.display()
            )
        })
}

/// The folder in which `./dev install` installs tools.
fn cache() -> PathBuf {
    let named = |variable: &str| {
        env::var_os(variable)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    named("VMWATCH_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|cache| cache.join("vmwatch")))
        .or_else(|| named("HOME").map(|home| home.join(".cache/vmwatch")))
        .expect("HOME, XDG_CACHE_HOME or VMWATCH_CACHE must be set")
}

/// The library that changes a program's clock, from Debian's package `libfaketime`; `None` if it is not installed.
pub fn fake_time_library() -> Option<PathBuf> {
    let folder = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
    let library = Path::new(&folder).join("faketime/libfaketime.so.1");
    library.is_file().then_some(library)
}
