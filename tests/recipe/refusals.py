"""A recipe in which nothing is wrong, and what a change to it is refused with."""

from pathlib import Path

import pytest

from lora_recipes.recipe import InvalidRecipe, load_recipe

BASE = """\
model:
  pretrained_model_name_or_path: org/tiny
lora:
  target_modules: all-linear
dataset:
  path: org/data
  split: train
"""


def write(folder: Path, text: str) -> Path:
    """r.yaml: its first line extends a recipe in which nothing is wrong, `text` begins in its second line."""
    (folder / "base.yaml").write_text(BASE)
    path = folder / "r.yaml"
    path.write_text(f"extends: base.yaml\n{text}\n")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> InvalidRecipe:
    path = write(folder, text)
    with pytest.raises(InvalidRecipe) as raised:
        load_recipe(path, overrides)
    return raised.value
