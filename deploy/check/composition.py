"""Rules for compose.yaml and for the configuration of its NATS server."""

import re

import yaml

from . import setup, sources

# Images that are not built here must be given by a variable whose default is an exact version, with or without a
# digest.
IMAGE = re.compile(r"\$\{VMWATCH_[A-Z_]+_IMAGE:-[a-z0-9./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*(@sha256:[0-9a-f]{64})?\}")
# This service only changes the owner of files and then exits.
PREPARES = "nats-volume"
# The capabilities that services need; docs/security.md explains that of the agent.
CAPABILITIES = {PREPARES: ["CHOWN"], "agent": ["NET_ADMIN"]}
# The options with which mongod accepts only TLS connections.
MONGO_TLS = ["--tlsMode requireTLS", "--tlsCertificateKeyFile /run/secrets/mongo-tls", "--tlsCAFile /run/secrets/ca"]


def compose():
    """Checks that services have existing settings, matching users and passwords, no privileges, TLS and bounded logs."""
    document = yaml.safe_load((sources.ROOT / "compose.yaml").read_text())
    declared = document["secrets"]
    for service, spec in document["services"].items():
        for secret in spec.get("secrets", []):
            if secret not in declared:
                yield f"{service} uses the secret {secret}, which is not declared"
            if secret.startswith("callout-") and service != "auth-svc":
                yield f"{service} has a key of the auth callout, which only auth-svc may have"
            if secret == "alert-key" and service != "alert-svc":
                yield f"{service} has the key of the secrets of channels, which only alert-svc may have"
        yield from hardened(service, spec)
        name = program(spec)
        if name not in sources.CRATES:
            continue
        variables = spec["environment"]
        for variable in set(variables) - sources.settings(name) - set(document["x-settings"]):
            yield f"{name} does not have the setting {variable}"
        for variable, value in variables.items():
            if variable.endswith("_FILE") and value.removeprefix("/run/secrets/") not in spec["secrets"]:
                yield f"{service}: {variable} refers to a file that is not mounted"
        if name == "agent":
            yield from enrols(service, variables)
            continue
        user, secret = variables["VMWATCH_NATS_USER"], variables["VMWATCH_NATS_PASSWORD_FILE"].rpartition("/")[2]
        if not declared[secret]["file"].endswith(f"/{user}"):
            yield f"{service} logs in as {user} but has another user's password"
        yield from encrypted(service, variables)
    yield from servers(document["services"])
    yield from separated(document["services"], document["networks"])
    yield from setup.order(document["services"])


def program(spec: dict) -> str:
    return spec["image"].partition(":")[0].removeprefix("vmwatch/")


def hardened(service: str, spec: dict):
    """Checks that the service has no other capabilities than CAPABILITIES, no writable file system and a bounded log."""
    if not spec.get("read_only"):
        yield f"{service} can write to its root file system"
    allowed = CAPABILITIES.get(service, [])
    if spec.get("cap_drop") != ["ALL"] or spec.get("cap_add", []) != allowed:
        yield f"{service} keeps capabilities"
    if spec.get("security_opt") != ["no-new-privileges:true"]:
        yield f"{service} may gain privileges (no-new-privileges is missing)"
    # This log driver rotates its files, which bounds the size of the log.
    if spec.get("logging", {}).get("driver") != "local" and service != PREPARES:
        yield f"{service}: the size of its log is not bounded"
    if program(spec) in sources.CRATES:
        # The images built from deploy/Dockerfile already have an unprivileged user.
        return
    if spec.get("user", "0").startswith("0") and service != PREPARES:
        yield f"{service} may run as root"
    if not IMAGE.fullmatch(spec["image"]):
        yield f"{service}: {spec['image']} is not a variable with an exact version as its default"


def enrols(service: str, variables: dict):
    """Checks that an agent enrols with a join token. It would not if it had a login to NATS."""
    for variable in ("VMWATCH_GATEWAY_URL", "VMWATCH_JOIN_TOKEN_FILE", "VMWATCH_AGENT_IDENTITY_DIR"):
        if variable not in variables:
            yield f"{service} lacks the setting {variable}"
    for variable in variables:
        if variable.startswith("VMWATCH_NATS_"):
            yield f"{service} has the setting {variable}, so it does not enrol"


def encrypted(service: str, variables: dict):
    if not variables["VMWATCH_NATS_URL"].startswith("tls://") or "VMWATCH_NATS_CA_FILE" not in variables:
        yield f"{service} connects to NATS without TLS"
    if "VMWATCH_MONGODB_URI_FILE" in variables and "VMWATCH_MONGODB_CA_FILE" not in variables:
        yield f"{service} connects to MongoDB without TLS"


def separated(services: dict, networks: dict):
    """Checks that alert-svc, which connects to receivers that administrators choose, shares no network with other programs of
    vmwatch, and only internal ones with servers."""
    own = set(services["alert-svc"]["networks"])
    for service, spec in services.items():
        shared = own & set(spec.get("networks", []))
        if service == "alert-svc" or not shared:
            continue
        if program(spec) in sources.CRATES:
            yield f"alert-svc shares the network {sorted(shared)} with {service}"
        for network in shared:
            if not (networks[network] or {}).get("internal"):
                yield f"{service} is in the network {network}, through which alert-svc reaches receivers"


def servers(services: dict):
    """Checks that NATS and MongoDB accept only TLS and that the monitoring port listens on loopback."""
    command = " ".join(services["mongo"]["command"])
    for part in MONGO_TLS:
        if part not in command:
            yield f"the service mongo is not started with the option {part}"
    folder = sources.ROOT / "deploy" / "nats"
    config = (folder / "nats.conf").read_text()
    if "include tls.conf" not in config or not re.search(r"^tls \{", (folder / "tls.conf").read_text(), re.M):
        yield "the service nats accepts connections without TLS"
    websocket = (folder / "websocket.conf").read_text()
    if "include websocket.conf" not in config or not re.search(r"^  tls \{", websocket, re.M) or "no_tls" in websocket:
        yield "the service nats does not serve WebSocket with TLS"
    published = {str(port).rpartition(":")[2] for port in services["nats"]["ports"]}
    listening = set(re.findall(r'^\s*listen: "[^"]*:(\d+)"', f"{config}\n{websocket}", re.M))
    if published != listening:
        yield f"the service nats listens for clients on {sorted(listening)}, but publishes {sorted(published)}"
    limited = set(re.search(r"^define bus = \{ (.+) \}$", (folder / "guests.nft").read_text(), re.M)[1].split(", "))
    if limited != listening:
        yield f"guests.nft limits connections to {sorted(limited)}, but NATS listens for agents on {sorted(listening)}"
    listeners = re.findall(r'^(http|https|monitor_port|http_port|https_port)\s*:\s*(\S+)', config, re.M)
    if listeners != [("http", '"127.0.0.1:8222"')]:
        yield f"the monitoring port of the service nats listens on {listeners} instead of loopback"
    for service, spec in services.items():
        if any(str(port).endswith((":8222", ":27017")) for port in spec.get("ports", [])):
            yield f"{service} publishes a port that must stay internal: {spec['ports']}"
