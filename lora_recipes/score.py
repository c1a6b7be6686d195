"""Scores of answers against what was expected, and what fails the recipe's `checks`."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MODELS = ("base", "adapter", "merged", "served")
TRAINED = MODELS[1:]  # what `checks` is held against; the base is there to compare with
# What `checks` asks where a recipe says nothing: of all answers, and of one prompt.
DEFAULTS: dict[str, Any] = {"min_stopped": 0.95, "stops": True}
SHOWN_CHARACTERS = 200  # of an answer, in a failure
EXAMPLES = 3  # rows, in a failure over many

# Scripts that write no space between words: each character is a token.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:[.,'’][^\W_{_UNSPACED}]+)*")
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Score:
    """Counts over the rows that have an expected answer; `stopped` and `ended` count over all rows.

    Attributes:
        ended: answers that stopped, neither in a loop nor with a control token in them, of the `must_end` that should.
        f1: sum of token F1.
    """

    asked: int
    stopped: int
    must_end: int
    ended: int
    expected: int
    exact: int
    fields: int
    fields_right: int
    f1: float

    def as_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "expected": self.expected,
            "exact_match": _share(self.exact, self.expected),
            "field_match": _share(self.fields_right, self.fields),
            "token_f1": _share(self.f1, self.expected),
            "stopped_by_eos": _share(self.stopped, self.asked),
            "stops": _share(self.ended, self.must_end),
        }


def summary(rows: list[dict[str, Any]], checks: dict[str, Any]) -> dict[str, Any]:
    """What the rows of generations.jsonl say.

    Args:
        rows: {"prompt", "expected", model: {"text", "stopped"}} and, for what `checks.prompts` asks, "expectation"; an
            answer that did not end as it should has a "fault", one of `checks.prompts` a list "failed".
        checks: the recipe's section.

    Returns:
        {"scores": {model: …}, "stopped": {model: share of answers that end as they should},
        "merged_equals_adapter": share or None, "failed": [{"check", "model", "prompt", "line", "expected", "found", "answer"}]}.
        A failure over many rows has no "prompt" and no "answer"; its "found" is the share, or None where it could not be
        measured, and its "examples" are up to three of the rows. "line" is the row's in generations.jsonl, from 1.
    """
    scores = {who: found.as_json() for who in MODELS if (found := score(rows, who))}
    both = [row for row in rows if "adapter" in row and "merged" in row]
    # Where the clock cut an answer off says nothing of the model.
    both = [row for row in both if "time" not in (row["adapter"]["stopped"], row["merged"]["stopped"])]
    return {
        "scores": scores,
        "stopped": {who: values["stops"] for who, values in scores.items()},
        "merged_equals_adapter": _share(
            sum(row["adapter"]["text"] == row["merged"]["text"] for row in both), len(both)
        ),
        "failed": [*_failed_prompts(rows, checks), *_failed_shares(rows, scores, checks)],
    }


def _failed_prompts(rows: list[dict[str, Any]], checks: dict[str, Any]) -> Iterator[dict[str, Any]]:
    asked = [row["expectation"] for row in rows if "expectation" in row]
    wanted = [expectation_of(entry) for entry in checks.get("prompts", [])]
    if rows and asked != wanted:
        prompt = next((entry["prompt"] for entry in [*wanted, *asked] if entry not in wanted or entry not in asked), "")
        found = "the transcript was made with other `checks.prompts`"
        yield _failure("prompts", None, "an answer to each of the recipe's", found, prompt=prompt)
    for line, row in enumerate(rows, 1):
        for who in TRAINED:
            for failed in row.get(who, {}).get("failed", []):
                answer = _shortened(row[who]["text"], SHOWN_CHARACTERS)
                where = {"prompt": row["prompt"], "line": line, "answer": answer}
                yield _failure(failed["check"], who, failed["expected"], failed["found"], **where)


def _failed_shares(
    rows: list[dict[str, Any]], scores: dict[str, dict[str, Any]], checks: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Whatever is asked for and was not measured has failed."""
    lines = list(enumerate(rows, 1))
    for who in (model for model in TRAINED if model in scores):
        least = checks.get("min_stopped", DEFAULTS["min_stopped"])
        found = scores[who]["stops"]
        # Where each prompt says `stops: false` nothing is left to measure, and only the default asks for it.
        if least and (found < least if found is not None else "min_stopped" in checks):
            unended = [line for line, row in lines if who in row and _must_end(row) and not _ended(row[who])]
            yield _failure("min_stopped", who, least, found, examples=_examples(rows, unended, who))
        for name, bound in checks.get("scores", {}).items():
            if scores[who][name] is None or scores[who][name] < bound["min"]:
                wrong = [line for line, row in lines if who in row and row["expected"] not in (None, row[who]["text"])]
                yield _failure(name, who, bound["min"], scores[who][name], examples=_examples(rows, wrong, who))


