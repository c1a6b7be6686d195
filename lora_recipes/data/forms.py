"""What form the rows of a source are in, told from its first rows before anything else is read."""

from itertools import islice
from typing import Any

from lora_recipes.data.files import Source, sources
from lora_recipes.data.formats import (
    COLUMNS,
    FIELDS,
    OPTIONAL,
    BadRow,
    RowSettings,
    not_an_object,
    oriented,
    recognise,
    unknown_columns,
)
from lora_recipes.data.problems import SHOWN, Problem, problem_of
from lora_recipes.data.readers import read_split, rows_of
from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe

CHUNKS = 2  # that are looked at for a row that can be read


def settings_of_all(recipe: Recipe) -> list[tuple[Source, RowSettings]]:
    """Each source of a recipe with how its rows are read.

    Raises:
        DataError: as `settings_of`, or `dataset_text_field` where no source has text.
    """
    found = [(source, settings_of(source)) for source in sources(recipe)]
    key = "training.dataset_text_field"
    if recipe.get(key) not in (None, "text") and not any(settings.form == "text" for _, settings in found):
        forms = ", ".join(dict.fromkeys(f"`{settings.form}`" for _, settings in found))
        raise DataError(f"{recipe.where(key)}: `dataset_text_field` has no effect: the rows are in the format {forms}")
    return found


def settings_of(source: Source) -> RowSettings:
    """How the source's rows are read.

    Raises:
        DataError: no rows, no known format, columns that are not there, a loss setting that the format cannot follow.
    """
    recipe, text_field = source.recipe, source.recipe.get("training.dataset_text_field", "text")
    rows = _first_rows(source)
    present = list(dict.fromkeys(name for row in rows for name in row))
    found = ", ".join(f"`{column}`" for column in present)
    columns = oriented(source.get("columns", {}), present)
    if unknown := [field for field in columns if field not in FIELDS]:
        raise DataError(
            f"{source.where('columns')}: `{unknown[0]}` is no field of a format; fields: {', '.join(sorted(FIELDS))}"
        )
    known = (form for row in rows if (form := recognise(row, columns, text_field)))
    form = source.get("format") or next(known, None)
    marks = COLUMNS.get(form or "", ())
    # A column that only some rows use may come later than the rows that were looked at.
    if missing := [name for field, name in columns.items() if name not in present and (not form or field in marks)]:
        raise DataError(
            f"{source.where('columns')}: there is no column `{missing[0]}` in {source.name}; found: {found}"
        )
    if form and (unread := [field for field in columns if field not in (*marks, *OPTIONAL[form])]):
        raise DataError(
            f"{source.where('columns')}: `{unread[0]}` has no effect: rows in the format `{form}` have the fields "
            f"{', '.join(f'`{field}`' for field in (*marks, *OPTIONAL[form]))}"
        )
    if form is None:
        raise DataError(f"{source.where('data_files')}: {source.name}: {unknown_columns(present)}")
    named = [({"text": text_field} | columns).get(name, name) for name in COLUMNS[form]]
    if missing := [column for column in named if column not in present]:
        raise DataError(
            f"{source.where('format')}: `format: {form}` needs the column `{missing[0]}`, which is not in {source.name}; "
            f"found: {found}"
        )
    answers_only = bool(recipe.get("training.assistant_only_loss"))
    settings = RowSettings(
        form=form,
        columns=columns,
        text_field=text_field,
        answers_only=answers_only,
        completion_only=recipe.get("training.completion_only_loss") is not False,
        control_tokens=source.get("control_tokens", "error"),
    )
    plain = any(isinstance(row.get(columns.get("prompt", "prompt")), str) for row in rows)
    _require_meaningful_loss(source, settings, plain=plain)
    return settings


def _first_rows(source: Source) -> list[dict[str, Any]]:
    """The objects in the first chunk that has any."""
    broken: list[Problem] = []
    for chunk in islice(read_split(source, source.split), CHUNKS):
        rows = []
        for number, row in rows_of(chunk):
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken.append(problem_of(row if isinstance(row, BadRow) else not_an_object(row), 0, number, chunk))
        if rows:
            return rows
    if broken:
        shown = "\n".join(map(str, broken[:SHOWN]))
        raise DataError(f"{shown}\nnone of the first {len(broken):,} rows of {source.name} can be read")
    raise DataError(f"{source.where('data_files')}: {source.name}: split `{source.split}` has no rows")


def _require_meaningful_loss(source: Source, settings: RowSettings, *, plain: bool) -> None:
    """A loss setting that this form of data cannot follow is refused, not ignored."""
    recipe = source.recipe
    completion_only = recipe.get("training.completion_only_loss")
    where = recipe.where("training.completion_only_loss")
    if completion_only is not None and settings.form != "prompt_completion":
        raise DataError(
            f"{where}: `completion_only_loss` is for rows with `prompt` and `completion`; those of {source.name} are "
            f"`{settings.form}`"
        )
    if completion_only is False and plain and settings.answers_only:
        raise DataError(
            f"{where}: `completion_only_loss: false` trains on the prompt, which `assistant_only_loss: true` excludes; "
            "set training.assistant_only_loss=false"
        )
    if settings.control_tokens == "keep" and settings.answers_only:
        raise DataError(
            f"{source.where('control_tokens')}: `keep` is for text that is trained as it stands: set "
            "training.assistant_only_loss=false"
        )
