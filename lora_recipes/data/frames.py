"""What a chat template writes around the messages: constant text is shown, text that depends on what is said is refused."""

import re
from collections.abc import Callable
from typing import Any

from lora_recipes.data.formats import BadRow, Conversation, Message
from lora_recipes.errors import RefusedError

LONGEST_FRAME = 1_000_000  # characters that a template may add; the longest known one adds some 20,000
GROWTH = 20  # times the text of the messages: a template may write it as JSON
KEPT = 256  # forms of dialogue whose frames are remembered
PLACE = "\ue000{}\ue001"  # stands for a message's text; no template and no data has these characters
PLACES = re.compile("\ue000(\\d+)\ue001")
WORDS = re.compile(r"[^\W\d_]+(?:[,.:;]?[^\S\n]+[^\W\d_]+){2,}")  # three words in a row: not the name of a role
CHATS = (("user",), ("user", "assistant"), ("user", "assistant", "user", "assistant"))

THOUGHT = re.compile(r"</?think|\[/?THINK", re.IGNORECASE)  # which templates take out of earlier turns

Render = Callable[[list[Message], Conversation], str]


class HostileTemplate(BadRow):
    """Rendering was broken off: the template took too much time or memory, or reached for what is outside its sandbox."""


class Frames:
    """The text around the messages for each form of dialogue (roles, template settings), as the template writes it."""

    def __init__(self) -> None:
        self.known: dict[Any, list[str] | None] = {}

    def require(self, render: Render, conversation: Conversation, text: str) -> None:
        """Raises BadRow when the text has more, or less, around its messages than it has around any others.

        A template could add a sentence to every dialogue that holds a certain word. Thinking and tools are left out here:
        where they stand depends on what they are.
        """
        messages = conversation.messages
        size = sum(len(message["content"]) for message in messages)
        if len(text) > LONGEST_FRAME + GROWTH * size and not conversation.tools:
            raise BadRow("template", "", f"the chat template makes {len(text):,} characters of {size:,}")
        if not _plain(conversation):
            return
        settings = repr(conversation.template_kwargs) if conversation.template_kwargs else ""
        key = (settings, *[message["role"] for message in messages])
        for fresh in (False, True):  # a template may write the time of day
            if fresh or key not in self.known:
                if len(self.known) >= KEPT:
                    self.known.clear()
                self.known[key] = _frame(render, conversation)
            frame = self.known[key]
            if frame is None or _fits(frame, [message["content"] for message in messages], text):
                return
        raise BadRow(
            "template",
            "",
            "the chat template adds, drops or rewrites text depending on what is said; use one that does not",
        )


def _plain(conversation: Conversation) -> bool:
    """Whether all that is said is text, which no template has a reason to look into."""
    if conversation.tools:
        return False
    for message in conversation.messages:
        others = len(message) > 2 and any(message[name] for name in message.keys() - {"role", "content"})
        said = message["content"]
        if others or not said.strip() or THOUGHT.search(said) or PLACES.search(said) or message["role"] == "tool":
            return False
    return True


def _frame(render: Render, conversation: Conversation) -> list[str] | None:
    """The parts between the messages; None where the template refuses places, or writes them in another order."""
    marked = [{**message, "content": PLACE.format(place)} for place, message in enumerate(conversation.messages)]
    try:
        text = render(marked, conversation)
    except BadRow:
        return None
    found = PLACES.split(text)  # parts at even places, numbers between them
    return found[::2] if found[1::2] == [str(place) for place in range(len(marked))] else None


def _fits(frame: list[str], said: list[str], text: str) -> bool:
    """Whether the text is the frame with what is said in its places, trimmed or not."""
    if not text.startswith(frame[0]):
        return False
    at = len(frame[0])
    for words, part in zip(said, frame[1:], strict=True):
        ending = words + part
        if not text.startswith(ending, at):
            forms = (words.strip(), words.rstrip(), words.lstrip())
            ending = next((form + part for form in forms if text.startswith(form + part, at)), "")
            if not ending:
                return False
        at += len(ending)
    return at == len(text)


def added_text(render: Render, origin: str) -> str:
    """The words that a template adds to a dialogue of its own: a system message that nobody wrote, mostly.

    Raises:
        RefusedError: it drops, repeats or reorders what is said in a plain dialogue, runs without end, or is hostile.
    """
    added: list[str] = []
    for roles in CHATS:
        messages = [{"role": role, "content": PLACE.format(place)} for place, role in enumerate(roles)]
        try:
            text = render(messages, Conversation(messages))
        except BadRow as refused:
            if isinstance(refused, HostileTemplate):
                way_out = "use another (training.chat_template_path)"
                raise RefusedError(f"chat template ({origin}): {refused.message}; {way_out}") from None
            continue  # a form of dialogue that it does not know
        places = PLACES.findall(text)
        if places != [str(place) for place in range(len(roles))]:
            missing = [str(place + 1) for place in range(len(roles)) if str(place) not in places]
            what = f"drops the text of message {', '.join(missing)}" if missing else "repeats or reorders what is said"
            raise RefusedError(
                f"chat template ({origin}): of a dialogue of {', '.join(roles)} it {what}; use another "
                "(training.chat_template_path)"
            )
        added += [words for part in PLACES.split(text)[::2] for words in WORDS.findall(part)]
    return " … ".join(dict.fromkeys(added))
