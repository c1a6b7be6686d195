"""A conversation becomes tokens of which exactly the assistant's words, with the token that ends them, carry loss."""

import json
import re
import unicodedata
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy
from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_recipes.data.encode import Encoder, Pieces, Tokens
from lora_recipes.data.formats import THINKING, BadRow, Conversation, Message
from lora_recipes.data.frames import Frames, HostileTemplate
from lora_recipes.errors import DataError
from lora_recipes.limits import TooMuch, bounded

IGNORED = -100  # PyTorch's cross entropy ignore_index
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
LAST = 4  # tokens: what a template may write after the last end token
PROBE = "\ue000probe\ue001"  # private use characters: no template and no data has them
LITERAL = "\ue002{}\ue003"
MARKS = re.compile("[\ue002\ue003]")
LITERALS = re.compile("\ue002(\\d+)\ue003")
RENDER_SECONDS = 2.0  # a conversation takes a tenth of a millisecond
RENDER_BYTES = 4 << 30
RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError)

Span = tuple[int, int]


@dataclass(slots=True)
class Rendered:
    """Text as the model reads it. `spans` are the parts [start, end) in characters that carry loss, in order.

    Attributes:
        literals: control tokens that were written in the row and stay plain text; LITERAL marks stand for them.
        thinking_left_out: the template leaves out thinking that the row has.
    """

    text: str
    spans: list[Span]
    literals: list[str]
    thinking_left_out: bool = False
    whole: bool = False  # every token carries loss
    bare: bool = False  # literal text: the tokenizer's own first token and the end token are added


@dataclass(slots=True)
class Tokenized:
    """One row's tokens and labels, int32, of equal length."""

    input_ids: Any
    labels: Any


