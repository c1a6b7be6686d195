"""A micro-batch as a CPU computes it best: cut into pieces of rows of like length, each forward and backward by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from lora_recipes.model.compare import IGNORED

TOGETHER = 512  # tokens of a piece with its padding; a row that is longer is a piece by itself
# Tokens that take as long as a forward and backward does beside its tokens (operators of every layer are started, weights
# are read): between 40 in float32 and 110 in bf16 on a CPU with AMX, for SmolLM2-135M.
OVERHEAD = 64


def takes_own_loss(training: Mapping[str, Any], config: PreTrainedConfig) -> bool:
    """Whether a CPU computes the loss as `model.loss` does; TRL does where labels are smoothed or routers have a loss.

    Args:
        training: settings by the names of trl.SFTConfig.
    """
    text = config.get_text_config()
    coefficient = training.get("router_aux_loss_coef")
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0)
    routed = hasattr(text, "output_router_logits") and coefficient != 0  # as trl/trainer/sft_trainer.py decides
    return not routed and not training.get("label_smoothing_factor")


def takes_pieces(training: Mapping[str, Any], config: PreTrainedConfig) -> bool:
    """Whether a CPU cuts micro-batches. NEFTune's noise is scaled by the length of the whole one."""
    return takes_own_loss(training, config) and training.get("neftune_noise_alpha") is None


def largest_piece(rows: int, length: int) -> tuple[int, int]:
    """(rows, tokens) of the largest piece of a micro-batch whose rows are at most this long: two shorter rows may be more."""
    shapes = [(count, min(length, TOGETHER // count)) for count in range(1, min(rows, TOGETHER) + 1)]
    return max([(1, length), *shapes], key=lambda shape: (shape[0] * shape[1], shape[1]))


def pieces(inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The micro-batch in pieces that together hold every token once.

    A causal model reads a row the same whoever stands beside or behind it, so only the order of sums differs. (Not so where
    positions are scaled by the length of the whole batch, as in Phi-3's longrope beyond its original length.)

    Args:
        inputs: of a collator, padded on the right: `input_ids`, `labels` and `attention_mask`, each [rows, tokens]; or packed:
            one row of documents, each of which begins where `position_ids` is 0.

    Returns:
        `input_ids`, `labels` and `attention_mask` of each piece, the longest rows last.
    """
    rows = sorted(rows_of(inputs), key=lambda row: -len(row[0]))
    found, first = [], 0
    for end in _ends([len(ids) for ids, _ in rows]):
        ids, labels = zip(*rows[first:end], strict=True)
        kept = [torch.ones_like(row) for row in ids]
        found.append(
            {
                "input_ids": pad_sequence(ids, batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
                "attention_mask": pad_sequence(kept, batch_first=True),
            }
        )
        first = end
    return found[::-1]


def rows_of(inputs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each row or packed document, without padding."""
    found = []
    places, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    for number, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        if places is not None:
            starts = (places[number] == 0).nonzero().flatten().tolist()
            cuts = list(zip(starts, [*starts[1:], len(ids)], strict=True))
        else:
            cuts = [(0, int(mask[number].sum()) if mask is not None else len(ids))]
        found += [(ids[start:end], labels[start:end]) for start, end in cuts]
    # A document of one token has nothing to predict; padding at the end of a packed row looks like many of them.
    return [row for row in found if len(row[0]) > 1] or found[:1]


def _ends(lengths: list[int]) -> list[int]:
    """Where each piece ends, so that padding and overhead together cost least.

    Args:
        lengths: of all rows, falling: the first of a piece says how far the others are padded.
    """
    cost, before = [0], [0]  # of the first n rows, and where the last piece of them begins
    for end in range(1, len(lengths) + 1):
        options = [
            (cost[first] + lengths[first] * (end - first) + OVERHEAD, first)
            for first in range(end)
            if end - first == 1 or lengths[first] * (end - first) <= TOGETHER
        ]
        least, first = min(options)
        cost.append(least)
        before.append(first)
    found, end = [], len(lengths)
    while end:
        found.append(end)
        end = before[end]
    return found[::-1]
