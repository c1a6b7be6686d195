"""Before a single weight is loaded: what a recipe trains, whether it fits, how long it takes and what to change."""

import json
from collections.abc import Iterator
from typing import Any

from lora_recipes.model.targets import Targets, find_targets
from lora_recipes.plan.advice import Suggestion, half_the_rows, suggestions, ways_out
from lora_recipes.plan.architecture import CONFIGS, config_of, facts_file, facts_of
from lora_recipes.plan.cards import Target, target_for, target_of
from lora_recipes.plan.cost import cost
from lora_recipes.plan.memory import Estimate, Memory
from lora_recipes.plan.required import required_on
from lora_recipes.recipe import Recipe

__all__ = [
    "CONFIGS",
    "Estimate",
    "Memory",
    "Suggestion",
    "Target",
    "config_of",
    "facts_file",
    "facts_of",
    "half_the_rows",
    "plan",
    "settings_to_apply",
    "target_for",
    "target_of",
    "ways_out",
]


def plan(
    recipe: Recipe, target: Target | None = None, *, advise: bool = True, teraflops: float | None = None
) -> dict[str, Any]:
    """Everything that can be said about a run without its weights.

    Args:
        target: where it would run; None for this machine.
        advise: also find the largest micro-batch and what to change.
        teraflops: rate that was measured on such a device.

    Returns:
        The keys of `plan --json`: parameters trained and in all, hits by module, memory in bytes, whether it fits, and
        what to change when it does not.

    Raises:
        RecipeError: a LoRA target matches nothing, or experts would be frozen in silence.
        MachineError: the architecture is neither here, nor in the cache, nor known to this package.
    """
    target = target or target_for(recipe)
    config = config_of(recipe)
    targets = find_targets(recipe, config)
    required = required_on(recipe, target)
    recipe = recipe.changed(required)
    estimate = Estimate(recipe, config, target)
    memory = estimate.memory()
    found = _counts(targets) | {
        "target": {
            "name": target.name,
            "memory": target.memory,
            "gpus": target.gpus,
            "sharding": target.sharding,
            "measured": target.gpu is None,  # no CUDA term of this plan was measured
        },
        "micro_batch": {"rows": estimate.rows, "length": estimate.length, "accumulation": estimate.accumulation},
        "memory": memory.as_json(),
        "fits": memory.high <= target.memory,
        "tight": memory.expected <= target.memory < memory.high,
        "extrapolated": estimate.extrapolates(),
        "required": required,
        "notes": list(_notes(targets)),
    }
    if advise:
        found["max_micro_batch"] = estimate.most_rows()
        found["suggestions"] = [one.as_json() for one in suggestions(estimate, memory)]
        found["cost"] = cost(recipe, estimate, teraflops)
    return found


def settings_to_apply(found: dict[str, Any]) -> list[str]:
    """What a plan asks for as `section.key=value` words, the later ones on top of the earlier."""
    merged: dict[str, Any] = dict(found["required"])
    for suggestion in found["suggestions"]:
        merged |= suggestion["settings"]
    return [f"{key}={json.dumps(value)}" for key, value in merged.items()]  # JSON is YAML


def _notes(targets: Targets) -> Iterator[str]:
    if targets.frozen_experts:
        share = targets.frozen_experts / targets.total
        yield f"{targets.frozen_experts:,} parameters of experts ({share:.0%} of the model) have no adapter"


def _counts(targets: Targets) -> dict[str, Any]:
    return {
        "trainable": targets.trainable,
        "all": targets.total,
        "trainable_percent": round(targets.percent, 4),
        "hits": targets.hits,
    }
