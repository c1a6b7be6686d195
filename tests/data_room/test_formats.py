"""The same conversations in every format give the same tokens and the same labels, and no setting of a format is ignored."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from lora_recipes.data.audit import audit, require_sound
from lora_recipes.data.check import check_data
from lora_recipes.data.files import sources
from lora_recipes.data.formats import COLUMNS, CONVERTERS, OPTIONAL, BadRow, RowSettings, convert, oriented, recognise
from lora_recipes.data.forms import settings_of
from lora_recipes.data.load import load_data
from lora_recipes.errors import DataError
from lora_recipes.model.build import end_token_ids, load_tokenizer
from lora_recipes.model.source import locate
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.vocabulary import FORMATS

WORDS = [
    "the",
    "order",
    "of",
    "three",
    "small",
    "cups",
    "is",
    "你好",
    "ready",
    "for",
    "上海",
    "today",
    "–",
    "naïve",
    "4.5",
    "kg,",
    "please:",
    '"quoted"',
    "{a}",
    "<b>",
    "👍",
    "ok",
]
ASKED = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
GOOD = {"messages": [ASKED, ANSWER]}
# Writes everything that a message can carry, so that whatever is lost or changed shows in the tokens.
TOOLS_TEMPLATE = """{%- if tools %}{{- '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{- call.function.name + '(' + (call.function.arguments | tojson) + ')' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

Tokens = list[tuple[list[int], list[int]]]


def tokens_of(recipe: Recipe) -> Tokens:
    """(input_ids, labels) of each training row, after a sound audit."""
    source = locate(recipe)
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    require_sound(audit(data, 1, 1))
    return [(row["input_ids"], row["labels"]) for row in data.train()]


def told(recipe: Recipe, tokens: Tokens) -> list[tuple[str, str]]:
    """(the whole, what carries loss) as text."""
    tokenizer = load_tokenizer(recipe, locate(recipe))
    return [
        (tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100]))
        for ids, labels in tokens
    ]


def refusal(recipe: Recipe) -> str:
    with pytest.raises(DataError) as caught:
        check_data(recipe)
    return str(caught.value)


def single_turns() -> list[tuple[str, str]]:
    chance = random.Random(7)
    return [
        (" ".join(chance.choices(WORDS, k=12)), "\n".join(" ".join(chance.choices(WORDS, k=5)) for _ in range(2)))
        for _ in range(50)
    ]


