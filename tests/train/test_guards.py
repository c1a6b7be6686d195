"""Numbers that are no longer finite: the run ends within that step, says which rows it had, and nothing broken is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_recipes.errors import RefusedError
from lora_recipes.run_dir import RunDir, read_json, read_jsonl
from lora_recipes.train import launch
from lora_recipes.train.guards import MOST_SKIPPED
from lora_recipes.train.trainer import RecipeTrainer
from tests.train.runs import make_trainer

POISON = "~~~~"  # in one row only


@pytest.fixture
def poisoned(workdir: Path) -> dict[str, Any]:
    """A `dataset` of 24 rows of which the 17th holds the poison."""
    rows = []
    for number in range(1, 25):
        answer = f"{POISON} {number}" if number == 17 else f"answer {number} " * (1 + number % 5)
        rows.append(
            {"messages": [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]}
        )
    (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data_files": {"train": "rows.jsonl"}, "eval_split": None}


@pytest.fixture
def nan_at_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RecipeTrainer.compute_loss

    def compute_loss(self: RecipeTrainer, model: Any, inputs: dict[str, torch.Tensor], *more: Any, **named: Any) -> Any:
        loss = real(self, model, inputs, *more, **named)
        said = self.processing_class.batch_decode(inputs["input_ids"])
        return loss * (float("nan") if any(POISON in text for text in said) else 1.0)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)


@pytest.mark.promise("F9")
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"packing": True, "max_length": 128, "per_device_train_batch_size": 1},
    ],
    ids=["padded", "accumulation", "packed"],
)
@pytest.mark.parametrize("pieces", [True, False], ids=["pieces", "whole"])
def test_a_loss_that_is_not_finite_ends_the_run_before_its_step_and_names_the_rows(
    write_recipe: Callable[..., Path],
    poisoned: dict,
    nan_at_poison: None,
    training: dict[str, Any],
    pieces: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    if not pieces:
        monkeypatch.setattr(RecipeTrainer, "suits_cpu_loss", lambda self: False)
    keys = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "logging_steps": 50} | training
    assert launch(str(write_recipe(dataset=poisoned, training=keys)), []) == 4
    said = capsys.readouterr().err
    run_dir = RunDir.of("tiny")
    status = read_json(run_dir.status)
    reason = status["reason"]
    found = re.match(r"step (\d+): loss is nan", reason)
    assert found and reason in said
    step = int(found.group(1)) - 1
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 4, step)
    assert "rows.jsonl:17" in said
    assert not run_dir.adapter.exists()
    kept = sorted(run_dir.checkpoints.glob("checkpoint-*"))
    assert bool(kept) == (step > 0) and all(int(folder.name.split("-")[1]) <= step for folder in kept)
    for folder in kept:
        weights = load_file(folder / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    assert not [row for row in read_jsonl(run_dir.metrics) if "nan" in str(row).lower()]


@pytest.mark.promise("F9")
def test_a_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    real = RecipeTrainer.training_step

    def training_step(self: RecipeTrainer, *given: Any) -> torch.Tensor:
        loss = real(self, *given)
        if self.state.global_step == 1:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    assert launch(str(write_recipe(training={"logging_steps": 50})), []) == 4
    said = capsys.readouterr().err
    assert "step 2: the loss is finite, but the norm of its gradient is" in said and "train.jsonl:" in said
    assert not RunDir.of("tiny").adapter.exists()


@pytest.mark.promise("F9")
@pytest.mark.parametrize("saving", ["no", "steps"])
def test_weights_that_are_not_finite_are_neither_saved_nor_published(
    write_recipe: Callable[..., Path], saving: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Broken by the optimizer itself in the very last step, whose loss and gradients were finite."""
    real = RecipeTrainer.create_optimizer

    def create_optimizer(self: RecipeTrainer, *given: Any) -> torch.optim.Optimizer:
        made = real(self, *given)
        made.register_step_post_hook(lambda *_: next(self.model.parameters()).data.fill_(float("nan")))
        return made

    monkeypatch.setattr(RecipeTrainer, "create_optimizer", create_optimizer)
    path = write_recipe(training={"max_steps": 1, "save_strategy": saving, "save_steps": 1}, lora=None)
    assert launch(str(path), []) == 4
    assert "step 1: trained weights are not finite: model.embed_tokens.weight" in capsys.readouterr().err
    run_dir = RunDir.of("tiny")
    assert not run_dir.merged.exists() and not list(run_dir.checkpoints.glob("checkpoint-*"))


@pytest.mark.promise("F9")
def test_an_evaluation_that_is_not_finite_ends_the_run(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(RecipeTrainer, "prediction_step", lambda *_, **__: (torch.tensor(float("nan")), None, None))
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    assert launch(str(write_recipe(training=keys)), []) == 4
    assert "step 1: eval_loss is nan" in capsys.readouterr().err
    assert not list(RunDir.of("tiny").checkpoints.glob("checkpoint-*"))


@pytest.mark.promise("F9")
def test_fp16_may_skip_steps_but_not_for_ever(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """No GPU is here: a scaler that is only there, and gradients that overflow."""
    made = make_trainer(write_recipe())
    monkeypatch.setattr(made.accelerator, "scaler", object())
    batch = next(iter(made.get_train_dataloader()))

    def step(norm: float) -> None:
        made._computed = [(batch, torch.tensor(1.0))]
        made._get_grad_norm(made.model, torch.tensor(norm))

    for _ in range(MOST_SKIPPED - 1):
        step(float("inf"))
    step(1.0)  # a scale was found
    for _ in range(MOST_SKIPPED - 1):
        step(float("inf"))
    with pytest.raises(RefusedError, match=f"the last {MOST_SKIPPED} optimizer steps were skipped"):
        step(float("inf"))
    made._computed = [(batch, torch.tensor(float("nan")))]
    with pytest.raises(RefusedError, match="loss is nan"):
        made._get_grad_norm(made.model, torch.tensor(1.0))
