"""Chat templates that TRL does not know and those shipped here, which of them a run uses, and keywords of a row."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_recipes.data import chat_templates
from lora_recipes.data.formats import Conversation
from lora_recipes.data.masks import IGNORED, Masker
from lora_recipes.errors import RecipeError
from lora_recipes.recipe import Recipe
from tests.data_room.chat_tokenizers import TRL, tokenizer_of
from tests.data_room.conversations import (
    CHATML,
    DIFFERENCE,
    LIU,
    MARKS,
    ROWS,
    SIX,
    SMOLLM2,
    both,
    chat,
    conversation,
    masker_of,
    own_masker,
    refused,
    rendered_ids,
    tokenized,
    trained,
)

# -- laws, on templates of the tests' own -----------------------------------------------------------------------------

COLONS = (  # the prompt ends with a space, which a tokenizer takes into the answer's first word
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{{ '<|im_end|>\n' if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def marked_template(words: str, after: str) -> str:
    return (
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ 'assistant\n' }}"
        "{% generation %}{{ " + words + " }}{% endgeneration %}{{ " + after + " }}"
        "{% else %}{{ message.role + '\n' + message.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}{# <|im_end|> <|im_start|> #}"
    )


def test_smollm2s_own_template_gives_its_default_system_turn_and_trains_the_answers():
    masker = own_masker(SMOLLM2)
    row = chat("What is 2 times 3?", SIX, "In Chinese, please?", LIU)
    assert masker.origin.startswith(DIFFERENCE)
    assert trained(masker, row) == CHATML
    ids = tokenized(masker, row).input_ids.tolist()
    assert ids == rendered_ids(masker, row)
    for messages in (1, 3):
        asked = masker.prompt_ids(Conversation(row.messages[:messages]))
        assert ids[: len(asked)] == asked
    assert masker.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize("turns", [1, 3])
def test_a_mask_by_difference_costs_the_whole_and_two_renders_a_turn_at_most(
    turns: int, monkeypatch: pytest.MonkeyPatch
):
    masker, row = own_masker(SMOLLM2), chat(*("What is 2 times 3?", SIX) * turns)
    rendered: list[int] = []
    render = masker._render

    def counted(messages: list[Any], *rest: Any, **more: Any) -> Any:
        rendered.append(len(messages))
        return render(messages, *rest, **more)

    monkeypatch.setattr(masker, "_render", counted)
    masker.render(row)
    assert len(rendered) == 2 * turns + 1  # the last answer ends where the whole does; one more for a form of dialogue
    masker.render(row)
    assert len(rendered) == 4 * turns + 1


@pytest.mark.parametrize(
    "content",
    ["message.content[:9]", "(message.content if loop.last else message.content | upper)"],
)
def test_an_unknown_template_that_rewrites_an_answer_is_refused(content: str):
    masker = own_masker(SMOLLM2.replace("message['content']", content))
    bad = refused(masker, chat("Say six.", SIX, "Chinese.", LIU))
    assert bad.kind == "template" and bad.field.startswith("message")
    assert "drops or rewrites its text" in bad.message


@pytest.mark.promise("M5")
def test_an_unknown_template_that_rewrites_the_turns_before_is_refused():
    """It takes the thinking out of earlier turns, and closes them in another way."""
    template = SMOLLM2.replace(
        "message['content']", "(message.content if loop.last else message.content.split('</think>')[-1])"
    )
    bad = refused(own_masker(template), chat("Say six.", f"<think>Twice three.</think>{SIX}", "Chinese.", LIU))
    assert bad.kind == "template" and "differently alone than in the whole" in bad.message
    assert "training.chat_template_path" in bad.message and "training.assistant_only_loss=false" in bad.message


@pytest.mark.promise("M5")
def test_an_end_token_is_trained_where_it_is_the_padding_too():
    """What is masked is decided by place: masking every padding token would take away what the model stops by."""
    masker = own_masker(SMOLLM2)
    assert masker.tokenizer.pad_token_id == masker.tokenizer.eos_token_id
    rows = [tokenized(masker, chat(*turns)) for turns in (("Say six.", SIX, "Chinese.", LIU), ("Say six.", SIX))]
    collate = DataCollatorForLanguageModeling(masker.tokenizer.pad_token_id)
    batch = collate([{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows])
    ends = (batch["labels"] == masker.tokenizer.eos_token_id).sum(-1).tolist()
    assert ends == [2, 1] and batch["labels"][1, -1] == IGNORED  # the shorter row is padded


def test_an_end_token_that_follows_the_marks_is_trained():
    masker = own_masker(marked_template("message.content", "'<|im_end|>\n'"))
    assert masker.origin.startswith(MARKS)
    assert trained(masker, chat("Say six.", SIX, "Chinese.", LIU)) == CHATML


@pytest.mark.parametrize(
    ("words", "after"),
    [
        ("message.content", "'\n'"),
        ("message.content", "'\n<|im_end|>'"),
        ("message.content + '<|im_start|>'", "'\n'"),
        ("message.content + ('\n' if loop.last else '<|im_end|>')", "''"),
        ("('<|im_end|>' if loop.last else '<|im_start|>') + message.content", "'<|im_end|>' if loop.last else '\n'"),
    ],
)
def test_an_answer_that_no_end_token_closes_is_refused(words: str, after: str):
    bad = refused(own_masker(marked_template(words, after)), chat("Say six.", SIX, "Chinese.", LIU))
    assert bad.kind == "end_token" and "training.eos_token" in bad.message and "<|im_end|>" in bad.message


def test_marks_that_are_missing_or_cut_an_answer_in_two_are_refused():
    some = marked_template("message.content", "'<|im_end|>'").replace(
        "== 'assistant' %}", "== 'assistant' and false %}"
    )
    parted = marked_template("message.content", "'-'").replace(
        "{% else %}", "{% generation %}!{% endgeneration %}{% else %}"
    )
    for template, found in ((some, 0), (parted, 2)):
        bad = refused(own_masker(template), chat("Say six.", SIX))
        assert bad.kind == "template" and f"marks {found} answers where the conversation has 1" in bad.message


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("template", [SMOLLM2, COLONS, marked_template("message.content + '<|im_end|>'", "'\n'")])
@pytest.mark.parametrize(
    "answer", [SIX, f" {SIX}", f"  {SIX}", f"\n{SIX}", f"\n\n{SIX}", f"\n \n{LIU}", LIU, f"{SIX} \n"]
)
def test_an_answer_may_begin_and_end_with_white_space(answer: str, template: str, trims: bool):
    masker, row = own_masker(template, trims=trims), chat("Say six.", answer, "In Chinese, please?", answer)
    assert trained(masker, row) == [f"{answer}<|im_end|>"] * 2
    ids = tokenized(masker, row).input_ids.tolist()
    assert masker.tokenizer.decode(ids) == masker.tokenizer.decode(rendered_ids(masker, row))
    asked = masker.prompt_ids(Conversation(row.messages[:1]))
    assert ids[: len(asked)] == asked  # as at inference


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("cafe\u0301 e\u0301 o\u0308", "answer \u0958 done"), ("e\u0301e\u0301", "x \u0344 yes"), ("plain", "cafe\u0301")],
    ids=["grows and shrinks", "grows", "in the answer"],
)
def test_a_normalizer_that_moves_characters_does_not_move_the_mask(asked: str, answered: str):
    """The widths of the tokens add up to the text although both of its ends were changed (NFC, as in Qwen)."""
    tokenizer = own_masker(SMOLLM2).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    masker = Masker(tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")})
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    (row,) = masker.tokenize([masker.render(Conversation(messages))])
    trained = tokenizer.decode([int(label) for label in row.labels if label != IGNORED])
    assert trained == unicodedata.normalize("NFC", answered) + "<|im_end|>"


# -- keywords of a row ------------------------------------------------------------------------------------------------


def test_a_rows_chat_template_kwargs_reach_the_template():
    masker = masker_of("qwen3")
    row = chat("What is 2 times 3?", SIX, chat_template_kwargs={"enable_thinking": False})
    assert trained(masker, row) == [f"{SIX}<|im_end|>"]  # the prompt has the empty thinking
    assert trained(masker, chat("What is 2 times 3?", SIX)) == [f"<think>\n\n</think>\n\n{SIX}<|im_end|>"]
    assert tokenized(masker, row).input_ids.tolist() == rendered_ids(masker, row)
    row.messages.pop()
    assert masker.tokenizer.decode(masker.prompt_ids(row)).endswith("assistant\n<think>\n\n</think>\n\n")


# -- which template a run uses ----------------------------------------------------------------------------------------

SHIPPED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nSay six.\n\n### Response:\nIt is six.<|im_end|>\n\n"
        "### Instruction:\nChinese.\n\n### Response:\n二乘三等于六。<|im_end|>",
        both("…<|im_end|>"),
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay six.<|im_end|>\n<|im_start|>assistant\n"
        "It is six.<|im_end|>\n<|im_start|>user\nChinese.<|im_end|>\n<|im_start|>assistant\n二乘三等于六。<|im_end|>\n",
        both("…<|im_end|>"),
    ),
    "human_assistant": (
        "Be brief.\nHuman: Say six.\nAssistant: It is six.<|im_end|>\n"
        "Human: Chinese.\nAssistant: 二乘三等于六。<|im_end|>",
        both(" …<|im_end|>"),
    ),
    "plain": ("Be brief.Say six.It is six.<|im_end|>Chinese.二乘三等于六。<|im_end|>", both("…<|im_end|>")),
}


def bare_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """With ChatML's control tokens, but without a template."""
    tokenizer = tokenizer_of("<|im_start|>", "<|startoftext|>", ("<|im_end|>",), adds_bos=adds_bos)
    tokenizer.chat_template = None
    return tokenizer


