"""Scores of answers against what was expected: exact match and, for JSON objects, fields that are right."""

import json
from dataclasses import dataclass
from typing import Any

MODELS = ("base", "adapter", "merged")


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


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of generations.jsonl say.

    Returns:
        {"scores": {model: …}, "stopped": {model: share}, "merged_equals_adapter": share or None,
        "failed": [questions that a trained model did not end by itself]}
    """
    scores = {who: found.as_json() for who in MODELS if (found := score(rows, who))}
    both = [row for row in rows if "adapter" in row and "merged" in row]
    return {
        "scores": scores,
        "stopped": {who: values["stopped_by_eos"] for who, values in scores.items()},
        "merged_equals_adapter": _share(
            sum(row["adapter"]["text"] == row["merged"]["text"] for row in both), len(both)
        ),
        "failed": [
            row["prompt"] for row in rows if any(row[who]["stopped"] != "eos" for who in MODELS[1:] if who in row)
        ],
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
