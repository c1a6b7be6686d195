"""What a trained model is asked: the held-out rows without their last answer, and the recipe's own prompts."""

from dataclasses import dataclass, replace
from itertools import islice

from lora_recipes.data.formats import SPEAKER, Conversation, marked_messages
from lora_recipes.data.load import LoadedData, SourceRows, used_rows
from lora_recipes.data.masks import Masker


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it (`input_ids`), as a person reads it (`text`), and the expected answer if known."""

    text: str
    input_ids: list[int]
    expected: str | None


def questions(data: LoadedData) -> list[Question]:
    """The recipe's `generation.prompts`, then up to `generation.max_rows` held-out rows in file order."""
    recipe = data.recipe
    asked = [_from_prompt(prompt, data.sources[0]) for prompt in recipe.get("generation.prompts", [])]
    limit = recipe.get("generation.max_rows")
    rows = (
        _from_row(conversation, held.masker)
        for held in data.sources
        if held.heldout is not None
        for conversation in used_rows(held.heldout, limit)
    )
    return asked + list(islice((question for question in rows if question), limit))


def _from_prompt(prompt: str, rows: SourceRows) -> Question:
    """A bare prompt is put into the form of the training rows, with their system message where they have one."""
    first = next(used_rows(rows.train, 1), None)
    if first is None or not first.messages:
        return Question(prompt, rows.masker.prompt_ids(Conversation(text=prompt)), None)
    marked = marked_messages(prompt) if SPEAKER.search(prompt) else []
    messages = [message for message in marked if message["content"]] or [{"role": "user", "content": prompt}]
    system = [message for message in first.messages[:1] if message["role"] == "system" != messages[0]["role"]]
    asked = replace(first, messages=[*system, *messages])
    return Question(prompt, rows.masker.prompt_ids(asked), None)


def _from_row(row: Conversation, masker: Masker) -> Question | None:
    """None for a row that was tokenized before: nobody knows where its answer begins."""
    if row.input_ids is not None:
        return None
    if row.text is not None:
        return Question(row.text, masker.prompt_ids(row), None)
    answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    last = answers[-1] if answers else len(row.messages)
    # A tool call is no text that an answer could be compared with.
    expected = row.messages[last]["content"].strip() if answers and not row.messages[last].get("tool_calls") else None
    asked = [message["content"] for message in row.messages[:last] if message["role"] == "user"]
    return Question(asked[-1] if asked else "", masker.prompt_ids(replace(row, messages=row.messages[:last])), expected)
