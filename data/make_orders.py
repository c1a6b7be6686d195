"""Generate the demo data set "orders": short order messages in, one small JSON object out.

Running this file rewrites ``orders/train.jsonl`` and ``orders/heldout.jsonl`` next to it,
byte for byte the same every time.  ``--check`` writes nothing: it verifies that the files
on disk are what would be generated and that the two splits share no phrasing and no value.

The values come from ``words/*.txt`` (one per line; every sixth line is held out) and the
hand-written sentences from ``phrasings/*.txt`` (one per line, ``\\n`` stands for a line break).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20250117
SYSTEM = "Order to JSON."
ROWS = {"train": 1200, "heldout": 240}
FIELDS = ("customer", "item", "quantity", "city")
WORD_LISTS = ("first_names", "last_names", "modifiers", "nouns", "cities")
GREETING_SHARE = 0.2
CLOSING_SHARE = 0.2
LOWER_START_SHARE = 0.3
SHARED_WORDS_ALLOWED = 2  # consecutive words a held-out phrasing may share with a training one


# ---------------------------------------------------------------- reading the lists


def read_lines(name: str) -> list[str]:
    """The non-empty lines of one text file below this folder."""
    text = (HERE / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(set(lines)) != len(lines):
        raise ValueError(f"{name} has a line twice")
    return lines


def read_phrasings(name: str) -> list[str]:
    """The sentences of one file in ``phrasings``; a phrasing may have several lines."""
    return [line.replace("\\n", "\n") for line in read_lines(f"phrasings/{name}.txt")]


def split_values(values: list, split: str) -> list:
    """Every sixth value is held out, the others are for training."""
    wanted = split == "heldout"
    return [value for index, value in enumerate(values) if (index % 6 == 5) == wanted]


def load_values(split: str) -> dict[str, list]:
    """All values one split may use, by kind."""
    values = {name: split_values(read_lines(f"words/{name}.txt"), split) for name in WORD_LISTS}
    values["quantities"] = split_values(list(range(2, 130)), split)
    return values


# ---------------------------------------------------------------- building one row


class Cycle:
    """Hand out values in shuffled order and use each once before any comes again."""

    def __init__(self, values: list, rng: random.Random):
        self.values, self.rng, self.left = list(values), rng, []

    def next(self):
        if not self.left:
            self.left = list(self.values)
            self.rng.shuffle(self.left)
        return self.left.pop()


def make_order(cycles: dict[str, Cycle]) -> dict[str, str | int]:
    return {
        "customer": f"{cycles['first_names'].next()} {cycles['last_names'].next()}",
        "item": f"{cycles['modifiers'].next()} {cycles['nouns'].next()}",
        "quantity": cycles["quantities"].next(),
        "city": cycles["cities"].next(),
    }


def lower_first(phrasing: str) -> str:
    """Lower-case the first letter, except in "I" and "PO" (a placeholder starts with ``{``)."""
    if re.match(r"(I|PO)\b", phrasing):
        return phrasing
    return phrasing[0].lower() + phrasing[1:]


def add_greeting(phrasing: str, greeting: str, rng: random.Random) -> str:
    style = rng.randrange(3)
    if style == 0:
        return f"{greeting}, {lower_first(phrasing)}"
    if style == 1:
        return f"{greeting.capitalize()}! {phrasing}"
    return f"{greeting.capitalize()},\n{phrasing}"


def add_closing(phrasing: str, closing: str, rng: random.Random) -> str:
    if phrasing[-1] in ".?!":
        return f"{phrasing} {closing.capitalize()}{rng.choice(['', '.', '!'])}"
    return f"{phrasing}{rng.choice([', ', ' - ', '. '])}{closing}"


def add_noise(phrasing: str, greetings: Cycle, closings: Cycle, rng: random.Random) -> str:
    """Vary the wording around the order; the placeholders stay untouched."""
    if rng.random() < LOWER_START_SHARE:
        phrasing = lower_first(phrasing)
    if rng.random() < GREETING_SHARE:
        phrasing = add_greeting(phrasing, greetings.next(), rng)
    if rng.random() < CLOSING_SHARE:
        phrasing = add_closing(phrasing, closings.next(), rng)
    return phrasing


def make_row(message: str, order: dict[str, str | int]) -> dict:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(order, ensure_ascii=False)},
        ]
    }


def make_split(split: str) -> list[dict]:
    """The rows of one split, the same on every call."""
    rng = random.Random(f"{SEED}-{split}")
    cycles = {name: Cycle(values, rng) for name, values in load_values(split).items()}
    phrasings = Cycle(read_phrasings(split), rng)
    greetings = Cycle(read_phrasings(f"{split}_greetings"), rng)
    closings = Cycle(read_phrasings(f"{split}_closings"), rng)
    rows = []
    for _ in range(ROWS[split]):
        order = make_order(cycles)
        template = add_noise(phrasings.next(), greetings, closings, rng)
        rows.append(make_row(template.format(**order), order))
    return rows


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------- checking


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def literal_runs(phrasing: str) -> set[tuple[str, ...]]:
    """All runs of words in a phrasing that are one longer than may be shared; placeholders break a run."""
    length = SHARED_WORDS_ALLOWED + 1
    pieces = [words_of(piece) for piece in re.split(r"\{\w+\}", phrasing)]
    return {tuple(words[start : start + length]) for words in pieces for start in range(len(words) - length + 1)}


def normal(phrasing: str) -> str:
    """The phrasing without its case and without repeated or closing blanks."""
    return " ".join(phrasing.lower().split())


def contains(text: str, value: str | int) -> bool:
    """Whether the value stands in the text as whole words, whatever the case."""
    return bool(re.search(rf"(?<![\w-]){re.escape(str(value).lower())}(?![\w-])", text.lower()))


def phrasing_problems() -> list[str]:
    """Held-out wording must not contain training wording."""
    problems = []
    train, heldout = read_phrasings("train"), read_phrasings("heldout")
    known_runs = set().union(*map(literal_runs, train))
    for text in heldout:
        for run in sorted(literal_runs(text) & known_runs):
            problems.append(f"held-out phrasing shares {' '.join(run)!r} with training: {text!r}")
        for other in train:
            if normal(other) in normal(text):
                problems.append(f"held-out phrasing {text!r} contains training phrasing {other!r}")
    for part in ("greetings", "closings"):
        for text in read_phrasings(f"train_{part}"):
            for other in heldout + read_phrasings(f"heldout_{part}"):
                if contains(other, text):
                    problems.append(f"held-out text {other!r} contains training text {text!r}")
    return problems


def value_problems(train: list[dict], heldout: list[dict]) -> list[str]:
    """Held-out values must not occur, as whole words, anywhere in the training rows."""
    training_text = "\n".join(m["content"] for row in train for m in row["messages"]).lower()
    values = {value for values in load_values("heldout").values() for value in values}
    found = [f"held-out value {v!r} occurs in training" for v in values if contains(training_text, v)]
    both = {row["messages"][1]["content"] for row in train} & {row["messages"][1]["content"] for row in heldout}
    return sorted(found) + [f"message in both splits: {text!r}" for text in sorted(both)]


def row_problems(rows: list[dict]) -> list[str]:
    """Every answer must be readable off its message in exactly one way."""
    problems = []
    for row in rows:
        message = row["messages"][1]["content"]
        order = json.loads(row["messages"][2]["content"])
        if tuple(order) != FIELDS:
            problems.append(f"wrong fields: {order}")
        for value in order.values():
            if message.count(str(value)) != 1:
                problems.append(f"{value!r} is not exactly once in {message!r}")
        if re.findall(r"\d+", message) != [str(order["quantity"])]:
            problems.append(f"a second number in {message!r}")
    return problems


def find_problems(train: list[dict], heldout: list[dict]) -> list[str]:
    """Everything that is wrong with the two splits, as sentences; empty when all is well."""
    return phrasing_problems() + value_problems(train, heldout) + row_problems(train + heldout)


def stale_files(splits: dict[str, list[dict]]) -> list[str]:
    stale = []
    for split, rows in splits.items():
        path = HERE / "orders" / f"{split}.jsonl"
        if not path.is_file() or path.read_bytes() != to_jsonl(rows).encode("utf-8"):
            stale.append(f"orders/{path.name} is not what make_orders.py generates")
    return stale


def write_files(splits: dict[str, list[dict]]) -> None:
    (HERE / "orders").mkdir(exist_ok=True)
    for split, rows in splits.items():
        path = HERE / "orders" / f"{split}.jsonl"
        path.write_bytes(to_jsonl(rows).encode("utf-8"))
        print(f"wrote orders/{path.name}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate or check the demo data set 'orders'.")
    parser.add_argument("--check", action="store_true", help="write nothing, verify the files on disk")
    args = parser.parse_args(argv)
    splits = {split: make_split(split) for split in ROWS}
    problems = find_problems(splits["train"], splits["heldout"])
    if args.check:
        problems += stale_files(splits)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    if not args.check:
        write_files(splits)
    print("ok: train and heldout share no phrasing and no value")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
