"""Mixtures, held-out shares, streams and the token cache: which rows are trained on, and how often."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.data import prepare, scan
from lora_recipes.data.audit import audit
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.data.masks import Masker
from lora_recipes.errors import MachineError
from lora_recipes.model.build import end_token_ids, load_tokenizer
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe


def row(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": text}]}


def write(path: str, texts: list[str]) -> str:
    Path(path).write_text("".join(json.dumps(row(text)) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def load(write_recipe: Callable[..., Path]) -> Callable[..., LoadedData]:
    """The data of a recipe with the given `dataset` (a mapping or a list) and `training` keys."""

    def build(dataset: Any, **training: Any) -> LoadedData:
        path = write_recipe(training=training)
        whole = json.loads(path.read_text())
        path.write_text(json.dumps(whole | {"dataset": dataset}))
        recipe = load_recipe(path)
        source = locate(recipe)
        tokenizer = load_tokenizer(recipe, source)
        return load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))

    return build


def source(path: str, **keys: Any) -> dict[str, Any]:
    return {"path": "json", "data_files": path} | keys


def said(data: LoadedData, rows: Any) -> list[str]:
    """What the assistant says in each row, in order."""
    tokenizer = data.sources[0].masker.tokenizer
    return [
        tokenizer.decode([label for label in row["labels"] if label != -100]).removesuffix("<|im_end|>") for row in rows
    ]


A, B = [f"alpha {number}" for number in range(8)], [f"beta {number}" for number in range(4)]


def test_a_mixture_holds_each_source_as_often_as_its_weight_says(load: Callable[..., LoadedData]):
    mixture = [source(write("a.jsonl", A), weight=0.5), source(write("b.jsonl", B), weight=3)]
    data = load(mixture)
    counts = Counter(said(data, data.train()))
    assert {text: counts[text] for text in B} == dict.fromkeys(B, 3)
    assert sum(counts[text] for text in A) == 4 and max(counts[text] for text in A) == 1
    report = audit(data, 4, 4)
    assert [(part["weight"], part["epoch_rows"]) for part in report["sources"]] == [(0.5, 4), (3.0, 12)]
    assert report["epoch_rows"] == 16 and report["rows"] == 12


def test_a_mixture_is_in_the_same_order_every_time_and_in_another_with_another_seed(load: Callable[..., LoadedData]):
    mixture = [source(write("a.jsonl", A)), source(write("b.jsonl", B))]
    first, again, other = (said(data, data.train()) for data in (load(mixture), load(mixture), load(mixture, seed=7)))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(A + B)
    assert first != A + B


def test_sources_of_different_formats_mix(load: Callable[..., LoadedData]):
    write("a.jsonl", A)
    Path("b.csv").write_text("question,answer\nsay it,beta 0\n", encoding="utf-8")
    data = load([source("a.jsonl"), {"path": "csv", "data_files": "b.csv"}])
    assert sorted(said(data, data.train())) == sorted([*A, "beta 0"])
    assert [part["format"] for part in audit(data, 1, 1)["sources"]] == ["messages", "question_answer"]


def test_a_share_is_held_out_and_never_trained_on(load: Callable[..., LoadedData]):
    texts = [f"gamma {number}" for number in range(40)]
    data = load(source(write("a.jsonl", texts), eval_split=0.1))
    train, held = said(data, data.train()), said(data, data.heldout())
    assert len(held) == 4 and sorted(train + held) == sorted(texts)
    # The share does not depend on the order of the file.
    data = load(source(write("b.jsonl", texts[::-1]), eval_split=0.1))
    assert sorted(said(data, data.heldout())) == sorted(held)


def test_duplicates_fall_on_one_side_of_a_share(load: Callable[..., LoadedData]):
    texts = [f"delta {number % 5}" for number in range(40)]
    data = load(source(write("a.jsonl", texts), eval_split=0.2))
    assert not set(said(data, data.train())) & set(said(data, data.heldout()))
    report = audit(data, 1, 1)
    assert report["overlap"] == 0 and report["duplicates"] > 0


def test_overlap_between_two_sources_is_an_error(load: Callable[..., LoadedData]):
    files = {"train": write("b.jsonl", B), "held": write("c.jsonl", [*A[:2], "new"])}
    report = audit(load([source(write("a.jsonl", A)), source("", data_files=files, eval_split="held")]), 1, 1)
    assert report["overlap"] == 2
    (problem,) = [problem for problem in report["problems"] if problem["kind"] == "overlap"]
    assert "2 of 3 held-out rows are also trained on" in problem["text"] and "c.jsonl:1, c.jsonl:2" in problem["text"]


@pytest.mark.parametrize("max_length", [160, 24])
def test_a_stream_gives_the_rows_of_the_cache_and_keeps_no_tokens(load: Callable[..., LoadedData], max_length: int):
    texts = [f"{word} {'word ' * number}end" for number, word in enumerate(A)]
    keys: dict[str, Any] = {"truncation": "keep_start", "eval_split": 0.25}
    kept = load(source(write("a.jsonl", texts), **keys), max_length=max_length)
    data = load(source("a.jsonl", streaming=True, **keys), max_length=max_length)
    assert data.sources[0].train.prepared.tokens is None
    order = lambda rows: sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)  # noqa: E731
    assert order(data.train()) == order(kept.train())
    assert order(data.heldout()) == order(kept.heldout())
    first = [row["input_ids"] for row in data.train()]
    assert first == [row["input_ids"] for row in data.train()]  # shuffled the same every time
    one, two = audit(data, 1, 1), audit(kept, 1, 1)
    assert {key: one[key] for key in ("rows", "tokens", "rows_truncated", "answers_truncated", "trained_tokens")} == {
        key: two[key] for key in ("rows", "tokens", "rows_truncated", "answers_truncated", "trained_tokens")
    }


def test_streams_of_two_sources_are_interleaved_by_weight(load: Callable[..., LoadedData]):
    mixture = [
        source(write("a.jsonl", A * 20), streaming=True, weight=0.5),
        source(write("b.jsonl", B * 20), streaming=True, weight=2),
    ]
    data = load(mixture)
    counts = Counter(text.split()[0] for text in said(data, data.train()))
    assert 0.2 < counts["alpha"] / counts["beta"] < 1.2
    assert counts["beta"] >= 160


def test_a_second_start_tokenizes_nothing(load: Callable[..., LoadedData], monkeypatch: pytest.MonkeyPatch):
    keys = source(write("a.jsonl", A))
    before = said(load(keys), load(keys).train())

    def never(*_: Any) -> Any:
        raise AssertionError("tokenized once more")

    monkeypatch.setattr(Masker, "tokenize", never)
    assert said(load(keys), load(keys).train()) == before
    with pytest.raises(AssertionError, match="once more"):  # another text is another entry
        load(source(write("a.jsonl", B)))


def test_the_result_does_not_depend_on_the_number_of_processes(
    load: Callable[..., LoadedData], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    texts = [f"row {number}" for number in range(300)]
    keys = source(write("a.jsonl", texts), eval_split=0.1)
    alone = load(keys)
    monkeypatch.setattr(scan, "SMALL", 0)
    monkeypatch.setattr("lora_recipes.data.readers.CHUNK_BYTES", 2000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    data = load(keys, dataset_num_proc=2)
    for rows, others in ((alone.train(), data.train()), (alone.heldout(), data.heldout())):
        assert [dict(row) for row in rows] == [dict(row) for row in others]
    assert alone.sources[0].train.prepared.place(7) == data.sources[0].train.prepared.place(7) == "a.jsonl:8"


def test_too_little_room_for_the_tokens_is_said_before_anything_is_written(
    load: Callable[..., LoadedData], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(MachineError, match=r"dataset\.streaming: true"):
        load(source(write("a.jsonl", A)))
    load(source("a.jsonl", streaming=True))


def test_escaped_control_tokens_are_not_counted_as_odd(load: Callable[..., LoadedData]):
    texts = ["plain", "say <|im_end|> twice"]
    report = audit(load(source(write("a.jsonl", texts), control_tokens="escape")), 1, 1)
    assert report["odd_characters"] == {} and report["problems"] == []
