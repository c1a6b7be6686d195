"""Rows that cannot be trained on, D2 to D11, D14, D16 to D18, D21, D24, D25: named by file and line, exit code 2."""

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_recipes.data.check import check_data
from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe
from tests.data_room.rows import ANSWER, ASKED, GOOD, TEXT, Seen, chat, lines, refusal

HALF = "\ud83d"
SYSTEM = {"role": "system", "content": "be brief"}
PAIR = {"prompt": "hi", "completion": "hello"}
IDS = {"input_ids": [1, 300, 301, 2], "labels": [-100, -100, 301, 2]}


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        pytest.param([{"ask": "a", "reply": "b"}] * 2, "columns found: `ask`, `reply`", id="D2"),
        pytest.param([{"prompt": "a"}], "columns found: `prompt`; a row must have", id="D2-half-a-format"),
        pytest.param([{}], "columns found: none", id="D2-no-column"),
        pytest.param([{"Text": "a"}], "columns found: `Text`", id="D2-case"),
    ],
)
def test_unknown_columns_are_listed_with_the_formats(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], rows: list[Any], said: str
):
    seen = audit(recipe_on(rows))
    assert seen.code == 2 and said in seen.text
    for known in (
        "`messages`",
        "`conversations`",
        "`prompt` with `completion`",
        "`instruction` with `output`",
        "`text`",
    ):
        assert known in seen.text
    assert "dataset.columns" in seen.text


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([("human", "hi"), ("gpt", "hello")], id="D3"),
        pytest.param([("system", "be brief"), ("user", "hi"), ("assistant", "hello")], id="D3-system"),
        pytest.param([("Human", "hi"), ("ChatGPT", "hello")], id="D3-case"),
    ],
)
def test_sharegpt_is_read_as_it_is(recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], turns: list[Any]):
    seen = audit(recipe_on([{"conversations": [{"from": who, "value": said} for who, said in turns]}]))
    assert seen.code == 0 and seen.report["sources"][0]["format"] == "sharegpt" and seen.report["rows"] == 1


# -- one bad row ------------------------------------------------------------------------------------------------------

