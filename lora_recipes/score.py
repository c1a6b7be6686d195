"""Scores of answers against what was expected: exact match and, for JSON objects, fields that are right."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Counts over the rows that have an expected answer; `stopped` counts over all rows."""

    asked: int
    stopped: int
    expected: int
    exact: int
    fields: int
    fields_right: int

    def as_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "expected": self.expected,
            "exact_match": _share(self.exact, self.expected),
            "field_match": _share(self.fields_right, self.fields),
            "stopped_by_eos": _share(self.stopped, self.asked),
        }


def score(rows: list[dict[str, Any]], who: str) -> Score | None:
    """Score one model's answers ("base", "adapter" or "merged") in the rows of generations.jsonl; None without any."""
    answered = [row for row in rows if who in row]
    if not answered:
        return None
    judged = [row for row in answered if row["expected"] is not None]
    fields = [fields_right(row[who]["text"], row["expected"]) for row in judged]
    return Score(
        asked=len(answered),
        stopped=sum(row[who]["stopped"] == "eos" for row in answered),
        expected=len(judged),
        exact=sum(row[who]["text"] == row["expected"] for row in judged),
        fields=sum(total for _, total in fields),
        fields_right=sum(right for right, _ in fields),
    )


def fields_right(answer: str, expected: str) -> tuple[int, int]:
    """(fields of the expected JSON object that the answer has with the same value, fields expected).

    An expected answer that is no JSON object has no fields: (0, 0). An answer that is no object has none right.
    """
    wanted, given = _object(expected), _object(answer)
    if wanted is None:
        return 0, 0
    if given is None:
        return 0, len(wanted)
    missing = object()
    return sum(given.get(name, missing) == value for name, value in wanted.items()), len(wanted)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
