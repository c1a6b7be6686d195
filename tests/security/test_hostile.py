"""Hostile fixtures: no code runs, nothing connects, each is refused with exit code 4; and its honest neighbour is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.errors import EXIT_REFUSED
from tests.conftest import ROOT
from tests.security.hostile import ADAPTERS, CANARY, MODELS, RECIPES, TEMPLATES, Maker, cases

NAMES = [*MODELS, *ADAPTERS, *TEMPLATES, *RECIPES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def found(folder: Path, tiny_model: Path, tiny_data: dict[str, str]) -> dict[str, Any]:
    """What became of each fixture, all in one process that is watched and may reach the network if it tries."""
    made = cases(Maker(folder, tiny_model, tiny_data))
    (folder / "cases.json").write_text(json.dumps(made))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-m", "tests.security.child", "cases.json", "result.json"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_there_are_enough_of_them():
    assert len(NAMES) == len(set(NAMES)) >= 25


@pytest.mark.promise("F18")
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(found: dict[str, Any], folder: Path, name: str):
    assert found[name]["events"] == []
    assert found[name]["code"] == EXIT_REFUSED, found[name]["message"]
    assert len(found[name]["message"]) < 2_000
    assert not list(folder.rglob(CANARY))