ROWS = [
    ("D4", {"messages": None}, "field_type", "`messages` is null, not a list of messages"),
    ("D4-text", {"messages": "hello"}, "field_type", "`messages` is text, not a list of messages"),
    ("D4-mapping", {"messages": ANSWER}, "field_type", "`messages` is a mapping, not a list"),
    ("D4-broken-text", {"messages": "[{"}, "field_type", "`messages` is text, not a list"),
    ("D4-deep-text", {"messages": "[" * 100_000}, "field_type", "`messages` is text, not a list"),
    ("D4-scalars", {"messages": [1, 2]}, "field_type", "message 1 of `messages` is a number, not a message"),
    ("D5", {"messages": []}, "empty", "`messages` is empty"),
    ("D5-text", {"messages": "[]"}, "empty", "`messages` is empty"),
    (
        "D6",
        chat(ASKED, {"role": "assistant", "content": None}),
        "field_type",
        "message 2 of `messages` (assistant): `con",
    ),
    ("D6-user", chat({"role": "user", "content": None}, ANSWER), "field_type", "(user): `content` is null, not text"),
    ("D6-missing", chat({"role": "user"}, ANSWER), "field_type", "(user): `content` is null, not text"),
    ("D6-no-calls", chat(ASKED, {"role": "assistant", "tool_calls": []}), "field_type", "`content` is null, not text"),
    ("D7", chat({"role": "user", "content": 5}, ANSWER), "field_type", "(user): `content` is a number, not text"),
    ("D7-bool", chat({"role": "user", "content": True}, ANSWER), "field_type", "is true or false, not text"),
    ("D7-mapping", chat({"role": "user", "content": {"a": 1}}, ANSWER), "field_type", "is a mapping, not text"),
    ("D7-part", chat({"role": "user", "content": [5]}, ANSWER), "field_type", "a part that is no text: a number"),
    ("D7-image", chat({"role": "user", "content": [{"type": "image"}]}, ANSWER), "field_type", "is no text: image"),
    (
        "D8",
        chat({"role": "bot", "content": "x"}, ANSWER),
        "unknown_role",
        "role 'bot'; known roles: system, developer, u",
    ),
    ("D8-case", chat({"role": "User", "content": "x"}, ANSWER), "unknown_role", "has the role 'User'; known roles:"),
    ("D8-null", chat({"role": None, "content": "x"}, ANSWER), "unknown_role", "has the role None"),
    ("D8-list", chat({"role": ["user"], "content": "x"}, ANSWER), "unknown_role", "has the role ['user']"),
    ("D8-missing", chat({"content": "x"}, ANSWER), "field_type", "message 1 of `messages` has no `role`"),
    (
        "D8-speaker",
        chat({"from": "narrator", "value": "x"}, ANSWER),
        "unknown_role",
        "is from 'narrator'; known speakers",
    ),
    ("D9", chat(ASKED), "nothing_to_learn", "there is no assistant turn, so there is nothing to learn"),
    ("D9-system", chat(SYSTEM), "nothing_to_learn", "there is no assistant turn"),
    ("D10", chat(ASKED, {"role": "assistant", "content": ""}), "empty", "message 2 (assistant) is empty"),
    ("D10-space", chat(ASKED, {"role": "assistant", "content": " \n"}), "empty", "message 2 (assistant) is empty"),
    ("D10-first", chat(ASKED, {"role": "assistant", "content": ""}, ASKED, ANSWER), "empty", "message 2 (assistant)"),
    ("D10-no-parts", chat(ASKED, {"role": "assistant", "content": []}), "empty", "message 2 (assistant) is empty"),
    ("D10-user", chat({"role": "user", "content": " "}, ANSWER), "empty", "message 1 (user) is empty"),
    ("D11", chat(ASKED, ASKED, ANSWER), "role_order", "message 2 follows another user message"),
    ("D11-ends-on-user", chat(ASKED, ANSWER, ASKED), "role_order", "message 3 is from user: the last word must be"),
    (
        "D11-system-later",
        chat(ASKED, SYSTEM, ANSWER),
        "role_order",
        "message 2 is from system, which may only come first",
    ),
    ("D11-two-systems", chat(SYSTEM, SYSTEM, ASKED, ANSWER), "role_order", "message 2 is from system, which may only"),
    ("D11-two-answers", chat(ASKED, ANSWER, ANSWER), "role_order", "message 3 follows another assistant message"),
    (
        "D11-tool-unasked",
        chat(ASKED, {"role": "tool", "content": "4"}, ANSWER),
        "role_order",
        "message 2 is a tool's answer",
    ),
    ("D11-ends-on-tool", chat(ASKED, call(name="f"), {"role": "tool", "content": "4"}), "role_order", "is from tool"),
    (
        "D16",
        TEXT,
        "other_format",
        "`messages` is missing: the other rows are in the format `messages`, the row is in the",
    ),
    (
        "D16-unknown",
        {"ask": "a"},
        "other_format",
        "`messages` is missing: the other rows are in the format `messages`, co",
    ),
    ("D16-empty", {}, "other_format", "columns found: none"),
    ("D16-list", [1, 2], "not_an_object", "a row must be an object with named fields, found a list"),
    ("D16-number", 5, "not_an_object", "found a number"),
    ("D16-text", '"hello"', "not_an_object", "found text"),
    ("D16-null", None, "not_an_object", "found null"),
    (
        "D25",
        chat(ASKED, call(name="scale", arguments='{"a": ')),
        "tool_call",
        "the arguments of tool `scale` are no JSON: E",
    ),
    (
        "D25-deep",
        chat(ASKED, call(name="f", arguments="[" * 100_000)),
        "tool_call",
        "the arguments of tool `f` are no JSON",
    ),
    ("D25-nan", chat(ASKED, call(name="f", arguments='{"a": NaN}')), "tool_call", "`f` are no JSON: NaN is no JSON"),
    ("D25-list", chat(ASKED, call(name="f", arguments=[1])), "tool_call", "the arguments of tool `f` are a list"),
    ("D25-no-name", chat(ASKED, call(arguments={})), "tool_call", "message 2 of `messages` a tool call has no `name`"),
    (
        "D25-null-call",
        chat(ASKED, {"role": "assistant", "tool_calls": [None]}),
        "tool_call",
        "a tool call has no `name`",
    ),
    (
        "D25-mapping",
        chat(ASKED, {"role": "assistant", "tool_calls": {"a": 1}}),
        "tool_call",
        "is a mapping, not a list",
    ),
    ("D25-text", chat(ASKED, {"from": "function_call", "value": "f(1)"}), "tool_call", "a tool call is no JSON"),
    (
        "D25-tools-mapping",
        chat(ASKED, ANSWER, tools={}),
        "tools",
        "`tools` must be a list of JSON schemas, found a mapping",
    ),
    ("D25-tools-text", chat(ASKED, ANSWER, tools="scale"), "tools", "must be a list of JSON schemas, found text"),
    ("D25-tools-names", chat(ASKED, ANSWER, tools=["scale"]), "tools", "must be a list of JSON schemas"),
    ("D25-tools-no-name", chat(ASKED, ANSWER, tools=[{"function": {}}]), "tools", "`tools` number 1 has no `name`"),
    ("D25-tools-odd", chat(ASKED, ANSWER, tools=[{"function": "f"}]), "tools", "`tools` number 1 has no `name`"),
    (
        "D25-keywords",
        chat(ASKED, ANSWER, chat_template_kwargs=[1]),
        "field_type",
        "`chat_template_kwargs` is a list, not a",
    ),
]


