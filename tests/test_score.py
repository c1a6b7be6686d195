"""Scores against answers counted by hand, and what fails a recipe's `checks`."""

from typing import Any

import pytest

from lora_recipes.score import DEFAULTS, fields_right, score, summary, token_f1, tokens, told

OFF = {"min_stopped": 0}


def row(expected: str | None, prompt: str = "q", **answers: Any) -> dict[str, Any]:
    """A row of generations.jsonl; an answer is its text, or the whole entry."""
    given = {
        who: one if isinstance(one, dict) else {"text": one, "stopped": "eos"}
        for who, one in answers.items()
        if who != "expectation"
    }
    asked = {"expectation": answers["expectation"]} if "expectation" in answers else {}
    return {"prompt": prompt, "expected": expected} | asked | given


def cut(text: str = "a") -> dict[str, Any]:
    return {"text": text, "stopped": "length", "fault": "ran into the limit of new tokens"}


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("Paris", "paris", 1.0),
        ("The answer is Paris.", "answer: is PARIS", 1.0),  # articles, case and punctuation do not count
        ("in Paris", "Paris", 2 * 0.5 * 1 / 1.5),
        ("pens", "cups", 0.0),
        ("", "", 1.0),
        ("", "cups", 0.0),
        ("cups", "", 0.0),
        ("a", "the", 1.0),  # nothing is left of either
        ("no no no", "no", 2 * (1 / 3) * 1 / (4 / 3)),  # counted as often as it occurs
        ("我要两支笔", "我要三支笔", 0.8),  # 4 of 5 characters
        ("买 pens 两支", "买两支pens", 1.0),  # a word inside Chinese is one token
        ("12.50", "1250", 0.0),
        ("ﬁne", "fine", 1.0),
        ('{"size":2}', '{"size": 2}', 1.0),
    ],
)
def test_token_f1_is_the_one_counted_by_hand(answer: str, expected: str, f1: float):
    assert token_f1(answer, expected) == pytest.approx(f1)
    assert token_f1(expected, answer) == pytest.approx(f1)


def test_tokens_are_words_and_characters():
    assert tokens("Don't pay 1,250.50 for the snow_white cup!") == [
        "don't",
        "pay",
        "1,250.50",
        "for",
        "snow",
        "white",
        "cup",
    ]
    assert tokens("東京へ行く OK") == ["東", "京", "へ", "行", "く", "ok"]


def test_fields_are_compared_by_value():
    assert fields_right('{"a": 1, "b": 3}', '{"a": 1, "b": 2}') == (1, 2)
    assert fields_right("no", '{"a": 1}') == (0, 1)
    assert fields_right('{"a": 1}', "[1]") == (0, 0)
    assert fields_right("[" * 100_000, '{"a": 1}') == (0, 1)


def test_scores_count_held_out_rows_and_endings_all_rows():
    rows = [
        row('{"x": 1, "y": 2}', base="x", adapter='{"x": 1, "y": 2}'),
        row('{"x": 1, "y": 2}', base="x", adapter='{"x": 1, "y": 3}'),
        row(None, base=cut("x"), adapter={"text": "x", "stopped": "eos", "fault": "leaks '<s>'"}),
        row(None, base="x", adapter=cut("x"), expectation={"prompt": "q", "stops": False}),
    ]
    found = score(rows, "adapter")
    assert found is not None
    assert found.as_json() == {
        "asked": 4,
        "expected": 2,
        "exact_match": 0.5,
        "field_match": 0.75,
        "token_f1": 0.875,  # 1 and 3 of 4 tokens
        "stopped_by_eos": 0.75,
        "stops": 0.6667,  # of the three that should end; one leaks
    }
    assert score(rows, "merged") is None


def test_an_empty_transcript_has_neither_scores_nor_failures():
    checks = {"prompts": [{"prompt": "a"}], "scores": {"exact_match": {"min": 1}}, "min_stopped": 1}
    assert summary([], checks) == {"scores": {}, "stopped": {}, "merged_equals_adapter": None, "failed": []}


