"""Reads the recipe's data with `datasets` and checks every row; whatever is wrong is named by file and line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

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
    for split, rows in ((recipe.get("dataset.split"), train), (heldout_split, heldout)):
        if rows is None:
            continue
        try:
            _check_rows(rows, form, text_field, recipe, split)
        except UnicodeDecodeError as error:  # the reader takes any bytes; they fail when a row is looked at
            raise DataError(_broken_file(local_files(recipe, split), error)) from None
    return RawData(train, heldout, form)


def _read_split(recipe: Recipe, split: str) -> datasets.Dataset:
    keywords = recipe.section("dataset")
    keywords.pop("eval_split", None)
    keywords["split"] = split
    files = local_files(recipe, split)
    for file in files:
        if not file.is_file():
            raise DataError(f"{recipe.where('dataset.data_files')}: no such data file: {file} (seen from {Path.cwd()})")
    try:
        rows = datasets.load_dataset(**keywords)
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        raise DataError(_broken_file(files, error)) from None
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


def local_files(recipe: Recipe, split: str) -> list[Path]:
    """The plain local files that `dataset.data_files` names for a split; patterns and URLs are left to `datasets`."""
    named = recipe.get("dataset.data_files")
    if isinstance(named, dict):
        named = named.get(split.split("[")[0])
    paths = [named] if isinstance(named, str) else list(named or [])
    folder = Path(recipe.get("dataset.data_dir") or "")
    return [folder / path for path in paths if not any(mark in path for mark in ("*", "?", "[", "://"))]


def _check_rows(rows: datasets.Dataset, form: str, text_field: str, recipe: Recipe, split: str) -> None:
    answers_only = bool(recipe.get("training.assistant_only_loss"))
    problems = [
        (index, problem)
        for index, row in enumerate(rows)
        if (problem := row_problem(row, form, text_field, answers_only)) is not None
    ]
    if not problems:
        return
    places = _row_places(local_files(recipe, split), [index for index, _ in problems[:SHOWN]])
    lines = [f"{places.get(index, f'{split} row {index + 1}')}: {problem}" for index, problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"… and {len(problems) - SHOWN:,} more")
    raise DataError(
        "\n".join(lines) + f"\n{len(problems):,} of {len(rows):,} rows cannot be trained on; mend or remove them"
    )


def _row_places(files: list[Path], wanted: list[int]) -> dict[int, str]:
    """Row index → `file:line`, for rows that lie in line-oriented local files."""
    if not files or any(file.suffix not in (".jsonl", ".json", ".txt") for file in files):
        return {}
    places: dict[int, str] = {}
    index, left = 0, set(wanted)
    for file in files:
        for number, line in _lines(file):
            if line.lstrip().startswith(b"["):
                return places  # one JSON array: rows are not lines
            if index in left:
                places[index] = f"{file}:{number}"
            index += 1
    return places


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _broken_file(files: list[Path], error: Exception) -> str:
    """Find the line that broke the reader; its own message often names the wrong row and no file."""
    for file in files:
        for number, line in _lines(file):
            problem = _broken_line(line)
            if problem:
                return f"{file}:{number}{problem}"
            if line.lstrip().startswith(b"["):
                break
    cause: Any = error.__cause__ or error
    return f"{', '.join(str(file) for file in files) or 'the data set'}: cannot be read: {cause}"


def _broken_line(line: bytes) -> str | None:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f": byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        excerpt = error.doc[max(0, error.pos - 40) : error.pos + 40].strip()
        return f":{error.pos + 1}: broken JSON: {error.msg}: …{excerpt}"
    if not isinstance(value, dict | list):
        return ": a row must be a JSON object"
    return None
