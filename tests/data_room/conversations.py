"""Conversations, maskers of a chat template, and what of a conversation a masker trains."""

import copy
from functools import cache
from typing import Any

import pytest

from lora_recipes.data.formats import BadRow, Conversation, RowSettings, convert
from lora_recipes.data.masks import IGNORED, Masker, Tokenized
from tests.data_room.chat_tokenizers import tokenizer_of, trl_tokenizer

MARKS, DIFFERENCE = "the template's own", "the difference of renders"  # where a mask comes from

SIX, LIU = "It is six.", "二乘三等于六。"
ASKED, ASKED_AGAIN = (
    {"role": "user", "content": "What is 2 times 3?"},
    {"role": "user", "content": "In Chinese, please?"},
)
NUMBER = {"type": "integer", "description": "A number."}
TOOL = {
    "name": "multiply",
    "description": "Multiplies two numbers.",
    "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
}
CALL = {"id": "call1", "type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": None}}}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {
        "messages": [
            {"role": "system", "content": "Be very brief."},
            ASKED,
            {"role": "assistant", "content": SIX},
            ASKED_AGAIN,
            {"role": "assistant", "content": LIU},
        ]
    },
    "tools": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "multiply", "tool_call_id": "call1", "content": "The product: 6"},
            {"role": "assistant", "content": SIX},
            ASKED_AGAIN,
            {"role": "assistant", "content": LIU},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "thinking": {
        "messages": [
            ASKED,
            {"role": "assistant", "reasoning_content": "Twice three.", "content": SIX},
            ASKED_AGAIN,
            {"role": "assistant", "reasoning_content": "Translate six.", "content": LIU},
        ]
    },
}

# SmolLM2's, which TRL does not know.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def both(form: str) -> list[str]:
    """The two answers in a template's form."""
    return [form.replace("…", SIX), form.replace("…", LIU)]


CHATML = both("…<|im_end|>")


@cache
def masker_of(name: str, control_tokens: str = "error") -> Masker:
    return Masker(*trl_tokenizer(name), control_tokens)


def own_masker(template: str, control_tokens: str = "error", **tokenizer: Any) -> Masker:
    """For a template of a test's own, which ends its turns with <|im_end|>."""
    made = tokenizer_of(template, "<|startoftext|>", ("<|im_end|>", "<|endoftext|>"), **tokenizer)
    return Masker(made, set(made.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])), control_tokens)


def conversation(row: dict[str, Any]) -> Conversation:
    return convert(copy.deepcopy(row), RowSettings("messages", {}))


def chat(*said: str, **more: Any) -> Conversation:
    """The user's and the assistant's words in turn."""
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return conversation({"messages": messages, **more})


def tokenized(masker: Masker, row: Conversation) -> Tokenized:
    (made,) = masker.tokenize([masker.render(row)])
    if isinstance(made, BadRow):
        raise made
    return made


def runs(row: Tokenized) -> list[list[int]]:
    """The tokens that carry loss, one list for each answer."""
    found: list[list[int]] = [[]]
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if label == IGNORED:
            found.append([])
        else:
            assert label == token
            found[-1].append(token)
    return [run for run in found if run]


def trained(masker: Masker, row: Conversation) -> list[str]:
    return [masker.tokenizer.decode(run) for run in runs(tokenized(masker, row))]


def refused(masker: Masker, row: Conversation) -> BadRow:
    with pytest.raises(BadRow) as caught:
        tokenized(masker, row)
    return caught.value


def rendered_ids(masker: Masker, row: Conversation) -> list[int]:
    """What transformers itself makes of the conversation with the template that the masker uses."""
    return masker.tokenizer.apply_chat_template(
        masker._in_parts(row.messages),
        tools=row.tools,
        chat_template=masker.template,
        return_dict=False,
        **row.template_kwargs,
    )
