"""Batched answers of a loaded model, each with how it ended."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """`stopped` is "eos" when the model ended by itself (or by a stop string), else which limit it ran into: "length" or
    "time"."""

    text: str
    stopped: str


def generation_config(
    section: dict[str, Any], end_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The recipe's `generation` section as its class. End tokens are the model's unless the recipe names them."""
    own = ("prompts", "batch_size", "max_rows")
    values = {key: value for key, value in section.items() if key not in own}
    return GenerationConfig(
        **{"eos_token_id": end_ids, "pad_token_id": tokenizer.pad_token_id, "do_sample": False, **values}
    )


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: GenerationConfig,
    batch_size: int,
    seed: int,
    limits: list[int | None] | None = None,
) -> list[Answer]:
    """One answer a prompt (token ids), in the order of `prompts`.

    Prompts of like length share a batch, padded on the left, which is exact for causal models with position ids.

    Args:
        limits: new tokens of each prompt; None for `config.max_new_tokens`. Only prompts of one limit share a batch, so
            that a short answer never waits for a long one.
    """
    torch.manual_seed(seed)
    answers: dict[int, Answer] = {}
    for batch, limit in _batches(prompts, limits or [None] * len(prompts), batch_size):
        given = answer_batch(model, tokenizer, [prompts[index] for index in batch], _limited(config, limit))
        answers |= dict(zip(batch, given, strict=True))
    return [answers[index] for index in range(len(prompts))]


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: GenerationConfig,
    **keywords: Any,
) -> list[Answer]:
    """One answer a prompt, all in one batch; `keywords` go to `generate`."""
    extra = {"tokenizer": tokenizer} if config.stop_strings else {}
    inputs = _left_padded(prompts, tokenizer.pad_token_id, model.device)
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=config, **extra, **keywords)
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((position for position, token in enumerate(row) if token in end_ids(config)), None)
        while end is None and row and row[-1] == tokenizer.pad_token_id:  # ended by a stop string before others
            row.pop()
        text = tokenizer.decode(row[:end], skip_special_tokens=False).strip()
        stopped = end is not None or any(stop in text for stop in stop_strings(config))
        answers.append(Answer(text, "eos" if stopped else limit_met(config, len(row))))
    return answers


def limit_met(config: GenerationConfig, tokens: int) -> str:
    """What cut an answer of so many new tokens off: "time" (`max_time`, seconds a batch) or "length"."""
    in_time = config.max_time is None or config.max_new_tokens is None or tokens >= config.max_new_tokens
    return "length" if in_time else "time"


def end_ids(config: GenerationConfig) -> list[int]:
    """Tokens that end an answer."""
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def stop_strings(config: GenerationConfig) -> list[str]:
    """Texts that end an answer beside the end tokens."""
    return [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or [])


def _batches(
    prompts: list[list[int]], limits: list[int | None], batch_size: int
) -> Iterator[tuple[list[int], int | None]]:
    """(indices of prompts, their limit), the shortest prompts of a limit first."""
    for limit in dict.fromkeys(limits):
        order = sorted(
            (index for index, own in enumerate(limits) if own == limit), key=lambda index: len(prompts[index])
        )
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size], limit


def _limited(config: GenerationConfig, limit: int | None) -> GenerationConfig:
    if limit is None:
        return config
    limited = deepcopy(config)
    limited.max_new_tokens = limit
    return limited


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """{"input_ids", "attention_mask"}, each [rows, longest row]."""
    longest = max(len(row) for row in rows)
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