@pytest.mark.parametrize(("row", "kind", "said"), [pytest.param(*case, id=name) for name, *case in ROWS])
def test_a_bad_row_of_messages_is_named(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], row: Any, kind: str, said: str
):
    recipe = recipe_on([GOOD, GOOD, row, GOOD])
    message = refusal(recipe)
    assert message.startswith("rows.jsonl:3: ") and said in message.splitlines()[0]
    assert len(message.splitlines()) == 2 and "1 of 4 rows cannot be trained on" in message
    seen = audit(recipe)
    assert seen.code == 2 and seen.text == message and seen.report["bad_row_kinds"] == {kind: 1}
    (told,) = seen.report["problems"][0]["rows"]
    assert (told["file"], told["line"], told["row"], told["kind"]) == ("rows.jsonl", 3, 3, kind)


OTHER_ROWS = [
    ("D17", TEXT, {"text": None}, "`text` is null, not text"),
    ("D17-number", TEXT, {"text": 7}, "`text` is a number, not text"),
    ("D17-list", TEXT, {"text": ["a"]}, "`text` is a list, not text"),
    ("D17-empty", TEXT, {"text": " "}, "`text` is empty"),
    ("D17-no-answer", TEXT, {"text": "Human: hi"}, "`text` has no line that begins with `Assistant:`"),
    ("D17-ends-on-user", TEXT, {"text": "Human: a\nAssistant: b\nHuman: c"}, "message 3 is from user: the last word"),
    (
        "D16-messages-among-text",
        TEXT,
        GOOD,
        "`text` is missing: the other rows are in the format `text`, the row is in the",
    ),
    ("D18", PAIR, {"prompt": "hi"}, "`completion` is missing"),
    ("D18-no-prompt", PAIR, {"completion": "hi"}, "`prompt` is missing"),
    ("D18-null", PAIR, {"prompt": "hi", "completion": None}, "`completion` is null, not text"),
    ("D18-number", PAIR, {"prompt": 5, "completion": "b"}, "`prompt` is a number, not text"),
    (
        "D18-mixed",
        PAIR,
        {"prompt": "hi", "completion": [ANSWER]},
        "`prompt` is text and `completion` is a list; both must",
    ),
    (
        "D18-mixed-other-way",
        PAIR,
        {"prompt": [ASKED], "completion": "hello"},
        "`prompt` is a list and `completion` is text",
    ),
    ("D18-empty-list", PAIR, {"prompt": [ASKED], "completion": []}, "`completion` is empty"),
    ("D18-no-answer", PAIR, {"prompt": [SYSTEM], "completion": [ASKED]}, "there is no assistant turn"),
    (
        "D18-system-twice",
        PAIR,
        {"prompt": [SYSTEM], "completion": [ANSWER], "system": "x"},
        "`system` is a second system",
    ),
    ("D18-system-number", PAIR, {**PAIR, "system": 5}, "`system` is a number, not text"),
    ("D24-floats", IDS, {"input_ids": [1.0, 2.0]}, "`input_ids` must be a list of whole numbers"),
    ("D24-text", IDS, {"input_ids": ["1"]}, "`input_ids` must be a list of whole numbers"),
    ("D24-true", IDS, {"input_ids": [True]}, "`input_ids` must be a list of whole numbers"),
    ("D24-empty", IDS, {"input_ids": []}, "`input_ids` is empty"),
    ("D24-null", IDS, {"input_ids": None}, "`input_ids` must be a list of whole numbers"),
    ("D24-labels-length", IDS, {"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 entries for 2 tokens"),
    ("D24-labels-text", IDS, {"input_ids": [1, 2], "labels": "12"}, "`labels` must be a list of whole numbers"),
]


@pytest.mark.parametrize(("good", "row", "said"), [pytest.param(*case, id=name) for name, *case in OTHER_ROWS])
def test_a_bad_row_of_another_format_is_named(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], good: Any, row: Any, said: str
):
    recipe = recipe_on([good, row, good])
    message = refusal(recipe)
    assert message.startswith("rows.jsonl:2: ") and said in message.splitlines()[0]
    seen = audit(recipe)
    assert seen.code == 2 and seen.text == message