def turns(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


SINGLE: dict[str, tuple[Callable[[str, str], dict[str, Any]], dict[str, Any]]] = {
    "text": (lambda q, a: {"text": f"Human: {q}\nAssistant: {a}"}, {}),
    "prompt and completion": (lambda q, a: {"prompt": q, "completion": a}, {}),
    "prompt and completion as messages": (
        lambda q, a: {"prompt": turns(q, a)[:1], "completion": turns(q, a)[1:]},
        {},
    ),
    "alpaca": (lambda q, a: {"instruction": q, "input": "", "output": a}, {}),
    "sharegpt": (lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}, {}),
    "question and answer": (lambda q, a: {"question": q, "answer": a}, {}),
    "mapped to question and answer": (
        lambda q, a: {"ask": q, "reply": a},
        {"columns": {"question": "ask", "answer": "reply"}},
    ),
    "mapped to prompt and completion": (
        lambda q, a: {"question": q, "answer": a},
        {"columns": {"prompt": "question", "completion": "answer"}},
    ),
    "mapped the other way round": (
        lambda q, a: {"question": q, "answer": a},
        {"columns": {"question": "prompt", "answer": "completion"}},
    ),
    "strange names the other way round": (
        lambda q, a: {"ask": q, "reply": a},
        {"columns": {"ask": "prompt", "reply": "completion"}},
    ),
    "messages under another name": (lambda q, a: {"chat": turns(q, a)}, {"columns": {"messages": "chat"}}),
    "messages as JSON text": (lambda q, a: {"messages": json.dumps(turns(q, a))}, {}),
    "messages in parts": (
        lambda q, a: {
            "messages": [
                {
                    **turn,
                    "content": [{"type": "text", "text": part} for part in (turn["content"][:3], turn["content"][3:])],
                }
                for turn in turns(q, a)
            ]
        },
        {},
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_conversation_has_the_same_tokens_and_labels_in_every_format(recipe_on: Callable[..., Recipe], name: str):
    said = single_turns()
    recipe = recipe_on([{"messages": turns(*turn)} for turn in said], max_length=512)
    expected = tokens_of(recipe)
    assert [trained for _, trained in told(recipe, expected)] == [f"{answered}<|im_end|>" for _, answered in said]
    build, keys = SINGLE[name]
    assert tokens_of(recipe_on([build(*turn) for turn in said], keys, max_length=512)) == expected


def test_the_input_of_alpaca_rows_follows_on_a_line_of_its_own(recipe_on: Callable[..., Recipe]):
    row = {"instruction": "Add them.", "input": "2, 2", "output": "4"}
    assert tokens_of(recipe_on([row])) == tokens_of(recipe_on([{"messages": turns("Add them.\n2, 2", "4")}]))


def conversation(number: int, *, call_text: bool = False) -> list[dict[str, Any]]:
    """System, a question with a tool call and its result, an answer, and one more turn."""
    arguments = {"city": f"上海 {number}", "days": number, "units": None, "at": 1.0, "tags": []}
    return [
        {"role": "system", "content": f"be brief {number}"},
        {"role": "user", "content": f"weather {number}?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": json.dumps(arguments) if call_text else arguments},
                }
            ],
        },
        {"role": "tool", "content": f'{{"sky": {number}}}'},
        {"role": "assistant", "content": f"clear {number}"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": f"any time {number}"},
    ]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}]
SPEAKERS = {"user": "human", "tool": "observation", "assistant": "gpt", "system": "system"}


def in_sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said = []
    for message in messages:
        if calls := message.get("tool_calls"):
            said.append({"from": "function_call", "value": json.dumps(calls[0]["function"])})
        else:
            said.append({"from": SPEAKERS[message["role"]], "value": message["content"]})
    return said


def multi(number: int, form: str) -> dict[str, Any]:
    messages = conversation(number)
    return {
        "messages": lambda: {"messages": messages, "tools": TOOLS},
        "string arguments": lambda: {"messages": conversation(number, call_text=True), "tools": json.dumps(TOOLS)},
        "no content": lambda: {
            "messages": [*messages[:2], messages[2] | {"content": None}, *messages[3:]],
            "tools": TOOLS,
        },
        "sharegpt": lambda: {"conversations": in_sharegpt(messages), "tools": TOOLS},
        "sharegpt with a system column": lambda: {
            "conversations": in_sharegpt(messages[1:]),
            "system": messages[0]["content"],
            "tools": TOOLS,
        },
        "prompt and completion": lambda: {"prompt": messages[:6], "completion": messages[6:], "tools": TOOLS},
        "with a system column": lambda: {
            "prompt": messages[1:6],
            "completion": messages[6:],
            "tools": TOOLS,
            "system": messages[0]["content"],
        },
    }[form]()


@pytest.fixture
def tools_recipe(recipe_on: Callable[..., Recipe], workdir: Any) -> Callable[..., Recipe]:
    def build(rows: list[Any], dataset: dict[str, Any] | None = None, **training: Any) -> Recipe:
        (workdir / "tools.jinja").write_text(TOOLS_TEMPLATE)
        return recipe_on(rows, dataset, **({"chat_template_path": "tools.jinja", "max_length": 512} | training))

    return build


