"""What a recipe must say to run on a card at all."""

from typing import Any

from lora_recipes.plan.cards import Target
from lora_recipes.recipe import Recipe

FP16 = {"training.bf16": False, "training.fp16": True}


def required_on(recipe: Recipe, target: Target) -> dict[str, Any]:
    """Settings without which the target refuses the run: fp16 on a card that has no bf16."""
    if target.gpu is None or target.gpu.bf16:
        return {}
    asks = recipe.get("training.bf16") is not False and not recipe.get("training.fp16")
    found: dict[str, Any] = dict(FP16) if asks else {}
    if recipe.get("model.dtype") == "bfloat16":
        found["model.dtype"] = "float16"
    return found
