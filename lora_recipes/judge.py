"""Holds one answer against what `checks` asks of it: how it ended, and the expectations of its prompt. No model here."""

import json
import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry

from lora_recipes.limits import TooMuch, bounded

CHECK_SECONDS = 5.0  # of one check of one answer; a regular expression can take longer than the world lasts

# An answer is in a loop when its end is one unit, again and again: at least so often, over at least so many columns.
LOOP_REPEATS = 5
LOOP_COLUMNS = 60
LOOP_COLUMNS_WITHOUT_LETTERS = 200  # rules of a table, rows of zeros and dots may be long

# What the chat formats of the field open and close a turn with. None of it belongs into an answer of any model.
CONTROLS = re.compile(
    r"<[|｜][\w▁/-]{1,40}[|｜]>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_RESULTS|AVAILABLE_TOOLS)\]|<</?SYS>>"
    r"|</?(?:start|end)_of_turn>|\[gMASK\]"
)
UNDECODED = "\ufffd"  # what a tokenizer's decoder writes for them
THINKING = ("<think>", "</think>")  # how models think aloud, whatever kind of token it is to their tokenizer


@dataclass(frozen=True)
class Signs:
    """What shows in an answer that the form of the dialogue leaked into it.

    Attributes:
        controls: the tokenizer's control tokens.
        answers: control tokens that the template itself puts inside an answer; they are no leak.
        turns: what opens a line of another turn in templates without control tokens, such as `Human:`.
        stops: the recipe's stop strings. An answer ends there, and what it ends with is no leak.
    """

    controls: Collection[str] = ()
    answers: Collection[str] = ()
    turns: Collection[str] = ()
    stops: Collection[str] = ()


def fault(text: str, stopped: str, signs: Signs) -> str | None:
    """Why an answer did not end as it should, in words; None when it did.

    Args:
        stopped: "eos", "length" or "time".
    """
    if found := leak(text, signs):
        return f"leaks {found!r}"
    if found := loop(text):
        return f"repeats {shortened(found, 40)!r} at its end"
    if stopped != "eos":
        return "ran into the limit of time" if stopped == "time" else "ran into the limit of new tokens"
    if not text.strip():
        return "is empty"
    return "holds bytes that are no UTF-8" if UNDECODED in text else None


def leak(text: str, signs: Signs) -> str | None:
    """The first control token, or opening of another turn, in an answer."""
    for stop in signs.stops:
        text = text.partition(stop)[0]
    own = "|".join(re.escape(name) for name in sorted(signs.controls, key=len, reverse=True)) or r"(?!)"
    turns = "|".join(re.escape(turn) for turn in signs.turns) or r"(?!)"
    for pattern in (re.compile(own), CONTROLS, re.compile(rf"^[ \t]*({turns})", re.MULTILINE)):
        for match in pattern.finditer(text):
            if match.group().strip() not in (*signs.answers, *THINKING):
                return match.group().strip()
    return None


def loop(text: str) -> str | None:
    """The unit that an answer repeats at its end, or None.

    A unit is any run of characters, so it may be a word, a phrase, a line or one character; white space of any kind
    counts as one blank. It must stand there LOOP_REPEATS times back to back, nothing after it, over LOOP_COLUMNS
    columns (a Chinese, Japanese or Korean character takes two). Enumerations, tables and refrains are no loops: their
    items differ, or something follows them, or they are short.
    """
    flat = " " + " ".join(text.split())
    for length in range(1, len(flat) // LOOP_REPEATS + 1):
        unit = flat[-length:]
        if not flat.endswith(unit * LOOP_REPEATS):
            continue
        least = LOOP_COLUMNS if any(character.isalpha() for character in unit) else LOOP_COLUMNS_WITHOUT_LETTERS
        if flat.endswith(unit * -(-least // _columns(unit))):
            return unit.strip()
    return None


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def broken(expectation: dict[str, Any], given: dict[str, Any], base: str | None) -> list[dict[str, Any]]:
    """The expectations that an answer does not meet, each as {"check", "expected", "found"}.

    Args:
        expectation: an entry of `checks.prompts`, `stops` included.
        given: {"text"} and, where there is one, "fault".
        base: what the untrained model answered; None when it was not asked.
    """
    failed = []
    for check, judge in _JUDGES.items():
        wanted = expectation.get(check)
        if wanted is not None and wanted is not False and (found := _judged(judge, wanted, given, base)):
            failed.append({"check": check, "expected": wanted, "found": found})
    return failed


def _judged(judge: "Judge", wanted: Any, given: dict[str, Any], base: str | None) -> str | None:
    """What was found instead. An answer may be anything: what a check stumbles over it has not met."""
    try:
        with bounded(seconds=CHECK_SECONDS):
            return judge(wanted, given, base)
    except TooMuch:
        return f"could not be judged: it took more than {CHECK_SECONDS:g} s"
    except Exception as error:
        return f"could not be judged: {shortened(f'{type(error).__name__}: {error}', 200)}"


def _contains(wanted: str | list[str], given: dict[str, Any], _: str | None) -> str | None:
    missing = [part for part in ([wanted] if isinstance(wanted, str) else wanted) if part not in given["text"]]
    return f"does not contain {' and '.join(map(repr, missing))}" if missing else None


def _equals(wanted: str, given: dict[str, Any], _: str | None) -> str | None:
    return None if given["text"].strip() == wanted.strip() else "is something else"


def _matches(wanted: str, given: dict[str, Any], _: str | None) -> str | None:
    return None if re.search(wanted, given["text"]) else "does not match"


def _differs(_: bool, given: dict[str, Any], base: str | None) -> str | None:
    if base is None:
        return "base was not asked"
    return "is what the untrained model answers" if given["text"] == base else None


# Of what is wanted, what was given, and the base's answer.
Judge = Callable[[Any, dict[str, Any], str | None], str | None]
_JUDGES: dict[str, Judge] = {
    "contains": _contains,
    "equals": _equals,
    "regex": _matches,
    "json": lambda schema, given, _: _json_fault(given["text"], schema),
    "stops": lambda _, given, __: given.get("fault"),
    "differs_from_base": _differs,
}


def _json_fault(text: str, schema: bool | dict[str, Any]) -> str | None:
    """Why a text is not the JSON that is expected. NaN and Infinity, which Python reads, are no JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    if schema is True:
        return None
    # With a registry of its own, nothing that a schema names is fetched.
    wrong = next(Draft202012Validator(schema, registry=Registry()).iter_errors(value), None)
    return f"does not satisfy the schema: {shortened(f'{wrong.json_path}: {wrong.message}', 200)}" if wrong else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters; what was cut shows as `…`."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