@pytest.mark.parametrize("form", ["string arguments", "no content", "sharegpt", "sharegpt with a system column"])
def test_a_dialogue_with_tools_has_the_same_tokens_and_labels_in_every_format(
    tools_recipe: Callable[..., Recipe], form: str
):
    expected = tokens_of(tools_recipe([multi(number, "messages") for number in range(5)]))
    recipe = tools_recipe([multi(number, form) for number in range(5)])
    made = tokens_of(recipe)
    assert made == expected
    _, trained = told(recipe, made)[3]
    call = 'weather({"city": "上海 3", "days": 3, "units": null, "at": 1.0, "tags": []})'
    assert trained == f"{call}<|im_end|>clear 3<|im_end|>any time 3<|im_end|>"


@pytest.mark.parametrize("form", ["prompt and completion", "with a system column"])
def test_completions_after_a_dialogue_have_the_same_tokens_and_only_their_own_loss(
    tools_recipe: Callable[..., Recipe], form: str
):
    expected = tokens_of(tools_recipe([multi(number, "messages") for number in range(5)]))
    recipe = tools_recipe([multi(number, form) for number in range(5)])
    made = tokens_of(recipe)
    assert [ids for ids, _ in made] == [ids for ids, _ in expected]
    assert told(recipe, made)[2][1] == "any time 2<|im_end|>"
    rows = [multi(number, form) for number in range(5)]
    assert tokens_of(tools_recipe(rows, completion_only_loss=False, assistant_only_loss=True)) == expected


def test_the_history_of_alpaca_rows_comes_before_their_question(recipe_on: Callable[..., Recipe]):
    messages = [
        {"role": "system", "content": "be brief"},
        *turns("one", "first"),
        *turns("two", "second"),
        *turns("three", "third"),
    ]
    row = {
        "instruction": "three",
        "input": None,
        "output": "third",
        "history": [["one", "first"], ["two", "second"]],
        "system": "be brief",
    }
    assert tokens_of(recipe_on([row])) == tokens_of(recipe_on([{"messages": messages}]))
    for history, said in (
        ([["one"]], "`history` must be a list of"),
        ([["one", 2]], "`history` is a number"),
        ("x", "`history` m"),
    ):
        assert said in refusal(recipe_on([row, row | {"history": history}]))
    assert "`input` is a number, not text" in refusal(recipe_on([row, row | {"input": 5}]))


def test_values_of_tool_arguments_reach_the_template_unchanged(tools_recipe: Callable[..., Recipe]):
    arguments = {
        "a": None,
        "b": 1.0,
        "c": [],
        "d": {},
        "e": 10**20,
        "f": 1e-7,
        "g": False,
        "h": "é \\n",
        "": [None, {"z": None}],
    }
    other = {"b": 1, "unlike": "the first"}
    rows = [
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]}
        for given in (arguments, other)
    ]
    recipe = tools_recipe(rows)
    trained = [trained for _, trained in told(recipe, tokens_of(recipe))]
    assert trained == [f"f({json.dumps(given, ensure_ascii=False)})<|im_end|>" for given in (arguments, other)]


@pytest.mark.parametrize("form", list(COLUMNS))
def test_the_more_telling_columns_win(form: str):
    """A row that has the columns of several formats is in the first of them."""
    order = list(COLUMNS)
    later = [column for other in order[order.index(form) :] for column in COLUMNS[other]]
    assert recognise([*reversed(later), "more"], {}, "text") == form


def test_recognition_looks_at_the_mapped_names():
    assert recognise(["chat"], {"messages": "chat"}, "text") == "messages"
    assert recognise(["chat", "text"], {}, "text") == "text"
    assert recognise(["text"], {}, "body") is None and recognise(["body"], {}, "body") == "text"
    assert recognise(["body"], {"text": "body"}, "text") == "text"
    assert recognise(["messages"], {"messages": "chat"}, "text") is None
    assert recognise([], {}, "text") is None


