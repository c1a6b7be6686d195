"""Losses that jump, rise or stay: found, with the right cause first; losses that fall say nothing."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_recipes.run_dir import RunDir, read_json, read_jsonl
from lora_recipes.train import diagnosis, launch
from lora_recipes.train.diagnosis import Facts, diagnose
from lora_recipes.train.trainer import RecipeTrainer

FACTS = Facts(
    method="LoRA",
    targets="all-linear",
    max_steps=100,
    warmup_steps=5,
    max_grad_norm=1.0,
    trained_percent=30.0,
    rows_a_step=16,
    vocabulary=50_000,
    fp16=False,
)


def lines(losses: list[float], rate: float = 2e-4, norm: float = 0.8) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm} for step, loss in enumerate(losses, 1)
    ]


def wavy(start: float, end: float, count: int = 40) -> list[float]:
    """Falls like a real loss: by a power, with waves of ten per cent."""
    return [end + (start - end) * math.exp(-step / 10) + 0.1 * end * math.sin(2.1 * step) for step in range(count)]


HARDLY_TRAINED = {"data_files": {"train": "rows.jsonl"}, "eval_split": None}
FLAT = [2.0 + 0.05 * math.sin(step) for step in range(40)]


@pytest.mark.parametrize("start, end", [(3.0, 1.0), (1.4, 0.02), (1.6, 1.45), (0.05, 0.05), (11.0, 7.0)])
def test_a_loss_that_falls_or_is_low_from_the_start_is_not_remarked_on(start: float, end: float):
    assert diagnose(lines(wavy(start, end)), FACTS) is None


def test_a_few_losses_say_nothing():
    assert diagnose(lines([2.0, 9.0, 2.0]), FACTS) is None


CAUSES = {
    "no gradient arrives": (lines(FLAT, norm=0.0), FACTS),
    "the warmup takes 80 of 100": (lines(FLAT), replace(FACTS, warmup_steps=80)),
    "training.learning_rate was 1e-09 at most; LoRA wants": (lines(FLAT, rate=1e-9), FACTS),
    "training.learning_rate was 1e-08 at most; full fine-tuning": (
        lines(FLAT, rate=1e-8),
        replace(FACTS, method="full fine-tuning", targets=None),
    ),
    "only 0.2 % of the tokens": (lines(FLAT), replace(FACTS, trained_percent=0.2)),
    "a model that knows nothing": (lines([loss + 9 for loss in FLAT]), FACTS),
    "gradients are clipped from 90": (lines(FLAT, norm=90.0), FACTS),
    "5 steps of 2 rows": (lines(FLAT), replace(FACTS, max_steps=5, warmup_steps=0, rows_a_step=2)),
    "few layers are adapted (q_proj)": (lines(FLAT), replace(FACTS, targets=["q_proj"])),
    "training.learning_rate reached 0.5": (lines(FLAT, rate=0.5), FACTS),
    "nothing in the settings explains it": (lines(FLAT), FACTS),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_loss_that_stays_is_told_with_the_likeliest_cause_first(cause: str):
    found = diagnose(*CAUSES[cause])
    assert found is not None and found["finding"] == "flat" and cause in found["causes"][0]


def test_a_jump_is_told_with_its_step_though_the_loss_falls_again():
    losses = wavy(3.0, 1.0)
    losses[25] = 4.0
    found = diagnose(lines(losses, rate=5e-2), FACTS)
    assert found is not None and (found["finding"], found["step"]) == ("spike", 26)
    assert "training.learning_rate reached 0.05" in found["causes"][0]
    unclipped = diagnose(lines(losses), replace(FACTS, max_grad_norm=0.0))
    assert unclipped is not None and "max_grad_norm=0" in unclipped["causes"][0]


def test_a_loss_that_rises_for_good_is_no_spike():
    found = diagnose(lines([2.0 + 0.1 * step for step in range(40)], rate=0.2), FACTS)
    assert found is not None and found["finding"] == "rising" and "learning_rate reached" in found["causes"][0]


@pytest.mark.parametrize(
    ("changes", "finding", "cause"),
    [
        ({"training": {"learning_rate": 1e-9}}, "flat", "training.learning_rate was 1e-09 at most"),
        ({"training": {"learning_rate": 1.0}, "lora": None}, "rising", "training.learning_rate reached 1;"),
        ({"training": {"learning_rate": 2e-4, "max_length": 500}, "dataset": HARDLY_TRAINED}, "flat", "only 0.4"),
        ({"training": {"learning_rate": 1e-2}}, None, ""),
    ],
    ids=["too low", "too high", "masked", "healthy"],
)
def test_a_real_run_is_told_what_is_wrong_with_it_and_a_healthy_one_nothing(
    write_recipe: Callable[..., Path],
    workdir: Path,
    changes: dict[str, Any],
    finding: str | None,
    cause: str,
    capsys: pytest.CaptureFixture,
):
    keys = {"max_steps": 16, "logging_steps": 1, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    rows = [
        [{"role": "user", "content": f"say {n}" + " word" * 150}, {"role": "assistant", "content": "y"}]
        for n in range(24)
    ]
    (workdir / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert launch(str(write_recipe(**changes | {"training": keys | changes["training"]})), []) == 0
    found = read_json(RunDir.of("tiny").status)["diagnosis"]
    said = capsys.readouterr().err
    if finding is None:
        assert found is None and "Likely causes" not in said
    else:
        assert found["finding"] == finding and found["causes"][0].startswith(cause)
        assert said.count("Likely causes") == 1


def test_what_was_logged_is_read_at_half_the_run_and_at_its_end_not_at_every_step(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    read = []
    monkeypatch.setattr(diagnosis, "read_jsonl", lambda path: read.append(path) or read_jsonl(path))
    keys = {"max_steps": 16, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4}
    assert launch(str(write_recipe(training=keys)), []) == 0
    assert len(read) == 2


def test_a_jump_in_a_real_run_is_told_at_its_step(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    real, told = RecipeTrainer.training_step, []

    def training_step(self: RecipeTrainer, *given: Any) -> torch.Tensor:
        return real(self, *given) * (3.0 if self.state.global_step == 11 else 1.0)

    def say(text: str, *style: str) -> None:
        if "jumped" in text:
            told.append(read_jsonl(RunDir.of("tiny").metrics)[-1]["step"])

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    monkeypatch.setattr(diagnosis.console, "say", say)
    assert launch(str(write_recipe(training={"max_steps": 40, "logging_steps": 1})), []) == 0
    assert told == [12]
    assert read_json(RunDir.of("tiny").status)["diagnosis"]["step"] == 12
