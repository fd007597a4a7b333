"""Runs all rules and prints each violation. deploy/check/run starts it in the Python environment with the validator."""

import sys

from . import composition, observability, rules, servers, setup
from .overlay import Overlay

OVERLAYS = ["dev", "production", "production-keda"]
RULES = [
    rules.schemas, rules.selectors, rules.port_names, rules.ports_of_programs, rules.settings, rules.references,
    rules.hardening, rules.rolling_updates, rules.autoscaling, rules.keda, servers.servers, servers.proxies,
    setup.jobs,
]


def main() -> int:
    ready = "--ready" in sys.argv
    overlays = {name: Overlay(name) for name in OVERLAYS}
    checks = [(f"{name}: {rule.__name__}", rule, [overlay]) for name, overlay in overlays.items() for rule in RULES]
    checks += [
        ("compose.yaml", composition.compose, []),
        ("NATS", servers.bus, []),
        ("dashboards", observability.dashboards, []),
        ("alerts", observability.alerts, []),
        ("tests of the alerts", observability.firing, []),
        ("documented metrics", observability.documented, []),
    ]
    if ready:
        checks.append(("production: placeholders that the operator must replace", servers.decided, [overlays["production"]]))
    passed, failed = 0, 0
    for title, rule, arguments in checks:
        wrong = list(rule(*arguments))
        passed, failed = (passed, failed + 1) if wrong else (passed + 1, failed)
        for text in wrong:
            print(f"{title}: {text}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
