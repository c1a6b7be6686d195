"""All rows held against their format before a tokenizer, or torch, is imported; free when nothing has changed."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

from lora_recipes.data.content import content_of, settings_key
from lora_recipes.data.files import Source
from lora_recipes.data.formats import BadRow, RowSettings, convert
from lora_recipes.data.forms import settings_of_all
from lora_recipes.data.problems import SHOWN, Problem, problem_of, said
from lora_recipes.data.readers import Chunk, rows_of
from lora_recipes.data.scan import scan
from lora_recipes.data.select import rows_in_slice
from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import cache_folder, write_json


class Checking:
    """The work on one chunk: (rows, problems of the form alone)."""

    def __init__(self, settings: RowSettings) -> None:
        self.settings = settings

    def __call__(self, chunk: Chunk) -> tuple[int, list[Problem]]:
        rows, problems = 0, []
        for number, row in rows_of(chunk):
            try:
                if isinstance(row, BadRow):
                    raise row
                convert(row, self.settings)
            except BadRow as bad:
                problems.append(problem_of(bad, rows, number, chunk))
            rows += 1
        return rows, problems


def check_data(recipe: Recipe) -> None:
    """Raises DataError about every row that cannot be trained on, of each source that does not skip such rows."""
    for source, settings in settings_of_all(recipe):
        splits = [source.split, *([source.eval_split] if isinstance(source.eval_split, str) else [])]
        for split in splits:
            if not source.is_hub() and source.get("bad_rows", "error") == "error":
                _check_split(source, split, settings, recipe.get("training.dataset_num_proc"))


def _check_split(source: Source, split: str, settings: RowSettings, processes: int | None) -> None:
    parts = [content_of(source, split.split("[")[0]), settings_key(settings), split]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    sound = cache_folder("data") / f"{digest}.sound.json"
    if sound.is_file():
        return
    rows, problems = 0, []
    for _, (count, found) in scan(source, split, Checking(settings), processes):
        problems += [replace(problem, row=problem.row + rows) for problem in found]
        rows += count
    if "[" in split:
        first, last = rows_in_slice(source, split, rows)
        problems = [problem for problem in problems if first <= problem.row < last]
        rows = last - first
    if problems:
        counts = Counter(problem.kind for problem in problems)
        raise DataError(said(problems[:SHOWN], counts, rows))
    if rows <= 0:  # a slice may lie beyond the end
        raise DataError(f"{source.where('split')}: split `{split}` of {source.name} has no rows")
    write_json(sound, {"rows": rows})
