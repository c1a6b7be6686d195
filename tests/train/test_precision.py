"""What fp16 trains is float32: its gradient scaler refuses gradients of 16 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.errors import RecipeError
from tests.conftest import NF4
from tests.train import runs
from tests.train.runs import make_trainer


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that is told of fp16 on a CPU, where the Trainer would refuse it."""
    real = runs.training_arguments

    def arguments(*more: Any) -> Any:
        args = real(*more)
        args.fp16 = True
        return args

    monkeypatch.setattr(runs, "training_arguments", arguments)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_gradients_of_an_adapter_can_be_unscaled(
    fp16: None, write_recipe: Callable[..., Path], dtype: str, quantization: dict | None
):
    keys: dict[str, Any] = {"lora": {"modules_to_save": ["norm"]}, "model": {"dtype": dtype}}
    trainer = make_trainer(write_recipe(quantization=quantization, **keys))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert any(name.endswith("norm.modules_to_save.default.weight") for name, _ in trainer.model.named_parameters())
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(trained)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = trainer.compute_loss(trainer.model, dict(batch))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert {parameter.grad.dtype for parameter in trained} == {torch.float32}


def test_a_whole_model_of_16_bits_is_not_trained_in_fp16(
    fp16: None, write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path
):
    """The recipe says nothing of a type: only the loaded weights show that they are 16 bits."""
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(workdir / "half")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(workdir / "half")
    keys: dict[str, Any] = {"lora": None, "merge": None}
    half = {"pretrained_model_name_or_path": str(workdir / "half")}
    with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+: fp16's .* are bfloat16; set model\.dtype=float32"):
        make_trainer(write_recipe(model=half, **keys))
    trainer = make_trainer(write_recipe(model=half | {"dtype": "float32"}, **keys))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
