"""What is wrong with rows, D1 to D29 of the list of bad inputs with their neighbours: named by file and line, exit code 2."""

import gzip
import json
import lzma
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_recipes.cli import main
from lora_recipes.data import prepare
from lora_recipes.data.check import check_data
from lora_recipes.data.problems import RAW
from lora_recipes.errors import DataError, RunError
from lora_recipes.recipe import Recipe, load_recipe
from lora_recipes.run_dir import RunDir, write_json, write_text
from lora_recipes.train.preflight import data_hashes, preflight

NUL, BIDI, ZERO_WIDTH, HALF = "\x00", "\u202e", "\u200b", "\ud83d"
ANSWER = {"role": "assistant", "content": "hello"}
ASKED = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
GOOD = {"messages": [ASKED, ANSWER]}
TEXT = {"text": "Human: hi\nAssistant: hello"}
PAIR = {"prompt": "hi", "completion": "hello"}
IDS = {"input_ids": [1, 300, 301, 2], "labels": [-100, -100, 301, 2]}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@dataclass
class Seen:
    """What `lora-recipes audit RECIPE --json` came to: its exit code, its report, and all that was said."""

    code: int
    report: dict[str, Any]
    text: str

    @property
    def warnings(self) -> str:
        return "\n".join(finding["text"] for finding in self.report["warnings"])


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Callable[[Recipe], Seen]:
    def run(recipe: Recipe) -> Seen:
        capsys.readouterr()
        code = main(["audit", str(recipe.path), "--json"])
        report = json.loads(capsys.readouterr().out)
        if "error" in report:
            assert report["error"]["exit_code"] == code
            return Seen(code, report, report["error"]["message"])
        assert (code == 2) == bool(report["problems"])
        return Seen(code, report, "\n".join(problem["text"] for problem in report["problems"]))

    return run


@pytest.fixture
def recipe_of(write_recipe: Callable[..., Path], workdir: Path) -> Callable[..., Recipe]:
    """A recipe on one file with the given bytes; keywords are `dataset` keys."""

    def build(
        content: bytes, name: str = "rows.jsonl", training: dict[str, Any] | None = None, **dataset: Any
    ) -> Recipe:
        (workdir / name).write_bytes(content)
        keys = {"data_files": {"train": name}, "eval_split": None, **dataset}
        return load_recipe(write_recipe(dataset=keys, training=training or {}))

    return build


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def refusal(recipe: Recipe) -> str:
    """What `check_data` refuses the rows with."""
    with pytest.raises(DataError) as caught:
        check_data(recipe)
    return str(caught.value)


# -- D1 to D3: nothing to read, nothing known -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="D1"),
        pytest.param(b"\n  \n\t\n\r\n", id="D1-white-space"),
        pytest.param(b"\xef\xbb\xbf", id="D1-byte-order-mark"),
        pytest.param(b"[]", id="D1-array"),
        pytest.param(b" [\n]\n", id="D1-array-over-lines"),
    ],
)
def test_a_file_without_rows_is_named(recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], content: bytes):
    recipe = recipe_of(content)
    assert "rows.jsonl: split `train` has no rows" in refusal(recipe)
    seen = audit(recipe)
    assert seen.code == 2 and seen.text == refusal(recipe)


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


# -- D4 to D11, D16 to D18, D25: one bad row --------------------------------------------------------------------------

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


# -- D12 to D15: broken files -----------------------------------------------------------------------------------------

