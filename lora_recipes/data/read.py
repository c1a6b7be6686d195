"""Reads the recipe's data with `datasets` and checks every row; whatever is wrong is named by file and line."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from lora_recipes.data.files import local_files
from lora_recipes.data.formats import recognise, row_problem
from lora_recipes.errors import DataError, MachineError
from lora_recipes.recipe import Recipe

SHOWN = 20  # problems listed one by one; the rest are counted


@dataclass(frozen=True)
class RawData:
    """Checked rows as they lie on disk. `heldout` is None when the recipe has no `dataset.eval_split`."""

    train: datasets.Dataset
    heldout: datasets.Dataset | None
    form: str  # "messages", "prompt_completion" or "text"


def read_data(recipe: Recipe) -> RawData:
    """Load the training split and the held-out split, and check each row.

    Raises:
        DataError: a missing or broken file, an unknown format, rows that cannot be trained on, no rows.
        MachineError: a hub data set that cannot be reached.
    """
    train = _read_split(recipe, recipe.get("dataset.split"))
    heldout_split = recipe.get("dataset.eval_split")
    heldout = _read_split(recipe, heldout_split) if heldout_split else None
    text_field = recipe.get("training.dataset_text_field", "text")
    form = recognise(train.column_names, text_field, recipe.where("dataset.data_files"))
    _require_meaningful_loss(recipe, form, train[0])
    for split, rows in ((recipe.get("dataset.split"), train), (heldout_split, heldout)):
        if rows is None:
            continue
        try:
            _check_rows(rows, form, text_field, recipe, split)
        except UnicodeDecodeError as error:  # the reader takes any bytes; they fail when a row is looked at
            raise DataError(_broken_file(recipe, local_files(recipe, split), error)) from None
    return RawData(train, heldout, form)


def _require_meaningful_loss(recipe: Recipe, form: str, first: dict[str, Any]) -> None:
    """A loss setting that this form of data cannot follow is refused, not ignored."""
    completion_only = recipe.get("training.completion_only_loss")
    where = recipe.where("training.completion_only_loss")
    if completion_only is not None and form != "prompt_completion":
        raise DataError(
            f"{where}: `completion_only_loss` is for rows with `prompt` and `completion`; these are `{form}`"
        )
    plain = form == "prompt_completion" and isinstance(first["prompt"], str)
    if completion_only is False and plain and recipe.get("training.assistant_only_loss"):
        raise DataError(
            f"{where}: `completion_only_loss: false` trains on the prompt, which `assistant_only_loss: true` excludes; "
            "set training.assistant_only_loss=false"
        )


def _read_split(recipe: Recipe, split: str) -> datasets.Dataset:
    keywords = recipe.section("dataset")
    keywords.pop("eval_split", None)
    keywords["split"] = split
    files = local_files(recipe, split)
    where = recipe.where("dataset.data_files")
    for file in files:
        if not file.is_file():
            raise DataError(f"{where}: no such data file: {file} (seen from {Path.cwd()})")
        if not os.access(file, os.R_OK):
            raise DataError(f"{where}: {file} may not be read by this user")
    try:
        rows = datasets.load_dataset(**keywords)
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        raise DataError(_broken_file(recipe, files, error)) from None
    except ConnectionError as error:
        raise MachineError(
            f"{recipe.where('dataset.path')}: cannot reach the data set {keywords['path']!r}: {error}"
        ) from None
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{recipe.where('dataset.path')}: the data cannot be read: {error}") from None
    if len(rows) == 0:
        raise DataError(f"{recipe.where('dataset.split')}: split {split!r} has no rows{_named(files)}")
    return rows


def _named(files: list[Path]) -> str:
    return f" ({', '.join(str(file) for file in files)})" if files else ""


def _check_rows(rows: datasets.Dataset, form: str, text_field: str, recipe: Recipe, split: str) -> None:
    answers_only = bool(recipe.get("training.assistant_only_loss"))
    problems = [
        (index, problem)
        for index, row in enumerate(rows)
        if (problem := row_problem(row, form, text_field, answers_only)) is not None
    ]
    if not problems:
        return
    places = row_places(recipe, split, [index for index, _ in problems[:SHOWN]])
    lines = [f"{places[index]}: {problem}" for index, problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN:,} more")
    raise DataError(
        "\n".join(lines) + f"\n{len(problems):,} of {len(rows):,} rows cannot be trained on; mend or remove them"
    )


def row_places(recipe: Recipe, split: str, wanted: list[int]) -> dict[int, str]:
    """Row index → `file:line` for rows of line-oriented local files, `SPLIT row N` for all others."""
    places = {index: f"{split} row {index + 1}" for index in wanted}
    files = local_files(recipe, split)
    if recipe.get("dataset.path") != "json" or "[" in split:
        return places
    index = 0
    for file in files:
        for number, line in _lines(file):
            if line.lstrip().startswith(b"["):
                return places  # one JSON array: rows are not lines
            if index in places:
                places[index] = f"{file}:{number}"
            index += 1
    return places


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _broken_file(recipe: Recipe, files: list[Path], error: Exception) -> str:
    """Find the line that broke the reader; its own message often names the wrong row and no file."""
    for file in files if recipe.get("dataset.path") == "json" else []:
        head = next(_lines(file), (1, b""))[1].lstrip()
        if head.startswith(b"["):
            if problem := _broken_json(file.read_bytes()):
                return f"{file}:{problem}"
            continue
        for number, line in _lines(file):
            if problem := _broken_json(line.rstrip(b"\r\n"), number) or _no_object(line, number):
                return f"{file}:{problem}"
    cause: Any = error.__cause__ or error
    return f"{', '.join(str(file) for file in files) or 'the data set'}: cannot be read: {cause}"


def _broken_json(text: bytes, first_line: int = 1) -> str | None:
    """ "line:column: what is wrong" for text that is no JSON; None for text that is."""
    try:
        json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + text[: error.start].count(b"\n")
        return f"{line}: a byte that is not UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        excerpt = error.doc[max(0, error.pos - 40) : error.pos + 40].strip()
        return f"{first_line + error.lineno - 1}:{error.colno}: broken JSON: {error.msg}: …{excerpt}"
    return None


def _no_object(line: bytes, number: int) -> str | None:
    return None if isinstance(json.loads(line.decode("utf-8-sig")), dict) else f"{number}: a row must be a JSON object"
