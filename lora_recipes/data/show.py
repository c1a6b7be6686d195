"""Rows as the model will see them: which text carries loss, which tokens are control tokens, the worst rows first."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_recipes.data.load import LoadedData, SourceRows, UsedRows
from lora_recipes.data.masks import IGNORED, Masker
from lora_recipes.data.prepare import Tokenizing
from lora_recipes.data.scan import scan
from lora_recipes.errors import RunError

SHOWN_TOKENS = 4096  # of one row; nobody reads further


@dataclass(frozen=True)
class Piece:
    """A run of tokens as text, all with loss or all without, all control tokens or none."""

    text: str
    trained: bool
    control: bool


@dataclass(frozen=True)
class ShownRow:
    """One row of a split. `row` counts from 1; `why` is why it is shown."""

    row: int
    place: str
    source: str
    split: str
    why: str
    input_ids: list[int]
    labels: list[int]
    pieces: list[Piece]

    @property
    def trained(self) -> int:
        """Tokens with loss."""
        return sum(label != IGNORED for label in self.labels)

    def as_json(self) -> dict[str, Any]:
        """With the keys of `preview --json`."""
        return {
            **{name: getattr(self, name) for name in ("row", "place", "source", "split", "why", "input_ids", "labels")},
            "text": "".join(piece.text for piece in self.pieces),
            "trained_text": "".join(piece.text for piece in self.pieces if piece.trained),
        }


def first_example(data: LoadedData) -> ShownRow:
    """The first training row."""
    rows = next(rows for rows in data.sources if len(rows.train.indices))
    return _shown(data, rows, rows.train, int(rows.train.indices[0]), "the first")


def row_of(data: LoadedData, number: int) -> ShownRow:
    """The training row with this number, counted from 1 through the sources in their order.

    Raises:
        RunError: no such row, or one that is not trained on.
    """
    left = number
    for rows in data.sources:
        prepared = rows.train.prepared
        if left <= prepared.rows:
            row = prepared.first_row + left - 1
            (found,) = (prepared.stats["row"] == row).nonzero()
            if len(found):
                return _shown(data, rows, *_used_in(rows, int(found[0]), data.limit))
            reasons = [str(problem) for problem in prepared.problems if problem.row == row]
            reason = reasons[0] if reasons else "it is one of many bad rows, see rejected.jsonl"
            raise RunError(f"row {number} is not trained on: {reason}")
        left -= prepared.rows
    raise RunError(f"there is no row {number}: the training splits have {number - left:,} rows")


def _used_in(rows: SourceRows, index: int, limit: int | None) -> tuple[UsedRows, int, str]:
    """(split, index, what becomes of it) of a good row of the training split."""
    if rows.heldout is not None and rows.heldout.prepared is rows.train.prepared and index in rows.heldout.indices:
        return rows.heldout, index, "held out"
    if index in rows.train.indices:
        return rows.train, index, "trained on"
    return rows.train, index, f"left out: longer than {limit} tokens"


def worst_rows(data: LoadedData, report: dict[str, Any], count: int) -> list[ShownRow]:
    """`count` rows: those that the audit names first, then the first ones of the file."""
    by_key = {rows.source.key: rows for rows in data.sources}
    wanted: dict[tuple[str, str, int], str] = {}
    for found in _in_turn(report["worst"]):
        wanted.setdefault((found["source"], found["split"], found["row"]), found["why"])
    for rows in data.sources:
        for row in rows.train.stat("row")[:count]:
            wanted.setdefault((rows.source.key, rows.train.prepared.split, int(row) + 1), "among the first")
    shown = []
    for (key, split, row), why in list(wanted.items())[:count]:
        rows = by_key[key]
        part = rows.train if rows.train.prepared.split == split or rows.heldout is None else rows.heldout
        (found,) = (part.prepared.stats["row"] == row - 1).nonzero()
        shown.append(_shown(data, rows, part, int(found[0]), why))
    return shown


def _in_turn(worst: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each reason, then the second of each."""
    by_reason = [list(found) for _, found in groupby(sorted(worst, key=lambda found: found["why"]), lambda f: f["why"])]
    order = {found["why"]: place for place, found in reversed(list(enumerate(worst)))}
    by_reason.sort(key=lambda found: order[found[0]["why"]])
    longest = max((len(found) for found in by_reason), default=0)
    return [found[place] for place in range(longest) for found in by_reason if place < len(found)]


def _shown(data: LoadedData, rows: SourceRows, part: UsedRows, index: int, why: str) -> ShownRow:
    prepared = part.prepared
    tokens = prepared.tokens[index] if prepared.tokens is not None else _tokenized(rows, part, index)
    ids, labels = tokens["input_ids"][: data.limit], tokens["labels"][: data.limit]
    return ShownRow(
        row=int(prepared.stats["row"][index]) + 1,
        place=prepared.place(index),
        source=rows.source.name,
        split=prepared.split,
        why=why,
        input_ids=ids,
        labels=labels,
        pieces=_pieces(ids[:SHOWN_TOKENS], labels[:SHOWN_TOKENS], rows.masker),
    )


def _pieces(ids: list[int], labels: list[int], masker: Masker) -> list[Piece]:
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: (pair[1] != IGNORED, pair[0] in masker.special_ids))
    return [
        Piece(masker.tokenizer.decode([token for token, _ in pairs]), trained, control)
        for (trained, control), pairs in runs
    ]


def _tokenized(rows: SourceRows, part: UsedRows, index: int) -> dict[str, list[int]]:
    """A row of a source that keeps no tokens on disk: read and tokenized once more."""
    prepared = part.prepared
    wanted, first = int(prepared.stats["row"][index]), 0
    work = Tokenizing(rows.masker, prepared.settings)
    for _, made in scan(prepared.source, prepared.split.split("[")[0], work, 1):
        for row, tokens in zip(made.stats["row"], made.each(), strict=True):
            if first + int(row) == wanted:
                return tokens
        first += made.rows
    raise AssertionError("a row that was seen is gone")
