"""What helps a model that forgets, cheapest first; and a recipe that mixes general rows into its data."""

import json
import shlex
from pathlib import Path

from lora_recipes.data.audit import audit, require_sound
from lora_recipes.data.load import load_data
from lora_recipes.errors import RunError
from lora_recipes.evaluate.forgetting import general_source
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.defaults import ALPHA, DEVICE_BATCH, RANK
from lora_recipes.recipe.scaffold import new_recipe
from lora_recipes.trained import Opened

LEARNING_RATE = 2e-5  # SFTConfig's own default
EPOCHS = 3  # TrainingArguments' own default
SHARE = 0.1  # of the mixed training rows are general ones
HALF = "train[:50%]"  # the other half stays for measuring what was forgotten


def advice(recipe: Recipe) -> list[str]:
    """Commands that each make a gentler recipe."""
    words = "".join(f" {shlex.quote(word)}" for word in recipe.overrides)
    new = f"lora-recipes new {recipe.path} {recipe.name}-gentle{words}"
    rate = recipe.get("training.learning_rate", LEARNING_RATE)
    lines = [f"a lower learning rate: {new} training.learning_rate={rate / 3:.1e}"]
    steps, epochs = recipe.get("training.max_steps", -1), recipe.get("training.num_train_epochs", EPOCHS)
    if steps > 1:
        lines.append(f"fewer steps: {new} training.max_steps={steps // 2}")
    elif epochs > 1:
        lines.append(f"fewer epochs: {new} training.num_train_epochs={max(1, epochs // 2)}")
    if recipe.get("lora") and recipe.get("lora.r", RANK) > 4:
        rank, alpha = recipe.get("lora.r", RANK), recipe.get("lora.lora_alpha", ALPHA)
        lines.append(f"a smaller rank: {new} lora.r={rank // 2} lora.lora_alpha={max(1, alpha // 2)}")
    mix = f"lora-recipes evaluate {recipe.path} --mix {recipe.name}-mixed{words}"
    lines.append(f"{SHARE:.0%} general rows in the data: {mix}")
    return lines


def write_mix(recipe: Recipe, name: str, opened: Opened, file: str) -> Path:
    """A child recipe whose data is the recipe's and, as a tenth of all rows, the first half of a file of general rows.

    Args:
        opened: the run, as it was trained.
        file: general rows that this model can read.

    Raises:
        RunError: the data is a stream, whose rows nobody has counted, or half of the file holds no row.
        RecipeError, DataError: the recipe's own settings refuse such rows; nothing is written.
    """
    if opened.data.streams:
        raise RunError(f"--mix: the rows of a stream are not counted; write the mixture into `dataset` by hand: {file}")
    general = general_source(file, recipe, HALF)
    sources = [source for _, source in recipe.datasets()]
    mixed = load_data(recipe.changed({"dataset": [*sources, general]}), opened.tokenizer, set(opened.ends))
    count = len(mixed.sources[-1].train.indices)
    if not count:
        raise RunError(f"--mix: the first half of {file} holds no row that this recipe can train on")
    batch = recipe.get("training.per_device_train_batch_size", DEVICE_BATCH)
    require_sound(audit(mixed, batch, batch))  # what `train` would refuse is not written
    own = sum(len(rows.train.indices[opened.data.again(rows)]) for rows in opened.data.sources)
    general["weight"] = round(SHARE * own / (1 - SHARE) / count, 4)
    dataset = json.dumps([*sources, general], ensure_ascii=False)
    return new_recipe(recipe.path, name, [*recipe.overrides, f"dataset={dataset}"])
