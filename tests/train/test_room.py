"""A disk that is too small is said before any weight is loaded."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_recipes.plan.cost import checkpoints_kept
from lora_recipes.run_dir import RunDir
from lora_recipes.train import launch, session

Usage = namedtuple("Usage", "total used free")


@pytest.mark.promise("F6")
@pytest.mark.parametrize(
    ("training", "steps", "kept"),
    [
        ({"save_strategy": "no"}, 100, 0),
        ({"save_steps": 10}, 100, 10),
        ({"save_steps": 10, "save_total_limit": 3}, 100, 3),
        ({"save_steps": 10, "save_total_limit": 1}, 100, 2),
        ({"save_steps": 0.25}, 100, 4),
        ({"save_strategy": "epoch", "num_train_epochs": 3}, 100, 3),
        ({}, None, 1),
    ],
)
def test_checkpoints_are_counted_as_they_are_kept(training: dict, steps: int | None, kept: int):
    assert checkpoints_kept(training, steps) == kept


@pytest.mark.promise("F6")
def test_a_full_disk_is_refused_before_weights_are_loaded(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    path = write_recipe(training={"save_strategy": "steps", "save_steps": 1})
    with monkeypatch.context() as full:
        full.setattr(session, "load_base", never)
        full.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9 - 2**20, 2**20))
        full.setattr("lora_recipes.data.prepare.DISK_FACTOR", 0)
        assert launch(str(path), []) == 3
    said = capsys.readouterr().err
    assert "4 checkpoints of" in said and "are free" in said and "save_total_limit" in said
    assert not RunDir.of("tiny").checkpoints.exists()
    assert launch(str(path), []) == 0
