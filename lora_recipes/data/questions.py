"""What a trained model is asked: the held-out rows without their last answer, and the recipe's own prompts."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_recipes.data.formats import SPEAKER
from lora_recipes.data.read import RawData
from lora_recipes.data.tokens import text_spans
from lora_recipes.recipe import Recipe


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it (`input_ids`), as a person reads it (`text`), and the expected answer if known."""

    text: str
    input_ids: list[int]
    expected: str | None


def questions(recipe: Recipe, raw: RawData, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The recipe's `generation.prompts`, then up to `generation.max_rows` held-out rows in file order."""
    asked = [_from_prompt(prompt, raw, tokenizer) for prompt in recipe.get("generation.prompts", [])]
    if raw.heldout is None:
        return asked
    limit = recipe.get("generation.max_rows")
    rows = raw.heldout if limit is None else raw.heldout.select(range(min(limit, len(raw.heldout))))
    text_field = recipe.get("training.dataset_text_field", "text")
    return asked + [_from_row(row, raw.form, text_field, tokenizer) for row in rows]


def _from_prompt(prompt: str, raw: RawData, tokenizer: PreTrainedTokenizerBase) -> Question:
    """A bare prompt is put into the form of the training rows, with their system message where they have one."""
    if raw.form == "text":
        text = prompt if SPEAKER.search(prompt) else f"Human: {prompt}\nAssistant:"
        return Question(prompt, tokenizer(text)["input_ids"], None)
    first = raw.train[0]
    opening = first["messages"] if raw.form == "messages" else first["prompt"]
    if isinstance(opening, str):
        return Question(prompt, tokenizer(prompt)["input_ids"], None)
    system = [message for message in opening[:1] if message["role"] == "system"]
    return _from_chat([*system, {"role": "user", "content": prompt}], None, tokenizer, first.get("tools"))


def _from_row(row: dict[str, Any], form: str, text_field: str, tokenizer: PreTrainedTokenizerBase) -> Question:
    if form == "text":
        spans = text_spans(row[text_field], True, str(tokenizer.eos_token))
        last = max((number for number, (_, trained) in enumerate(spans) if trained), default=len(spans))
        prompt = "".join(part for part, _ in spans[:last])
        expected = spans[last][0].removesuffix(str(tokenizer.eos_token)).strip() if last < len(spans) else None
        return Question(prompt, tokenizer(prompt)["input_ids"], expected)
    if form == "prompt_completion" and isinstance(row["prompt"], str):
        return Question(row["prompt"], tokenizer(row["prompt"])["input_ids"], row["completion"].strip())
    messages = row["messages"] if form == "messages" else row["prompt"] + row["completion"]
    last = max(
        (number for number, message in enumerate(messages) if message["role"] == "assistant"),
        default=len(messages),
    )
    expected = (messages[last].get("content") or "").strip() if last < len(messages) else None
    return _from_chat(messages[:last], expected, tokenizer, row.get("tools"))


def _from_chat(
    messages: list[dict[str, Any]], expected: str | None, tokenizer: PreTrainedTokenizerBase, tools: Any
) -> Question:
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    text = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    return Question(text, ids, expected)
