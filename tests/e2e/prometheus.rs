//! Tests the metrics of VMs: Debian's Prometheus scrapes the gateway, and answers the queries of the dashboards.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use reqwest::{Method, Url};
use serde_json::{Value, json};
use testkit::{Gateway, MACHINES, PATIENCE, Process, Program, Spec, Stack, eventually, free_port};
use tokio::time::MissedTickBehavior;
use vmwatch_api::{
    Role, Scope,
    metrics::{Sample, SystemSample},
    time::unix_millis,
};

use crate::rest::client::{Api, Reply, process, publish, report, sample, stack};

/// A process name with which a guest tries to add a metric.
const HOSTILE: &str = "a\"} 1\nvmwatch_vms 666\n\\";
const LABEL: &str = "say \"hi\" \\n 数据 🚀";
/// The dashboards over the metrics of VMs.
const DASHBOARDS: [(&str, &str); 2] = [
    (
        "fleet",
        include_str!("../../deploy/observability/grafana/dashboards/fleet.json"),
    ),
    (
        "vm",
        include_str!("../../deploy/observability/grafana/dashboards/vm.json"),
    ),
];
/// Where a panel that shows a VM links to.
const LINK: &str = "${gateway:raw}/vms/${__field.labels.instance_id}?at=${__value.time}";

/// A Prometheus that scrapes a gateway every two seconds.
struct Prometheus {
    _process: Process,
    port: u16,
}

impl Prometheus {
    fn start(folder: &Path, gateway: &Gateway, token: &str) -> Self {
        let port = free_port();
        let credentials = folder.join("metrics-token");
        fs::write(&credentials, format!("{token}\n")).unwrap();
        let gateway = gateway.url("");
        let address = gateway.strip_prefix("http://").unwrap();
        let config = json!({
            "global": { "scrape_interval": "2s", "scrape_timeout": "2s" },
            "scrape_configs": [{
                "job_name": "vms", "metrics_path": "/api/v1/metrics",
                "authorization": { "credentials_file": credentials },
                "static_configs": [{ "targets": [address] }],
            }],
        });
        let file = folder.join("prometheus.yaml");
        fs::write(&file, config.to_string()).unwrap();
        let args = [
            format!("--config.file={}", file.display()),
            format!("--storage.tsdb.path={}", folder.join("prometheus").display()),
            format!("--web.listen-address=127.0.0.1:{port}"),
        ];
        let process = Process::start(Spec {
            name: "prometheus".to_owned(),
            program: testkit::prometheus(),
            args: args.to_vec(),
            env: Vec::new(),
            log: folder.join("prometheus.log"),
        });
        Self {
            _process: process,
            port,
        }
    }

    async fn get(&self, path: &str, params: &[(&str, &str)]) -> Result<Value, String> {
        let url = format!("http://127.0.0.1:{}/api/v1/{path}", self.port);
        let url = Url::parse_with_params(&url, params).unwrap();
        let answer = reqwest::get(url).await.map_err(|error| error.to_string())?;
        let mut body: Value = answer.json().await.map_err(|error| error.to_string())?;
        if body["status"] == "success" {
            Ok(body["data"].take())
        } else {
            Err(body.to_string())
        }
    }

    /// The series that a query selects, once there are any.
    async fn query(&self, query: &str) -> Vec<Value> {
        eventually(&format!("{query} selects series"), PATIENCE, async || {
            let data = self.get("query", &[("query", query)]).await?;
            match data["result"].as_array() {
                Some(series) if !series.is_empty() => Ok(series.clone()),
                _ => {
                    let targets = self.get("targets", &[]).await?;
                    Err(format!("{data} {}", targets["activeTargets"][0]["lastError"]))
                }
            }
        })
        .await
    }

    /// Waits until a query selects one series with this value.
    async fn has(&self, query: &str, value: &str) {
        eventually(&format!("{query} is {value}"), PATIENCE, async || {
            let data = self.get("query", &[("query", query)]).await?;
            let values = data["result"].as_array().into_iter().flatten();
            let values: Vec<_> = values.map(|series| &series["value"][1]).collect();
            (values == [&json!(value)])
                .then_some(())
                .ok_or_else(|| data.to_string())
        })
        .await;
    }
}