SEEN_BY_THE_TOKENIZER = [
    (
        "D21",
        GOOD,
        chat({"role": "user", "content": "a<|im_start|>system"}, ANSWER),
        "'<|im_start|>', a control token of",
    ),
    ("D21-answer", GOOD, chat(ASKED, {"role": "assistant", "content": "a<|im_end|>"}), "'<|im_end|>', a control token"),
    ("D21-text", TEXT, {"text": "Human: hi\nAssistant: <|endoftext|>"}, "'<|endoftext|>', a control token"),
    (
        "D21-argument",
        GOOD,
        chat(ASKED, call(name="f", arguments={"a": ["<|im_end|>"]})),
        "'<|im_end|>', a control token",
    ),
    ("D24", IDS, {"input_ids": [1, 512, 2]}, "`input_ids` holds the token 512; this tokenizer has 0 to 511"),
    ("D24-negative", IDS, {"input_ids": [1, -1, 2]}, "`input_ids` holds the token -1;"),
    ("D24-huge", IDS, {"input_ids": [1, 2**80]}, "`input_ids` holds the token 1208925819614629174706176"),
    ("D24-label", IDS, {"input_ids": [1, 2], "labels": [-100, 512]}, "holds the token 512"),
    ("D24-no-loss", IDS, {"input_ids": [1, 2], "labels": [-100, -100]}, "no token of the row carries loss"),
    ("D14-escaped-surrogate", GOOD, chat(ASKED, {"role": "assistant", "content": HALF}), "half of a surrogate pair"),
]


@pytest.mark.parametrize(
    ("good", "row", "said"), [pytest.param(*case, id=name) for name, *case in SEEN_BY_THE_TOKENIZER]
)
def test_a_row_that_only_the_tokenizer_can_refuse_is_named_as_well(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], good: Any, row: Any, said: str
):
    content = "\n".join(map(json.dumps, (good, row, good)))
    seen = audit(recipe_of(content.encode()))
    assert seen.code == 2 and seen.text.startswith("rows.jsonl:2: ") and said in seen.text.splitlines()[0]
    assert "1 of 3 rows cannot be trained on" in seen.text


def test_d21_control_tokens_can_be_trained_on_as_plain_text(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    row = chat(
        {"role": "user", "content": "what is <|im_start|>?"}, {"role": "assistant", "content": "<|im_end|> ends"}
    )
    assert audit(recipe_on([row])).code == 2
    assert audit(recipe_on([row], {"control_tokens": "escape"})).code == 0
    keep = {"control_tokens": "keep", "format": "text"}
    kept = audit(recipe_on([{"text": "Human: a\nAssistant: <|im_end|>"}], keep))
    assert kept.code == 2 and "`keep` is for text that is trained as it stands" in kept.text
    assert audit(recipe_on([{"text": "a <|im_end|> b"}], keep, assistant_only_loss=False)).code == 0


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_d25_no_tools_are_no_error(recipe_on: Callable[..., Recipe], tools: Any):
    check_data(recipe_on([chat(ASKED, ANSWER, tools=tools)]))


def test_d25_tools_and_arguments_may_be_written_as_json_text(recipe_on: Callable[..., Recipe]):
    answer = {"role": "tool", "content": "4"}
    row = chat(ASKED, call(name="scale", arguments='{"by": 2}'), answer, ANSWER, tools=' [{"name": "scale"}]')
    check_data(recipe_on([row, {"messages": json.dumps(row["messages"])}]))


# -- many bad rows, and rows that may be left out ---------------------------------------------------------------------


def test_the_first_20_bad_rows_are_listed_and_all_are_counted_by_kind(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]
):
    recipe = recipe_on([GOOD] + [{"messages": []}] * 30 + [chat(ASKED)] * 5 + ["{"])
    said = refusal(recipe).splitlines()
    assert [line.split(":")[1] for line in said[:20]] == [str(number) for number in range(2, 22)]
    assert said[20] == "… and 16 more"
    assert said[21].startswith("36 of 37 rows cannot be trained on (30 empty, 5 nothing to learn, 1 broken JSON);")
    assert said[21].endswith("dataset.bad_rows: skip") and len(said) == 22
    seen = audit(recipe)
    assert seen.text.splitlines() == said and len(seen.report["problems"][0]["rows"]) == 20
    assert seen.report["bad_row_kinds"] == {"empty": 30, "nothing_to_learn": 5, "broken_json": 1}


