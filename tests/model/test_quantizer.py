"""A process that trains without quantization imports no bitsandbytes, one that quantizes does, and a plan always can."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.training_args import OptimizerNames

from lora_recipes.model.quantizer import OTHER_OPTIMIZERS, is_needed
from lora_recipes.plan import Estimate, config_of, target_for, ways_out
from lora_recipes.recipe import load_recipe
from tests.conftest import NF4, ROOT

TRAINED = """
import json, sys
from lora_recipes.train import main
code = main()
heavy = ("bitsandbytes", "torch._inductor.lowering", "scipy", "sklearn", "matplotlib", "tensorboard")
print(json.dumps({"code": code, "imported": [name for name in heavy if sys.modules.get(name)]}))
"""
PLANNED = """
import json, sys
from lora_recipes.model.quantizer import leave_out_unless_needed
from lora_recipes.recipe import load_recipe
recipe = load_recipe(sys.argv[1], sys.argv[2:])
leave_out_unless_needed(recipe)
from lora_recipes.plan import Estimate, config_of, target_for, ways_out
assert sys.modules.get("bitsandbytes") is None
found = ways_out(Estimate(recipe, config_of(recipe), target_for(recipe)))
print(json.dumps([way.as_json() for way in found]))
"""


def said_by(program: str, *words: str | Path) -> Any:
    """The JSON that a process of its own prints last."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, env=env, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("changes", "imported"),
    [
        ({}, False),
        ({"training": {"optim": "adamw_torch"}}, False),
        ({"quantization": NF4}, True),
        ({"training": {"optim": "adamw_8bit"}}, True),
    ],
    ids=["plain", "torch's optimizer", "4-bit", "8-bit optimizer"],
)
def test_training_imports_bitsandbytes_when_it_is_used(
    changes: dict[str, Any], imported: bool, write_recipe: Callable[..., Path]
):
    found = said_by(TRAINED, write_recipe(**changes))
    assert found["code"] == 0
    assert ("bitsandbytes" in found["imported"]) == imported
    if not imported:
        assert found["imported"] == []


def test_a_process_that_went_without_plans_four_bits_as_any_other():
    path = ROOT / "recipes" / "smollm2-135m-lora.yaml"
    words = ["training.per_device_train_batch_size=1", "training.bf16=false"]  # so that weights are most of it
    recipe = load_recipe(path, words)
    planned = [way.as_json() for way in ways_out(Estimate(recipe, config_of(recipe), target_for(recipe)))]
    assert any("quantization" in way["settings"] for way in planned)
    assert said_by(PLANNED, path, *words) == planned


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": {"load_in_8bit": True}},
        {"training": {"optim": "paged_adamw_8bit"}},
        {"training": {"optim": "lion_32bit"}},
        {"model": {"trust_remote_code": True, "revision": "0" * 40}},
        {"model": {"pretrained_model_name_or_path": "nobody/has-this"}},
    ],
    ids=["8-bit", "paged", "lion", "code of the model's own", "a model that is not here"],
)
def test_where_it_cannot_be_told_bitsandbytes_stays(changes: dict[str, Any], write_recipe: Callable[..., Path]):
    assert not is_needed(load_recipe(write_recipe()))
    assert is_needed(load_recipe(write_recipe(**changes)))


@pytest.mark.parametrize("config", ['{"quantization_config": {"load_in_4bit": true}}', "{", None])
def test_a_checkpoint_that_may_be_quantized_keeps_it(
    config: str | None, tmp_path: Path, write_recipe: Callable[..., Path]
):
    folder = tmp_path / "quantized"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert is_needed(load_recipe(write_recipe(model={"pretrained_model_name_or_path": str(folder)})))


def test_every_optimizer_that_bitsandbytes_does_not_have_is_known_to_transformers():
    known = {name.value for name in OptimizerNames}
    assert set(OTHER_OPTIMIZERS) - {None} <= known
    assert not [name for name in OTHER_OPTIMIZERS if name and any(mark in name for mark in ("bit", "paged", "bnb"))]
