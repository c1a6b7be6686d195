"""What helps a model that forgets, cheapest first; and a recipe that mixes general rows into its data."""

import json
from pathlib import Path
from typing import Any

from lora_recipes.data.load import LoadedData
from lora_recipes.errors import RunError
from lora_recipes.evaluate.forgetting import SHIPPED
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.scaffold import new_recipe

LEARNING_RATE = 2e-5  # SFTConfig's own default
EPOCHS = 3  # TrainingArguments' own default
RANK = 8  # LoraConfig's own default
SHARE = 0.1  # of the mixed training rows are general ones
HALF = "train[:50%]"  # the other half stays for measuring what was forgotten


def advice(recipe: Recipe) -> list[str]:
    """Commands that each make a gentler recipe."""
    new = f"lora-recipes new {recipe.path} {recipe.name}-gentle"
    rate = recipe.get("training.learning_rate", LEARNING_RATE)
    lines = [f"a lower learning rate: {new} training.learning_rate={rate / 3:.1e}"]
    steps, epochs = recipe.get("training.max_steps", -1), recipe.get("training.num_train_epochs", EPOCHS)
    if steps > 1:
        lines.append(f"fewer steps: {new} training.max_steps={steps // 2}")
    elif epochs > 1:
        lines.append(f"fewer epochs: {new} training.num_train_epochs={max(1, epochs // 2)}")
    if recipe.get("lora") and recipe.get("lora.r", RANK) > 4:
        rank, alpha = recipe.get("lora.r", RANK), recipe.get("lora.lora_alpha", RANK)
        lines.append(f"a smaller rank: {new} lora.r={rank // 2} lora.lora_alpha={max(1, alpha // 2)}")
    lines.append(f"{SHARE:.0%} general rows in the data: lora-recipes evaluate {recipe.path} --mix {recipe.name}-mixed")
    return lines


def write_mix(recipe: Recipe, name: str, data: LoadedData) -> Path:
    """A child recipe whose data is the recipe's and, as a tenth of all rows, the first half of the general chat rows.

    Raises:
        RunError: the data is a stream, whose rows nobody has counted, or the rows to mix in are not there.
    """
    file = recipe.get("checks.forgetting.data_files", SHIPPED)
    file = file if isinstance(file, str) else file[0]
    if data.streams:
        raise RunError(f"--mix: the rows of a stream are not counted; write the mixture into `dataset` by hand: {file}")
    if not Path(file).is_file():
        raise RunError(f"--mix: there is no {file} to mix in; name rows of your own: checks.forgetting.data_files=FILE")
    own = sum(len(rows.train.indices[data.again(rows)]) for rows in data.sources)
    with Path(file).open(encoding="utf-8") as stream:
        general = sum(1 for line in stream if line.strip()) // 2
    weight = SHARE * own / (1 - SHARE) / max(general, 1)
    mixed: dict[str, Any] = {
        "path": "json",
        "data_files": {"train": file},
        "split": HALF,
        "weight": round(weight, 4),
        "bad_rows": "skip",
        "truncation": "keep_start",
        "control_tokens": "escape",
    }
    sources = [source for _, source in recipe.datasets()]
    return new_recipe(recipe.path, name, [f"dataset={json.dumps([*sources, mixed], ensure_ascii=False)}"])