@pytest.mark.parametrize("first", [True, False], ids=["the first row too", "later rows"])
def test_bad_rows_may_be_skipped_and_are_kept_with_their_reason(
    recipe_on: Callable[..., Recipe], audit: Callable[..., Seen], first: bool
):
    bad = ["{broken", {"messages": [], "note": "é"}, TEXT, chat({"role": "user", "content": "<|im_start|>"}, ANSWER)]
    recipe = recipe_on([*bad, GOOD] if first else [GOOD, *bad], {"bad_rows": "skip"})
    check_data(recipe)
    seen = audit(recipe)
    assert seen.code == 0 and seen.report["train_rows"] == 1 and seen.report["bad_rows"] == 4
    assert "4 rows are left out" in seen.warnings and "see rejected.jsonl" in seen.warnings
    path = Path("outputs/tiny/rejected.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["kind"] for row in kept] == ["broken_json", "empty", "other_format", "control_token"]
    assert [row["reason"].split(":")[1] for row in kept] == [str(number) for number in range(2 - first, 6 - first)]
    assert kept[0]["row"] == "{broken" and [json.loads(row["row"]) for row in kept[1:]] == bad[1:]


def test_a_limit_on_the_share_of_bad_rows_is_held(recipe_on: Callable[..., Recipe], audit: Callable[..., Seen]):
    rows = [GOOD, GOOD, GOOD, {"messages": []}]
    assert audit(recipe_on(rows, {"bad_rows": "skip", "max_bad_fraction": 0.25})).code == 0
    seen = audit(recipe_on(rows, {"bad_rows": "skip", "max_bad_fraction": 0.2}))
    assert seen.code == 2 and "tiny.yaml:" in seen.text
    assert "1 of 4 rows (25.0 %) cannot be trained on; `max_bad_fraction` allows 20.0 %" in seen.text
    seen = audit(recipe_on([{"messages": []}] * 3, {"bad_rows": "skip"}))
    assert seen.code == 2 and "no row is left to train on" in seen.text


# -- when they are found ----------------------------------------------------------------------------------------------


def test_the_check_is_free_when_nothing_has_changed_and_notices_a_change(
    recipe_on: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_on([GOOD])
    check_data(recipe)
    with monkeypatch.context() as patched:
        patched.setattr("lora_recipes.data.check.scan", lambda *args: pytest.fail("read again"))
        check_data(recipe)
    with pytest.raises(DataError):
        check_data(recipe_on([GOOD, {"messages": []}]))


CHECK_ONLY = """
import sys
from lora_recipes.data.check import check_data
from lora_recipes.recipe import load_recipe
try:
    check_data(load_recipe(sys.argv[1]))
except Exception as error:
    print(error)
print("torch" in sys.modules)
__import__("torch")
print("torch" in sys.modules)
"""


def test_rows_are_checked_before_torch_is_imported(write_recipe: Callable[..., Path], workdir: Path):
    import datasets

    datasets.Dataset.from_list([GOOD, {"messages": []}]).to_parquet(workdir / "rows.parquet")
    (workdir / "rows.jsonl").write_bytes(lines(GOOD, {"messages": []}))
    for name, place in (("rows.jsonl", "rows.jsonl:2: "), ("rows.parquet", "rows.parquet row 2: ")):
        kind = "json" if name.endswith("l") else "parquet"
        keys = {"path": kind, "data_files": {"train": name}, "split": "train[:2]", "eval_split": None}
        path = write_recipe(dataset=keys)
        done = subprocess.run(
            [sys.executable, "-c", CHECK_ONLY, str(path)], capture_output=True, text=True, check=True, cwd=workdir
        )
        assert done.stdout.startswith(f"{place}`messages` is empty"), done.stdout
        assert done.stdout.splitlines()[-2:] == ["False", "True"]
