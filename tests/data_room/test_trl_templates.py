"""Every chat template that TRL has: the assistant's words and the end token carry loss, no more."""

import pytest

from lora_recipes.data.formats import BadRow, Conversation
from lora_recipes.errors import DataError
from tests.data_room.chat_tokenizers import TRL
from tests.data_room.conversations import (
    DIFFERENCE,
    MARKS,
    ROWS,
    SIX,
    chat,
    conversation,
    masker_of,
    refused,
    rendered_ids,
    runs,
    tokenized,
    trained,
)
from tests.data_room.trl_templates import EXPECTED, OPENED

NAMES = sorted(path.stem for path in TRL.glob("*.jinja"))
KNOWN = "TRL's training template"
UNKNOWN_TO_TRL = {"gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "llama3_1", "llama3_2"}
WITH_MARKS = {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"}  # beside TRL's training templates


def test_the_table_knows_every_template_that_trl_has():
    assert {name for name, _ in EXPECTED} == set(NAMES)


@pytest.mark.parametrize(("name", "fixture"), [(name, fixture) for name in NAMES for fixture in ROWS])
def test_exactly_the_answers_carry_loss(name: str, fixture: str):
    masker, row, expected = masker_of(name), conversation(ROWS[fixture]), EXPECTED[name, fixture]
    if isinstance(expected, str):
        bad = refused(masker, row)
        assert bad.kind == "template" and expected in f"{bad.field} {bad.message}"
        return
    assert trained(masker, row) == expected
    ids, whole = tokenized(masker, row).input_ids.tolist(), rendered_ids(masker, row)
    if expected[-1] == OPENED[-1]:  # the prompt's "<think>\n" and the model's "\n</think>" are two tokens, not "\n\n"
        ids, whole = masker.tokenizer.decode(ids), masker.tokenizer.decode(whole)
    assert ids == whole
    thoughts = [message["reasoning_content"] for message in row.messages if "reasoning_content" in message]
    shown = [thought in said for thought, said in zip(thoughts, expected, strict=False)]
    assert masker.render(row).thinking_left_out is not all(shown)


@pytest.mark.parametrize("name", NAMES)
def test_the_source_of_the_mask(name: str):
    marked = name.endswith("_training") or name in WITH_MARKS
    assert masker_of(name).origin.startswith(MARKS if marked else DIFFERENCE if name in UNKNOWN_TO_TRL else KNOWN)


@pytest.mark.parametrize("name", NAMES)
def test_a_developers_words_are_rendered_or_the_row_is_refused(name: str):
    masker = masker_of(name)
    row = chat("What is 2 times 3?", SIX)
    row.messages.insert(0, {"role": "developer", "content": "Be very brief."})
    try:
        text = masker.tokenizer.decode(tokenized(masker, row).input_ids)
    except BadRow as bad:
        assert bad.kind == "template"
    else:
        assert "Be very brief." in text


# Their generation prompt opens thinking, and an answer without any is written another way.
NOT_A_PREFIX = {name for name in NAMES if name.startswith(("nemotron", "deepseek"))}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_at_inference_begins_the_row(name: str):
    masker = masker_of(name)
    row = chat("What is 2 times 3?", SIX)
    ids, spans = tokenized(masker, row).input_ids.tolist(), runs(tokenized(masker, row))
    row.messages.pop()
    asked = masker.prompt_ids(row)
    if name in NOT_A_PREFIX:
        assert ids[: len(asked)] != asked
    else:
        assert ids[: len(asked)] == asked
        assert ids[len(asked) :][: len(spans[0])] == spans[0]


# With these a turn is asked about after a history that is written otherwise than it was trained: the model's own template
# takes thinking out of earlier turns (TRL's training template keeps it), or joins the line ends that the prompt parts.
OTHER_HISTORY = NOT_A_PREFIX | {name for name in NAMES if name.startswith("qwen3_") and name[6].isdigit()} | {"qwen3"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - OTHER_HISTORY))
def test_every_turn_is_asked_as_it_is_trained(name: str):
    masker = masker_of(name)
    for fixture in ROWS:
        if isinstance(EXPECTED[name, fixture], str):
            continue
        row = conversation(ROWS[fixture])
        ids = tokenized(masker, row).input_ids.tolist()
        for number, message in enumerate(row.messages):
            if message["role"] == "assistant":
                asked = masker.prompt_ids(Conversation(row.messages[:number], row.tools))
                assert ids[: len(asked)] == asked


def test_a_question_that_the_models_own_template_refuses_is_an_error_of_the_data():
    row = conversation(ROWS["plain"])
    with pytest.raises(DataError, match="refuses a question: System role not supported"):
        masker_of("gemma").prompt_ids(Conversation(row.messages[:2]))