/// A sample with every measure and two processes.
fn whole(instance: &str) -> Sample {
    let mut body = sample(instance, unix_millis(), 12.5);
    if let Some(vm) = &mut body.vm {
        vm.system = SystemSample {
            cores: Some(4),
            steal: Some(0.5),
            load: Some(1.25),
            swap: Some(10.0),
            pressure_cpu: Some(12.5),
            pressure_mem: Some(1.0),
            pressure_io: Some(2.0),
        };
    }
    let started_ms = unix_millis() - 60_000;
    body.processes = vec![
        process("postgres", 7, 150.0, started_ms),
        process("postgres", 8, 25.0, started_ms),
        process(HOSTILE, 9, 5.0, started_ms),
    ];
    body
}

/// Publishes a sample of a VM every half second.
async fn keep_reporting(stack: &Stack, instance: &str) {
    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        publish(stack, &whole(instance)).await;
    }
}

#[tokio::test]
async fn prometheus_answers_the_queries_of_the_dashboards() {
    let stack = stack()
        .replicas(Program::Alert, 1)
        .set(Program::Metrics, "VMWATCH_PROCESS_SERIES", "100")
        .set(Program::Metrics, "VMWATCH_SILENT_AFTER", "5s");
    let stack = stack.start().await;
    let api = Api::with(&stack, Role::Operator, Scope::All).await;
    let [_, (silent, _), (busy, _)] = MACHINES;
    publish(&stack, &whole(silent)).await;
    let labels = json!({ "labels": { "team": LABEL }, "revision": 0 });
    let set = api
        .send(Method::PUT, &format!("/vms/{busy}/labels"), labels)
        .await;
    assert_eq!(set.status, 200, "{set:?}");
    let reporting = keep_reporting(&stack, busy);
    let checks = async {
        report(&stack, &api, &[(busy, 12.5)]).await;
        let token = stack.session(Role::Viewer, Scope::All).await;
        let folder = tempfile::tempdir().unwrap();
        let prometheus = Prometheus::start(folder.path(), stack.gateway(0), &token);
        has_values(&prometheus, busy).await;
        for (name, dashboard) in DASHBOARDS {
            let dashboard = serde_json::from_str(dashboard).unwrap();
            has_links(name, &dashboard);
            try_queries(&prometheus, name, &dashboard, busy).await;
        }
    };
    tokio::select! {
        () = reporting => {}
        () = checks => {}
    }
}

/// Checks values, labels and units.
async fn has_values(prometheus: &Prometheus, busy: &str) {
    let vm = format!("{{instance_id=\"{busy}\",name=\"vm-2\",hypervisor=\"test\"}}");
    for (query, value) in [
        ("up".to_owned(), "1"),
        ("vmwatch_vms".to_owned(), "3"),
        (format!("vmwatch_vm_cpu_usage_ratio{vm}"), "0.125"),
        (format!("vmwatch_vm_disk_read_bytes_per_second{vm}"), "3072"),
        (format!("vmwatch_vm_cpu_cores{vm}"), "4"),
        (format!("vmwatch_vm_agent_reporting{vm}"), "1"),
        ("count(vmwatch_vm_state{state=\"shut_off\"})".to_owned(), "2"),
        ("vmwatch_alerts_active{severity=\"critical\"}".to_owned(), "0"),
        ("vmwatch_source_current{source=\"alerts\"}".to_owned(), "1"),
        ("vmwatch_process_series_left_out".to_owned(), "0"),
        (
            format!("vmwatch_process_cpu_usage_cores{{instance_id=\"{busy}\",process=\"postgres\"}}"),
            "1.75",
        ),
    ] {
        prometheus.has(&query, value).await;
    }
    let join = format!(
        "vmwatch_vm_cpu_usage_ratio{vm} * on (instance_id) group_left (label_team) vmwatch_vm_info{{label_team!=\"\"}}"
    );
    let joined = prometheus.query(&join).await;
    assert_eq!(joined[0]["metric"]["label_team"], LABEL, "{joined:?}");
    let processes = prometheus
        .query(&format!(
            "vmwatch_process_memory_usage_ratio{{instance_id=\"{busy}\"}}"
        ))
        .await;
    let names: BTreeSet<_> = processes
        .iter()
        .map(|series| series["metric"]["process"].as_str().unwrap())
        .collect();
    assert_eq!(names, BTreeSet::from([HOSTILE, "postgres"]));
    let name = "vmwatch_vm_network_receive_bytes_per_second";
    let described = prometheus.get("metadata", &[("metric", name)]).await.unwrap();
    let help = json!({ "type": "gauge", "help": "Network receive rate.", "unit": "bytes_per_second" });
    assert_eq!(described[name], json!([help]));
}

