"""YAML to a checked, immutable `Recipe`. The only place that knows YAML, `extends`, overrides and the schema."""

from lora_recipes.recipe.load import Recipe, load_recipe
from lora_recipes.recipe.problem import InvalidRecipe, Origin, Problem

__all__ = ["InvalidRecipe", "Origin", "Problem", "Recipe", "load_recipe"]
