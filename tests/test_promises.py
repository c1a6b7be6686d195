"""Every promise has a row, every row a result of a test that is there, and the docs say what the results say."""

import ast
import functools
import re

import pytest

from tests import promises

LONG = {"F3", "F15", "F20"}  # only `make promises CHAOS=1` and `make bench-reliability` run them


@functools.cache
def functions(file: str) -> set[str]:
    tree = ast.parse((promises.ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_but_those_named_has_a_test_that_ran_and_is_there():
    results = promises.read()
    assert set(promises.PROMISES) - set(results) <= LONG
    assert set(results) <= set(promises.PROMISES)
    for tests in results.values():
        for name in tests:
            file, _, function = name.partition("::")
            assert function in functions(file), name


def test_every_mark_in_the_tests_names_a_promise():
    for file in (promises.ROOT / "tests").rglob("test_*.py"):
        for names in re.findall(r"mark\.promise\(([^)]*)\)", file.read_text(encoding="utf-8")):
            found = re.findall(r"\"(\w+)\"", names)
            assert found and set(found) <= set(promises.PROMISES), file


def test_the_docs_hold_the_table_of_the_results():
    assert promises.table(promises.read()) in promises.PAGE.read_text(encoding="utf-8")


def test_there_are_sixty_four_bad_inputs():
    assert len(promises.ROWS) == 64


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("test_x[D4-null]", {"D4"}),
        ("test_x[R1-0]", {"R1"}),
        ("test_d15_a_file", {"D15"}),
        ("test_x[a-D4]", set()),
        ("test_dozens[1]", set()),
        ("test_x[D4x]", set()),
    ],
)
def test_a_row_is_known_by_how_a_name_begins(name: str, rows: set[str]):
    assert promises.named_in(name) == rows


def test_a_failure_shows_and_new_results_replace_the_old_ones_of_the_same_test():
    good = {"passed": 3, "failed": 0, "skipped": 0, "figures": ["30/30 kills"]}
    bad = good | {"passed": 2, "failed": 1, "figures": []}
    old: promises.Results = {"R1": {"tests/a.py::test_a": bad, "tests/b.py::test_b": good}}
    assert promises.figure(old["R1"]) == "**FAILED** 5/6; 30/30 kills" and promises.figure({}) == "not run"
    assert "0 of 64 rows hold" in promises.table(old)
    new = promises.merged(old, {"R1": {"tests/a.py::test_a": good}})
    assert promises.figure(new["R1"]).startswith("6/6") and "1 of 64 rows hold" in promises.table(new)