GOOD_LINE = json.dumps(GOOD).encode()
BROKEN = [
    ("D12", b'{"messages": [}', r"^rows\.jsonl:3:15: broken JSON: Expecting value: …\{\"messages\": \[\}$"),
    ("D12-two-on-a-line", GOOD_LINE + GOOD_LINE, r"^rows\.jsonl:3:\d+: broken JSON: Extra data"),
    ("D12-single-quotes", b"{'text': 1}", r"^rows\.jsonl:3:2: broken JSON: Expecting property name"),
    ("D12-no-json", b"hello", r"^rows\.jsonl:3:1: broken JSON: Expecting value: …hello$"),
    ("D12-nan", b'{"messages": NaN}', r"^rows\.jsonl:3: broken JSON: NaN is no JSON$"),
    ("D12-infinity", b'{"messages": -Infinity}', r"^rows\.jsonl:3: broken JSON: -Infinity is no JSON$"),
    ("D12-deep", b"[" * 100_000 + b"]" * 100_000, r"^rows\.jsonl:3: broken JSON: it is nested too deep$"),
    ("D12-long-number", b'{"messages": ' + b"9" * 5000 + b"}", r"^rows\.jsonl:3: broken JSON: Exceeds the limit"),
    ("D12-raw-nul", b'{"messages": "\0"}', r"^rows\.jsonl:3:15: broken JSON: Invalid control character"),
    ("D12-escape-codes", b'{"messages": \x1b[31m}', "^rows\\.jsonl:3:14: broken JSON: Expecting value: …[^\\x1b]*$"),
    (
        "D14",
        b'{"messages": "caf\xe9 au"}',
        r"^rows\.jsonl:3: byte 0xE9 is not UTF-8; as Latin-1 .*café au",
    ),
    ("D14-gbk", '{"messages": "你好"}'.encode("gbk"), r"^rows\.jsonl:3: .* is not UTF-8; as GBK it reads .*你好"),
    ("D14-surrogate", b'{"messages": "\xed\xa0\xbd"}', r"^rows\.jsonl:3: holds half of a surrogate pair"),
    ("D14-utf-16-line", '{"messages": 1}'.encode("utf-16-be"), r"^rows\.jsonl:3:1: looks like UTF-16"),
    ("D15", GOOD_LINE[:40], r"^rows\.jsonl:3:\d+: broken JSON: the line ends mid-row"),
    ("D15-after-a-comma", GOOD_LINE[:-3], r"^rows\.jsonl:3:\d+: broken JSON: the line ends mid-row"),
]


@pytest.mark.parametrize(("line", "said"), [pytest.param(*case, id=name) for name, *case in BROKEN])
def test_a_broken_line_is_named_and_repeated_in_part(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], line: bytes, said: str
):
    recipe = recipe_of(b"\n".join([GOOD_LINE, GOOD_LINE, line]))
    with pytest.raises(DataError, match=said.replace("$", "\n")) as caught:
        check_data(recipe)
    assert len(str(caught.value).splitlines()[0].partition("…")[2]) <= 80
    assert "1 of 3 rows cannot be trained on" in str(caught.value)
    seen = audit(recipe)
    assert seen.code == 2 and seen.text == str(caught.value)
    rejected = json.loads(Path("outputs/tiny/rejected.jsonl").read_text())
    assert rejected["row"] == line.decode("utf-8", "replace")[:RAW]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\n\n" + GOOD_LINE + b"\n \n\n" + GOOD_LINE + b"\n\n", id="D13"),
        pytest.param(b"\xef\xbb\xbf" + GOOD_LINE + b"\n" + GOOD_LINE, id="D13-byte-order-mark"),
        pytest.param(b"\xef\xbb\xbf" + GOOD_LINE + b"\n\xef\xbb\xbf" + GOOD_LINE, id="D13-joined-files"),
        pytest.param(GOOD_LINE + b"\r\n\r\n" + GOOD_LINE + b"\r\n", id="D13-crlf"),
        pytest.param(b"[" + GOOD_LINE + b"," + GOOD_LINE + b"]", id="D13-array"),
        pytest.param(
            b"\xef\xbb\xbf \n" + json.dumps([GOOD, GOOD], indent=2).encode() + b"\r\n", id="D13-array-over-lines"
        ),
    ],
)
def test_harmless_forms_of_a_file_are_read(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], content: bytes
):
    seen = audit(recipe_of(content))
    assert seen.code == 0 and seen.report["rows"] == 2 and seen.report["duplicates"] == 1


