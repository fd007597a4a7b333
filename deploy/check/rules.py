"""Rules for Kubernetes overlays. Each rule is a function that yields the violations in an overlay."""

import kubernetes_validate

from . import sources
from .overlay import Overlay, container, environment, foreign, manifest, matches, pod, ports, program

KUBERNETES = "1.34"
# Kinds of custom resources; Kubernetes' own schemas do not include them.
CUSTOM = {"ScaledObject", "MongoDBCommunity"}
PART_OF = {"app.kubernetes.io/part-of": "vmwatch"}
# Secrets that deploy/secrets does not create, namely the certificate of the ingress.
FOREIGN_SECRETS = {"vmwatch-tls"}
FLUSH_SECONDS = 5


def schemas(overlay: Overlay):
    for item in overlay.objects:
        if item["kind"] in CUSTOM:
            continue
        try:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{item['kind']} {item['metadata']['name']}: {error.message}"


def selectors(overlay: Overlay):
    for deployment in overlay.all("Deployment"):
        name, labels = deployment["metadata"]["name"], pod(deployment)["metadata"]["labels"]
        if not matches(deployment["spec"]["selector"], labels):
            yield f"Deployment {name}: its selector does not match its own pods"
        if not matches({"matchLabels": PART_OF}, labels):
            yield f"Deployment {name}: its pods lack the label app.kubernetes.io/part-of=vmwatch"
        for spread in pod(deployment)["spec"]["topologySpreadConstraints"]:
            if not matches(spread["labelSelector"], labels):
                yield f"Deployment {name}: its topology spread constraint selects other pods"
    for item in overlay.all("PodDisruptionBudget"):
        if len(overlay.selected(item["spec"]["selector"])) != 1:
            yield f"PodDisruptionBudget {item['metadata']['name']} must select exactly one Deployment"
    for item in overlay.all("NetworkPolicy"):
        if not overlay.selected(item["spec"]["podSelector"]) and not foreign(item["spec"]["podSelector"]):
            yield f"NetworkPolicy {item['metadata']['name']} selects no pod"