@pytest.mark.parametrize(
    ("columns", "present", "expected"),
    [
        ({}, ["text"], {}),
        ({"prompt": "q"}, ["q"], {"prompt": "q"}),
        ({"q": "prompt"}, ["q"], {"prompt": "q"}),
        ({"q": "prompt"}, ["q", "prompt"], {"prompt": "q"}),
        ({"question": "prompt"}, ["question"], {"prompt": "question"}),
        ({"question": "prompt"}, ["prompt"], {"question": "prompt"}),
        ({"question": "prompt"}, ["question", "prompt"], {"question": "prompt"}),
        ({"q": "prompt"}, [], {"prompt": "q"}),
        ({"prompt": "gone"}, ["q"], {"prompt": "gone"}),
        ({"wrong": "q"}, ["q"], {"wrong": "q"}),
    ],
)
def test_a_map_of_columns_is_read_in_the_direction_that_fits_the_data(
    columns: dict[str, str], present: list[str], expected: dict[str, str]
):
    assert oriented(columns, present) == expected


def test_a_format_by_hand_wins_over_what_would_be_recognised(recipe_on: Callable[..., Recipe]):
    rows = [{"messages": turns("one", "two"), "text": "Human: three\nAssistant: four"}]
    recipe = recipe_on(rows, {"format": "text"})
    assert told(recipe, tokens_of(recipe))[0][1] == "four<|im_end|>"
    assert told(recipe, tokens_of(recipe_on(rows)))[0][1] == "two<|im_end|>"


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        (
            GOOD,
            {"format": "alpaca"},
            "`format: alpaca` needs the column `instruction`, which is not in rows.jsonl; found: `mess",
        ),
        (GOOD, {"format": "text"}, "`format: text` needs the column `text`"),
        (GOOD, {"columns": {"messages": "chat"}}, "there is no column `chat` in rows.jsonl; found: `messages`"),
        (GOOD, {"columns": {"chat": "messages"}}, "there is no column `chat` in rows.jsonl; found: `messages`"),
        (
            {"q": "a", "a": "b"},
            {"columns": {"promt": "q"}},
            "`promt` is no field of a format; fields: answer, chat_template_kwargs, completion",
        ),
        ({"q": "a", "a": "b"}, {"columns": {"prompt": "q"}}, "columns found: `q`, `a`; a row must have"),
    ],
)
def test_formats_and_columns_that_do_not_fit_are_named_with_the_line_of_the_recipe(
    recipe_on: Callable[..., Recipe], row: Any, keys: dict[str, Any], said: str
):
    message = refusal(recipe_on([row], keys))
    assert message.startswith(f"{recipe_on([row], keys).path}:") and said in message


def test_what_the_first_row_lacks_does_not_decide(recipe_on: Callable[..., Recipe]):
    system = {"prompt": "a", "completion": "b", "sys": "be brief"}
    recipe = recipe_on([{"prompt": "a", "completion": "b"}, system], {"columns": {"system": "sys"}})
    assert [whole.count("be brief") for whole, _ in told(recipe, tokens_of(recipe))] == [0, 1]
    assert refusal(recipe_on([{"ask": 1}, GOOD])).startswith("rows.jsonl:1: `messages` is missing")


def test_columns_that_no_format_knows_are_left_alone(recipe_on: Callable[..., Recipe]):
    more = {"id": 5, "meta": {"a": None}, "label": ["x"]}
    assert tokens_of(recipe_on([GOOD | more])) == tokens_of(recipe_on([GOOD]))


def test_the_text_may_lie_in_another_column(recipe_on: Callable[..., Recipe]):
    row = {"body": "Human: hi\nAssistant: hello", "text": "Human: no\nAssistant: no"}
    expected = tokens_of(recipe_on([GOOD]))
    assert tokens_of(recipe_on([row], dataset_text_field="body")) == expected
    assert tokens_of(recipe_on([row], {"columns": {"text": "body"}})) == expected
    assert "`body` is null" in refusal(recipe_on([row, {"body": None}], dataset_text_field="body"))
    assert "`body` is null" in refusal(recipe_on([row, {"body": None}], {"columns": {"text": "body"}}))