FILES = [
    ("D14-utf-16", "rows.jsonl", json.dumps(GOOD).encode("utf-16"), r"^rows\.jsonl:1: looks like UTF-16"),
    ("D14-utf-16-be", "rows.jsonl", b"\xfe\xff" + GOOD_LINE.decode().encode("utf-16-be"), r"rows\.jsonl:1: .*UTF-16"),
    ("D14-utf-16-no-mark", "rows.jsonl", GOOD_LINE.decode().encode("utf-16-le"), r"^rows\.jsonl:1: .*UTF-16"),
    ("D14-utf-16-chinese", "rows.jsonl", ('{"text": "' + "你好" * 999 + '"}').encode("utf-16-be"), r":1: .*UTF-16"),
    ("D14-utf-16-csv", "rows.csv", "text\nhello\n".encode("utf-16"), r"^rows\.csv:1: looks like UTF-16"),
    ("D14-latin-csv", "rows.csv", b"text,b\nok,1\ncaf\xe9,2\n", r"^rows\.csv:3: byte 0xE9"),
    ("D14-latin-names", "rows.csv", b"text,\xe9\nok,1\n", r"^rows\.csv:1: byte 0xE9"),
    (
        "D14-latin-array",
        "rows.json",
        b'[\n{"text": "a"},\n{"text": "\xe9"}\n]',
        r"^rows\.json:3: byte 0xE9",
    ),
    ("D14-latin-text", "rows.txt", b"ok\n\ncaf\xe9\n", r"^rows\.txt:3: byte 0xE9"),
    (
        "D15-array",
        "rows.json",
        json.dumps([GOOD] * 3, indent=1).encode()[:-30],
        r"^rows\.json:3\d: the file ends mid-row",
    ),
    ("D15-array-open", "rows.json", b"[" + GOOD_LINE + b"\n,", r"^rows\.json:2: the file ends mid-row"),
    (
        "D15-array-no-end",
        "rows.json",
        b"[" + GOOD_LINE + b"\n",
        r"^rows\.json:2: the file ends mid-row: its JSON array",
    ),
    (
        "D15-gzip",
        "rows.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 9000))[:-200],
        r"^rows\.jsonl\.gz:\d+: the file ends mid-row",
    ),
    ("D15-short-gzip", "rows.jsonl.gz", gzip.compress(GOOD_LINE)[:40], r"^rows\.jsonl\.gz:1: the file ends mid-row"),
    ("D15-no-gzip", "rows.jsonl.gz", GOOD_LINE, r"^rows\.jsonl\.gz:1: the file ends mid-row or is damaged here"),
    (
        "D15-damaged-gzip",
        "rows.jsonl.gz",
        gzip.compress(GOOD_LINE * 9)[:20] + b"\0" * 60,
        r"rows\.jsonl\.gz:1: .* damaged",
    ),
    (
        "D15-xz",
        "rows.json.xz",
        lzma.compress(b"[" + GOOD_LINE + b"]")[:-50],
        r"^rows\.json\.xz:1: the file ends mid-row",
    ),
    ("D15-no-bzip2", "rows.csv.bz2", b"text\nhello\n", r"^rows\.csv\.bz2:1: the file ends mid-row or is damaged here"),
    ("D15-csv-quote", "rows.csv", b'text,b\nok,1\n"begun,2\nmore,3\n', r"^rows\.csv:3: the file ends mid-row: a quote"),
    ("D12-csv-quote", "rows.csv", b'text,b\n"a"b,1\n', r"^rows\.csv:2: broken CSV"),
    ("D12-csv-names", "rows.csv", b"text,text\na,b\n", r"^rows\.csv:1: the column `text` is there twice"),
    ("D12-csv-cells", "rows.csv", b"text,b\nok,1\nonly\n", r"^rows\.csv:3: has 1 cells for 2 columns"),
    (
        "D12-array",
        "rows.json",
        b'[{"text": "a"},\n{"text" "b"}]',
        r"^rows\.json:2:9: broken JSON: Expecting ':' delimiter",
    ),
    (
        "D12-array-comma",
        "rows.json",
        b'[{"text": "a"}\n{"text": "b"}]',
        r"^rows\.json:2:1: broken JSON: `,` expected, found",
    ),
    (
        "D12-array-after",
        "rows.json",
        b'[{"text": "a"}]\n{"text": "b"}',
        r"^rows\.json:2: text after the end of the JSON array",
    ),
    ("D12-array-deep", "rows.json", b"[\n" + b"[" * 100_000, r"^rows\.json:2: broken JSON: it is nested too deep"),
    ("D12-array-nan", "rows.json", b'[\n{"text": NaN}]', r"^rows\.json:2: broken JSON: NaN is no JSON"),
    (
        "D12-array-scalars",
        "rows.json",
        b'[1,\n"a"]',
        r"^rows\.json:1: a row must be an object with named fields, found a number",
    ),
    (
        "D12-pretty-object",
        "rows.json",
        json.dumps(GOOD, indent=1).encode(),
        r"^rows\.json:1:2: .*a row must be one line",
    ),
    (
        "D12-scalars",
        "rows.jsonl",
        b"5\n6\n",
        r"^rows\.jsonl:1: a row must be an object with named fields, found a number",
    ),
    ("D12-gzip-inside", "rows.jsonl", gzip.compress(GOOD_LINE), r"^rows\.jsonl: is gzip, not json"),
    ("D12-parquet-inside", "rows.jsonl", b"PAR1\x15\x04", r"^rows\.jsonl: is Parquet, not json"),
    ("D28-zip-inside", "rows.jsonl", b"PK\x03\x04\x14\x00", r"^rows\.jsonl: is a zip archive, not json"),
]


