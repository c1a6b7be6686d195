"""`plan` counts what would be trained, and its bytes are those of the real model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_recipes.cli import main
from lora_recipes.model.build import load_base
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.plan import plan
from lora_recipes.recipe import load_recipe
from tests.conftest import NF4, ROOT


def test_the_tutorials_llama_is_planned_offline(capsys: pytest.CaptureFixture):
    assert main(["plan", str(ROOT / "recipes" / "llama2-7b-qlora.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trainable"], found["all"], found["trainable_percent"]) == (8_388_608, 6_746_804_224, 0.1243)
    assert 3.9 < found["memory"]["low"] / 2**30 < 4.2


@pytest.mark.parametrize("double", [False, True])
def test_4bit_weights_take_the_bytes_that_were_planned(write_recipe: Callable[..., Path], double: bool):
    path = write_recipe(quantization=NF4 | {"bnb_4bit_use_double_quant": double}, model={"dtype": "float32"})
    recipe = load_recipe(path)
    model = load_base(recipe, locate(recipe), choose(recipe))
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += state.absmax.numel() * state.absmax.element_size()
            held += 0 if state.state2 is None else state.state2.absmax.numel() * 4
    assert plan(recipe)["memory"]["parts"]["base_weights"] == pytest.approx(held, rel=0.02)


def test_adapter_bytes_are_those_of_the_real_adapter(write_recipe: Callable[..., Path]):
    from tests.train.test_training import make_trainer

    path = write_recipe()
    found = plan(load_recipe(path))
    trained = [p for p in make_trainer(path).model.parameters() if p.requires_grad]
    assert found["trainable"] == sum(p.numel() for p in trained)
    assert found["memory"]["parts"]["adapter"] == sum(p.numel() * p.element_size() for p in trained)
    assert {p.dtype for p in trained} == {torch.float32}


def test_an_unknown_architecture_says_how_to_get_it(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe(model={"pretrained_model_name_or_path": "nobody/unheard-of"})
    assert main(["plan", str(path)]) == 3
    assert "hf download nobody/unheard-of config.json" in capsys.readouterr().err
