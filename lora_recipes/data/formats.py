"""The forms of a row that are understood: each is checked and becomes one conversation, or one literal text."""

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

SPEAKER = re.compile(r"^(Human|Assistant):", re.MULTILINE)
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names for the speakers → the roles that chat templates know.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
# Formats by the columns that mark them, the most telling first: a row may carry more columns than its format needs.
COLUMNS: dict[str, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
# What a format may use beside the columns that mark it.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "input_ids": ("labels",),
    "messages": ("tools", "chat_template_kwargs"),
    "sharegpt": ("tools", "system", "chat_template_kwargs"),
    "prompt_completion": ("system", "tools", "chat_template_kwargs"),
    "alpaca": ("input", "system", "history"),
    "question_answer": ("system",),
    "text": (),
}
FIELDS = tuple(dict.fromkeys(name for form in COLUMNS for name in (*COLUMNS[form], *OPTIONAL[form])))
THINKING = ("reasoning_content", "reasoning", "thinking")  # one thing, named by three families of templates


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


JSON = json.JSONDecoder(parse_constant=_no_constant)  # NaN and Infinity are Python's own, and no text to learn


class BadRow(Exception):
    """What keeps a row from being trained on. `kind` is what it is counted under, `raw` a row that could not be parsed."""

    def __init__(self, kind: str, field: str, message: str, raw: str = "") -> None:
        super().__init__(kind, field, message, raw)
        self.kind, self.field, self.message, self.raw = kind, field, message, raw


@dataclass(frozen=True)
class RowSettings:
    """How the rows of a source are read.

    Attributes:
        form: a key of COLUMNS.
        columns: field of the format → column that holds it.
        answers_only: loss on the assistant's words only (`training.assistant_only_loss`).
        completion_only: no loss on the prompt of `prompt`/`completion` rows.
        control_tokens: "error", "escape" or "keep".
    """

    form: str
    columns: dict[str, str]
    text_field: str = "text"
    answers_only: bool = True
    completion_only: bool = True
    control_tokens: str = "error"

    @property
    def chat(self) -> bool:
        """Whether rows become conversations; the others are literal text, or tokens already."""
        return self.form != "input_ids" and (self.form != "text" or self.answers_only)


@dataclass(slots=True)
class Conversation:
    """A checked row. Exactly one of `messages`, `text` and `input_ids` is set.

    Attributes:
        first_trained: messages before this one carry no loss, whoever speaks.
        answers_only: False gives every token loss.
        text: literal text, trained as a whole and closed by the end token.
        input_ids, labels: a row that was tokenized before.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    first_trained: int = 0
    answers_only: bool = True
    text: str | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None


def recognise(columns: Collection[str], mapped: dict[str, str], text_field: str) -> str | None:
    """The format that a row's columns are in; None when they are in none.

    Args:
        mapped: the source's `columns`, field → column.
    """
    named = {"text": text_field} | mapped
    present = {field for field in FIELDS if named.get(field, field) in columns}
    known = [form for form, marks in COLUMNS.items() if present.issuperset(marks)]
    # What the recipe maps is what it means, whatever else a row carries.
    meant = [form for form in known if not set(mapped).isdisjoint(COLUMNS[form])]
    return next(iter(meant or known), None)


def oriented(columns: dict[str, str], present: Collection[str]) -> dict[str, str]:
    """`columns` as field → column; the other direction, column → field, is understood as well.

    Args:
        present: the columns of the data.
    """
    reverse = {field: column for column, field in columns.items()}

    def fits(mapping: dict[str, str]) -> bool:
        return mapping.keys() <= set(FIELDS) and set(mapping.values()) <= set(present)

    if fits(columns) or not reverse.keys() <= set(FIELDS):
        return dict(columns)
    return reverse if fits(reverse) or not columns.keys() & set(FIELDS) else dict(columns)


def unknown_columns(columns: Iterable[str]) -> str:
    """The message for a row in no known format."""
    found = ", ".join(f"`{column}`" for column in columns) or "none"
    return (
        f"columns found: {found}; a row must have `messages`, `conversations`, `prompt` with `completion`, `instruction` "
        "with `output`, `question` with `answer`, or `text`; other names can be mapped: "
        "dataset.columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}"
    )


def convert(row: Any, settings: RowSettings) -> Conversation:
    """Check one row and bring it into the one form.

    Raises:
        BadRow: the row cannot be trained on.
    """
    if not isinstance(row, dict):
        raise not_an_object(row)
    values = _fields(row, settings)
    conversation = CONVERTERS[settings.form](values, settings)
    if conversation.messages:
        _check_order(conversation, settings)
    return conversation


def not_an_object(row: Any) -> BadRow:
    """For a row without names."""
    return BadRow("not_an_object", "", f"a row must be an object with named fields, found {_kind(row)}")


def _fields(row: Row, settings: RowSettings) -> Row:
    """The row's values by field name. A field that marks the format must be there."""
    named = {"text": settings.text_field} | settings.columns
    marks = COLUMNS[settings.form]
    for name in marks:
        if named.get(name, name) not in row:
            other = recognise(row, settings.columns, settings.text_field)
            what = f"the row is in the format `{other}`" if other else f"columns found: {_listed(row)}"
            raise BadRow(
                "other_format",
                named.get(name, name),
                f"is missing: the other rows are in the format `{settings.form}`, {what}",
            )
    return {name: row.get(named.get(name, name)) for name in (*marks, *OPTIONAL[settings.form])}


