"""What is wrong with rows as a whole, or around them, D19, D20, D22, D23, D26 to D30: counted, named, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_recipes.cli import main
from lora_recipes.data import prepare
from lora_recipes.data.check import check_data
from lora_recipes.errors import DataError, RunError
from lora_recipes.recipe import Recipe
from lora_recipes.run_dir import RunDir, write_json, write_text
from lora_recipes.train.preflight import data_hashes, preflight
from tests.data_room.rows import ANSWER, ASKED, GOOD, TEXT, Seen, chat, lines

NUL, BIDI, ZERO_WIDTH = "\x00", "\u202e", "\u200b"


def rows_saying(*texts: str) -> list[dict[str, Any]]:
    return [chat(ASKED, {"role": "assistant", "content": text}) for text in texts]


# -- D19, D20: longer than max_length ---------------------------------------------------------------------------------

LONG_PROMPT = chat({"role": "user", "content": "why " * 400}, ANSWER)
LONG_ANSWER = chat(ASKED, {"role": "assistant", "content": "so " * 30_000})


def test_d19_rows_whose_prompt_fills_max_length_are_counted_and_named(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    seen = audit(recipe_on([GOOD, LONG_PROMPT]))
    assert seen.code == 2 and seen.text.startswith(
        "rows.jsonl:2: 1 of 2 rows are longer than training.max_length = 160"
    )
    seen = audit(recipe_on([GOOD, LONG_PROMPT], {"truncation": "keep_start"}))
    assert seen.code == 2 and "rows.jsonl:2: 1 of 2 rows have no trained token within training.max_length" in seen.text
    assert seen.report["rows_without_loss"] == 1
    seen = audit(recipe_on([GOOD, LONG_PROMPT], {"truncation": "keep_start", "bad_rows": "skip"}))
    assert seen.code == 0 and seen.report["train_rows"] == 1 and seen.report["rows_without_loss"] == 1
    rejected = json.loads(Path("outputs/tiny/rejected.jsonl").read_text())
    assert rejected["kind"] == "too_long" and rejected["reason"].startswith("rows.jsonl:2: ")
    seen = audit(recipe_on([LONG_PROMPT] * 2, {"truncation": "drop"}))
    assert seen.code == 2 and "no row is left to train on" in seen.text


def test_d20_a_row_of_30_000_words_is_never_cut_in_silence(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    seen = audit(recipe_on([GOOD, GOOD, LONG_ANSWER]))
    assert seen.code == 2 and seen.text.startswith("rows.jsonl:3: 1 of 3 rows are longer than")
    dropped = audit(recipe_on([GOOD, GOOD, LONG_ANSWER], {"truncation": "drop"}))
    assert dropped.code == 0 and dropped.report["train_rows"] == 2
    cut = audit(recipe_on([GOOD, GOOD, LONG_ANSWER], {"truncation": "keep_start"}))
    assert cut.code == 0 and cut.report["train_rows"] == 3 and cut.report["lengths"]["max"] > 30_000
    for seen in (dropped, cut):
        assert seen.report["rows_truncated"] == seen.report["answers_truncated"] == 1
        assert seen.report["tokens_truncated"] > 29_000
        assert "1 rows are longer than 160 tokens" in seen.warnings
    over = audit(recipe_on([GOOD, GOOD, LONG_ANSWER], {"truncation": "drop", "max_truncated_fraction": 0.3}))
    assert over.code == 2 and "1 of 3 rows (33.3 %) are longer than 160 tokens" in over.text
    assert "`max_truncated_fraction` allows 30.0 %" in over.text
    assert audit(recipe_on([GOOD] * 3 + [LONG_ANSWER], {"truncation": "drop", "max_truncated_fraction": 0.3})).code == 0


# -- D22, D23, D30: what is in the rows -------------------------------------------------------------------------------


def test_d22_odd_characters_are_counted_by_kind_and_warned_about(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    odd = [f"a{NUL}b", f"a{BIDI}b", f"a{BIDI}{ZERO_WIDTH}b", "a\x1b[0mb", "a\ufffdb", "tab\tand\nline and 中文 é 👍🏽"]
    seen = audit(recipe_on([chat(ASKED, {"role": "assistant", "content": text}) for text in odd]))
    assert seen.code == 0
    assert seen.report["odd_characters"] == {
        "NUL": 1,
        "bidirectional": 2,
        "zero_width": 1,
        "control": 1,
        "replacement": 1,
    }
    assert "2 rows hold bidirectional characters" in seen.warnings


def test_d30_rows_with_secrets_are_counted_and_named_and_their_text_is_not_repeated(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    key, password = "hf_" + "a1B2" * 8, "letmein"
    texts = ["fine", f"use {key}", f"postgres://me:{password}@db.example/x", "hf_short and sk-ip are none"]
    seen = audit(recipe_on([chat(ASKED, {"role": "assistant", "content": text}) for text in texts]))
    assert seen.code == 0 and seen.report["secrets"] == 2
    assert "2 rows hold what looks like a key" in seen.warnings
    named = {worst["place"] for worst in seen.report["worst"] if "secret" in worst["why"]}
    assert named == {"rows.jsonl:2", "rows.jsonl:3"}
    assert key not in json.dumps(seen.report) and password not in json.dumps(seen.report)


def test_d30_secrets_are_found_in_rows_of_tokens_too(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], tiny_model: Path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [tokenizer(text)["input_ids"] for text in ("use hf_" + "a1B2" * 8, "use none")]
    seen = audit(recipe_on([{"input_ids": row, "labels": row} for row in rows]))
    assert seen.code == 0 and seen.report["secrets"] == 1


def test_d23_duplicates_are_counted_and_limited(recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]):
    rows = rows_saying("one", "two", "one", "one", "three")
    seen = audit(recipe_on(rows))
    assert seen.code == 0 and seen.report["duplicates"] == 2 and "2 rows repeat an earlier row" in seen.warnings
    assert {worst["place"] for worst in seen.report["worst"] if "repeats" in worst["why"]} == {
        "rows.jsonl:3",
        "rows.jsonl:4",
    }
    seen = audit(recipe_on(rows, {"max_duplicate_fraction": 0.3}))
    assert seen.code == 2 and "2 of 5 rows (40.0 %) repeat an earlier row" in seen.text
    assert audit(recipe_on(rows, {"max_duplicate_fraction": 0.4})).code == 0


def test_d23_held_out_rows_that_are_trained_on_are_an_error(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], workdir: Path
):
    (workdir / "held.jsonl").write_bytes(lines(*rows_saying("four", "two")))
    held = {"data_files": {"train": "rows.jsonl", "held": "held.jsonl"}, "eval_split": "held"}
    rows = rows_saying("one", "two", "three")
    seen = audit(recipe_on(rows, held))
    assert seen.code == 2 and seen.report["overlap"] == 1
    assert "1 of 2 held-out rows are also trained on" in seen.text and "(held.jsonl:2)" in seen.text
    seen = audit(recipe_on(rows, held | {"overlap": "allow"}))
    assert seen.code == 0 and "1 held-out rows are also trained on" in seen.warnings
    seen = audit(recipe_on(rows * 4, {"eval_split": 0.3}))  # rows that are alike fall on one side
    assert seen.code == 0 and seen.report["overlap"] == 0 and seen.report["heldout_rows"] == 4


# -- D26 to D29: around the rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "split", "said"),
    [
        pytest.param(
            {"train": "rows.jsonl"}, "held", r"tiny\.yaml:\d+: there is no split `held`; splits: train", id="D26"
        ),
        pytest.param(
            "rows.jsonl", "held", r"tiny\.yaml:\d+: there is no split `held`: files without names", id="D26-unnamed"
        ),
        pytest.param(
            {"train": "rows.jsonl", "held": "gone.jsonl"}, "held", r"no such data file: gone\.jsonl", id="D26-file"
        ),
        pytest.param(
            {"train": "rows.jsonl", "held": "empty.jsonl"}, "held", r"split `held` .* has no rows", id="D26-empty"
        ),
        pytest.param(
            {"train": "rows.jsonl", "held": "text.jsonl"},
            "held",
            r"^text\.jsonl:1: `messages` is missing: the other rows are in the format `messages`, the row is in the format `text`",
            id="D26-other-format",
        ),
        pytest.param(
            {"train": "rows.jsonl", "held": "rows.jsonl"}, "held[9:]", r"split `held\[9:\]` .*no rows", id="D26-slice"
        ),
    ],
)
def test_a_held_out_split_that_is_no_use_is_named_before_anything_is_loaded(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], workdir: Path, files: Any, split: str, said: str
):
    (workdir / "empty.jsonl").write_bytes(b"\n")
    (workdir / "text.jsonl").write_bytes(lines(TEXT, TEXT))
    recipe = recipe_on([GOOD, GOOD], {"data_files": files, "eval_split": split})
    with pytest.raises(DataError, match=said):
        check_data(recipe)
    assert audit(recipe).code == 2


def test_d26_a_tiny_held_out_split_is_warned_about(recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]):
    seen = audit(recipe_on(rows_saying(*"abcdefghij"), {"eval_split": 0.2}))
    assert seen.code == 0 and "a score over 2 held-out rows says little" in seen.warnings


def test_d27_a_data_file_that_changed_between_runs_is_refused(recipe_on: Callable[..., Recipe], workdir: Path):
    recipe = recipe_on([GOOD, GOOD])
    run_dir = RunDir.of(recipe.name)
    write_json(run_dir.manifest, {"data": data_hashes(recipe)})
    write_text(run_dir.recipe, json.dumps(recipe.plain()))
    (run_dir.checkpoints / "checkpoint-1").mkdir(parents=True)
    assert preflight(recipe) is not None
    with (workdir / "rows.jsonl").open("a") as stream:
        stream.write("\n")
    with pytest.raises(RunError, match=r"rows\.jsonl: the file has changed") as caught:
        preflight(recipe)
    assert caught.value.exit_code == 2


def test_d27_a_data_file_that_changes_while_it_is_read_is_refused(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch, workdir: Path
):
    whole = prepare.scan

    def changed(*args: Any) -> Any:
        yield from whole(*args)
        (workdir / "rows.jsonl").write_bytes(lines(GOOD))

    recipe = recipe_on([GOOD, GOOD])
    monkeypatch.setattr(prepare, "scan", changed)
    seen = audit(recipe)
    assert seen.code == 2 and "a data file changed while it was read; start again" in seen.text
    assert audit(recipe).report["rows"] == 1


@pytest.mark.parametrize(
    ("path", "files", "said"),
    [
        pytest.param("json", "rows.pkl", "JSONL or Parquet is data only", id="D28"),
        pytest.param("pandas", "rows.jsonl", "convert the rows to JSONL or Parquet", id="D28-builder"),
        pytest.param("json", "rows.pt", "JSONL or Parquet is data only", id="D28-torch"),
        pytest.param("load.py", None, "write its rows to JSONL or Parquet yourself", id="D28-script"),
        pytest.param("json", "https://example.org/rows.jsonl", "check its sha256 and name the copy", id="D28-url"),
        pytest.param("json", {"train": ["a.jsonl", "s3://b/rows.jsonl"]}, "check its sha256", id="D28-url-in-a-list"),
        pytest.param("json", "rows.zip", "unpack it yourself", id="D28-zip"),
        pytest.param("json", "rows.tar.gz", "unpack it yourself", id="D28-tar"),
    ],
)
def test_data_that_could_run_code_or_change_is_refused(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], path: str, files: Any, said: str
):
    recipe = write_recipe(dataset={"path": path, "data_files": files, "eval_split": None})
    for verb in ("check", "audit"):
        assert main([verb, str(recipe)]) == 4
        assert said in capsys.readouterr().err


def test_d29_fewer_rows_than_one_step_are_warned_about_with_the_numbers(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    seen = audit(recipe_on(rows_saying(*"abc"), **training))
    assert seen.code == 0 and "3 rows are fewer than the 8 of one step; lower training.gradient_acc" in seen.warnings
    assert "of one step" not in audit(recipe_on(rows_saying(*"abcdefgh"), **training)).warnings
