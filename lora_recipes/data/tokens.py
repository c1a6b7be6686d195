"""Checked rows become `input_ids` and `labels`; a label is -100 where the token carries no loss."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_recipes.data.formats import turns
from lora_recipes.data.read import RawData, row_places
from lora_recipes.errors import DataError
from lora_recipes.recipe import Recipe

IGNORED = -100  # PyTorch's cross entropy ignore_index
Tokens = dict[str, list[int]]


@dataclass(frozen=True)
class TokenizedData:
    """Rows with `input_ids` and `labels`, not yet cut to `max_length` (SFTTrainer cuts)."""

    train: datasets.Dataset
    heldout: datasets.Dataset | None


def tokenize(raw: RawData, tokenizer: PreTrainedTokenizerBase, end_ids: set[int], recipe: Recipe) -> TokenizedData:
    """Render, tokenize and mask every row.

    Args:
        end_ids: tokens that end an answer (the tokenizer's and the generation config's); one of them
            must carry loss in each answer, else the model would never learn to stop.

    Raises:
        DataError: the chat template is missing, or rewrites earlier turns, or leaves the end token out.
    """
    chat = raw.form == "messages" or (raw.form == "prompt_completion" and not isinstance(raw.train[0]["prompt"], str))
    if chat and not tokenizer.chat_template:
        raise DataError(
            f"{recipe.where('model.pretrained_model_name_or_path')}: this tokenizer has no chat template, so messages "
            "cannot be rendered; set training.chat_template_path to a .jinja file"
        )
    keywords = {
        "form": raw.form,
        "text_field": recipe.get("training.dataset_text_field", "text"),
        "answers_only": bool(recipe.get("training.assistant_only_loss")),
        "completion_only": recipe.get("training.completion_only_loss") is not False,
        "end_ids": end_ids,
        "tokenizer": tokenizer,
        "code": _code_version(),
    }

    def tokenized(rows: datasets.Dataset, split: str) -> datasets.Dataset:
        try:
            return rows.map(
                tokenize_row,
                fn_kwargs=keywords,
                with_indices=True,
                remove_columns=rows.column_names,
                num_proc=recipe.get("training.dataset_num_proc"),
                desc=f"Tokenizing {split}",
            )
        except RowProblem as problem:
            raise DataError(f"{row_places(recipe, split, [problem.index])[problem.index]}: {problem.said}") from None

    with PartialState().main_process_first():
        train = tokenized(raw.train, recipe.get("dataset.split"))
        heldout = tokenized(raw.heldout, recipe.get("dataset.eval_split")) if raw.heldout is not None else None
    return TokenizedData(train, heldout)


class RowProblem(DataError):
    """A row that cannot be rendered or masked. Both arguments are kept as such, so that it crosses processes."""

    def __init__(self, index: int, said: str) -> None:
        super().__init__(index, said)
        self.index, self.said = index, said


def _code_version() -> str:
    """Changes with the masking code: `datasets` caches by a function's name and arguments, not by what it calls."""
    folder = Path(__file__).parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("tokens.py", "formats.py"))
    return hashlib.sha256(f"{transformers.__version__}{text}".encode()).hexdigest()


def tokenize_row(
    row: dict[str, Any],
    index: int,
    *,
    form: str,
    text_field: str,
    answers_only: bool,
    completion_only: bool,
    end_ids: set[int],
    tokenizer: PreTrainedTokenizerBase,
    code: str = "",
) -> Tokens:
    """One row of any format → {"input_ids", "labels"}, both of the row's length in tokens.

    Args:
        code: only there to make the cache notice a change of the masking code.

    Raises:
        RowProblem: the chat template refuses the row, or no mask can be trusted.
    """
    try:
        if form == "text":
            return _spans_tokens(text_spans(row[text_field], answers_only, _end(tokenizer)), tokenizer)
        if form == "messages":
            return _chat_tokens(row["messages"], 0, answers_only, row.get("tools"), end_ids, tokenizer)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return _spans_tokens([(prompt, not completion_only), (completion + _end(tokenizer), True)], tokenizer)
        first = len(prompt) if completion_only else 0
        return _chat_tokens(
            prompt + completion, first, completion_only or answers_only, row.get("tools"), end_ids, tokenizer
        )
    except (DataError, TemplateError, ValueError) as error:
        raise RowProblem(index, str(error)) from None


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.eos_token or "")