def _listed(row: Row) -> str:
    return ", ".join(f"`{name}`" for name in row) or "none"


def _text(values: Row, settings: RowSettings) -> Conversation:
    said, name = values["text"], settings.columns.get("text", settings.text_field)
    _require_text(said, name)
    if not settings.answers_only:
        return Conversation(text=said, answers_only=False)
    messages = marked_messages(said)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(
            "nothing_to_learn",
            name,
            "has no line that begins with `Assistant:`, so nothing in it is the assistant's; to train on all of the text "
            "set training.assistant_only_loss=false",
        )
    return Conversation(messages)  # of answers only, as was seen above


def marked_messages(text: str) -> list[Message]:
    """The turns of a `Human: … / Assistant: …` text; what stands before the first mark is the system's.

    White space around a turn is part of the marks, not of what is said.
    """
    marks = list(SPEAKER.finditer(text))
    before = text[: marks[0].start()].strip() if marks else ""
    messages = [{"role": "system", "content": before}] if before else []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):  # without marks there is one end too many
        role = "user" if mark.group(1) == "Human" else "assistant"
        messages.append({"role": role, "content": text[mark.end() : end].strip()})
    return messages


def _messages(values: Row, settings: RowSettings) -> Conversation:
    messages = _message_list(values["messages"], settings.columns.get("messages", "messages"))
    return Conversation(messages, _tools(values), _template_kwargs(values), answers_only=settings.answers_only)


def _sharegpt(values: Row, settings: RowSettings) -> Conversation:
    name = settings.columns.get("conversations", "conversations")
    messages = _message_list(values["conversations"], name)
    messages = _with_system(values, messages)
    return Conversation(messages, _tools(values), _template_kwargs(values), answers_only=settings.answers_only)


def _prompt_completion(values: Row, settings: RowSettings) -> Conversation:
    prompt, completion = values["prompt"], values["completion"]
    names = [settings.columns.get(name, name) for name in ("prompt", "completion")]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _with_system(values, _message_list(prompt, names[0])), _message_list(completion, names[1])
        first = len(before) if settings.completion_only else 0
        return Conversation(
            before + after,
            _tools(values),
            _template_kwargs(values),
            first_trained=first,
            answers_only=settings.completion_only or settings.answers_only,
        )
    if isinstance(prompt, list) or isinstance(completion, list):
        raise BadRow(
            "field_type",
            names[0],
            f"is {_kind(prompt)} and `{names[1]}` is {_kind(completion)}; both must be text, or both lists of messages",
        )
    conversation = _asked_and_answered(values, prompt, completion, names)
    conversation.tools, conversation.template_kwargs = _tools(values), _template_kwargs(values)
    conversation.answers_only = settings.completion_only
    return conversation


