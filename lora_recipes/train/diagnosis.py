"""A loss that jumps, or does not fall: said with the likely causes, which are looked for in what the run itself knows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_recipes import console
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, read_jsonl
from lora_recipes.train.record import write_status

FEWEST = 8  # logged losses that say something
BEGINNING = 3  # losses; one alone may be that of an easy batch
FALLEN = 0.97  # of what it was: a loss above this at the end has not fallen
LEARNT = 0.1  # nats a token; a loss that begins below has little to fall
RISEN = 1.2
JUMP, JUMP_BY = 2.0, 0.5  # a spike is this many times, and by so many nats, above the median of the losses before it
BEFORE = 8  # losses that a spike is held against
# Learning rates beyond which a method hardly moves, or falls apart. LoRA wants about ten times that of full fine-tuning
# (Schulman and others, "LoRA Without Regret", 2025).
USUAL = {"LoRA": (1e-5, 2e-3), "full fine-tuning": (1e-6, 1e-4)}
FEW_TRAINED = 1.0  # per cent of tokens
FEW_ROWS = 100  # seen in the whole run
NO_GRADIENT = 1e-7
FAR_CLIPPED = 10  # times `max_grad_norm`


@dataclass(frozen=True)
class Facts:
    """What of a run may explain its loss.

    Attributes:
        trained_percent: share of the tokens that have a loss.
        rows_a_step: of all ranks together.
        vocabulary: entries; a model that knows nothing has a loss of its logarithm.
    """

    method: str
    targets: Any
    max_steps: int
    warmup_steps: int
    max_grad_norm: float
    trained_percent: float
    rows_a_step: int
    vocabulary: int
    fp16: bool


def diagnose(logged: Sequence[dict[str, Any]], facts: Facts) -> dict[str, Any] | None:
    """What is odd about the losses, and why; None when nothing is, or too few were logged to tell.

    Args:
        logged: lines of metrics.jsonl with "step" and "loss", in their order.

    Returns:
        {"finding": "flat", "rising" or "spike", "step", "text", "causes"}: likely causes, the likeliest first.
    """
    if len(logged) < FEWEST:
        return None
    losses = [float(line["loss"]) for line in logged]
    quarter = len(losses) // 4
    first, last = median(losses[:quarter]), median(losses[-quarter:])
    begun = min(first, median(losses[:BEGINNING]))
    if last > RISEN * begun and last - begun > JUMP_BY:
        told = f"the loss has risen from {begun:.3g} to {last:.3g}"
        return _found("rising", int(logged[-1]["step"]), told, _too_much(logged, facts))
    if (place := _spike(losses)) is not None:
        before = median(losses[max(0, place - BEFORE) : place])
        told = f"the loss jumped from about {before:.3g} to {losses[place]:.3g} at step {logged[place]['step']}"
        return _found("spike", int(logged[place]["step"]), told, _too_much(logged, facts))
    if first > LEARNT and last > FALLEN * first:
        told = f"the loss does not fall: {first:.3g} in the first quarter, {last:.3g} in the last"
        return _found("flat", int(logged[-1]["step"]), told, _too_little(logged, facts, first))
    return None


def _found(finding: str, step: int, text: str, causes: list[str]) -> dict[str, Any]:
    unknown = "nothing in the settings explains it: look at the rows (lora-recipes preview, lora-recipes audit)"
    return {"finding": finding, "step": step, "text": text, "causes": causes or [unknown]}


def _spike(losses: Sequence[float]) -> int | None:
    for place in range(BEFORE, len(losses)):
        usual = median(losses[place - BEFORE : place])
        if losses[place] > JUMP * usual and losses[place] - usual > JUMP_BY:
            return place
    return None


def _newest_losses(state: TrainerState) -> list[float]:
    """As many as it takes to see whether the last one is a spike; evaluations are logged between them."""
    lines = [line for line in state.log_history[-2 * (BEFORE + 1) :] if "loss" in line]
    return [float(line["loss"]) for line in lines[-BEFORE - 1 :]]


def _highest_rate(logged: Sequence[dict[str, Any]]) -> float:
    return max((float(line["learning_rate"]) for line in logged if "learning_rate" in line), default=0.0)


def _norms(logged: Sequence[dict[str, Any]]) -> list[float]:
    return [float(line["grad_norm"]) for line in logged if "grad_norm" in line]


def _too_high(rate: float, facts: Facts) -> str:
    most = USUAL[facts.method][1]
    return f"training.learning_rate reached {rate:.2g}; {facts.method} rarely bears more than {most:.0e}"


def _too_much(logged: Sequence[dict[str, Any]], facts: Facts) -> list[str]:
    rate, (_, most) = _highest_rate(logged), USUAL[facts.method]
    causes = []
    if rate > most:
        causes.append(_too_high(rate, facts))
    if facts.fp16:
        causes.append("fp16 overflows easily: set training.bf16=true where the GPU has it")
    if not facts.max_grad_norm:
        causes.append("training.max_grad_norm=0 clips no gradient; 1.0 is usual")
    if not facts.warmup_steps:
        causes.append("there is no warmup: set training.warmup_steps to some 3 % of the steps")
    if facts.rows_a_step < 8:
        causes.append(
            f"a step sees {facts.rows_a_step} rows: one odd row weighs much; raise gradient_accumulation_steps, and look at "
            "the longest and the repeated rows (lora-recipes preview)"
        )
    return causes


def _too_little(logged: Sequence[dict[str, Any]], facts: Facts, first: float) -> list[str]:
    rate, (least, most), norms = _highest_rate(logged), USUAL[facts.method], _norms(logged)
    causes = []
    if rate > most:  # what was learnt is thrown out again with every step
        causes.append(_too_high(rate, facts))
    if norms and median(norms) < NO_GRADIENT:
        causes.append("no gradient arrives (its norm is 0): hardly a token has a loss, or what has one is frozen")
    if 2 * facts.warmup_steps >= facts.max_steps:
        causes.append(
            f"the warmup takes {facts.warmup_steps} of {facts.max_steps} steps, so the learning rate was hardly reached"
        )
    if rate < least:
        causes.append(f"training.learning_rate was {rate:.2g} at most; {facts.method} wants {10 * least:.0e} or more")
    if facts.trained_percent < FEW_TRAINED:
        causes.append(
            f"only {facts.trained_percent:g} % of the tokens have a loss: see the green ones in lora-recipes preview"
        )
    if first > 0.9 * math.log(facts.vocabulary):
        causes.append(
            f"a loss of {first:.3g} is that of a model that knows nothing (ln {facts.vocabulary:,} = "
            f"{math.log(facts.vocabulary):.3g}): wrong weights, tokenizer or chat template?"
        )
    if facts.max_grad_norm and norms and median(norms) > FAR_CLIPPED * facts.max_grad_norm:
        causes.append(
            f"gradients are clipped from {median(norms):.3g} to training.max_grad_norm={facts.max_grad_norm:g} in most steps"
        )
    if facts.max_steps * facts.rows_a_step < FEW_ROWS:
        causes.append(f"{facts.max_steps} steps of {facts.rows_a_step} rows are very little: train longer")
    if isinstance(facts.targets, list):
        causes.append(f"few layers are adapted ({', '.join(facts.targets)}): try lora.target_modules=all-linear")
    return causes


class Diagnosis(TrainerCallback):
    """Says what is odd once: a spike as soon as it shows, a loss that stays or rises at half the run and at its end.

    All that was logged is read only then, so that a log event costs the same at step 20,000 as at step 20.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, trained_percent: float, vocabulary: int) -> None:
        self.recipe, self.run_dir = recipe, run_dir
        self.trained_percent, self.vocabulary = trained_percent, vocabulary
        self.said: str | None = None
        self.halfway = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (kwargs.get("logs") or {}):
            return
        before, self.halfway = self.halfway, 2 * state.global_step >= state.max_steps
        if self.halfway > before or _spike(_newest_losses(state)) is not None:
            self._say(self._found(args, state), unless_flat=not self.halfway)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            found = self._found(args, state)
            write_status(self.run_dir, diagnosis=found)
            self._say(found)

    def _found(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        lora = self.recipe.section("lora")
        facts = Facts(
            method="LoRA" if lora else "full fine-tuning",
            targets=lora.get("target_modules"),
            max_steps=state.max_steps,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            max_grad_norm=args.max_grad_norm or 0.0,
            trained_percent=self.trained_percent,
            rows_a_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            vocabulary=self.vocabulary,
            fp16=args.fp16,
        )
        return diagnose([line for line in read_jsonl(self.run_dir.metrics) if "loss" in line], facts)

    def _say(self, found: dict[str, Any] | None, *, unless_flat: bool = False) -> None:
        if found is None or found["finding"] == self.said or (unless_flat and found["finding"] == "flat"):
            return
        self.said = found["finding"]
        causes = "\n".join(f"  {number}. {cause}" for number, cause in enumerate(found["causes"], start=1))
        console.say(f"note: {found['text']}. Likely causes, the likeliest first:\n{causes}", "yellow")
