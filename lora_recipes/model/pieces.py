"""A micro-batch as a CPU computes it best: rows end to end without padding, what they share once, each piece by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from lora_recipes.model.attention import Rows
from lora_recipes.model.compare import IGNORED

COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
# Tokens of a piece, where a row that is longer is a piece by itself: more are faster products, and more memory.
TOGETHER = {torch.float32: 512, torch.bfloat16: 1024, torch.float16: 1024}

Row = tuple[torch.Tensor, torch.Tensor]  # ids and labels, without padding


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


def takes_functions(training: Mapping[str, Any]) -> bool:
    """Whether functions of our own (`model.fused`, `model.attention`) may stand for a model's layers.

    Not where layers are compiled, which every new set of rows would be anew, and not where the results of some of torch's own
    functions are kept for backward (`selective`).
    """
    selective = (training.get("activation_checkpointing_kwargs") or {}).get("selective")
    return not (selective or any(training.get(key) for key in COMPILE_KEYS))


def takes_flat(training: Mapping[str, Any], lora: Mapping[str, Any]) -> bool:
    """Whether rows may lie end to end where the model takes it.

    Not where aLoRA looks for the last invocation of a sequence, to adapt what follows.
    """
    return takes_functions(training) and not lora.get("alora_invocation_tokens")


def most_together(autocast: torch.dtype | None) -> int:
    """Tokens that lie in a piece, computed in this type; None: in the weights' own."""
    return TOGETHER[autocast or torch.float32]


def largest_piece(rows: int, length: int, together: int) -> int:
    """Tokens of the largest piece of a micro-batch whose rows are at most this long."""
    return max(length, min(rows * length, together))


def pieces(inputs: dict[str, Any], together: int) -> list[dict[str, Any]]:
    """The micro-batch in pieces that together hold every row once.

    A causal model reads a row the same whoever stands beside it, so only the order of sums differs. (Not so where positions
    are scaled by the length of the whole batch, as in Phi-3's longrope beyond its original length.) A beginning that the
    rows of a piece share, and that none of them is trained on, is computed once: its gradient is the sum of theirs.

    Args:
        inputs: of a collator, padded on the right: `input_ids`, `labels` and `attention_mask`, each [rows, tokens]; or packed:
            one row of documents, each of which begins where `position_ids` is 0.
        together: tokens of a piece of several rows end to end, where the model takes that (`model.attention`); 0: each row is
            a piece.

    Returns:
        `input_ids`, `labels` and, where rows lie end to end, `position_ids` of each piece, [1, tokens]; `rows`: where they lie; `tokens`: of
        its rows, what they share counted for each. The pieces with the longest rows last.
    """
    found = sorted(rows_of(inputs), key=lambda row: -len(row[0]))
    if not together:
        return [_alone(row) for row in found[::-1]]
    shared = _shared(found)
    groups: list[list[Row]] = []
    for row in found:
        for group in groups:
            if shared + sum(len(ids) - shared for ids, _ in [*group, row]) <= together:
                group.append(row)
                break
        else:
            groups.append([row])
    return [_end_to_end(group, shared if len(group) > 1 else 0) for group in groups[::-1]]


def _alone(row: Row) -> dict[str, Any]:
    ids, labels = row
    return {"input_ids": ids[None], "labels": labels[None], "tokens": len(ids)}


def _end_to_end(rows: list[Row], shared: int) -> dict[str, Any]:
    ids, labels, places = [rows[0][0][:shared]], [rows[0][1][:shared]], [torch.arange(shared)]
    ends: list[int] = []
    for own, wanted in rows:
        rest = wanted[shared:].clone()
        rest[0] = IGNORED  # nothing of its row stands before it that would predict it
        ids.append(own[shared:])
        labels.append(rest)
        places.append(torch.arange(shared, len(own)))
        ends.append((ends[-1] if ends else shared) + len(rest))
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(places)[None],
        "rows": Rows(shared, tuple(ends)),
        "tokens": sum(len(own) for own, _ in rows),
    }


def _whole(ids: torch.Tensor, labels: torch.Tensor, shared: int, first: int, end: int) -> Row:
    one, other = slice(0, shared), slice(first, end)
    return torch.cat((ids[one], ids[other])), torch.cat((labels[one], labels[other]))


def _shared(rows: list[Row]) -> int:
    """Tokens with which all rows begin, and behind which none of them is trained on the next one; each keeps one of its own."""
    if len(rows) == 1:
        return 0
    length = min(len(ids) for ids, _ in rows) - 1
    ids = torch.stack([ids[:length] for ids, _ in rows])
    trained = torch.stack([labels[1 : length + 1] != IGNORED for _, labels in rows])
    return int(((ids == ids[0]).all(0) & ~trained.any(0)).int().cumprod(0).sum())


def rows_of(inputs: dict[str, Any]) -> list[Row]:
    """Each row or packed document of a micro-batch or of a piece."""
    if rows := inputs.get("rows"):
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        return [_whole(ids, labels, rows.shared, first, end) for first, end, _ in rows.spans() if end > rows.shared]
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
