"""Rules for the `setup` commands, which create and change JetStream streams and KV buckets."""

from . import sources
from .overlay import Overlay, container, environment, matches, pod
from .rules import PART_OF


def jobs(overlay: Overlay):
    """Checks that each program that owns streams has a Job for `setup` with the image and settings of its Deployment."""
    found = {item["metadata"]["name"]: item for item in overlay.all("Job")}
    made = sources.secrets()
    for owner in sources.owners():
        job, deployment = found.pop(f"vmwatch-{owner}-setup", None), overlay.deployment(f"vmwatch-{owner}")
        if not job:
            yield f"{owner}: no Job runs its `setup` command"
            continue
        own, settings = container(job), dict(environment(overlay, job))
        if own["image"] != container(deployment)["image"] or own["args"] != ["setup"]:
            yield f"{owner}: its setup Job must run `setup` with the Deployment's image, but runs {own['image']} {own['args']}"
        if own["envFrom"] != container(deployment)["envFrom"]:
            yield f"{owner}: the settings of its setup Job differ from those of its Deployment"
        secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod(job)["spec"]["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in own["volumeMounts"]}
        files = {f"{mounts.get(name)}/{key}" for name, secret in secrets.items() for key in made.get(secret, set())}
        for variable, value in settings.items():
            if variable.endswith("_FILE") and value not in files:
                yield f"{owner}: {variable} of its setup Job refers to {value}, which is not mounted"
        if secrets["bus"] != f"{settings['VMWATCH_NATS_USER']}-nats":
            yield f"{owner}: its setup Job logs in as {settings['VMWATCH_NATS_USER']} but has another user's password"
        if not matches({"matchLabels": PART_OF}, pod(job)["metadata"]["labels"]):
            yield f"{owner}: the pods of its setup Job lack the label app.kubernetes.io/part-of=vmwatch"
    for name in found:
        yield f"Job {name} does not belong to a program that owns streams"


def order(services: dict):
    """Checks that a service in compose.yaml starts only after the setup of its streams has succeeded."""
    for owner in sources.owners():
        service, setup = f"{owner}-svc", f"{owner}-setup"
        waits = services[service].get("depends_on", {}).get(setup, {}).get("condition")
        if waits != "service_completed_successfully":
            yield f"{service} does not wait until {setup} has succeeded"