def test_the_shipped_templates_are_known():
    assert chat_templates.shipped() == sorted(SHIPPED)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_begins_as_the_tokenizer_does(name: str, adds_bos: bool, recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer(adds_bos=adds_bos)
    recipe = recipe_on([{}], chat_template_path=name)
    assert chat_templates.settle(tokenizer, recipe, ["messages"]) == f"`{name}`"
    masker = Masker(tokenizer, {tokenizer.eos_token_id})
    row = chat("Say six.", SIX, "Chinese.", LIU)
    row.messages.insert(0, {"role": "system", "content": "Be brief."})
    text, answers = SHIPPED[name]
    ids = tokenized(masker, row).input_ids.tolist()
    assert tokenizer.decode(ids) == ("<|startoftext|>" if adds_bos else "") + text
    assert trained(masker, row) == answers
    assert masker.origin.startswith(MARKS)
    for messages in (2, 4):
        asked = masker.prompt_ids(Conversation(row.messages[:messages]))
        assert ids[: len(asked)] == asked
    literal = tokenized(masker, Conversation(text="It is six.", answers_only=False)).input_ids.tolist()
    assert literal.count(tokenizer.bos_token_id) == int(adds_bos)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_without_a_form_for_tools_refuses_them(name: str, recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer()
    chat_templates.settle(tokenizer, recipe_on([{}], chat_template_path=name), ["messages"])
    masker = Masker(tokenizer, {tokenizer.eos_token_id})
    without_list = {"messages": ROWS["tools"]["messages"]}
    assert refused(masker, conversation(ROWS["tools"])).kind == "template"
    assert refused(masker, conversation(without_list)).kind == "template"


def test_a_template_is_a_file_a_shipped_name_or_one_of_trls(recipe_on: Callable[..., Recipe], workdir: Path):
    (workdir / "mine.jinja").write_text(SMOLLM2, encoding="utf-8")
    for wanted, said, begins in (
        ("mine.jinja", "the file mine.jinja", SMOLLM2),
        ("chatml", "`chatml`", "{#- ChatML."),
        ("llama3", "TRL's `llama3`", (TRL / "llama3.jinja").read_text(encoding="utf-8")),
    ):
        tokenizer = bare_tokenizer()
        assert chat_templates.settle(tokenizer, recipe_on([{}], chat_template_path=wanted), ["text"]) == said
        assert tokenizer.chat_template.startswith(begins)


def test_an_unknown_template_is_refused_with_the_known_names(recipe_on: Callable[..., Recipe]):
    with pytest.raises(RecipeError) as caught:
        chat_templates.settle(bare_tokenizer(), recipe_on([{}], chat_template_path="lama3"), ["messages"])
    for name in ("lama3", *SHIPPED, "llama3", "qwen3_training", "tiny.yaml:"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("form", "template"),
    [("text", "human_assistant"), ("prompt_completion", "plain")],
)
def test_without_a_template_literal_formats_have_one(form: str, template: str, recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer(adds_bos=True)
    assert chat_templates.settle(tokenizer, recipe_on([{}]), [form]) == f"`{template}`, for the tokenizer has none"
    masker = Masker(tokenizer, {tokenizer.eos_token_id})
    ids = tokenized(masker, chat("Say six.", SIX)).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.promise("M5")
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "question_answer"])
def test_without_a_template_chat_formats_need_one(form: str, recipe_on: Callable[..., Recipe]):
    with pytest.raises(RecipeError, match=r"this tokenizer has no chat template.*chat_template_path.*chatml.*llama3"):
        chat_templates.settle(bare_tokenizer(), recipe_on([{}]), [form])


def test_rows_that_are_no_conversations_need_no_template(recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer()
    assert chat_templates.settle(tokenizer, recipe_on([{}]), []) == "none"
    assert tokenizer.chat_template is None
    assert refused(Masker(tokenizer, {0}), chat("Say six.", SIX)).message == "the tokenizer has no chat template"


def test_the_models_own_template_is_kept(recipe_on: Callable[..., Recipe]):
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = SMOLLM2
    assert chat_templates.settle(tokenizer, recipe_on([{}]), ["messages"]) == "the model's own"
    assert tokenizer.chat_template == SMOLLM2