def _question_answer(values: Row, settings: RowSettings) -> Conversation:
    names = [settings.columns.get(name, name) for name in ("question", "answer")]
    conversation = _asked_and_answered(values, values["question"], values["answer"], names)
    conversation.answers_only = settings.answers_only
    return conversation


def _alpaca(values: Row, settings: RowSettings) -> Conversation:
    """`input` follows `instruction` on a line of its own; `history` holds earlier (instruction, output) pairs."""
    name = {field: settings.columns.get(field, field) for field in (*COLUMNS["alpaca"], *OPTIONAL["alpaca"])}
    more = values["input"]
    if more is not None and not isinstance(more, str):
        raise BadRow("field_type", name["input"], f"is {_kind(more)}, not text")
    _require_text(values["instruction"], name["instruction"])
    asked = values["instruction"] if not more else f"{values['instruction']}\n{more}"
    conversation = _asked_and_answered(values, asked, values["output"], [name["instruction"], name["output"]])
    history = _unpacked(values["history"]) or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow("field_type", name["history"], "must be a list of (instruction, output) pairs")
    earlier: list[Message] = []
    for question, answer in history:
        _require_text(question, name["history"])
        _require_text(answer, name["history"])
        earlier += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    at = len(conversation.messages) - 2
    conversation.messages[at:at] = earlier
    conversation.answers_only = settings.answers_only
    return conversation


def _asked_and_answered(values: Row, asked: Any, answered: Any, names: list[str]) -> Conversation:
    for value, name in zip((asked, answered), names, strict=True):
        _require_text(value, name)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Conversation(_with_system(values, messages))


def _input_ids(values: Row, settings: RowSettings) -> Conversation:
    ids, labels = _unpacked(values["input_ids"]), _unpacked(values["labels"])
    for name, numbers in (("input_ids", ids), ("labels", labels)):
        if numbers is None and name == "labels":
            continue
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise BadRow("field_type", name, "must be a list of whole numbers")
    if not ids:
        raise BadRow("empty", "input_ids", "is empty")
    if labels is not None and len(labels) != len(ids):
        raise BadRow("field_type", "labels", f"has {len(labels)} entries for {len(ids)} tokens")
    return Conversation(input_ids=ids, labels=list(ids) if labels is None else labels)


CONVERTERS: dict[str, Callable[[Row, RowSettings], Conversation]] = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "question_answer": _question_answer,
    "input_ids": _input_ids,
}


def _require_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise BadRow("field_type", name, f"is {_kind(value)}, not text")
    if not value.strip():
        raise BadRow("empty", name, "is empty")


def _with_system(values: Row, messages: list[Message]) -> list[Message]:
    system = values.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise BadRow("field_type", "system", f"is {_kind(system)}, not text")
    if messages[0]["role"] == "system":
        raise BadRow("role_order", "system", "is a second system message: the first message is one already")
    return [{"role": "system", "content": system}, *messages]


