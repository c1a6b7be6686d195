"""What a model has forgotten: general text and general chat that the run did not train on, before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from lora_recipes.data.files import KINDS, kind_of
from lora_recipes.data.forms import settings_of_all
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.errors import DataError, RunError
from lora_recipes.model.compare import Row, trained_row
from lora_recipes.recipe import Recipe

KEY = "checks.forgetting.data_files"
SHIPPED = ("data/general/chat.jsonl", "data/general/text.jsonl")
MAX_ROWS = 100  # of each file
MAX_LENGTH = 512  # tokens of a row that are looked at
# Nats a token. Between a gentle run of the demo and its own, which is after one job only (docs/evaluate.md).
MAX_LOSS_INCREASE = 0.2
MAX_KL = 0.3


@dataclass(frozen=True)
class General:
    """Rows of one file.

    Attributes:
        trained_on: rows of the file that are also training rows of the run, and left out.
        unusable: rows that this model's template refuses, and left out.
    """

    file: str
    rows: list[Row]
    trained_on: int
    unusable: int


def general_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ends: list[int], data: LoadedData
) -> list[General]:
    """The rows that forgetting is measured on, as this model reads them.

    Args:
        data: the run's own rows.

    Raises:
        RunError: no such file, one of an unknown kind, or not a row that the run did not train on.
        DataError: a file that the recipe names holds no row that can be read.
    """
    wanted = recipe.get(KEY, SHIPPED)
    files = [wanted] if isinstance(wanted, str) else list(wanted)
    seen = numpy.concatenate([rows.train.stat("hash") for rows in data.sources])
    found = []
    for file in files:
        if not Path(file).is_file():
            raise RunError(
                f"{recipe.where(KEY)}: no file {file} to measure forgetting on; run from the folder that holds data/general, "
                f"or name rows of your own: {KEY}=general.jsonl"
            )
        if (general := _read(file, recipe, tokenizer, ends, seen)) is not None:
            found.append(general)
    if not any(general.rows for general in found):
        raise RunError(f"{recipe.path}: none of {', '.join(files)} holds a row that the run did not train on")
    return found


def general_source(file: str, recipe: Recipe, split: str) -> dict[str, Any]:
    """The `dataset` section that reads a file of general rows: what this model cannot read is left out, not an error.

    Raises:
        RunError: the file's ending is of no known kind.
    """
    kind = kind_of(Path(file))
    if kind is None:
        raise RunError(f"{recipe.where(KEY)}: {file} is of no known kind; known endings: {', '.join(KINDS)}")
    return {
        "path": kind,
        "data_files": {"train": file},
        "split": split,
        "bad_rows": "skip",
        "truncation": "keep_start",
        "control_tokens": "escape",
    }


def _read(file: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, ends: list[int], seen: Any) -> General | None:
    """The rows of one file; None where they are conversations and the model has no template for any."""
    changes = {
        "dataset": general_source(file, recipe, "train"),
        "training.max_length": MAX_LENGTH,
        "training.packing": False,
        "training.dataset_text_field": "text",
        "training.assistant_only_loss": False,
        "training.completion_only_loss": None,
    }
    general = recipe.changed(changes)
    ((_, settings),) = settings_of_all(general)
    if settings.form not in ("text", "input_ids"):  # of a conversation, what the assistant says; of a text, all of it
        if not tokenizer.chat_template:
            return None
        general = general.changed({"training.assistant_only_loss": True})
    (rows,) = load_data(general, tokenizer, set(ends)).sources
    own = numpy.isin(rows.train.stat("hash"), seen)
    kept = rows.train.indices[~own][: recipe.get("checks.forgetting.max_rows", MAX_ROWS)]
    tokens, unusable = rows.train.prepared.tokens, rows.train.prepared.counts.total()
    if tokens is None:  # not a row of the file is one that this model can read
        if recipe.get(KEY):
            raise DataError(
                f"{recipe.where(KEY)}: no row of {file} can be read, so nothing would be measured on it:\n"
                f"  {rows.train.prepared.problems[0]}\ncorrect the file, or leave it out"
            )
        return General(file, [], 0, unusable)
    cut = [(row["input_ids"][:MAX_LENGTH], row["labels"][:MAX_LENGTH]) for row in tokens.select(kept)]
    taken = [trained_row(ids, labels) for ids, labels in cut]
    return General(file, [row for row in taken if row is not None], int(own.sum()), unusable)
