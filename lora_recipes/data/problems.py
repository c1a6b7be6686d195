"""What is wrong with rows: said with file and line, the first of them one by one, all of them counted by kind."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lora_recipes.data.formats import BadRow
from lora_recipes.data.readers import Chunk

SHOWN = 20  # problems that are listed one by one
KEPT = 1000  # problems that are remembered with their text
RAW = 2000  # characters of a row that rejected.jsonl repeats
# Control characters, line separators, marks that reorder text, and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

KINDS = {
    "broken_json": "broken JSON",
    "encoding": "not UTF-8",
    "not_an_object": "not an object",
    "columns": "wrong number of cells",
    "other_format": "in another format",
    "field_type": "a field of the wrong type",
    "empty": "empty",
    "unknown_role": "an unknown role",
    "role_order": "roles out of order",
    "nothing_to_learn": "nothing to learn",
    "tools": "broken tools",
    "tool_call": "a broken tool call",
    "control_token": "a control token in the text",
    "template": "refused by the chat template",
    "end_token": "no end token in the loss",
    "vocabulary": "a token outside the vocabulary",
    "too_long": "longer than max_length",
}


@dataclass(frozen=True)
class Problem:
    """One row that cannot be trained on. `row` counts the rows of the split from 0, `number` lines or rows of the file."""

    row: int
    file: str
    unit: str
    number: int
    kind: str
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file} row {self.number}"
        if self.field.startswith("column "):
            return f"{place}:{self.field.removeprefix('column ')}: {self.message}"
        named = self.field.isidentifier()
        what = f"`{self.field}` {self.message}" if named else f"{self.field} {self.message}".strip()
        return f"{place}: {what}"

    def as_json(self) -> dict[str, Any]:
        """With the keys that scripts may rely on."""
        line = self.number if self.unit == "line" else None
        return {**asdict(self), "row": self.row + 1, "line": line, "text": str(self)}


def problem_of(bad: BadRow, row: int, number: int, chunk: Chunk) -> Problem:
    """A BadRow with its place. What it says may repeat the row's own words."""
    return Problem(row, chunk.file, chunk.unit, number, bad.kind, printable(bad.field), printable(bad.message))


def printable(text: str) -> str:
    """The text on one line, with what a terminal would obey, or no file could hold, written out: `\\x1b`, `\\ud800`."""
    return UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def excerpt_of(row: Any) -> str:
    """The row as rejected.jsonl repeats it; "" when it is nested too deep to be written."""
    try:
        text = row.raw if isinstance(row, BadRow) else json.dumps(row, ensure_ascii=False, default=str)
    except RecursionError:
        return ""
    return text[:RAW].encode("utf-8", "replace").decode("utf-8")


def said(problems: Iterable[Problem], counts: Counter[str], rows: int) -> str:
    """The one message about all bad rows of a split."""
    total = sum(counts.values())
    lines = [str(problem) for problem, _ in zip(problems, range(SHOWN), strict=False)]
    if total > len(lines):
        lines.append(f"… and {total - len(lines):,} more")
    kinds = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in counts.most_common())
    lines.append(f"{total:,} of {rows:,} rows cannot be trained on ({kinds}); mend or remove them, or leave them out")
    return "\n".join(lines) + " with dataset.bad_rows: skip"