def test_most_answers_must_end_by_default_and_only_those_of_trained_models():
    rows = [row(None, f"q{number}", base=cut(), adapter="a", merged="a") for number in range(20)]
    assert summary(rows, {})["failed"] == []
    rows[3]["merged"] = cut()
    assert summary(rows, {})["failed"] == []  # 19 of 20 is the default share
    rows[7]["merged"] = cut()
    [failure] = summary(rows, {})["failed"]
    assert (failure["check"], failure["model"], failure["expected"], failure["found"]) == (
        "min_stopped",
        "merged",
        DEFAULTS["min_stopped"],
        0.9,
    )
    assert [example["prompt"] for example in failure["examples"]] == ["q3", "q7"]
    assert "merged" in told(failure) and "'q3'" in told(failure) and "limit of new tokens" in told(failure)
    assert summary(rows, {"min_stopped": 0.9})["failed"] == [] == summary(rows, OFF)["failed"]
    assert summary(rows, {"min_stopped": 0.91})["failed"]


def test_nothing_to_measure_fails_only_what_was_written():
    rows = [row(None, adapter=cut(), expectation={"prompt": "q", "stops": False})]
    prompts = [{"prompt": "q", "stops": False}]
    assert summary(rows, {"prompts": prompts})["failed"] == []
    [failure] = summary(rows, {"prompts": prompts, "min_stopped": 0.1})["failed"]
    assert failure["found"] is None and "not measured" in told(failure)


@pytest.mark.parametrize(
    ("name", "expected", "least", "passes"),
    [
        ("exact_match", "a", 0.5, True),
        ("exact_match", "a", 0.51, False),
        ("token_f1", "words", 0.5, True),
        ("token_f1", "words", 0.6, False),
        ("field_match", '{"x": 1}', 0.5, True),
        ("field_match", '{"x": 1}', 0.9, False),
        ("field_match", "no JSON at all", 0.0, False),  # cannot be measured
    ],
)
def test_a_score_under_its_least_value_fails(name: str, expected: str, least: float, passes: bool):
    rows = [row(expected, "first", adapter=expected), row(expected, "second", adapter="zzz")]
    failed = summary(rows, OFF | {"scores": {name: {"min": least}}})["failed"]
    assert (failed == []) is passes
    if not passes:
        assert (failed[0]["check"], failed[0]["model"], failed[0]["expected"]) == (name, "adapter", least)
        assert "'second'" in told(failed[0])


def test_a_score_over_no_rows_is_a_failure():
    failed = summary([row(None, adapter="a")], OFF | {"scores": {"exact_match": {"min": 0}}})["failed"]
    assert failed[0]["found"] is None and "not measured" in told(failed[0])


def test_an_expectation_fails_for_trained_models_alone():
    missed = {"text": "x" * 300, "stopped": "eos", "failed": [{"check": "contains", "expected": "a", "found": "no"}]}
    expectation = {"prompt": "q", "stops": True, "contains": "a"}
    checks = OFF | {"prompts": [{"prompt": "q", "contains": "a"}]}
    right = {"text": "a", "stopped": "eos", "failed": []}
    assert summary([row(None, base=missed, adapter=right, expectation=expectation)], checks)["failed"] == []
    for who in ("adapter", "merged", "served"):
        [failure] = summary([row(None, base=right, **{who: missed}, expectation=expectation)], checks)["failed"]
        assert (failure["model"], failure["prompt"], failure["check"]) == (who, "q", "contains")
        assert len(failure["answer"]) == 200
        assert told(failure).startswith(f"{who}, prompt 'q' (generations.jsonl:1): contains 'a': no; it answered 'xxx")


@pytest.mark.parametrize(
    "prompts", [[], [{"prompt": "q", "contains": "b"}], [{"prompt": "q", "contains": "a"}, {"prompt": "r"}]]
)
def test_a_transcript_made_with_other_expectations_proves_nothing(prompts: list[dict[str, Any]]):
    right = {"text": "a", "stopped": "eos", "failed": []}
    rows = [row(None, adapter=right, expectation={"prompt": "q", "stops": True, "contains": "a"})]
    assert summary(rows, OFF | {"prompts": [{"prompt": "q", "contains": "a"}]})["failed"] == []
    [failure] = summary(rows, OFF | {"prompts": prompts})["failed"]
    assert failure["check"] == "prompts" and "other `checks.prompts`" in told(failure)


def test_merged_equals_adapter_is_the_share_of_equal_texts():
    rows = [row(None, adapter="a", merged="a"), row(None, adapter="a", merged="b"), row(None, adapter="a")]
    assert summary(rows, OFF)["merged_equals_adapter"] == 0.5