def _examples(rows: list[dict[str, Any]], lines: list[int], who: str) -> list[dict[str, Any]]:
    found = []
    for line in lines[:EXAMPLES]:
        row = rows[line - 1]
        fault = {"fault": row[who]["fault"]} if "fault" in row[who] else {}
        answer = _shortened(row[who]["text"], SHOWN_CHARACTERS)
        found.append({"prompt": row["prompt"], "line": line, "answer": answer} | fault)
    return found


def _failure(check: str, who: str | None, expected: Any, found: Any, **more: Any) -> dict[str, Any]:
    without = {"prompt": None, "line": None, "answer": None}
    return {"check": check, "model": who, "expected": expected, "found": found} | without | more


def told(failure: dict[str, Any]) -> str:
    """A failure of `summary` in a line for people: the model, the prompt, what was expected, what came."""
    who, check, expected = failure["model"] or "all models", failure["check"], failure["expected"]
    if failure["prompt"] is not None:
        line = f"{who}, {_asked(failure)}: {check} {expected!r}: {failure['found']}"
        return line if failure["answer"] is None else f"{line}; it answered {_shortened(failure['answer'], 80)!r}"
    found = "it was not measured" if failure["found"] is None else f"found {failure['found']}"
    line = f"{who}: {check} must be at least {expected}, {found}"
    if not failure["examples"]:
        return line
    first = failure["examples"][0]
    came = first.get("fault") or f"it answered {_shortened(first['answer'], 80)!r}"
    return f"{line}; such as {_asked(first)}: {came}"


def _asked(found: dict[str, Any]) -> str:
    """Which prompt, and where its transcript is."""
    where = f" (generations.jsonl:{found['line']})" if found["line"] is not None else ""
    return f"prompt {_shortened(found['prompt'], 80)!r}{where}"


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def expectation_of(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `checks.prompts` with its default filled in."""
    return {"stops": DEFAULTS["stops"], **entry}


def score(rows: list[dict[str, Any]], who: str) -> Score | None:
    """Score one model's answers in the rows of generations.jsonl; None without any."""
    answered = [row for row in rows if who in row]
    if not answered:
        return None
    judged = [row for row in answered if row["expected"] is not None]
    fields = [fields_right(row[who]["text"], row["expected"]) for row in judged]
    must_end = [row[who] for row in answered if _must_end(row)]
    return Score(
        asked=len(answered),
        stopped=sum(row[who]["stopped"] == "eos" for row in answered),
        must_end=len(must_end),
        ended=sum(_ended(given) for given in must_end),
        expected=len(judged),
        exact=sum(row[who]["text"] == row["expected"] for row in judged),
        fields=sum(total for _, total in fields),
        fields_right=sum(right for right, _ in fields),
        f1=sum(token_f1(row[who]["text"], row["expected"]) for row in judged),
    )


def _must_end(row: dict[str, Any]) -> bool:
    return bool(row.get("expectation", DEFAULTS)["stops"])


def _ended(given: dict[str, Any]) -> bool:
    return given["stopped"] == "eos" and "fault" not in given


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
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over `tokens`, each counted as often as it occurs, as SQuAD scores spans."""
    given, wanted = Counter(tokens(answer)), Counter(tokens(expected))
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def tokens(text: str) -> list[str]:
    """Words in lower case without punctuation and English articles; characters of scripts that write no spaces."""
    return [word for word in _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()) if word not in _ARTICLES]


def _share(part: float, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
