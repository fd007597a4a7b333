"""The instance id of this machine, and the VMs of libvirt's test driver."""

import os
import uuid
from pathlib import Path
from typing import List, Tuple

from . import layout

DMI = Path("/sys/class/dmi/id/product_uuid")

# Values of libvirt's enumeration virDomainState.
RUNNING, PAUSED, SHUT_OFF = 1, 3, 5

# The VM in the examples of the documented API (docs/api). It is switched off, so the example request starts it.
TO_START = "6abf5a1e-b85c-4e5f-ba02-f96e22cbd02e"
OTHERS = [
    ("web", TO_START, SHUT_OFF),
    ("db", "0d5e7c2e-4a0b-4f0e-9a53-5d2f8c1b7e11", RUNNING),
    ("batch", "b41d2a8c-93f6-4c57-8e0a-6f7d1c9e2b22", PAUSED),
]


def as_uuid(text: str) -> str:
    """Returns the UUID in the format that libvirt uses, or "" if the text is not a UUID."""
    try:
        return str(uuid.UUID(text.strip()))
    except ValueError:
        return ""


def instance_id() -> str:
    """Returns VMWATCH_INSTANCE_ID, or the UUID from the firmware, or a random id that is stored for this checkout.

    The random id is needed in containers, which have no product_uuid, and without root, which is needed to read it.
    """
    configured = os.environ.get("VMWATCH_INSTANCE_ID", "").strip()
    if configured:
        return configured
    try:
        found = as_uuid(DMI.read_text())
    except OSError:
        found = ""
    if found and uuid.UUID(found).int:
        return found
    made = layout.DOT / "instance-id"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        made.write_text(f"{uuid.uuid4()}\n")
    return made.read_text().strip()


def node_xml(machines: List[Tuple[str, str, int]]) -> str:
    """Returns a definition of VMs for libvirt's test driver. Each connection to the driver has its own copy of these VMs."""
    domains = "".join(
        f"""  <domain type="test" xmlns:test="http://libvirt.org/schemas/domain/test/1.0">
    <name>{name}</name>
    <uuid>{identity}</uuid>
    <memory unit="MiB">512</memory>
    <os><type>hvm</type></os>
    <test:runstate>{state}</test:runstate>
  </domain>
"""
        for name, identity, state in machines
    )
    return f"<node>\n{domains}</node>\n"


def write_node_file(instance: str) -> Path:
    """Writes the definitions of the stack's VMs: this machine as a running VM if its id is a UUID, and VMs in other states."""
    identity = as_uuid(instance)
    this = [("this-machine", identity, RUNNING)] if identity else []
    others = [machine for machine in OTHERS if machine[1] != identity]
    path = layout.DOT / "machines.xml"
    path.write_text(node_xml(this + others))
    return path
