"""Rules for NATS, MongoDB and the ingress in front of the gateway."""

import ipaddress
import json
import re

from . import sources
from .overlay import FOREIGN_PODS, Overlay, environment, manifest, matches, program

# Placeholders in overlays/production for the operator's own names and addresses.
EXAMPLES = re.compile(r"\bexample\.com\b|\b192\.0\.2\.\d+|=yours\b")


def servers(overlay: Overlay):
    """Checks that NATS and MongoDB accept only TLS, open only the ports that clients need, and do not run as root."""
    policies = overlay.all("NetworkPolicy")
    for name, (labels, known) in FOREIGN_PODS.items():
        own = [item["spec"] for item in policies if matches(item["spec"]["podSelector"], labels)]
        if not any("Ingress" in policy["policyTypes"] for policy in own):
            yield f"no NetworkPolicy restricts access to {name}"
        for rule in [rule for policy in own for rule in policy.get("ingress", [])]:
            opened = {port["port"] for port in rule.get("ports", [])}
            if not rule.get("from") or not opened or opened - known:
                yield f"{name}: a NetworkPolicy opens {sorted(opened) or 'every port'} to {rule.get('from') or 'every pod'}"
    values, mongodb = manifest("nats-values.yaml"), manifest("mongodb.yaml")
    config = values["config"]
    if not (config["nats"]["tls"]["enabled"] and config["cluster"]["tls"]["enabled"] and values["tlsCA"]["enabled"]):
        yield "nats-values.yaml: NATS accepts connections without TLS"
    websocket = config["websocket"]
    if not (websocket["enabled"] and websocket["tls"]["enabled"]):
        yield "nats-values.yaml: NATS does not serve WebSocket with TLS"
    if config["merge"].get("http") != "127.0.0.1:8222" or {"op": "remove", "path": "/http_port"} not in config["patch"]:
        yield "nats-values.yaml: the monitoring port listens on the pod network"
    if not values["podTemplate"]["merge"]["spec"]["securityContext"]["runAsNonRoot"]:
        yield "nats-values.yaml: NATS may run as root"
    if not mongodb["spec"]["security"]["tls"]["enabled"] or mongodb["spec"]["security"]["tls"].get("optional"):
        yield "mongodb.yaml: MongoDB accepts connections without TLS"
    made = sources.secrets()
    used = {config[part]["tls"]["secretName"] for part in ("nats", "websocket", "cluster")} | {values["tlsCA"]["secretName"]}
    used |= {mongodb["spec"]["security"]["tls"][part]["name"] for part in ("certificateKeySecretRef", "caCertificateSecretRef")}
    for secret in used - set(made):
        yield f"deploy/secrets does not create the Secret {secret}"
    for deployment in overlay.all("Deployment"):
        settings = dict(environment(overlay, deployment))
        if not settings["VMWATCH_NATS_URL"].startswith("tls://") or "VMWATCH_NATS_CA_FILE" not in settings:
            yield f"{program(deployment)} connects to NATS without TLS"
        if "VMWATCH_MONGODB_URI_FILE" in settings and "VMWATCH_MONGODB_CA_FILE" not in settings:
            yield f"{program(deployment)} connects to MongoDB without TLS"


def bus():
    """Checks that the NATS servers of compose.yaml and of Kubernetes have the same limits and files."""
    document = (sources.ROOT / "deploy" / "nats" / "nats.conf").read_text()
    values = manifest("nats-values.yaml")
    merged = {**values["config"]["merge"], **values["config"]["jetstream"]["merge"]}
    for name in ("ping_interval", "ping_max", "max_connections", "max_pending", "max_buffered_msgs", "max_buffered_size",
                 "sync_interval"):
        here = re.search(rf"^\s*{name}: (\S+)$", document, re.M)[1].strip('"')
        if here != str(merged[name]).strip("<> "):
            yield f"nats-values.yaml: {name} is {merged[name]}, but {here} in nats.conf"
    callout = merged["authorization"]["auth_callout"]
    wanted = {"system_account: (.+)": merged["system_account"], "timeout: (.+)": merged["authorization"]["timeout"],
              "account: (.+)": callout["account"]}
    for pattern, value in wanted.items():
        here = re.search(rf"^\s*{pattern}$", document, re.M)[1]
        if here != str(value):
            yield f"nats-values.yaml: {pattern.partition(':')[0]} is {value}, but {here} in nats.conf"
    if not callout["$include"].endswith("/nats-secrets/callout.conf"):
        yield "nats-values.yaml: auth_callout does not include callout.conf"
    websocket = (sources.ROOT / "deploy" / "nats" / "websocket.conf").read_text()
    port = int(re.search(r'^\s*listen: "0\.0\.0\.0:(\d+)"$', websocket, re.M)[1])
    if port != values["config"]["websocket"]["port"]:
        yield f"nats-values.yaml: the WebSocket port is {values['config']['websocket']['port']}, but {port} in websocket.conf"
    mounted = values["podTemplate"]["patch"][0]["value"]["secret"]
    if {item["key"] for item in mounted["items"]} != sources.secrets()[mounted["secretName"]]:
        yield f"nats-values.yaml does not mount all files of the Secret {mounted['secretName']}"


def proxies(overlay: Overlay):
    """Checks that a gateway behind an ingress trusts its proxies, and that only these proxies can reach it."""
    if not overlay.all("Ingress"):
        return
    if "VMWATCH_TRUSTED_PROXIES" not in dict(environment(overlay, overlay.deployment("vmwatch-gateway"))):
        yield "the gateway is behind an ingress but trusts no proxy, so that all clients have the same address"
    for policy in overlay.all("NetworkPolicy"):
        if overlay.deployment("vmwatch-gateway") in overlay.selected(policy["spec"]["podSelector"]):
            for rule in policy["spec"].get("ingress", []):
                if not rule.get("from"):
                    yield "every pod can reach the gateway and forge a client's address"


def decided(overlay: Overlay):
    """Checks that the operator has replaced all placeholders (`deploy/check/run --ready`)."""
    for item in overlay.objects:
        for text in sorted(set(EXAMPLES.findall(json.dumps(item).replace('": "', "=")))):
            yield f"{item['kind']} {item['metadata']['name']} still contains the placeholder {text}"
    trusted = dict(environment(overlay, overlay.deployment("vmwatch-gateway"))).get("VMWATCH_TRUSTED_PROXIES", "")
    try:
        networks = [ipaddress.ip_network(part.strip()) for part in trusted.split(",")]
    except ValueError:
        yield f"VMWATCH_TRUSTED_PROXIES: {trusted or 'nothing'} is not a list of addresses or networks"
    else:
        if any(network.prefixlen == 0 for network in networks):
            yield "VMWATCH_TRUSTED_PROXIES trusts every address, so that every client can forge its address"