def text_spans(text: str, answers_only: bool, end: str) -> list[tuple[str, bool]]:
    """(part, whether it carries loss) of a `Human: … / Assistant: …` text, in order.

    Each `Assistant:` turn is closed by the end token, inside the loss: without it the model goes on as `Human:`.
    """
    if not answers_only:
        return [(text + end, True)]
    spans: list[tuple[str, bool]] = []
    for speaker, said in turns(text):
        mark = f"{speaker}:" if speaker else ""
        if speaker == "Assistant":
            answer = said.rstrip()
            spans += [(mark, False), (answer + end, True), (said[len(answer) :], False)]
        else:
            spans.append((mark + said, False))
    return _without_trailing_space(spans)


def _without_trailing_space(spans: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """White space after the last end token is never seen at inference."""
    while spans and not spans[-1][0].strip():
        spans = spans[:-1]
    return spans


def _spans_tokens(spans: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokenize the joined text once, as at inference, and give loss to tokens that begin inside a trained span."""
    text = "".join(part for part, _ in spans)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ranges, position = [], 0
    for part, trained in spans:
        if trained:
            ranges.append((position, position + len(part)))
        position += len(part)
    ids = encoded["input_ids"]
    # White space may have no width (offsets are trimmed); a token that the tokenizer added itself has none either.
    added = [
        special and start == end
        for special, (start, end) in zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
    ]
    labels = [
        token if not own and any(first <= start < last for first, last in ranges) else IGNORED
        for token, own, (start, _) in zip(ids, added, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _chat_tokens(
    messages: list[dict[str, Any]],
    first_trained: int,
    answers_only: bool,
    tools: Any,
    end_ids: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Tokens:
    """Render a chat and give loss to the assistant's turns from message `first_trained` on.

    The chat is rendered up to each answer and past it. Both renders must be prefixes of the whole, else the template
    rewrites earlier turns and no mask can be trusted.
    """
    full = _render(messages, False, tools, tokenizer)
    if not answers_only:
        return {"input_ids": full, "labels": list(full)}
    labels = [IGNORED] * len(full)
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first_trained:
            continue
        start = _prefix_length(_render(messages[:number], True, tools, tokenizer), full, number)
        end = _prefix_length(_render(messages[: number + 1], False, tools, tokenizer), full, number)
        end = _after_end_token(full, start, end, end_ids, number)
        labels[start:end] = full[start:end]
    return {"input_ids": full, "labels": labels}


def _render(
    messages: list[dict[str, Any]], open_answer: bool, tools: Any, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=open_answer, return_dict=False)


def _prefix_length(prefix: list[int], full: list[int], number: int) -> int:
    if full[: len(prefix)] != prefix:
        raise DataError(
            f"the chat template renders the conversation up to message {number + 1} differently alone than in the whole, "
            "so the assistant's words cannot be told apart; use a template that leaves earlier turns as they are "
            "(training.chat_template_path), or train on everything (training.assistant_only_loss=false)"
        )
    return len(prefix)


def _after_end_token(full: list[int], start: int, end: int, end_ids: set[int], number: int) -> int:
    """The answer's end: just after its last end token, so that the template's newline behind it carries no loss."""
    for position in range(end, start, -1):
        if full[position - 1] in end_ids:
            return position
    raise DataError(
        f"message {number + 1}: the chat template closes the answer with none of the tokens that end generation "
        f"({sorted(end_ids)}), so the model would never learn to stop; set training.eos_token to the token that closes a turn"
    )
