"""What form the rows of a source are in, told from its first rows before anything else is read."""

from itertools import islice

from lora_recipes.data.files import Source
from lora_recipes.data.formats import FIELDS, BadRow, RowSettings, oriented, recognise, unknown_columns
from lora_recipes.data.readers import read_split, rows_of
from lora_recipes.errors import DataError


def settings_of(source: Source) -> tuple[RowSettings, bool]:
    """(how the source's rows are read, whether they are conversations).

    Raises:
        DataError: no rows, no known format, columns that are not there, a loss setting that the format cannot follow.
    """
    recipe, columns = source.recipe, oriented(source.get("columns", {}))
    text_field = recipe.get("training.dataset_text_field", "text")
    row = _first_row(source)
    if missing := [column for column in columns.values() if column not in row]:
        found = ", ".join(f"`{column}`" for column in row)
        raise DataError(
            f"{source.where('columns')}: there is no column `{missing[0]}` in {source.name}; found: {found}"
        )
    if unknown := [field for field in columns if field not in FIELDS]:
        raise DataError(
            f"{source.where('columns')}: `{unknown[0]}` is no field of a format; fields: {', '.join(sorted(FIELDS))}"
        )
    form = source.get("format") or recognise(row, columns, text_field)
    if form is None:
        raise DataError(f"{source.where('data_files')}: {source.name}: {unknown_columns(row)}")
    answers_only = bool(recipe.get("training.assistant_only_loss"))
    settings = RowSettings(
        form=form,
        columns=columns,
        text_field=text_field,
        answers_only=answers_only,
        completion_only=recipe.get("training.completion_only_loss") is not False,
        control_tokens=source.get("control_tokens", "error"),
    )
    _require_meaningful_loss(source, settings, plain=isinstance(row.get(columns.get("prompt", "prompt")), str))
    literal = form == "input_ids" or (form == "text" and not answers_only)
    return settings, not literal


def _first_row(source: Source) -> dict:
    """The first object among the rows; only its names are looked at."""
    broken = None
    for chunk in islice(read_split(source, source.split), 2):
        for number, row in rows_of(chunk):
            if isinstance(row, dict):
                return row
            broken = broken or f"{chunk.place(number)}: " + (
                row.message if isinstance(row, BadRow) else "a row must be an object with named fields"
            )
    if broken:
        raise DataError(broken)
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
