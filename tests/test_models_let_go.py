"""A model is gone before the next one is loaded: two do not fit where one does."""

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_recipes import generate as module
from lora_recipes.generate import generate
from lora_recipes.merge import merge
from lora_recipes.model.machine import release_memory
from lora_recipes.recipe import load_recipe
from lora_recipes.train import launch
from tests.conftest import NF4


def test_no_model_is_left_when_the_next_is_loaded_or_served(
    write_recipe: Callable[..., Path], quick_proof: None, monkeypatch: pytest.MonkeyPatch
):
    path = write_recipe(quantization=NF4, training={"max_steps": 1})
    assert launch(str(path), []) == 0
    recipe = load_recipe(path)
    merge(recipe)
    loaded: weakref.WeakSet[Any] = weakref.WeakSet()
    left: list[int] = []

    def loading(real: Callable[..., Any]) -> Callable[..., Any]:
        def load(*more: Any, **named: Any) -> Any:
            left.append(len(loaded))
            model = real(*more, **named)
            loaded.update(model.modules())  # a model may be gone, and its layers be held by their own weights
            return model

        return load

    def served_answers(folder: Path, conversations: list[Any], limit: int) -> list[str]:
        left.append(len(loaded))
        return ["no"] * len(conversations)

    for name in ("load_base", "load_merged"):
        monkeypatch.setattr(module, name, loading(getattr(module, name)))
    monkeypatch.setitem(sys.modules, "lora_recipes.model.served", SimpleNamespace(served_answers=served_answers))
    gc.collect()
    gc.disable()  # it comes when it likes
    try:
        generate(recipe, served=True)
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def test_what_was_freed_on_a_gpu_is_given_back(monkeypatch: pytest.MonkeyPatch):
    given: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(True))
    release_memory()
    assert given
