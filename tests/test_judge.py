"""What an answer is held against: each expectation both ways, loops and leaks against what only looks like them."""

import json
import socket
import time
from typing import Any

import pytest

from lora_recipes.judge import Signs, broken, fault, leak, loop, shortened

SCHEMA = {"type": "object", "required": ["size"], "properties": {"size": {"type": "integer"}}}


def failed(expectation: dict[str, Any], text: str, *, base: str | None = "other", **given: Any) -> list[str]:
    found = broken({"stops": True} | expectation, {"text": text, "stopped": "eos"} | given, base)
    assert all(entry["found"] for entry in found)
    return [entry["check"] for entry in found]


@pytest.mark.parametrize(
    ("expectation", "meets", "misses"),
    [
        ({"contains": "ink"}, "pens with ink", "pens"),
        ({"contains": ["ink", "pens"]}, "pens with ink", "pens with oil"),
        ({"equals": " Paris\n"}, "Paris", "Paris."),
        ({"equals": ""}, "", "a"),
        ({"regex": r"^\d+ pens$"}, "12 pens", "12 pens please"),
        ({"regex": "pen"}, "two pens", "two cups"),
        ({"json": True}, "[1, 2]", "[1, 2"),
        ({"json": True}, "null", "NaN"),
        ({"json": True}, "{}", "```json\n{}\n```"),
        ({"json": SCHEMA}, '{"size": 2}', '{"size": "2"}'),
        ({"json": SCHEMA}, '{"size": 2, "more": []}', "{}"),
        ({"json": {}}, "3", "three"),
        ({"differs_from_base": True}, "mine", "other"),
    ],
)
def test_an_expectation_holds_or_is_named(expectation: dict[str, Any], meets: str, misses: str):
    assert failed(expectation, meets) == []
    assert failed(expectation, misses) == list(expectation)


@pytest.mark.parametrize("expectation", [{"json": False}, {"differs_from_base": False}, {"stops": False}])
def test_what_is_switched_off_is_not_asked(expectation: dict[str, Any]):
    given = {"fault": "ran into the limit of new tokens"} if "stops" in expectation else {}
    assert failed(expectation, "other", **given) == []


def test_an_answer_with_a_fault_did_not_stop():
    assert failed({}, "a") == []
    assert failed({}, "a", fault="leaks '<s>'") == ["stops"]


def test_a_base_that_was_not_asked_is_no_proof_of_a_difference():
    assert failed({"differs_from_base": True}, "a", base=None) == ["differs_from_base"]


def test_a_schema_never_reaches_the_network(monkeypatch: pytest.MonkeyPatch):
    """`check` refuses such a recipe; whatever gets past it must not fetch."""
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **_: asked.append(place) or [])
    assert failed({"json": {"$ref": "https://example.org/s.json"}}, "1") == ["json"]
    assert asked == []


def test_deeply_nested_json_is_a_finding_and_no_crash():
    assert failed({"json": True}, "[" * 100_000) == ["json"]


@pytest.mark.parametrize(
    ("schema", "text", "said"),
    [
        ({"multipleOf": 0.1}, "1" + "0" * 400, "OverflowError"),
        (
            {"properties": {"a": {"$ref": "#"}}, "additionalProperties": {"$ref": "#"}},
            '{"a":' * 900 + "1" + "}" * 900,
            "",
        ),
        ({"$ref": "#"}, "1", "RecursionError"),
    ],
)
def test_an_answer_that_a_check_stumbles_over_has_not_met_it(schema: dict[str, Any], text: str, said: str):
    [found] = broken({"stops": True, "json": schema}, {"text": text, "stopped": "eos"}, None)
    assert found["check"] == "json" and said in found["found"] and len(found["found"]) < 300


@pytest.mark.parametrize(
    "expectation",
    [
        {"regex": r"^(([\s\S]|[\s\S][\s\S])*)*\x00$"},
        {"json": {"pattern": r"^(([\s\S]|[\s\S][\s\S])*)*\x00$"}},
    ],
)
def test_a_check_without_end_is_broken_off_and_fails(monkeypatch: pytest.MonkeyPatch, expectation: dict[str, Any]):
    monkeypatch.setattr("lora_recipes.judge.CHECK_SECONDS", 0.2)
    text = json.dumps("a" * 56)  # 58 characters
    [found] = broken({"stops": True} | expectation, {"text": text, "stopped": "eos"}, None)
    assert found["found"] == "could not be judged: it took more than 0.2 s"