/// Checks that the panels of single VMs link to the page at the moment of a value.
fn has_links(name: &str, dashboard: &Value) {
    let panels = dashboard["panels"].as_array().unwrap();
    let links = panels
        .iter()
        .filter_map(|panel| panel["fieldConfig"]["defaults"]["links"].as_array())
        .flatten();
    let urls: Vec<_> = links.map(|link| link["url"].as_str().unwrap()).collect();
    assert!(
        urls.len() > 5 && urls.iter().all(|url| *url == LINK),
        "{name}: {urls:?}"
    );
}

/// Tries every query of a dashboard, and of its variables. Each must select series.
async fn try_queries(prometheus: &Prometheus, name: &str, dashboard: &Value, vm: &str) {
    let mut count = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            let query = query
                .replace("$hypervisor", ".*")
                .replace("$name", ".*")
                .replace("$vm", vm);
            assert!(!query.contains('$'), "{name}: {query}");
            prometheus.query(&query).await;
            count += 1;
        }
    }
    assert!(count > 15, "{name}: {count}");
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if variable["type"] != "query" {
            continue;
        }
        let query = variable["query"].as_str().unwrap();
        let values = query
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let (series, label) = values.unwrap().rsplit_once(", ").unwrap();
        let series = series.replace("$hypervisor", ".*").replace("$name", ".*");
        let found = prometheus.query(&series).await;
        assert!(
            found.iter().any(|one| !one["metric"][label].is_null()),
            "{name}: {query}"
        );
    }
}

#[tokio::test]
async fn metrics_have_the_scope_of_the_session_and_are_shared_by_equal_scopes() {
    let stack = stack().start().await;
    let all = Api::with(&stack, Role::Viewer, Scope::All).await;
    let one = || Scope::Only(vec!["vm-1".parse().unwrap()]);
    let limited = Api::with(&stack, Role::Viewer, one()).await;
    report(&stack, &all, &[("vm-1", 12.5), ("vm-2", 50.0)]).await;

    let metrics = limited.get("/metrics").await;
    assert_eq!(metrics.status, 200, "{metrics:?}");
    assert_eq!(
        metrics.header("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    let lines: BTreeSet<_> = metrics.body.lines().collect();
    for line in [
        "vmwatch_vms 1",
        "vmwatch_source_current{source=\"samples\"} 1",
        // No alert-svc runs.
        "vmwatch_source_current{source=\"alerts\"} 0",
        "vmwatch_vm_cpu_usage_ratio{instance_id=\"vm-1\",name=\"\",hypervisor=\"\"} 0.125",
        "# UNIT vmwatch_vm_cpu_usage_ratio ratio",
        "# EOF",
    ] {
        assert!(lines.contains(line), "{line}\n{}", metrics.body);
    }
    for absent in ["vm-2", "vmwatch_alerts_active", "vmwatch_process_cpu"] {
        assert!(!metrics.body.contains(absent), "{absent}\n{}", metrics.body);
    }

    // The next sample is not in the answer that is shared, which may be plain or compressed.
    let first = all.get("/metrics").await.body;
    assert!(first.contains("instance_id=\"vm-2\""), "{first}");
    report(&stack, &all, &[("vm-3", 1.0)]).await;
    let other = Api::with(&stack, Role::Admin, Scope::All).await;
    let plain = other
        .request(Method::GET, "/metrics")
        .header("accept-encoding", "identity");
    let plain = Reply::of(plain).await;
    assert_eq!((plain.body, plain.headers.get("content-encoding")), (first, None));
    let packed = reqwest::Client::builder().no_gzip().build().unwrap();
    let packed = packed
        .get(stack.gateway(0).url("/api/v1/metrics"))
        .header("accept-encoding", "gzip")
        .bearer_auth(all.token.clone().unwrap());
    let packed = packed.send().await.unwrap();
    assert_eq!(packed.headers()["content-encoding"], "gzip");
    assert!(packed.bytes().await.unwrap().starts_with(&[0x1f, 0x8b]));

    let anonymous = Api::of(stack.gateway(0));
    anonymous.get("/metrics").await.problem(401, "unauthenticated");
    all.get("/metrics?vm=vm-1").await.problem(400, "invalid");
    stack.replica(Program::Metrics, 0).process.kill9();
    let new = Api::with(&stack, Role::Viewer, Scope::Only(Vec::new())).await;
    new.get("/metrics").await.problem(503, "unavailable");
}