@pytest.mark.parametrize(("name", "content", "said"), [pytest.param(*case, id=key) for key, *case in FILES])
def test_a_broken_file_is_named(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], name: str, content: bytes, said: str
):
    path = {".csv": "csv", ".txt": "text"}.get(Path(name.removesuffix(".bz2")).suffix, "json")
    recipe = recipe_of(content, name, path=path, training={"assistant_only_loss": False})
    seen = audit(recipe)
    with pytest.raises(DataError, match=said):
        check_data(recipe)
    assert seen.code == 2 and seen.text == refusal(recipe)


def test_d15_a_truncated_gzip_file_is_named_with_the_line_it_breaks_off_in(
    recipe_of: Callable[..., Recipe], workdir: Path
):
    rows = [json.dumps(chat({"role": "user", "content": os.urandom(99).hex()}, ANSWER)) for _ in range(5000)]
    content = gzip.compress(("\n".join(rows) + "\n").encode())
    message = refusal(recipe_of(content[: len(content) // 2], "rows.jsonl.gz"))
    line = int(message.split(":")[1])
    assert 2000 < line < 3000


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_d15_a_truncated_table_is_named(
    recipe_of: Callable[..., Recipe], audit: Callable[..., Seen], workdir: Path, kind: str
):
    import datasets

    rows = datasets.Dataset.from_list([GOOD] * 2000)
    if kind == "parquet":
        rows.to_parquet(workdir / "whole")
    else:
        rows.save_to_disk(workdir / "saved")
        next((workdir / "saved").glob("*.arrow")).rename(workdir / "whole")
    content = (workdir / "whole").read_bytes()
    recipe = recipe_of(content[: len(content) // 2], f"rows.{kind}", path=kind)
    assert refusal(recipe).startswith(f"rows.{kind}: is no whole {kind} file (cut off, damaged or of another kind)")
    assert audit(recipe).code == 2
    recipe = recipe_of(b"hello", f"rows.{kind}", path=kind)
    assert refusal(recipe).startswith(f"rows.{kind}: is no whole {kind} file (cut off, damaged or of another kind)")


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


# -- D22 to D24: what is in the rows ----------------------------------------------------------------------------------


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


def rows_saying(*texts: str) -> list[dict[str, Any]]:
    return [chat(ASKED, {"role": "assistant", "content": text}) for text in texts]


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