def test_every_check_that_fails_is_told():
    expectation = {"contains": "x", "equals": "y", "regex": "z", "json": True, "differs_from_base": True}
    assert set(failed(expectation, "other", fault="repeats")) == {*expectation, "stops"}


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("I am sure. " + "Yes, it is. " * 12, "Yes, it is."),
        ("I am sure. " + "Yes, it is. " * 12 + "Yes, i", "Yes, it is."),
        ("The order: " + "pens " * 20, "pens"),
        ("hm" + "a" * 80, "a"),
        ("- a line of text\n" * 6, "- a line of text"),
        ("好的，我知道了。" * 8, "好的，我知道了。"),
        ("total " + "." * 300, "."),
        ("0 " * 150, "0"),
        ("!" * 400, "!"),
    ],
)
def test_a_loop_at_the_end_is_found(text: str, unit: str):
    found = loop(text)
    assert found is not None
    # A loop has no first unit: any rotation of it is the same loop.
    assert "".join(found.split()) in "".join(unit.split()) * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27",
        "ha ha ha ha ha ha ha ha ha",
        "Yes. Yes. Yes. Yes. Yes.",
        "| item | count |\n|---|---|\n" + "".join(f"| pen {n} | 0 |\n" for n in range(30)),
        "| a | b | c | d | e | f | g | h |\n" + "|---|---|---|---|---|---|---|---|\n" * 1,
        '{"tags": [' + '"pen", ' * 30 + '"pen"]}',
        "very " * 30 + "good",
        "0 0 0 0\n" * 4,
        "A title\n" + "=" * 79,
        "- [ ] \n" * 9,
        "你好。" * 6,
        "\n".join(f"{n}. The same words for each of them" for n in range(1, 20)),
        "for (;;) {\n" + "    }\n" * 8,
        "We shall not flag or fail. We shall go on to the end. We shall fight in France. " * 3,
    ],
)
def test_what_repeats_for_a_reason_is_no_loop(text: str):
    assert loop(text) is None


def test_a_long_answer_is_looked_at_quickly():
    text = " ".join(f"word{n}" for n in range(8000))
    started = time.process_time()
    assert loop(text) is None
    assert time.process_time() - started < 2  # seconds; quadratic comparing in Python would take minutes


CHATML = Signs(controls=["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
PLAIN = Signs(controls=["</s>"], turns=["Human:", "Assistant:"])
HARMONY = Signs(controls=["<|start|>", "<|channel|>", "<|message|>"], answers=["<|channel|>", "<|message|>"])


@pytest.mark.parametrize(
    ("text", "signs", "found"),
    [
        ("Sure.<|im_start|>user\nAnd", CHATML, "<|im_start|>"),
        ("Sure.<|eot_id|>", CHATML, "<|eot_id|>"),  # of another family: a template was mixed up
        ("Sure. [INST] and", CHATML, "[INST]"),
        ("Sure.<end_of_turn>", PLAIN, "<end_of_turn>"),
        ("Sure.<｜User｜>", PLAIN, "<｜User｜>"),
        ("Sure.</s>", PLAIN, "</s>"),
        ("Paris.\nHuman: and Rome?", PLAIN, "Human:"),
        ("Human: and Rome?", PLAIN, "Human:"),
        ("<|channel|>final<|message|>Paris<|start|>", HARMONY, "<|start|>"),
    ],
)
def test_a_leaked_control_token_or_turn_is_found(text: str, signs: Signs, found: str):
    assert leak(text, signs) == found
    assert fault(text, "eos", signs) == f"leaks {found!r}"


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        ("<think>\nHm.\n</think>\n\nParis", Signs(controls=["<think>", "</think>", "<|im_end|>"])),
        ("<tool_call>{}</tool_call>", CHATML),
        ("The user said: Human: hello", PLAIN),
        ("Paris.\nHuman: and Rome?", CHATML),  # this template opens no turn so
        ("<|channel|>final<|message|>Paris", HARMONY),
        ("if (a <| b |> c) x = [INSTALL];", CHATML),
        ("<b>bold</b> a || b", CHATML),
        ("Paris.\nHuman:", Signs(turns=["Human:"], stops=["\nHuman:"])),  # where the recipe lets it stop
    ],
)
def test_what_belongs_into_an_answer_is_no_leak(text: str, signs: Signs):
    assert leak(text, signs) is None


@pytest.mark.promise("G1")
@pytest.mark.parametrize(
    ("text", "stopped", "found"),
    [
        ("", "eos", "is empty"),
        (" \n", "eos", "is empty"),
        ("caf\ufffd", "eos", "holds bytes that are no UTF-8"),
        ("on and on", "length", "ran into the limit of new tokens"),
        ("on and on", "time", "ran into the limit of time"),
        ("caf\ufffd", "length", "ran into the limit of new tokens"),  # cut within a character
        ("pens " * 20, "eos", "repeats 'pens' at its end"),
        ("café", "eos", None),
    ],
)
def test_each_way_an_answer_can_go_wrong_has_a_name(text: str, stopped: str, found: str | None):
    assert fault(text, stopped, Signs()) == found


def test_how_an_answer_ended_is_told_in_order_of_what_explains_most():
    looping = "pens " * 20
    assert fault("Paris", "eos", CHATML) is None
    assert fault("Paris", "length", CHATML) == "ran into the limit of new tokens"
    assert fault(looping, "length", CHATML) == "repeats 'pens' at its end"
    assert fault(f"{looping}<|im_start|>", "length", CHATML) == "leaks '<|im_start|>'"


def test_a_cut_text_shows_it():
    assert shortened("abc", 3) == "abc" and shortened("abcd", 3) == "ab…"