def port_names(overlay: Overlay):
    for service in overlay.all("Service"):
        chosen = overlay.selected({"matchLabels": service["spec"]["selector"]})
        if len(chosen) != 1:
            yield f"Service {service['metadata']['name']} must select exactly one Deployment"
        for port in service["spec"]["ports"]:
            if any(port["targetPort"] not in ports(deployment) for deployment in chosen):
                yield f"Service {service['metadata']['name']}: its pods have no port {port['targetPort']}"
    for policy in overlay.all("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            named = [port["port"] for port in rule.get("ports", []) if isinstance(port["port"], str)]
            for deployment in overlay.selected(policy["spec"]["podSelector"]):
                for name in named:
                    if name not in ports(deployment):
                        yield f"NetworkPolicy {policy['metadata']['name']}: {deployment['metadata']['name']} has no port {name}"
    for ingress in overlay.all("Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                offered = {
                    port["name"]
                    for item in overlay.all("Service")
                    if item["metadata"]["name"] == service["name"]
                    for port in item["spec"]["ports"]
                }
                if service["port"]["name"] not in offered:
                    yield f"Ingress {ingress['metadata']['name']}: there is no Service {service['name']} with the port that it refers to"


def ports_of_programs(overlay: Overlay):
    for deployment in overlay.all("Deployment"):
        name = program(deployment)
        found = ports(deployment)
        if found["health"] != sources.health_port(name):
            yield f"{name}: its health port is {found['health']}, but the program listens on {sources.health_port(name)}"
        if set(found.values()) != sources.image_ports(name):
            yield f"{name}: it declares the ports {sorted(found.values())}, but its image exposes {sorted(sources.image_ports(name))}"
        annotations = pod(deployment)["metadata"]["annotations"]
        if annotations["prometheus.io/port"] != str(found["health"]):
            yield f"{name}: the annotations for Prometheus do not name the port of the health listener"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container(deployment)[probe]["httpGet"]
            wanted = "/readyz" if probe == "readinessProbe" else "/healthz"
            if asked["port"] not in found or asked["path"] != wanted:
                yield f"{name}: its {probe} requests {asked}, not {wanted} on a port of the container"


def settings(overlay: Overlay):
    for deployment in overlay.all("Deployment"):
        known = sources.settings(program(deployment)) | set().union(*map(sources.settings, sources.CRATES))
        own = sources.settings(program(deployment))
        shared_map = {name for item in overlay.all("ConfigMap") for name in item["data"]}
        for name, _ in environment(overlay, deployment):
            if name not in (known if name in shared_map else own):
                yield f"{program(deployment)} does not have the setting {name}"


def references(overlay: Overlay):
    made = sources.secrets()
    mongodb = manifest("mongodb.yaml")
    connections = {user["connectionStringSecretName"] for user in mongodb["spec"]["users"]}
    maps = {item["metadata"]["name"]: item["data"] for item in overlay.all("ConfigMap")}
    for deployment in overlay.all("Deployment"):
        name = program(deployment)
        for source in container(deployment).get("envFrom", []):
            if source["configMapRef"]["name"] not in maps:
                yield f"{name}: there is no ConfigMap {source['configMapRef']['name']}"
        for variable in container(deployment)["env"]:
            asked = variable.get("valueFrom", {}).get("configMapKeyRef")
            if asked and asked["key"] not in maps.get(asked["name"], {}):
                yield f"{name}: there is no ConfigMap {asked['name']} with {asked['key']}"
        volumes = {volume["name"]: volume["secret"] for volume in pod(deployment)["spec"]["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container(deployment)["volumeMounts"]}
        if set(volumes) != set(mounts):
            yield f"{name}: its volumes {sorted(volumes)} differ from its mounts {sorted(mounts)}"
        if name != "auth" and "vmwatch-callout" in {secret["secretName"] for secret in volumes.values()}:
            yield f"{name} has the keys of the auth callout, which only auth-svc may have"
        if name != "alert" and "vmwatch-alert-key" in {secret["secretName"] for secret in volumes.values()}:
            yield f"{name} has the key of the secrets of channels, which only alert-svc may have"
        files = set()
        for volume, secret in volumes.items():
            known = secret["secretName"] in made or secret["secretName"] in connections
            if not known and not secret.get("optional"):
                yield f"{name}: deploy/secrets does not create the Secret {secret['secretName']}"
            keys = {item["path"] for item in secret["items"]} if "items" in secret else made.get(secret["secretName"], set())
            files |= {f"{mounts[volume]}/{key}" for key in keys}
        for variable, value in environment(overlay, deployment):
            if variable.endswith("_FILE") and value not in files:
                yield f"{name}: {variable} refers to {value}, which is not mounted"
        user = dict(environment(overlay, deployment))["VMWATCH_NATS_USER"]
        if volumes["bus"]["secretName"] != f"{user}-nats":
            yield f"{name}: it logs in as {user} but has another user's password"
    for ingress in overlay.all("Ingress"):
        for secret in {tls["secretName"] for tls in ingress["spec"]["tls"]} - FOREIGN_SECRETS:
            yield f"Ingress {ingress['metadata']['name']}: deploy/secrets does not create the Secret {secret}"
    for user in mongodb["spec"]["users"]:
        if user["passwordSecretRef"]["name"] not in made:
            yield f"mongodb.yaml: deploy/secrets does not create the Secret {user['passwordSecretRef']['name']}"


def hardening(overlay: Overlay):
    for deployment in overlay.all("Deployment") + overlay.all("Job"):
        spec, own = pod(deployment)["spec"], container(deployment)
        security = own["securityContext"]
        for passed, what in [
            (spec["securityContext"]["runAsNonRoot"], "may run as root"),
            (spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "has no seccomp profile"),
            (spec["automountServiceAccountToken"] is False, "gets a service account token"),
            (security["readOnlyRootFilesystem"], "can write to its file system"),
            (security["allowPrivilegeEscalation"] is False, "may gain privileges"),
            (security["capabilities"] == {"drop": ["ALL"]}, "keeps capabilities"),
            (set(own["resources"]["requests"]) == {"cpu", "memory"}, "has no resource requests"),
            ("memory" in own["resources"]["limits"], "has no memory limit"),
        ]:
            if not passed:
                yield f"{program(deployment)} {what}"


def rolling_updates(overlay: Overlay):
    """Checks that a replica stops only after its replacement is ready, and is not killed while it drains."""
    for deployment in overlay.all("Deployment"):
        name = program(deployment)
        if deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] != 0:
            yield f"{name}: a rolling update stops a replica before the new one is ready"
        hook = container(deployment).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = hook + overlay.drain_seconds(deployment) + FLUSH_SECONDS
        if pod(deployment)["spec"]["terminationGracePeriodSeconds"] < needed:
            yield f"{name}: it is killed after less than {needed} s, while it may still be draining"
        if name == "gateway" and not hook:
            yield "gateway: a stopping replica closes its port before the cluster has removed it from the Service's endpoints"


def autoscaling(overlay: Overlay):
    targets = [item["spec"]["scaleTargetRef"]["name"] for item in overlay.all("HorizontalPodAutoscaler") + overlay.all("ScaledObject")]
    for target in targets:
        if targets.count(target) > 1:
            yield f"{target} has two autoscalers, which conflict"
        if target not in overlay.names("Deployment"):
            yield f"an autoscaler scales {target}, which does not exist"
    for deployment in overlay.all("Deployment"):
        name = deployment["metadata"]["name"]
        if ("replicas" in deployment["spec"]) == (name in targets):
            yield f"{name} must have either a number of replicas or an autoscaler"


def keda(overlay: Overlay):
    """Checks that the ScaledObject has the limits and triggers of the HorizontalPodAutoscaler that it replaces."""
    replaced = {item["metadata"]["name"]: item["spec"] for item in Overlay("production").all("HorizontalPodAutoscaler")}
    for item in overlay.all("ScaledObject"):
        before, spec = replaced[item["spec"]["scaleTargetRef"]["name"]], item["spec"]
        if (spec["minReplicaCount"], spec["maxReplicaCount"]) != (before["minReplicas"], before["maxReplicas"]):
            yield "the limits of the ScaledObject differ from those of the autoscaler that it replaces"
        triggers = {trigger["type"]: trigger["metadata"] for trigger in spec["triggers"]}
        cpu = before["metrics"][0]["resource"]["target"]["averageUtilization"]
        if triggers["cpu"]["value"] != str(cpu):
            yield f"the ScaledObject lacks the CPU trigger of {cpu} %"
        query = triggers["prometheus"]["query"]
        for label, value in [
            ("stream_name", sources.constant("shared", "SAMPLE_STREAM")),
            ("consumer_name", sources.constant("metrics-svc", "CONSUMER")),
        ]:
            if f'{label}="{value}"' not in query:
                yield f"the ScaledObject does not observe the {label} {value}"
