"""`pytest -p tests.promises.record`: runs the tests that hold a promise, and writes down how they ended (`make promises`)."""

import json
from typing import Any

import pytest

from tests import promises

_found: promises.Results = {}


def _held_by(item: pytest.Item) -> set[str]:
    if item.path.name == "test_promises.py":  # it is about numbers of rows, and holds none
        return set()
    marked = {str(name) for mark in item.iter_markers("promise") for name in mark.args}
    return marked | promises.named_in(item.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not _held_by(item)]
    items[:] = [item for item in items if _held_by(item)]
    config.hook.pytest_deselected(items=others)
    for item in items:  # goes with the report, from whatever process ran it
        item.user_properties.append(("promises", sorted(_held_by(item))))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    told = [value for name, value in report.user_properties if name == "promises"]
    figures = [str(value) for name, value in report.user_properties if name == "figure"]
    for promise in told[0] if told else []:
        fresh: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "figures": []}
        test = _found.setdefault(promise, {}).setdefault(report.nodeid.partition("[")[0], fresh)
        test[report.outcome] += 1
        test["figures"] += [said for said in figures if said not in test["figures"]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a process of pytest-xdist; the one that started it writes
        return
    results = promises.merged(promises.read(), _found)
    promises.RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    promises.publish(results)
