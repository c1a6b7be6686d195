"""What a recipe must say to run on a card at all."""

from typing import Any

from lora_recipes.model.machine import SHARDABLE, of_bitsandbytes, without_bf16
from lora_recipes.plan.cards import Target
from lora_recipes.recipe import Recipe


def required_on(recipe: Recipe, target: Target) -> dict[str, Any]:
    """Settings without which the target refuses the run: fp16 on a card that has no bf16, an optimizer of torch's under FSDP."""
    found = {} if target.gpu is None or target.gpu.bf16 else without_bf16(recipe)
    if target.sharding == "fsdp2" and of_bitsandbytes(recipe.get("training.optim", "")):
        found["training.optim"] = SHARDABLE
    return found
