"""What a trained model is asked: the held-out rows without their last answer, and the recipe's own prompts."""

from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from lora_recipes.data.formats import SPEAKER, BadRow, Conversation, Message, marked_messages
from lora_recipes.data.load import LoadedData, SourceRows, used_rows
from lora_recipes.data.masks import Masker
from lora_recipes.errors import DataError

FORM_ROWS = 32  # training rows of a source that show the form of the dialogue


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it (`input_ids`), as a person reads it (`text`), and the expected answer if known.

    Attributes:
        messages: the same as a server is asked; None for literal text, and where the template gets more than messages.
        expectation: the entry of `checks.prompts`; None for any other question.
    """

    text: str
    input_ids: list[int]
    expected: str | None
    messages: list[Message] | None = None
    expectation: dict[str, Any] | None = None


@dataclass(frozen=True)
class DialogueForm:
    """What surrounds the words of a dialogue.

    Attributes:
        controls: control tokens of the tokenizer.
        inside: those of them that stand inside the answers of training rows, before the end token.
        turns: what opens a turn in plain text, such as `Human:`; nothing where control tokens do.
    """

    controls: frozenset[str]
    inside: frozenset[str]
    turns: frozenset[str]


def questions(data: LoadedData, at_most: int | None = None) -> list[Question]:
    """`generation.prompts`, then `checks.prompts`, then up to `generation.max_rows` held-out rows in file order.

    Args:
        at_most: how many; unset: all of them.
    """
    recipe, first = data.recipe, data.sources[0]
    asked = [_from_prompt(prompt, first) for prompt in recipe.get("generation.prompts", [])]
    for entry in recipe.get("checks.prompts", []):
        asked.append(replace(_from_prompt(entry["prompt"], first), expectation=entry))
    limit = recipe.get("generation.max_rows")
    rows = (
        _from_row(conversation, held.masker)
        for held in data.sources
        if held.heldout is not None
        for conversation in used_rows(held.heldout, limit)
    )
    heldout = islice((question for question in rows if question), limit)
    return list(islice(chain(asked, heldout), at_most))


def _from_prompt(prompt: str, rows: SourceRows) -> Question:
    """A bare prompt is put into the form of the training rows, with their system message where they have one."""
    first = next(used_rows(rows.train, 1), None)
    if first is None or not first.messages:
        return Question(prompt, rows.masker.prompt_ids(Conversation(text=prompt)), None)
    marked = marked_messages(prompt) if SPEAKER.search(prompt) else []
    messages = [message for message in marked if message["content"]] or [{"role": "user", "content": prompt}]
    system = [message for message in first.messages[:1] if message["role"] == "system" != messages[0]["role"]]
    asked = replace(first, messages=[*system, *messages])
    return Question(prompt, rows.masker.prompt_ids(asked), None, _servable(asked))


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
    conversation = replace(row, messages=row.messages[:last])
    text = asked[-1] if asked else ""
    return Question(text, masker.prompt_ids(conversation), expected, _servable(conversation))


def _servable(asked: Conversation) -> list[Message] | None:
    return None if asked.tools or asked.template_kwargs else asked.messages


def dialogue_form(data: LoadedData) -> DialogueForm:
    """The control tokens of the tokenizer and the forms that the first training rows of each source show."""
    controls: set[str] = set()
    inside: set[str] = set()
    turns: set[str] = set()
    for rows in data.sources:
        masker = rows.masker
        controls |= {masker.tokenizer.convert_ids_to_tokens(number) for number in masker.special_ids}
        ends = {masker.tokenizer.convert_ids_to_tokens(number) for number in masker.end_ids}
        for row in used_rows(rows.train, FORM_ROWS):
            if row.text is not None:
                turns |= {match.group() for match in SPEAKER.finditer(row.text)}
            elif row.messages:
                turns |= _turns(row, masker)
                inside |= _inside(row, masker) - ends
    return DialogueForm(frozenset(controls), frozenset(inside), frozenset(turns))


def _inside(row: Conversation, masker: Masker) -> set[str]:
    """Control tokens in the last answer of a row: all that follows the prompt, whether it carries loss or not."""
    answers = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    if not answers:
        return set()
    try:
        rendered = masker.render(replace(row, answers_only=True))
        prompt = masker.tokenizer.decode(masker.prompt_ids(replace(row, messages=row.messages[: answers[-1]])))
    except (BadRow, DataError):  # where every token is trained, there may be no part that could be told as the answer
        return set()
    start, end = rendered.spans[-1]
    start = len(prompt) if rendered.text.startswith(prompt) else start
    return set(masker.controls.findall(rendered.text[start:end]))


def _turns(row: Conversation, masker: Masker) -> set[str]:
    """The end of what the template writes before each turn, behind any control token: `Human:`."""
    text = masker.render(replace(row, answers_only=False)).text.removeprefix(masker.tokenizer.bos_token or "")
    found, place = set(), 0
    for message in row.messages:
        said = message["content"].strip()
        start = text.find(said, place)
        if not said or start < 0 or message["role"] not in ("user", "assistant"):
            continue
        opening = masker.controls.split(text[place:start])[-1].strip().rpartition("\n")[2]
        place = start + len(said)
        if opening and not opening.isalnum():  # a word alone, such as a role, is no sign: answers hold it as well
            found.add(opening)
    return found
