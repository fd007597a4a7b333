"""Checks dashboards and alerts: the programs export the metrics used, and each alert has a test and a row in
docs/operations.md."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Iterator, Set

import yaml

from . import sources

FOLDER = sources.ROOT / "deploy" / "observability"
# Metrics of other programs: the exporters in compose.yaml, and the kubelet in Kubernetes. The names are from their
# source code.
FOREIGN = {
    "prometheus": {"up"},
    "prometheus-nats-exporter": {
        "gnatsd_healthz_status", "gnatsd_varz_connections", "gnatsd_varz_in_msgs", "gnatsd_varz_out_msgs", "gnatsd_varz_slow_consumers",
        "jetstream_consumer_num_ack_pending", "jetstream_consumer_num_pending", "jetstream_server_jetstream_disabled",
        "jetstream_server_max_storage", "jetstream_server_total_message_bytes", "jetstream_server_total_streams",
        "jetstream_stream_total_bytes", "jetstream_stream_total_messages",
    },
    "blackbox-exporter": {"probe_ssl_earliest_cert_expiry", "probe_success"},
    "node-exporter": {"node_filesystem_avail_bytes", "node_filesystem_size_bytes"},
    "kubelet": {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"},
}
# Labels that every metric may have: those that Prometheus adds, and the label of histogram buckets.
ALWAYS_LABELS = {"job", "instance", "le"}
WORDS = {"and", "or", "unless", "offset", "bool", "inf", "nan", "by", "without", "on", "ignoring", "group_left", "group_right"}


def dashboards():
    """Checks that programs export every metric that a dashboard panel uses."""
    for path in sorted((FOLDER / "grafana" / "dashboards").glob("*.json")):
        for query in queries(json.loads(path.read_text())):
            yield from (f"{path.name}: {text}" for text in unknown(query))


def queries(part) -> Iterator[str]:
    """Returns every PromQL expression (`expr`) in a dashboard."""
    if isinstance(part, dict):
        if isinstance(part.get("expr"), str):
            yield part["expr"]
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from queries(item)


def alerts():
    """Checks that each alert uses exported metrics, and has a severity, tests and a row in docs/operations.md."""
    document = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    tested = cases()
    documented = set(re.findall(r"^\| `(Vmwatch\w+)`", (sources.ROOT / "docs" / "operations.md").read_text(), re.M))
    jobs = {job["job_name"] for job in yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]}
    for rule in rules:
        name = rule["alert"]
        yield from (f"{name}: {text}" for text in unknown(rule["expr"]))
        for matched in re.findall(r'job=~?"([^"]+)"', rule["expr"]):
            for job in set(matched.split("|")) - jobs:
                yield f"{name}: prometheus.yaml has no job {job}"
        if rule["labels"]["severity"] not in ("page", "ticket"):
            yield f"{name}: the severity is neither page nor ticket"
        if not {True, False} <= tested.get(name, set()):
            yield f"{name} needs a test in which the alert fires and a test in which it does not"
        if name not in documented:
            yield f"docs/operations.md has no row for {name}"
    for name in documented - {rule["alert"] for rule in rules}:
        yield f"docs/operations.md has a row for {name}, but no such alert exists"


def documented():
    """Checks that docs/operations.md lists the metrics of alert-svc, and no others that begin like them."""
    page = (sources.ROOT / "docs" / "operations.md").read_text()
    section = page.split("## Metrics of alert-svc", 1)[-1].split("\n## ", 1)[0]
    own = {name for name in sources.metrics() if re.match(r"vmwatch_alerts?_", name)}
    listed = set(re.findall(r"`(vmwatch_alerts?_\w+)", section))
    yield from (f"docs/operations.md does not list {name}" for name in sorted(own - listed))
    yield from (f"docs/operations.md lists {name}, which no program exports" for name in sorted(listed - own))


def cases() -> dict:
    """Returns for each alert whether there are tests in which it fires and tests in which it does not."""
    found = {}
    for test in yaml.safe_load((FOLDER / "alerts-test.yaml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            found.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    return found


def firing():
    """Checks that promtool accepts the alert rules and that their tests pass."""
    promtool = Path(os.environ["VMWATCH_PROMTOOL"])
    for arguments in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts-test.yaml"]):
        done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True)
        if done.returncode:
            yield done.stdout + done.stderr


def unknown(query: str) -> Iterator[str]:
    """Yields the metrics in a query that no program exports, and the labels that vmwatch's metrics do not have."""
    own = {**sources.metrics(), **sources.vm_metrics()}
    foreign = set().union(*FOREIGN.values())
    for name, matchers in re.findall(r"\b([a-z_]\w*)\s*\{([^}]*)\}", query):
        for label in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)', matchers):
            if base(name) in own and label not in own[base(name)] | ALWAYS_LABELS:
                yield f"{name} has no label {label}"
    for name in names(query):
        if base(name) not in own and name not in own and name not in foreign:
            yield f"no program exports {name}"


def base(name: str) -> str:
    """Returns the name of the histogram that a `_bucket`, `_sum` or `_count` series belongs to."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def names(query: str) -> Set[str]:
    """Returns the metric names in a PromQL query: the words left after strings, labels, functions and keywords are removed."""
    query = re.sub(r'"(\\.|[^"\\])*"|#.*|\$\w+', "", query)
    query = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", query)
    query = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", query)
    found = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)\b(?!\s*\()", query)
    return {name for name in found if name.lower() not in WORDS}
