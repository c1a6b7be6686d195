"""Mixtures, held-out shares, streams and the token cache: which rows are trained on, and how often."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.data import scan
from lora_recipes.data.audit import audit
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.data.masks import Masker
from lora_recipes.data.questions import questions
from lora_recipes.data.show import row_of, worst_rows
from lora_recipes.errors import DataError, MachineError, RecipeError
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
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(MachineError, match=r"dataset\.streaming: true"):
        load(source(write("a.jsonl", A)))
    load(source("a.jsonl", streaming=True))


def test_escaped_control_tokens_are_not_counted_as_odd(load: Callable[..., LoadedData]):
    texts = ["plain", "say <|im_end|> twice"]
    report = audit(load(source(write("a.jsonl", texts), control_tokens="escape")), 1, 1)
    assert report["odd_characters"] == {} and report["problems"] == []


TEXT = {"text": "Human: say it\nAssistant: alpha 0"}


def write_rows(path: str, rows: list[Any]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def bare_model(tiny_model: Path, workdir: Path) -> dict[str, str]:
    """The `model` section of a copy of the tiny model whose tokenizer has no chat template."""
    shutil.copytree(tiny_model, workdir / "bare")
    (workdir / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((workdir / "bare" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (workdir / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
    return {"pretrained_model_name_or_path": "bare"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("other", [{"prompt": "say it", "completion": "beta 0"}, row("beta 0")], ids=["plain", "chat"])
def test_sources_that_need_different_templates_are_refused_in_any_order(
    write_recipe: Callable[..., Path], bare_model: dict, order: tuple[int, int], other: dict
):
    files = [write_rows("a.jsonl", [TEXT]), write_rows("b.jsonl", [other])]
    path = write_recipe(model=bare_model)
    whole = json.loads(path.read_text()) | {"dataset": [source(files[place]) for place in order]}
    path.write_text(json.dumps(whole))
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe, locate(recipe))
    with pytest.raises(RecipeError, match=r"no chat template.*chat_template_path"):
        load_data(recipe, tokenizer, {2})


def test_a_source_without_a_good_row_is_a_problem_and_not_a_crash(load: Callable[..., LoadedData]):
    mixture = [source(write("a.jsonl", A)), source(write_rows("b.jsonl", [{"messages": []}] * 3), bad_rows="skip")]
    data = load(mixture)
    assert ["b.jsonl" in problem["text"] for problem in audit(data, 1, 1)["problems"]] == [True]
    assert sorted(said(data, data.train())) == A


def test_a_weight_of_hundreds_is_streamed_as_often(load: Callable[..., LoadedData]):
    data = load(source(write("b.jsonl", B), streaming=True, weight=256))
    assert Counter(said(data, data.train())) == dict.fromkeys(B, 256)


def test_two_slices_of_one_file_are_two_sources_to_look_at(load: Callable[..., LoadedData]):
    write("a.jsonl", A)
    data = load([source("a.jsonl", split="train[:50%]"), source("a.jsonl", split="train[50%:]")])
    shown = worst_rows(data, audit(data, 1, 1), 8)
    assert sorted(row.row for row in shown) == list(range(1, 9))
    assert [row_of(data, 1).place, row_of(data, 8).place] == ["a.jsonl:1", "a.jsonl:8"]


def test_a_slice_counts_only_its_own_odd_and_bad_rows(load: Callable[..., LoadedData]):
    rows = [row("zero\u200bwidth"), {"messages": []}] * 50
    write_rows("a.jsonl", rows)
    report = audit(load(source("a.jsonl", split="train[:10]", bad_rows="skip")), 1, 1)
    assert report["odd_characters"] == {"zero_width": 5}
    assert report["bad_row_kinds"] == {"empty": 5} and report["rows"] == 10


def test_columns_that_are_mapped_win_over_other_columns_of_the_row(load: Callable[..., LoadedData]):
    write_rows("a.jsonl", [{**row("alpha"), "q": "say it", "a": "beta"}])
    data = load(source("a.jsonl", columns={"prompt": "q", "completion": "a"}))
    assert said(data, data.train()) == ["beta"]
    with pytest.raises(DataError, match=r"`prompt` has no effect: rows in the format `messages`"):
        load(source("a.jsonl", format="messages", columns={"prompt": "q"}))
    with pytest.raises(DataError, match="`dataset_text_field` has no effect"):
        load(source("a.jsonl"), dataset_text_field="nowhere")


def test_an_optional_column_may_come_late(load: Callable[..., LoadedData], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_recipes.data.readers.CHUNK_BYTES", 100)
    rows = [{"q": "say it", "a": text} for text in A] + [{"q": "say it", "a": "last", "sys": "be brief"}]
    columns = {"prompt": "q", "completion": "a", "system": "sys"}
    data = load(source(write_rows("a.jsonl", rows), columns=columns))
    whole = data.sources[0].masker.tokenizer.decode(data.train()[8]["input_ids"])
    assert whole.startswith("<|im_start|>system\nbe brief")


def test_data_files_of_a_folder_are_the_ones_that_are_read(load: Callable[..., LoadedData]):
    Path("folder").mkdir()
    write("folder/train.jsonl", A)
    write("folder/one.jsonl", ["only"])
    keys = {"path": "folder", "data_files": {"train": "one.jsonl"}}
    data = load(keys)
    assert said(data, data.train()) == ["only"]
    with pytest.raises(DataError, match="`name` has no effect"):
        load({"path": "folder", "name": "x"})


def test_rows_cut_to_nothing_count_as_left_out(load: Callable[..., LoadedData]):
    long = {"messages": [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "yes"}]}
    write_rows("a.jsonl", [row("yes"), long])
    keys = {"truncation": "keep_start", "bad_rows": "skip", "max_bad_fraction": 0.1}
    report = audit(load(source("a.jsonl", **keys), max_length=40), 1, 1)
    assert [problem["kind"] for problem in report["problems"]] == ["max_bad_fraction"]
    assert report["lengths"]["max"] > 40  # the histogram shows what is too long


@pytest.mark.parametrize("weight", [1, 2])
def test_every_source_has_its_own_counts(load: Callable[..., LoadedData], weight: int):
    report = audit(load([source(write("a.jsonl", A)), source(write("b.jsonl", [*B, *B]), weight=weight)]), 1, 1)
    assert [part["duplicates"] for part in report["sources"]] == [0, 4]
    assert [part["lengths"]["max"] for part in report["sources"]] and report["duplicates"] == 4


def test_a_tool_call_is_asked_for_but_not_scored(load: Callable[..., LoadedData], workdir: Path):
    (workdir / "tools.jinja").write_text(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    rows = [{"messages": [{"role": "user", "content": f"add {n}"}, call], "tools": [{"name": "add"}]} for n in range(4)]
    data = load(source(write_rows("a.jsonl", rows), eval_split=0.25), chat_template_path="tools.jinja")
    assert [question.expected for question in questions(data)] == [None]


@pytest.mark.parametrize("long", ["user", "assistant"])
def test_the_longest_rows_are_as_long_as_what_packing_splits_them_into(
    load: Callable[..., LoadedData], workdir: Path, long: str
):
    turns = {"user": "say it", "assistant": "yes"} | {long: "so it is " * 60}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    Path("a.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(row("no")) + "\n")
    data = load(source("a.jsonl"), packing=True, packing_strategy="bfd_split", max_length=64)
    first, second = data.longest(2)
    assert [len(first["input_ids"]), len(first["labels"])] == [64, 64] and len(second["input_ids"]) < 64
    assert any(label != -100 for label in first["labels"])