def _unpacked(value: Any) -> Any:
    """A list or object that was written as JSON text, as CSV must and some data sets do."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return JSON.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def _tools(values: Row) -> list[Any] | None:
    tools = _unpacked(values.get("tools"))
    if tools is None or tools == [] or tools == "":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools", "tools", f"must be a list of JSON schemas, found {_kind(tools)}")
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function") or tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("tools", "tools", f"number {number} has no `name`")
    return tools


def _template_kwargs(values: Row) -> dict[str, Any]:
    found = _unpacked(values.get("chat_template_kwargs"))
    if found is None or found == "":
        return {}
    if not isinstance(found, dict):
        raise BadRow("field_type", "chat_template_kwargs", f"is {_kind(found)}, not a mapping")
    return found


def _message_list(messages: Any, name: str) -> list[Message]:
    messages = _unpacked(messages)
    if not isinstance(messages, list):
        raise BadRow("field_type", name, f"is {_kind(messages)}, not a list of messages")
    if not messages:
        raise BadRow("empty", name, "is empty")
    return [_message(message, f"message {number} of `{name}`") for number, message in enumerate(messages, start=1)]


def _message(message: Any, place: str) -> Message:
    """One message with `role` and text as `content`; what else it carries stays as it is."""
    if not isinstance(message, dict):
        raise BadRow("field_type", place, f"is {_kind(message)}, not a message")
    key = "content"
    if "role" not in message and "from" in message:
        message, key = _from_sharegpt(message, place), "value"
    if "role" not in message:
        raise BadRow("field_type", place, "has no `role`")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise BadRow("unknown_role", place, f"has the role {role!r}; known roles: {', '.join(ROLES)}")
    if calls:
        message = {**message, "tool_calls": [_tool_call(call, place) for call in _call_list(calls, place)]}
    elif "tool_calls" in message:
        message = {key: value for key, value in message.items() if key != "tool_calls"}
    if isinstance(content, list):
        content = _joined_parts(content, place)
    if content is None and (calls or any(message.get(name) for name in THINKING)):
        content = ""
    if not isinstance(content, str):
        raise BadRow("field_type", place, f"({role}): `{key}` is {_kind(content)}, not text")
    return message if message.get("content") is content else {**message, "content": content}


def _from_sharegpt(message: Message, place: str) -> Message:
    speaker, said = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise BadRow("unknown_role", place, f"is from {speaker!r}; known speakers: {', '.join(SPEAKERS)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if speaker.lower() == "function_call":
        call = _unpacked(said)
        return {"role": "assistant", "content": "", "tool_calls": call if isinstance(call, list) else [call], **rest}
    return {"role": SPEAKERS[speaker.lower()], "content": said, **rest}


def _joined_parts(parts: list[Any], place: str) -> str:
    """The text of `[{"type": "text", "text": …}]`; anything but text cannot be trained on here."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise BadRow("field_type", place, f"`content` has a part that is no text: {kind}")
    return "".join(part["text"] for part in parts)


def _call_list(calls: Any, place: str) -> list[Any]:
    if not isinstance(calls, list):
        raise BadRow("tool_call", place, f"`tool_calls` is {_kind(calls)}, not a list")
    return calls


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """A call with its arguments as an object. Templates write them as JSON; text would be quoted a second time."""
    if isinstance(call, str):
        raise BadRow("tool_call", place, "a tool call is no JSON")
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("tool_call", place, "a tool call has no `name`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = JSON.decode(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise BadRow(
                "tool_call", place, f"the arguments of tool `{function['name']}` are no JSON: {error}"
            ) from None
    if not isinstance(arguments, dict | None):
        raise BadRow("tool_call", place, f"the arguments of tool `{function['name']}` are {_kind(arguments)}")
    kept = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    called = {**function, "arguments": {} if arguments is None else arguments}
    return {"type": "function", **kept, "function": called}


def _check_order(conversation: Conversation, settings: RowSettings) -> None:
    """The order of speakers that every chat model was trained on; a template may ask for more."""
    messages = conversation.messages
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role in ("system", "developer") and number > 1:
            raise BadRow("role_order", f"message {number}", f"is from {role}, which may only come first")
        if role == before and role in ("user", "assistant"):
            raise BadRow("role_order", f"message {number}", f"follows another {role} message; join the two")
        if role == "user" and conversation.answers_only and not message["content"].strip():
            raise BadRow("empty", f"message {number}", "(user) is empty")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow("role_order", f"message {number}", "is a tool's answer that no assistant message asked for")
        before = role
    if not conversation.answers_only:
        return
    answers = [message for message in messages[conversation.first_trained :] if message["role"] == "assistant"]
    if not answers:
        raise BadRow("nothing_to_learn", "", "there is no assistant turn, so there is nothing to learn")
    if before != "assistant":
        raise BadRow(
            "role_order", f"message {len(messages)}", f"is from {before}: the last word must be the assistant's"
        )
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and number > conversation.first_trained and not _says(message):
            raise BadRow("empty", f"message {number}", "(assistant) is empty")


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


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
