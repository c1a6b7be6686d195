"""What a recipe must say to run on a card at all."""

from typing import Any

from lora_recipes.plan.cards import Target
from lora_recipes.recipe import Recipe

FP16 = {"training.bf16": False, "training.fp16": True}


def required_on(recipe: Recipe, target: Target) -> dict[str, Any]:
    """Settings without which the target refuses the run: fp16 on a card that has no bf16."""
    asks = recipe.get("training.bf16") is not False and not recipe.get("training.fp16")
    return dict(FP16) if target.gpu is not None and not target.gpu.bf16 and asks else {}
