"""The forms of a row that are understood, and what is wrong with a row that is in none of them."""

import re
from typing import Any

from lora_recipes.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKER = re.compile(r"^(Human|Assistant):", re.MULTILINE)

FORMATS = (
    "`messages` (a list of role and content), `prompt` with `completion`, or `{text_field}` (Human: … / Assistant: …)"
)


def recognise(columns: list[str], text_field: str, where: str) -> str:
    """The format of a data set by its columns: "messages", "prompt_completion" or "text".

    Raises:
        DataError: no known column.
    """
    if "messages" in columns:
        return "messages"
    if "prompt" in columns and "completion" in columns:
        return "prompt_completion"
    if text_field in columns:
        return "text"
    found = ", ".join(f"`{column}`" for column in columns) or "none"
    raise DataError(f"{where}: columns found: {found}; a row must have {FORMATS.format(text_field=text_field)}")


def row_problem(row: dict[str, Any], form: str, text_field: str, answers_only: bool) -> str | None:
    """What keeps one row from being trained on; None when it is sound.

    Args:
        answers_only: the loss is on the assistant's words only, so there must be some.
    """
    if form == "messages":
        return _messages_problem(row.get("messages"), "messages", answers_only)
    if form == "prompt_completion":
        return _prompt_completion_problem(row)
    return _text_problem(row.get(text_field), text_field, answers_only)


def _messages_problem(messages: Any, field: str, answers_only: bool) -> str | None:
    if not isinstance(messages, list):
        return f"`{field}` is {_kind(messages)}, not a list of messages"
    if not messages:
        return f"`{field}` is empty"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            return f"`{field}` {number} has no `role`"
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            return f"`{field}` {number} has the role {role!r}; known roles: {', '.join(ROLES)}"
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return f"`{field}` {number} ({role}): `content` is {_kind(content)}, not text"
    answers = [message for message in messages if message["role"] == "assistant"]
    if answers_only and not answers:
        return f"`{field}` has no assistant turn, so there is nothing to learn"
    if answers_only and not any(
        (answer.get("content") or "").strip() or answer.get("tool_calls") for answer in answers
    ):
        return f"`{field}`: every assistant turn is empty"
    return None


def _prompt_completion_problem(row: dict[str, Any]) -> str | None:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        empty = [name for name, text in (("prompt", prompt), ("completion", completion)) if not text.strip()]
        return f"`{empty[0]}` is empty" if empty else None
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages_problem(prompt, "prompt", False) or _messages_problem(completion, "completion", True)
    found = f"`prompt` is {_kind(prompt)} and `completion` is {_kind(completion)}"
    return f"{found}; both must be text, or both lists of messages"


def _text_problem(text: Any, field: str, answers_only: bool) -> str | None:
    if not isinstance(text, str):
        return f"`{field}` is {_kind(text)}, not text"
    if not text.strip():
        return f"`{field}` is empty"
    if not answers_only:
        return None
    answers = [said for speaker, said in turns(text) if speaker == "Assistant"]
    if not answers:
        return (
            f"`{field}` has no line that begins with `Assistant:`, so nothing in it is the assistant's; to train on all "
            "of the text set training.assistant_only_loss=false"
        )
    return None if any(said.strip() for said in answers) else f"`{field}`: every `Assistant:` turn is empty"


def turns(text: str) -> list[tuple[str, str]]:
    """("Human" or "Assistant", what was said, with its white space) for each turn; text before the first is ("", …)."""
    marks = list(SPEAKER.finditer(text))
    found = [("", text[: marks[0].start()])] if marks and marks[0].start() else []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):  # without marks there is one end too many
        found.append((mark.group(1), text[mark.end() : end]))
    return found


def _kind(value: Any) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "a mapping",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
