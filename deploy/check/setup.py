"""Rules for the `setup` commands, which create and change the streams and buckets of their programs."""

from . import sources
from .overlay import Overlay, container, environment, matches, pod
from .rules import PART_OF


def jobs(overlay: Overlay):
    """Each owner of streams has a Job with the image and the settings of its Deployment."""
    found = {item["metadata"]["name"]: item for item in overlay.all("Job")}
    made = sources.secrets()
    for owner in sources.owners():
        job, deployment = found.pop(f"vmwatch-{owner}-setup", None), overlay.deployment(f"vmwatch-{owner}")
        if not job:
            yield f"{owner}: no Job runs its `setup`"
            continue
        own, settings = container(job), dict(environment(overlay, job))
        if own["image"] != container(deployment)["image"] or own["args"] != ["setup"]:
            yield f"{owner}: its setup Job runs {own['image']} {own['args']}"
        if own["envFrom"] != container(deployment)["envFrom"]:
            yield f"{owner}: the settings of its setup Job differ from those of its Deployment"
        secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod(job)["spec"]["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in own["volumeMounts"]}
        files = {f"{mounts.get(name)}/{key}" for name, secret in secrets.items() for key in made.get(secret, set())}
        for variable, value in settings.items():
            if variable.endswith("_FILE") and value not in files:
                yield f"{owner}: its setup Job has no file {value}, which {variable} names"
        if secrets["bus"] != f"{settings['VMWATCH_NATS_USER']}-nats":
            yield f"{owner}: its setup Job has the password of another user than {settings['VMWATCH_NATS_USER']}"
        if not matches({"matchLabels": PART_OF}, pod(job)["metadata"]["labels"]):
            yield f"{owner}: the pods of its setup Job are not part of vmwatch"
    for name in found:
        yield f"Job {name} is not the setup of a program that owns streams"


def order(services: dict):
    """In compose.yaml a service starts after the setup of its streams has succeeded."""
    for owner in sources.owners():
        service, setup = f"{owner}-svc", f"{owner}-setup"
        waits = services[service].get("depends_on", {}).get(setup, {}).get("condition")
        if waits != "service_completed_successfully":
            yield f"{service} does not wait for {setup}"
