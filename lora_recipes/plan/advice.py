"""What to change when a run does not fit, cheapest first: settings that were planned again, not guesses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_recipes.plan.memory import Estimate, Memory
from lora_recipes.recipe.rules import broken_rules

SHORTEST = 128  # tokens; shorter rows than this are no way out
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
SMALLER_OPTIMIZER = {"cuda": "paged_adamw_8bit", "cpu": "adamw_8bit"}

LEAST = 0.01  # of the high estimate, that a change must save to be worth a word

Change = tuple[dict[str, Any], str]  # settings, and what they cost


@dataclass(frozen=True)
class Suggestion:
    """Settings to add to those before it, what they cost, and what the run needs with all of them."""

    settings: dict[str, Any]
    costs: str
    memory: Memory
    fits: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "costs": self.costs,
            "expected": self.memory.expected,
            "high": self.memory.high,
            "fits": self.fits,
        }


def suggestions(estimate: Estimate, current: Memory) -> list[Suggestion]:
    """Changes to make one after the other until the run fits; what saves nothing is left out. [] when it fits as it is.

    Args:
        current: what `estimate` says of the recipe as it is.
    """
    found: list[Suggestion] = []
    for change in (_fitting_rows, *CHANGES, _fitting_rows):
        if current.high <= estimate.target.memory:
            break
        if (tried := _tried(change(estimate), estimate, current)) is not None:
            suggestion, estimate = tried
            current = suggestion.memory
            found.append(suggestion)
    return found


def ways_out(estimate: Estimate) -> list[Suggestion]:
    """Changes that each save memory by themselves, whether or not one is enough; the cheapest first."""
    current = estimate.memory()
    tried = (_tried(change(estimate), estimate, current) for change in (_half_the_rows, *CHANGES))
    return [found[0] for found in tried if found is not None]


def smaller_batches(rows: int, accumulation: int) -> list[tuple[int, int]]:
    """(rows at a time, accumulation) with the same rows a step: fewer rows at a time, the most first."""
    return [(size, rows * accumulation // size) for size in range(rows - 1, 0, -1) if rows * accumulation % size == 0]


def half_the_rows(rows: int, accumulation: int) -> tuple[int, int] | None:
    """(rows at a time, accumulation) of at most half the micro-batch and the same rows a step; None at one row."""
    return next((pair for pair in smaller_batches(rows, accumulation) if pair[0] <= rows // 2), None)


def _tried(change: Change | None, estimate: Estimate, current: Memory) -> tuple[Suggestion, Estimate] | None:
    """A change planned on top of the recipe; None where there is none to make, or it saves less than LEAST."""
    if change is None:
        return None
    settings, costs = change
    changed = estimate.recipe.changed(settings)
    if broken_rules(changed.plain()):  # PiSSA on 4 bits, LoRA-FA with another optimizer
        return None
    planned = Estimate(changed, estimate.config, estimate.target)
    memory = planned.memory()
    if memory.high > (1 - LEAST) * current.high:
        return None
    return Suggestion(settings, costs, memory, memory.high <= estimate.target.memory), planned


def _fitting_rows(estimate: Estimate) -> Change | None:
    most = estimate.most_rows()
    smaller = smaller_batches(estimate.rows, estimate.accumulation)
    fitting = [pair for pair in smaller if pair[0] <= most] or smaller[-1:]
    return _rows(*fitting[0]) if fitting else None


def _half_the_rows(estimate: Estimate) -> Change | None:
    found = half_the_rows(estimate.rows, estimate.accumulation)
    return _rows(*found) if found else None


def _rows(rows: int, accumulation: int) -> Change:
    settings = {"training.per_device_train_batch_size": rows, "training.gradient_accumulation_steps": accumulation}
    return settings, f"nothing that is learnt: {rows * accumulation} rows a step as before, in more passes"


def _checkpointing(estimate: Estimate) -> Change | None:
    if estimate.step().checkpointing is not None:
        return None
    return {"training.activation_checkpointing": True}, "about a third more computation; the same result"


def _four_bit(estimate: Estimate) -> Change | None:
    if not estimate.recipe.get("lora") or estimate.recipe.get("quantization"):
        return None
    return {"quantization": dict(NF4)}, "a base that is rounded to 4 bits (QLoRA), and slower steps"


def _shorter_rows(estimate: Estimate) -> Change | None:
    if estimate.length // 2 < SHORTEST:
        return None
    cost = "the end of longer rows, which dataset.truncation must allow"
    return {"training.max_length": estimate.length // 2}, cost


def _smaller_optimizer(estimate: Estimate) -> Change | None:
    if "8bit" in estimate.optimizer or estimate.target.sharding == "fsdp2":
        return None
    return {"training.optim": SMALLER_OPTIMIZER[estimate.choices.device]}, "optimizer states in 8 bits"


CHANGES: list[Callable[[Estimate], Change | None]] = [_checkpointing, _four_bit, _shorter_rows, _smaller_optimizer]
