"""The rules of dashboards and alerts."""

import re

from . import sources


def observability():
    """Panels and alerts ask for metrics that the programs have."""
    folder = sources.ROOT / "deploy" / "observability"
    known = sources.metrics()
    for path in [*sorted((folder / "grafana" / "dashboards").glob("*.json")), folder / "alerts.yaml"]:
        for name in set(re.findall(r"\bvmwatch_[a-z0-9_]+", path.read_text())):
            if name not in known and re.sub(r"_(bucket|sum|count)$", "", name) not in known:
                yield f"{path.name}: no program has the metric {name}"
