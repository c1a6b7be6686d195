"""What is promised, by number, and how the results of the tests that hold it become a table in the docs.

A test holds a promise by `@pytest.mark.promise("F2")`, or by a parameter's id (`D4-null`) or name (`test_d15_…`) that begins
with the number of a row.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "promises" / "results.json"
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"(?:^|\[|test_)([RDMACG]\d{1,2})(?=[-_\]]|$)", re.IGNORECASE)

FAULTS = {
    "F1": "a run that was cut off becomes the run that was not, to the bit",
    "F2": "a kill at any file of a save leaves a whole checkpoint, and the same command goes on",
    "F3": "a run that is killed at random 30 times ends as the run that was not",
    "F4": "a signal to the launcher, the group or one rank: saved, 143, nobody left",
    "F5": "a grace that ends within a save costs that save only",
    "F6": "a full disk costs no checkpoint; too little room is told before the first step",
    "F7": "a fault in any file of a checkpoint is found, named and passed over",
    "F8": "files are synced before the manifest names them, the folder before it appears",
    "F9": "a number that is not finite ends the run before it is saved or published, with the rows",
    "F10": "memory that runs out is told with the batch and the ways out",
    "F11": "never fewer than two whole checkpoints; the best and the newest stay; only this run's are deleted",
    "F12": "a complete run trains 0 steps",
    "F13": "what has changed is refused with the difference",
    "F14": "two runs never share a folder",
    "F15": "a rank that dies or hangs takes the others down, and nothing half is published",
    "F16": "without a network a cached run works, and anything else is told before it costs",
    "F17": "a merged model appears only when it is whole and proved",
    "F18": "hostile files: no code runs, nothing connects, exit code 4",
    "F19": "no secret in anything that a run writes or says",
    "F20": "all this takes at most 5 % of the time",
    "F21": "a run repeats to the bit from its own folder, and what cannot be repeated is refused",
}
ROWS = {
    "R1": "an unknown key", "R2": "a duplicate key", "R3": "1e-4", "R4": "no, 012, 12:30", "R5": "YAML that is broken",
    "R6": "tags, alias bombs, large files", "R7": "numbers out of range", "R8": "keys in conflict", "R9": "secrets",
    "R10": "names that lead elsewhere", "R11": "a run folder that is taken or read-only", "R12": "what is not there",
    "D1": "no rows", "D2": "unknown columns", "D3": "ShareGPT", "D4": "messages that are none", "D5": "no messages",
    "D6": "content null", "D7": "content that is no text", "D8": "an unknown role", "D9": "no answer",
    "D10": "an empty answer", "D11": "turns out of order", "D12": "broken JSON", "D13": "harmless forms of a file",
    "D14": "encodings", "D15": "cut files", "D16": "mixed formats", "D17": "text that is none", "D18": "half a pair",
    "D19": "a prompt that fills the row", "D20": "rows that are cut", "D21": "control tokens in text",
    "D22": "odd characters", "D23": "duplicates and overlap", "D24": "token ids out of range", "D25": "broken tool calls",
    "D26": "a held-out split that is no use", "D27": "data that changes", "D28": "data that could run code",
    "D29": "fewer rows than a step", "D30": "private text in rows", "M1": "pickles alone",
    "M2": "torn or missing shards", "M3": "weight files that lead elsewhere", "M4": "code in a config",
    "M5": "no template, no end token, a template that rewrites earlier turns", "M6": "a tokenizer that is too large",
    "M7": "weights that are not finite", "M8": "a model that is none of ours", "M9": "an adapter as a base",
    "A1": "an adapter of another base", "A2": "another shape or rank", "A3": "missing keys", "A4": "unknown fields",
    "A5": "targets that match nothing", "A6": "an adapter that is broken or untrained",
    "A7": "a merge into what is quantized, tied or resized", "C1": "half-written and strangers' checkpoints",
    "C2": "a checkpoint of another run", "C3": "a checkpoint without optimizer, schedule or random state",
    "C4": "links, other owners, open folders, pickles", "C5": "a last step that was reached",
    "G1": "answers that are empty, endless, in a loop, unended or not text",
}  # fmt: skip
PROMISES = FAULTS | ROWS
UNTESTED = "no test"

Results = dict[str, dict[str, dict[str, Any]]]  # promise → test function → {"passed", "failed", "skipped", "figures"}


def named_in(name: str) -> set[str]:
    """Rows that a test's name or id begins with."""
    return {found.upper() for found in ROW.findall(name)}


def read() -> Results:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def merged(old: Results, new: Results) -> Results:
    """The old results, with those of the tests that ran now in their place."""
    together = {promise: old.get(promise, {}) | new.get(promise, {}) for promise in old.keys() | new.keys()}
    return {
        promise: {test: together[promise][test] for test in sorted(together[promise])}
        for promise in sorted(together, key=_number)
    }


def figure(tests: dict[str, dict[str, Any]]) -> str:
    """How many cases hold, and what they measured."""
    passed, failed = (sum(test[outcome] for test in tests.values()) for outcome in ("passed", "failed"))
    if not passed + failed:
        return "not run"
    told = [f"{'**FAILED** ' if failed else ''}{passed}/{passed + failed}"]
    return "; ".join([*told, *(said for test in tests.values() for said in test["figures"])])


def table(results: Results) -> str:
    """The promises in Markdown, each with its figure and its tests."""
    held = [row for row in ROWS if figure(results.get(row, {})).split("/")[0].isdecimal()]
    lines = ["| | promise | cases that hold | test |", "|---|---|---|---|"]
    lines += [_line(promise, FAULTS[promise], results.get(promise, {})) for promise in FAULTS]
    lines += [
        "",
        f"Bad inputs: {len(held)} of {len(ROWS)} rows hold, which means: all cases of a row that a test has.",
        "",
    ]
    lines += ["| | bad input | cases that hold | test |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_line(row, ROWS[row], results.get(row, {})) for row in ROWS)])


def _line(promise: str, told: str, tests: dict[str, dict[str, Any]]) -> str:
    names = ", ".join(f"`{test.removeprefix('tests/').replace('::test_', ' ')}`" for test in tests) or UNTESTED
    return f"| {promise} | {told} | {figure(tests)} | {names} |"


def publish(results: Results) -> None:
    """Rewrite the table between its marks in the docs."""
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- promises -->\n")
    after = rest.split("<!-- /promises -->")[1]
    PAGE.write_text(f"{before}<!-- promises -->\n{table(results)}\n<!-- /promises -->{after}", encoding="utf-8")


def _number(promise: str) -> tuple[int, int]:
    return "FRDMACG".index(promise[0]), int(promise[1:])
