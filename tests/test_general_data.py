"""The general rows of the forgetting check: enough of them, both languages, no two alike, none like a row trained on."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from lora_recipes.data.check import check_data
from lora_recipes.errors import DataError
from lora_recipes.recipe import load_recipe
from tests.conftest import ROOT

GENERAL = ROOT / "data" / "general"
FILES = {"chat": GENERAL / "chat.jsonl", "text": GENERAL / "text.jsonl"}
TRAINED = [*sorted((ROOT / "data" / "orders").glob("*.jsonl")), ROOT / "data" / "tutorial.jsonl"]
HAN = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[a-z0-9']+")
WORDS, CHARACTERS = 12, 25  # a run as long as this, of words or of Chinese characters, is no coincidence
ENGLISH = {"chat": (30, 150), "text": (80, 160)}  # words
CHINESE = {"chat": (50, 260), "text": (110, 330)}  # Chinese characters


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parts(row: dict) -> list[str]:
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


def judged(row: dict) -> list[str]:
    """The texts whose length counts: a plain text, or each answer."""
    return parts(row) if "text" in row else [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def chinese(row: dict) -> bool:
    text = "".join("".join(judged(row)).split())
    return len(HAN.findall(text)) > len(text) / 5  # code stays as it is in a Chinese row


def runs(row: dict) -> Iterator[tuple[str, ...]]:
    """Every run of words and every run of Chinese characters, punctuation left out."""
    text = " ".join(parts(row))
    for units, length in ((WORD.findall(text.lower()), WORDS), (HAN.findall(text), CHARACTERS)):
        yield from (tuple(units[start : start + length]) for start in range(len(units) - length + 1))


def shared(these: list[dict], others: list[dict]) -> set[tuple[str, ...]]:
    return {run for row in these for run in runs(row)} & {run for row in others for run in runs(row)}


def repeated(these: list[dict]) -> list[tuple[str, ...]]:
    """Runs that stand in two of the rows."""
    found = sorted((run, number) for number, row in enumerate(these) for run in set(runs(row)))
    return [run for (run, _), (other, _) in pairwise(found) if run == other]


@pytest.fixture(scope="module")
def general() -> dict[str, list[dict]]:
    return {name: rows(path) for name, path in FILES.items()}


def test_there_are_enough_rows_in_both_languages(general: dict[str, list[dict]]):
    counted = {name: (len(found), sum(map(chinese, found))) for name, found in general.items()}
    assert counted["chat"][0] >= 160 and counted["text"][0] >= 120, counted
    assert sum(count for count, _ in counted.values()) >= 200
    for name, (count, in_chinese) in counted.items():
        assert count / 4 <= in_chinese <= count / 2, (name, counted)


def test_each_line_is_one_object_of_the_form_and_written_as_json_dumps_does():
    for path in FILES.values():
        text = path.read_bytes().decode()
        assert text.endswith("\n") and not text.startswith("\ufeff")
        assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(path))


def test_conversations_alternate_and_some_have_two_turns_or_a_system_message(general: dict[str, list[dict]]):
    shapes = ["".join(message["role"][0] for message in row["messages"]) for row in general["chat"]]
    assert all(set(row) == {"messages"} for row in general["chat"])
    assert all(set(message) == {"role", "content"} for row in general["chat"] for message in row["messages"])
    assert all(re.fullmatch("s?(ua)+", shape) for shape in shapes)
    assert sum(shape.count("a") > 1 for shape in shapes) >= 25 and sum(shape[0] == "s" for shape in shapes) >= 10
    assert all(set(row) == {"text"} for row in general["text"])


def test_lengths_keep_their_bounds(general: dict[str, list[dict]]):
    for name, found in general.items():
        for number, row in enumerate(found, start=1):
            low, high = (CHINESE if chinese(row) else ENGLISH)[name]
            for text in judged(row):
                length = len(HAN.findall(text)) if chinese(row) else len(text.split())
                assert low <= length <= high, f"{name}.jsonl:{number} has {length}: {text[:60]}"


def test_no_two_rows_are_alike(general: dict[str, list[dict]]):
    everything = general["chat"] + general["text"]
    texts = [text for row in everything for text in judged(row)]
    questions = [row["messages"][-2]["content"] for row in general["chat"]]
    assert len(set(texts)) == len(texts) and len(set(questions)) == len(questions)
    assert repeated(everything) == []


def test_no_row_is_like_one_that_the_demo_recipes_train_on(general: dict[str, list[dict]]):
    trained = [row for path in TRAINED for row in rows(path)]
    assert len(trained) > 1000
    assert shared(general["chat"] + general["text"], trained) == set()


def test_no_answer_looks_like_the_order_task(general: dict[str, list[dict]]):
    for row in general["chat"] + general["text"]:
        for text in judged(row):
            assert not text.lstrip().startswith(("{", "[")), text
            assert not any(f'"{key}":' in text for key in ("customer", "item", "quantity", "city")), text


@pytest.mark.parametrize("name", FILES)
def test_a_reworded_copy_would_be_found(general: dict[str, list[dict]], name: str):
    """The control of the two tests above, in both languages: a row again with its ends cut off."""
    for row in (general[name][0], next(row for row in general[name] if chinese(row))):
        copy = {"text": "So: " + judged(row)[0][7:-7] + " Indeed."}
        assert repeated([*general[name], copy]) and shared([copy], general[name])


def test_they_hold_no_control_characters_and_no_addresses(general: dict[str, list[dict]]):
    for text in (text for row in general["chat"] + general["text"] for text in parts(row)):
        assert text == text.strip() and text == unicodedata.normalize("NFC", text)
        assert not [sign for sign in text if unicodedata.category(sign)[0] == "C" and sign != "\n"], text
        assert not re.search(r"https?://(?!example\.com)|www\.|@(?!example\.com)\w+\.[a-z]", text), text
        assert not re.search(r"\d{7,}", text), text  # a telephone or card number; no other number is so long


@pytest.mark.parametrize(("name", "answers_only"), [("chat", True), ("text", False)])
def test_the_data_reader_takes_every_row(
    write_recipe: Callable[..., Path],
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    general: dict[str, list[dict]],
    name: str,
    answers_only: bool,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))

    def check(path: Path) -> None:
        data = {"data_files": {"train": str(path)}, "eval_split": None}
        check_data(load_recipe(write_recipe(dataset=data, training={"assistant_only_loss": answers_only})))

    check(FILES[name])
    [sound] = (workdir / "cache").rglob("*.sound.json")
    assert json.loads(sound.read_text())["rows"] == len(general[name])
    broken = workdir / "broken.jsonl"
    broken.write_text(FILES[name].read_text(encoding="utf-8") + '{"messages": [], "text": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=f":{len(general[name]) + 1}"):
        check(broken)
