"""A merge asks for the memory that its proof will take: of the GPU that the model is loaded on."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_recipes.errors import MachineError
from lora_recipes.merge import _require_memory
from lora_recipes.recipe import load_recipe

GIB = 2**30


@pytest.mark.parametrize(
    ("needed", "device_map", "fits"),
    [(7, None, True), (10, None, False), (10, "auto", True), (20, "auto", False)],
)
def test_several_gpus_count_as_one_unless_the_model_is_spread_over_them(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    needed: int,
    device_map: str | None,
    fits: bool,
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (8 * GIB, 8 * GIB))
    recipe = load_recipe(write_recipe(model={"device_map": device_map} if device_map else {}))
    planned = SimpleNamespace(layout=SimpleNamespace(bytes=needed * GIB))
    job = SimpleNamespace(recipe=recipe, planned=planned, behaviour=True, choices=SimpleNamespace(device="cuda"))
    if fits:
        _require_memory(job)
        return
    with pytest.raises(MachineError) as told:
        _require_memory(job)
    assert ("on all GPUs (model.device_map=auto)" in str(told.value)) == (device_map is None)
