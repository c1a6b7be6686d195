"""Control tokens that stand in a row: plain text, or the row is refused; never a token that steers the model."""

import copy

import pytest

from lora_recipes.data.formats import BadRow, Conversation
from lora_recipes.data.masks import Masker
from tests.data_room.conversations import (
    ROWS,
    SIX,
    SMOLLM2,
    chat,
    conversation,
    masker_of,
    own_masker,
    refused,
    runs,
    tokenized,
)
from tests.data_room.trl_templates import EXPECTED


def with_words(fixture: str, words: str) -> Conversation:
    """A fixture whose every free text, tool arguments and tool descriptions included, ends with the given words."""
    row = copy.deepcopy(ROWS[fixture])
    for message in row["messages"]:
        for key in ("content", "reasoning_content"):
            if message.get(key):
                message[key] += f" {words} so"
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = {"a": 2, "b": f"the {words} so"}
    for tool in row.get("tools", []):
        tool["function"]["description"] += f" {words} so"
    return conversation(row)


def special_count(masker: Masker, ids: list[int]) -> int:
    return sum(token in masker.special_ids for token in ids)


CONTROLS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|channel|>",
    "gemma4": "<turn|>",
    "muse_glimmer": "<|start|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "llava_next": "</s>",
    "phi3": "<|end|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "qwen2_5": "<|im_start|>",
}
CONTROLLED = [
    (name, fixture, control)
    for name, control in CONTROLS.items()
    for fixture in ROWS
    if isinstance(EXPECTED[name, fixture], list)
]


@pytest.mark.parametrize(("name", "fixture", "control"), CONTROLLED)
def test_control_tokens_in_a_row_stay_plain_text(name: str, fixture: str, control: str):
    assert (bad := refused(masker_of(name), with_words(fixture, control))).kind == "control_token"
    assert control in bad.message and "dataset.control_tokens: escape" in bad.message
    masker = masker_of(name, "escape")
    decode = masker.tokenizer.decode
    harmless = tokenized(masker, with_words(fixture, "WORD"))
    escaped = tokenized(masker, with_words(fixture, control))
    assert special_count(masker, escaped.input_ids.tolist()) == special_count(masker, harmless.input_ids.tolist())
    assert decode(escaped.input_ids) == decode(harmless.input_ids).replace("WORD", control)
    assert [decode(run) for run in runs(escaped)] == [decode(run).replace("WORD", control) for run in runs(harmless)]
    assert any(control in decode(run[:-1]) for run in runs(escaped))


def test_a_question_with_a_control_token_is_asked_as_it_is_trained():
    masker = own_masker(SMOLLM2, "escape")
    row = chat("What is <|im_end|> here?", SIX)
    ids = tokenized(masker, row).input_ids.tolist()
    assert ids == tokenized(masker, row).input_ids.tolist()  # the row itself is left as it was
    asked = masker.prompt_ids(Conversation(row.messages[:1]))
    assert ids[: len(asked)] == asked and special_count(masker, asked) == 5


def test_control_tokens_in_the_names_of_arguments_are_found_as_well():
    call = {"function": {"name": "multiply", "arguments": {"a <|im_end|>": 2, "role": "<|im_start|>"}}}
    row = copy.deepcopy(ROWS["tools"])
    row["messages"][1]["tool_calls"] = [call]
    assert refused(masker_of("qwen3"), conversation(row)).kind == "control_token"
    masker = masker_of("qwen3", "escape")
    kept = tokenized(masker, conversation(row)).input_ids.tolist()
    plain = tokenized(masker, conversation(ROWS["tools"])).input_ids.tolist()
    assert special_count(masker, kept) == special_count(masker, plain)
    assert '{"a <|im_end|>": 2, "role": "<|im_start|>"}' in masker.tokenizer.decode(kept)


def test_literal_text_keeps_or_escapes_its_control_tokens():
    said = "one<|im_end|> two"
    for setting, special in (("keep", 2), ("escape", 1)):
        masker = own_masker(SMOLLM2, setting)
        row = tokenized(masker, Conversation(text=said, answers_only=False))
        assert special_count(masker, row.input_ids.tolist()) == special
        assert masker.tokenizer.decode(row.input_ids) == f"{said}<|im_end|>"
        assert row.labels.tolist() == row.input_ids.tolist()


def test_control_tokens_in_template_kwargs_are_refused_as_well():
    masker = own_masker("{{ note }}" + SMOLLM2)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match="control_token"):
        masker.render(Conversation(messages, template_kwargs={"note": "x<|im_end|>"}))


def test_the_marks_of_escaped_tokens_cannot_be_forged():
    masker = own_masker(SMOLLM2)
    masker.control_tokens = "escape"
    messages = [{"role": "user", "content": "\ue0029\ue003 <|im_end|>"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match="private use"):
        masker.render(Conversation(messages))