def test_marked_text_keeps_what_stands_before_the_first_mark_as_the_systems(recipe_on: Callable[..., Recipe]):
    text = "be brief\n\nHuman: one\nAssistant:  first, Human: not a mark \nHuman:two\nAssistant: second\n"
    messages = [
        {"role": "system", "content": "be brief"},
        *turns("one", "first, Human: not a mark"),
        *turns("two", "second"),
    ]
    assert tokens_of(recipe_on([{"text": text}])) == tokens_of(recipe_on([{"messages": messages}]))


def test_literal_text_is_trained_on_as_a_whole_and_closed(recipe_on: Callable[..., Recipe]):
    text = "plain prose, Human: and all\n of  it "
    recipe = recipe_on([{"text": text}], assistant_only_loss=False)
    ((whole, trained),) = told(recipe, tokens_of(recipe))
    assert whole == trained == f"{text}<|im_end|>"


def test_all_of_a_conversation_is_trained_on_when_that_is_asked(recipe_on: Callable[..., Recipe]):
    for row in (GOOD, {"question": "hi", "answer": "hello"}, {"instruction": "hi", "output": "hello"}):
        recipe = recipe_on([row], assistant_only_loss=False)
        ((whole, trained),) = told(recipe, tokens_of(recipe))
        assert whole == trained == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    recipe = recipe_on([{"messages": [ASKED]}], assistant_only_loss=False)
    assert told(recipe, tokens_of(recipe))[0][1] == "<|im_start|>user\nhi<|im_end|>\n"


PAIR = {"prompt": "hi", "completion": "hello"}
LISTS = {"prompt": [*turns("one", "first"), ASKED], "completion": [ANSWER]}


@pytest.mark.parametrize(
    ("row", "completion_only", "answers_only", "trained"),
    [
        (PAIR, None, True, "hello<|im_end|>"),
        (PAIR, None, False, "hello<|im_end|>"),
        (PAIR, True, True, "hello<|im_end|>"),
        (PAIR, True, False, "hello<|im_end|>"),
        (PAIR, False, False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"),
        (LISTS, None, True, "hello<|im_end|>"),
        (LISTS, True, False, "hello<|im_end|>"),
        (LISTS, False, True, "first<|im_end|>hello<|im_end|>"),
    ],
)
def test_which_part_of_a_completion_row_carries_loss(
    recipe_on: Callable[..., Recipe], row: Any, completion_only: bool | None, answers_only: bool, trained: str
):
    recipe = recipe_on([row], completion_only_loss=completion_only, assistant_only_loss=answers_only)
    assert told(recipe, tokens_of(recipe))[0][1] == trained


def test_a_loss_setting_that_a_format_cannot_follow_is_refused(recipe_on: Callable[..., Recipe]):
    for value in (True, False):
        message = refusal(recipe_on([GOOD], completion_only_loss=value))
        assert (
            "`completion_only_loss` is for rows with `prompt` and `completion`; those of rows.jsonl are `mess"
            in message
        )
    assert "which `assistant_only_loss: true` excludes" in refusal(recipe_on([PAIR], completion_only_loss=False))


def test_rows_of_tokens_are_taken_as_they_are(recipe_on: Callable[..., Recipe]):
    rows = [{"input_ids": [1, 300, 301, 2], "labels": [-100, -100, 301, 2]}, {"input_ids": [300, 2]}]
    assert tokens_of(recipe_on(rows)) == [([1, 300, 301, 2], [-100, -100, 301, 2]), ([300, 2], [300, 2])]
    text = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    assert tokens_of(recipe_on(text)) == tokens_of(recipe_on(rows))
    assert not settings_of(sources(recipe_on(rows))[0]).chat


def test_a_row_that_was_converted_is_not_changed():
    row = multi(1, "string arguments")
    before = json.dumps(row)
    convert(row, RowSettings("messages", {}))
    assert json.dumps(row) == before
    with pytest.raises(BadRow):
        convert({"messages": []}, RowSettings("messages", {}))


def test_the_formats_that_a_recipe_may_name_are_those_that_are_read():
    assert set(FORMATS) == set(COLUMNS) == set(OPTIONAL) == set(CONVERTERS)
