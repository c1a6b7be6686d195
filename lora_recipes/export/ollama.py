"""An Ollama Modelfile for a GGUF file: the chat template in Ollama's language where it can be, end tokens, sampling."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Render = Callable[[Messages], str | None]
SYSTEM, FIRST, ANSWER, SECOND = "%system%", "%first%", "%answer%", "%second%"
# Conversations on which both templates must write the same: with and without a system message, up to three turns.
_TURNS = [
    ("user", 'Two "pens", {{ please }}.\n\nAnd a <b>book</b>.'),
    ("assistant", '{"items": ["pen", "book"]}'),
    ("user", "No: thrée pens — 日本."),
    ("assistant", "Done.\n  - 3 pens"),
    ("user", "Thanks"),
]
_BEFORE = ("system", "Answer in JSON.\nBe brief.")
SAMPLES: list[Messages] = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (_TURNS[:1], _TURNS[:3], _TURNS, [_BEFORE, *_TURNS[:1]], [_BEFORE, *_TURNS[:3]], [_BEFORE, *_TURNS])
]
# Ollama's parameter → GenerationConfig's. Values that a recipe does not set are Ollama's own, but for these.
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


@dataclass(frozen=True)
class Form:
    """The texts between the messages of a chat: at most one system message, then user and assistant by turns.

    Attributes:
        opening: before the first question.
        asking: after the last question, where the model goes on.
        answering: between an earlier question and its answer.
        next: between an answer and the next question.
        system: before the system message, and between it and a question; None where the template takes none.
        system_last: it stands before the last question, not before the first.
    """

    opening: str
    asking: str
    answering: str
    next: str
    system: tuple[str, str] | None
    system_last: bool = False

    def render(self, messages: Messages) -> str:
        """What `go` writes for these messages."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        text = ""
        for at, message in enumerate(messages):
            last = at == len(messages) - 1
            if message["role"] == "system":
                if self.system and not self.system_last:
                    text += self.system[0] + message["content"] + self.system[1]
            elif message["role"] == "user":
                if at == 0 or (system and at == 1 and (self.system_last or not self.system)):
                    text += self.opening
                if self.system and self.system_last and last and system:
                    text += system + self.system[1]
                text += message["content"] + (self.asking if last else self.answering)
            else:
                text += message["content"] + ("" if last else self.next)
        return text

    def go(self) -> str:
        """The same as a template of Go, which is what Ollama reads. Texts stand in quotes, so no blank is trimmed."""
        first = "eq $i 0"
        if self.system_last or not self.system:
            first = f"or ({first}) (and $.System (eq $i 1))"
        system = ""
        if self.system and not self.system_last:
            system = f"{_quoted(self.system[0])}{{{{ $m.Content }}}}{_quoted(self.system[1])}"
        question = f"{{{{ if {first} }}}}{_quoted(self.opening)}{{{{ end }}}}"
        if self.system and self.system_last:
            question += f"{{{{ if and $last $.System }}}}{{{{ $.System }}}}{_quoted(self.system[1])}{{{{ end }}}}"
        question += "{{ $m.Content }}"
        question += f"{{{{ if $last }}}}{_quoted(self.asking)}{{{{ else }}}}{_quoted(self.answering)}{{{{ end }}}}"
        answer = f"{{{{ $m.Content }}}}{{{{ if not $last }}}}{_quoted(self.next)}{{{{ end }}}}"
        return "\n".join(
            [
                "{{- range $i, $m := .Messages }}",
                "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
                f'{{{{- if eq $m.Role "system" }}}}{system}',
                f'{{{{- else if eq $m.Role "user" }}}}{question}',
                f'{{{{- else if eq $m.Role "assistant" }}}}{answer}',
                "{{- end }}",
                "{{- end }}",
            ]
        )


def _quoted(text: str) -> str:
    """An action that writes the text; JSON's escapes are Go's."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def form_of(render: Render) -> Form | None:
    """The form of a chat template, or None where no form writes the same on every sample.

    Args:
        render: the template with the model's turn opened; None where it takes no such conversation.
    """
    turns = [
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": SECOND},
    ]
    system = {"role": "system", "content": SYSTEM}
    short = _between(render(turns[:1]), FIRST)
    long = _between(render(turns), FIRST, ANSWER, SECOND)
    told = _between(render([system, *turns[:1]]), SYSTEM, FIRST)
    if short is None or long is None or long[0] != short[0] or long[3] != short[1]:
        return None
    for last in (False, True) if told else (False,):
        form = Form(short[0], short[1], long[1], long[2], (told[0], told[1]) if told else None, last)
        if all(form.render(sample) == render(sample) for sample in SAMPLES if told or sample[0]["role"] != "system"):
            return form
    return None


def _between(text: str | None, *marks: str) -> list[str] | None:
    """What stands before, between and after the marks; None where one is not there once, in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def modelfile(
    path: Path, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, section: dict[str, Any]
) -> tuple[str, list[str]]:
    """The Modelfile for the GGUF file at `path`, and what a user should know of it.

    Args:
        section: the recipe's `generation`.
    """
    lines = [f"FROM ./{path.name}"]
    form, reason = _chat(path, tokenizer)
    notes = []
    if form is None:
        lines.append(f"# No TEMPLATE: {reason}. The GGUF file holds the model's own.")
        notes.append(f"the Modelfile has no TEMPLATE: {reason}; the GGUF file holds the model's own")
    else:
        if form.system is None:
            lines.append("# The model's chat template takes no system message, so SYSTEM has no effect.")
        lines.append(f'TEMPLATE """{form.go()}"""')
    lines += [
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in _stops(tokenizer, generation, section)
    ]
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(section).items()]
    return "\n".join(lines) + "\n", notes


def _chat(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Form | None, str]:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None, "the model has no chat template"
    if "strftime_now" in template:
        return None, "the chat template writes the day's date, which Ollama's language cannot"
    added = gguf.GGUFReader(path).get_field("tokenizer.ggml.add_bos_token")
    start = tokenizer.bos_token if added is not None and added.contents() else ""

    def render(messages: Messages) -> str | None:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:  # what a template raises for a conversation that it does not take
            return None
        return text.removeprefix(start)  # Ollama adds it, where the file says so

    form = form_of(render)
    return form, "" if form else "the model's chat template has no form in Ollama's language that writes the same"


def _stops(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, section: dict[str, Any]) -> list[str]:
    """Texts that end an answer: the end tokens, then the recipe's stop strings."""
    ids: list[int | None] = [tokenizer.eos_token_id]
    for declared in (section.get("eos_token_id"), generation.eos_token_id):
        ids += declared if isinstance(declared, list) else [declared]
    strings = section.get("stop_strings") or []
    tokens = [tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
    return list(dict.fromkeys([*tokens, *([strings] if isinstance(strings, str) else strings)]))


def _parameters(section: dict[str, Any]) -> dict[str, Any]:
    """Answers as the recipe generates them: greedy unless it samples, and with no penalty that it does not set."""
    parameters: dict[str, Any] = {"temperature": 0}
    if section.get("do_sample"):
        parameters = {
            name: section.get(key, GENERATES[key]) for name, key in SAMPLING.items() if section.get(key, GENERATES[key])
        }
    parameters["repeat_penalty"] = section.get("repetition_penalty") or 1.0
    if limit := section.get("max_new_tokens"):
        parameters["num_predict"] = limit
    return parameters


# What `generate` uses where a recipe samples and does not say; None is off.
GENERATES = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