class Masker:
    """Renders and masks conversations with one tokenizer and its template.

    Where the loss lies is read, in this order, from the template's own `{% generation %}` marks; from the training
    template that TRL has for it; from the difference of renders: the text after the generation prompt, up to where the
    conversation with this answer as its last message ends, both of which must be beginnings of the whole. A template
    that allows none of these is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: set[int], control_tokens: str = "error") -> None:
        self.tokenizer, self.end_ids, self.control_tokens = tokenizer, end_ids, control_tokens
        self.special = tokenizer.special_tokens_map  # what `apply_chat_template` gives a template
        names = {str(token) for token in tokenizer.all_special_tokens} | {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        self.special_ids = {tokenizer.convert_tokens_to_ids(name) for name in names}
        self.controls = re.compile(
            "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"
        )
        self.template, self.marked, self.origin = _template(tokenizer)
        self.frames = Frames()
        self.parts = self._wants_parts()
        self.first_ids = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
        self.encoder = Encoder(tokenizer)

    # -- rendering --------------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation and where its loss lies.

        Raises:
            BadRow: the template refuses the conversation, or no mask can be trusted, or it drops what is to be learnt.
        """
        conversation, literals = self._without_controls(conversation)
        if conversation.text is not None:
            return Rendered(conversation.text, [], literals, whole=True, bare=True)
        messages = conversation.messages
        text, marks = self._render(messages, conversation, marks=self.marked and conversation.answers_only)
        if conversation.tools and not all(_name(tool) in text for tool in conversation.tools):
            raise BadRow("template", "tools", "are left out by the chat template; use one that knows tools")
        for number, message in enumerate(messages):
            if message["role"] != "tool":  # whose text templates may write as JSON
                self._require_words(message, text, number)
        self.frames.require(self.plain, conversation, text)
        rendered = Rendered(text, [], literals, whole=not conversation.answers_only)
        if rendered.whole:
            return rendered
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked:
            marks = _joined(marks, len(answers))
        for place, number in enumerate(answers):
            if number < conversation.first_trained:
                continue
            span = self._answer_span(conversation, number, text, marks, place)
            self._require_words(messages[number], text[span[0] : span[1]], number)
            rendered.thinking_left_out |= _thinking(messages[number]) not in text[span[0] : span[1]]
            rendered.spans.append(span)
        return rendered

    def _answer_span(self, conversation: Conversation, number: int, text: str, marks: list[Span], place: int) -> Span:
        """Where the words of message `number` lie in the whole text, what follows them up to the next turn included."""
        opened = self._render(conversation.messages[:number], conversation, open_answer=True)[0]
        if self.marked:
            start, end = marks[place]
            if text.startswith(opened) and start <= len(opened) < end:
                return len(opened), end  # the marks may take in what the generation prompt gives
            return max(start, _header_end(text, opened, start, end, self.controls)), end
        if not text.startswith(opened):
            raise _rewritten(number)
        closed = text
        if number + 1 < len(conversation.messages):
            closed = self._render(conversation.messages[: number + 1], conversation)[0]
        if text.startswith(closed):
            return len(opened), len(closed)
        return len(opened), self._end_by_exchange(conversation, number, text)

    def _end_by_exchange(self, conversation: Conversation, number: int, text: str) -> int:
        """Where an answer ends, found by rendering the whole with another text in its place."""
        said = conversation.messages[number]["content"].strip()
        exchanged = [*conversation.messages]
        exchanged[number] = {**exchanged[number], "content": PROBE}
        other = self._render(exchanged, conversation)[0] if said else ""
        before, found, after = other.partition(PROBE)
        if not found or before + said + after != text:
            raise _rewritten(number)
        ends = [match.end() for match in self.controls.finditer(text, len(before) + len(said))]
        return ends[0] if ends else len(before) + len(said)

    def _require_words(self, message: Message, words: str, number: int) -> None:
        """What is said must be in the text; a template may trim it and leave out an assistant's old thinking."""
        said, role = message["content"].strip(), message["role"]
        if role == "assistant":
            said = said.rpartition("</think>")[2].strip()
        if said not in words:
            raise BadRow("template", f"message {number + 1}", f"({role}): the chat template drops or rewrites its text")
        for call in message.get("tool_calls") or []:
            if _name(call) not in words:
                raise BadRow(
                    "template",
                    f"message {number + 1}",
                    f"the chat template leaves out the call of tool `{_name(call)}`; use a template that knows tools",
                )

    def _without_controls(self, conversation: Conversation) -> tuple[Conversation, list[str]]:
        """Control tokens that a user wrote are refused, or become marks that are tokenized as plain text."""
        if self.control_tokens == "keep" and conversation.text is not None:
            return conversation, []
        literals: list[str] = []

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return self.controls.sub(lambda match: _literal(match.group(), literals), value)
            if isinstance(value, dict):
                return {marked(name): marked(child) for name, child in value.items()}
            return [marked(child) for child in value] if isinstance(value, list) else value

        messages = [{**marked(message), "role": message["role"]} for message in conversation.messages]
        tools, text = marked(conversation.tools), marked(conversation.text)
        keywords = marked(conversation.template_kwargs)
        if not literals:
            return conversation, []
        if self.control_tokens != "escape":
            raise BadRow(
                "control_token",
                "",
                f"the text holds {literals[0]!r}, a control token of this tokenizer; remove it, or set "
                "dataset.control_tokens: escape to train on it as plain text",
            )
        written = [conversation.messages, conversation.tools, conversation.text, conversation.template_kwargs]
        if MARKS.search(json.dumps(written, ensure_ascii=False, default=str)):
            raise BadRow("control_token", "", "holds a private use character (U+E002, U+E003) beside control tokens")
        return replace(conversation, messages=messages, tools=tools, text=text, template_kwargs=keywords), literals

    def _render(
        self, messages: list[Message], conversation: Conversation, *, open_answer: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        if self.template is None:
            raise BadRow("template", "", "the tokenizer has no chat template")
        try:
            with bounded(seconds=RENDER_SECONDS, memory=RENDER_BYTES):
                texts, spans = render_jinja_template(
                    [self._in_parts(messages)],
                    tools=conversation.tools,
                    chat_template=self.template,
                    add_generation_prompt=open_answer,
                    return_assistant_tokens_mask=marks,
                    **self.special,
                    **conversation.template_kwargs,
                )
        except (TooMuch, MemoryError, RecursionError) as error:
            why = f"the chat template takes too much time or memory ({type(error).__name__})"
            raise HostileTemplate("template", "", why) from None
        except SecurityError as error:
            raise HostileTemplate("template", "", f"the chat template tries to leave its sandbox: {error}") from None
        except RENDER_ERRORS as error:
            raise BadRow("template", "", f"the chat template refuses the conversation: {error}") from None
        return texts[0], spans[0] if marks else []

    def plain(self, messages: list[Message], conversation: Conversation) -> str:
        """The text of messages under the settings of a conversation."""
        return self._render(messages, conversation)[0]

    def _wants_parts(self) -> bool:
        """Templates of models that also see images read `content` as a list of parts, and lose plain text in silence."""
        if self.template is None:
            return False
        asked = Conversation([{"role": "user", "content": PROBE}])
        for parts in (False, True):
            self.parts = parts
            try:
                if PROBE in self._render(asked.messages, asked)[0]:
                    return parts
            except BadRow:
                continue
        return False

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The conversation as it is asked at inference: the tokenizer's own template, and the answer begun.

        Raises:
            DataError: the template refuses the conversation.
        """
        literals: list[str] = []
        if self.control_tokens == "escape":
            conversation, literals = self._without_controls(conversation)
        if conversation.text is not None:
            return [*self.first_ids, *self._in_pieces(Rendered(conversation.text, [], literals)).ids]
        try:
            with bounded(seconds=RENDER_SECONDS, memory=RENDER_BYTES):
                asked = self.tokenizer.apply_chat_template(
                    self._in_parts(conversation.messages),
                    tools=conversation.tools,
                    add_generation_prompt=True,
                    tokenize=not literals,
                    return_dict=False,
                    **conversation.template_kwargs,
                )
        except (TooMuch, MemoryError) as error:
            raise DataError(f"the model's own chat template takes too much: {type(error).__name__}") from None
        except RENDER_ERRORS as error:
            raise DataError(f"the model's own chat template refuses a question: {error}") from None
        return self._in_pieces(Rendered(asked, [], literals)).ids if literals else asked

    def _in_parts(self, messages: list[Message]) -> list[Message]:
        if not self.parts:
            return messages
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]

    # -- tokens -----------------------------------------------------------------------------------------------------

    def tokenize(self, rows: list[Rendered]) -> list[Tokenized | BadRow]:
        """Tokens and labels of many rows at once; a BadRow in the place of a row without a trustworthy mask."""
        encoded = iter(self.encoder.encode([row.text for row in rows if not row.literals]))
        return [self._labelled(row, self._in_pieces(row) if row.literals else next(encoded)) for row in rows]

    def _labelled(self, row: Rendered, encoded: Tokens) -> Tokenized | BadRow:
        try:
            if row.bare:
                ids = [*self.first_ids, *encoded.ids, self.tokenizer.eos_token_id]
                return _arrays(ids, [(len(self.first_ids), len(ids))])
            if row.whole:
                self._require_end(encoded.ids[-LAST:])
                return _arrays(encoded.ids, [(0, len(encoded.ids))])
            if any(encoded.straddles(start) for start, _ in row.spans):
                encoded = self._parted(row, encoded)
            return _arrays(encoded.ids, self._token_spans(row, encoded))
        except BadRow as bad:
            return bad

    def _token_spans(self, row: Rendered, encoded: Tokens) -> list[Span]:
        """Each span in tokens, ended just after the token that ends its answer.

        The last answer must end with one that ends generation; an earlier one may end with another control token
        (gpt-oss closes earlier turns with <|end|>, the last with <|return|>).
        """
        ids, spans = encoded.ids, []
        for number, (start, end) in enumerate(row.spans):
            first, stop = encoded.token_at(start), encoded.token_at(end)
            ends = [ids.index(token, first, stop) for token in self.end_ids if token in ids[first:stop]]
            if ends:
                stop = min(ends) + 1
            elif stop < len(ids) and ids[stop] in self.end_ids:
                stop += 1
            else:
                closing = max((at for at in range(first, stop) if ids[at] in self.special_ids), default=-1)
                if (
                    closing < 0
                    or number + 1 == len(row.spans)
                    or self.tokenizer.decode(ids[closing + 1 : stop]).strip()
                ):
                    self._require_end([])
                stop = closing + 1
            spans.append((first, stop))
        return spans

    def _require_end(self, ids: list[int]) -> None:
        if self.end_ids.isdisjoint(ids):
            raise BadRow(
                "end_token",
                "",
                f"the chat template closes an answer with none of the tokens that end generation ({self.end_names()}), so "
                "the model would never learn to stop; set training.eos_token to the token that closes a turn",
            )

    def _parted(self, row: Rendered, encoded: Tokens) -> Pieces:
        """For an answer whose first characters the tokenizer joins with the prompt's last: cut there, as at inference."""
        pieces = self._in_pieces(row)
        if self.tokenizer.decode(pieces.ids) != self.tokenizer.decode(encoded.ids):
            raise BadRow(
                "template", "", "an answer begins with characters that the tokenizer joins with the template's"
            )
        return pieces

    def end_names(self) -> str:
        """The end tokens as text."""
        return ", ".join(str(self.tokenizer.convert_ids_to_tokens(token)) for token in sorted(self.end_ids))

    def _in_pieces(self, row: Rendered) -> Pieces:
        """The text tokenized piece by piece: as at inference where an answer begins, plain text for its literals."""
        cuts = sorted({0, len(row.text), *(start for start, _ in row.spans)})
        pieces: list[tuple[str, int, bool]] = []
        for begin, end in pairwise(cuts):
            at = begin
            for match in LITERALS.finditer(row.text, begin, end):
                pieces.append((row.text[at : match.start()], at, False))
                pieces.append((row.literals[int(match.group(1))], match.start(), True))
                at = match.end()
            pieces.append((row.text[at:end], at, False))
        return self.encoder.encode_pieces(pieces)


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, bool, str]:
    """(the template that rows are rendered with, whether it marks the assistant's words, how the mask is found)."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    if own is None:
        return None, False, "no chat template"
    if MARKED.search(own):
        return own, True, "the template's own {% generation %} marks"
    from trl.chat_template_utils import get_training_chat_template

    try:
        with bounded(seconds=RENDER_SECONDS, memory=RENDER_BYTES):  # it renders, to see what the template can do
            training = get_training_chat_template(tokenizer)
    except (TooMuch, MemoryError, RecursionError, *RENDER_ERRORS):
        training = None  # not one of those that TRL knows
    if training is not None:
        return training, True, "TRL's training template for this chat template"
    return own, False, "the difference of renders, verified against the whole"


def _joined(marks: list[Span], answers: int) -> list[Span]:
    """The marked part of each answer. Marks that touch are one: a template may mark an answer in several parts."""
    joined: list[Span] = []
    for start, end in marks:
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    if len(joined) != answers:
        raise BadRow(
            "template", "", f"the chat template marks {len(joined)} answers where the conversation has {answers}"
        )
    return joined


def _header_end(text: str, opened: str, start: int, end: int, controls: re.Pattern[str]) -> int:
    """Where the part of a marked answer ends that the generation prompt gives: only whole control tokens count.

    Some training templates mark the header of the turn as well, such as <|start|>assistant or <|Assistant|>.
    """
    common = start
    limit = min(len(text), len(opened), end)
    while common < limit and text[common] == opened[common]:
        common += 1
    return max((match.end() for match in controls.finditer(text, start, common)), default=start)


def _rewritten(number: int) -> BadRow:
    return BadRow(
        "template",
        f"message {number + 1}",
        "the chat template renders the conversation up to here differently alone than in the whole, so the assistant's "
        "words cannot be told apart; use a template that leaves earlier turns as they are (training.chat_template_path), "
        "or train on everything (training.assistant_only_loss=false)",
    )


def _literal(control: str, literals: list[str]) -> str:
    literals.append(control)
    return LITERAL.format(len(literals) - 1)


def _name(call: dict[str, Any]) -> str:
    return str((call.get("function") or call).get("name"))


def _thinking(message: Message) -> str:
    return next((str(message[name]).strip() for name in THINKING if message.get(name)), "")


def _arrays(ids: list[int], spans: list[Span]) -> Tokenized:
    tokens = numpy.array(ids, dtype=numpy.int32)
    labels = numpy.full(len(ids), IGNORED, dtype=numpy.int32)
    for start, stop in spans:
        labels[start:stop] = tokens[start:stop]
    return Tokenized(tokens, labels)


ODD = {
    "NUL": re.compile("\x00"),
    "control": re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]"),
    "bidirectional": re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"),
    "zero_width": re.compile("[\u200b-\u200d\u2060\ufeff]"),
    "private_use": re.compile("[\ue000-\uf8ff]"),
    "replacement": re.compile("\ufffd"),
}
ANY_ODD = re.compile("|".join(pattern.pattern for pattern in ODD.values()))


def odd_characters(text: str) -> list[str]:
    """Kinds of characters in a text that are seldom meant: the keys of ODD."""
    if ANY_ODD.search(text) is None:
        return []
    return [kind for kind, pattern in ODD.items() if pattern.search(text)]


def require_encodable(text: str) -> None:
    """Raises BadRow for half of a surrogate pair, which has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        name = unicodedata.name(text[error.start], f"U+{ord(text[error.start]):04X}")
        raise BadRow("encoding", "", f"holds half of a surrogate pair ({name}); write the character itself") from None
