//! Tests the page behind Debian's nginx, with the configuration that docs/deployment.md shows.

use std::{fs, path::Path};

use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;
use testkit::{
    ADMIN, Gateway, MACHINES, PATIENCE, Process, Program, Spec, THIS_MACHINE, eventually, free_port, nginx,
    no_requests, run_in_browser,
};
use vmwatch_api::{Role, Scope};

use super::stories::with_agent;
use crate::rest::{
    client::{Api, Reply},
    events::{self, Follower},
};

/// The gateway's address in the configuration that the documentation shows.
const DOCUMENTED_GATEWAY: &str = "http://127.0.0.1:8086";

/// A running nginx that forwards requests to a gateway.
struct Nginx {
    port: u16,
    _process: Process,
    _folder: TempDir,
}

impl Nginx {
    /// Starts nginx with the documented `location` block.
    fn start(gateway: &Gateway) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let location = documented_lines("nginx");
        assert!(location.contains(DOCUMENTED_GATEWAY), "{location}");
        assert!(
            !location.contains("proxy_set_header Host"),
            "this test is for nginx's default Host: {location}"
        );
        let location = location.replace(DOCUMENTED_GATEWAY, &gateway.url(""));
        // Unlike the default paths, these can be written by every user.
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {kind};\n"))
            .concat();
        let config = format!(
            "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr;\nevents {{}}\n\
             http {{\naccess_log off;\n{paths}server {{\nlisten 127.0.0.1:{port};\n{location}}}\n}}\n"
        );
        let path = |name: &str| folder.path().join(name);
        fs::write(path("nginx.conf"), config).unwrap();
        let args = ["-p", &path("").display().to_string(), "-c", "nginx.conf"];
        let process = Process::start(Spec {
            name: "nginx".to_owned(),
            program: nginx(),
            args: args.map(str::to_owned).to_vec(),
            env: Vec::new(),
            log: path("nginx.log"),
        });
        Self {
            port,
            _process: process,
            _folder: folder,
        }
    }

    fn url(&self, host: &str) -> String {
        format!("http://{host}:{}", self.port)
    }
}

/// The indented lines of docs/deployment.md below the paragraph about this proxy.
fn documented_lines(proxy: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/deployment.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, section) = page
        .split_once(&format!("\n**{proxy}**"))
        .expect("the page describes the proxy");
    let lines = section.lines().skip_while(|line| !line.starts_with("    "));
    let block: Vec<_> = lines.take_while(|line| line.starts_with("    ")).collect();
    block.join("\n")
}

#[tokio::test]
async fn page_works_behind_nginx_with_documented_configuration() {
    let stack = with_agent()
        .set(Program::Gateway, "VMWATCH_TRUSTED_PROXIES", "127.0.0.1")
        .start()
        .await;
    let gateway = stack.gateway(0);
    let nginx = Nginx::start(gateway);
    let anonymous = Api::of(gateway).at_url(&nginx.url("127.0.0.1"));
    eventually("nginx forwards requests", PATIENCE, async || {
        let sent = anonymous.raw(Method::GET, "/").send().await;
        let status = sent.map_err(|error| error.to_string())?.status();
        (status == 200).then_some(()).ok_or_else(|| status.to_string())
    })
    .await;

    // nginx must forward each event immediately and not wait until its buffer is full.
    let viewer = Api::with(&stack, Role::Viewer, Scope::All).await;
    let viewer = viewer.at_url(&nginx.url("127.0.0.1"));
    let query = format!("?instance_id={}", MACHINES[0].0);
    let opening = Follower::of(&viewer, &query, None);
    let opened = tokio::time::timeout(PATIENCE, opening).await;
    let mut follower = opened.expect("nginx passes the stream on at once");
    follower.expect("ready").await;
    let published = events::tell(&stack, MACHINES[0].0).await;
    assert_eq!(follower.expect("machine").await.id, Some(published));
    drop(follower);

    let page_url = nginx.url("vmwatch.test");
    sign_in_is_refused_from_untrusted_address(gateway, &page_url).await;
    let environment = [
        ("VMWATCH_PAGE_URL", page_url.as_str()),
        ("VMWATCH_PAGE_VM", THIS_MACHINE),
    ];
    run_in_browser(&stack, "proxy", &environment, no_requests).await;
}

/// A client that is not a trusted proxy cannot choose its own `X-Forwarded-Host`.
async fn sign_in_is_refused_from_untrusted_address(gateway: &Gateway, origin: &str) {
    let host = origin.trim_start_matches("http://");
    let login = json!({ "user_name": ADMIN.0, "password": ADMIN.1, "cookie": true });
    let sign_in = async |address: [u8; 4]| {
        let request = Api::from_address(gateway, address.into())
            .request(Method::POST, "/sessions")
            .header("origin", origin)
            .header("x-forwarded-host", host);
        Reply::of(request.json(&login)).await
    };
    let detail = sign_in([127, 0, 0, 2]).await.problem(403, "forbidden");
    for part in [
        origin,
        &gateway.url("")["http://".len()..],
        "VMWATCH_TRUSTED_PROXIES",
    ] {
        assert!(detail.contains(part), "{detail}");
    }
    let trusted = sign_in([127, 0, 0, 1]).await;
    assert_eq!(trusted.status, 201, "{trusted:?}");
}
