"""How two models differ on the same tokens: logits, divergence, the loss of each. One row at a time, one model at a time."""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

IGNORED = -100  # PyTorch's cross entropy ignore_index
TOGETHER = 2**28  # logits of a row that are kept at a time: 1 GiB in float32
BLOCK = 128  # positions that are compared at a time, each step of which needs a tensor of the logits' size


@dataclass(frozen=True)
class Row:
    """Tokens that a model reads, and the places at which its prediction is looked at.

    Attributes:
        positions: the token at position + 1 is predicted there.
        targets: the tokens that follow at these positions; empty where there is nothing to be right about.
    """

    input_ids: list[int]
    positions: list[int]
    targets: list[int] = field(default_factory=list)


def prompt_row(input_ids: list[int], last: int) -> Row:
    """A prompt, looked at where its last tokens are read."""
    return Row(input_ids, list(range(max(0, len(input_ids) - last), len(input_ids))))


def trained_row(input_ids: Sequence[int], labels: Sequence[int], last: int | None = None) -> Row | None:
    """A row, looked at where it has loss; None where it has none.

    Args:
        last: only its last so many trained tokens.
    """
    places = [place for place in range(1, len(labels)) if labels[place] != IGNORED]
    places = places[-last:] if last else places
    if not places:
        return None
    return Row(list(input_ids), [place - 1 for place in places], [input_ids[place] for place in places])


def pieces(row: Row, vocabulary: int) -> list[Row]:
    """The row in pieces whose logits fit into memory; one, unless it is long and the vocabulary wide.

    A piece ends where it is looked at last, for a causal model sees nothing behind that: reading the start of the row again
    costs less than it would to read all of it.
    """
    count = max(1, TOGETHER // vocabulary)
    parts = [slice(first, first + count) for first in range(0, len(row.positions), count)]
    if len(parts) == 1:
        return [row]
    return [Row(row.input_ids[: row.positions[part][-1] + 1], row.positions[part], row.targets[part]) for part in parts]


def logits_at(model: PreTrainedModel | PeftModel, row: Row) -> torch.Tensor:
    """[positions, vocabulary], float32, on the CPU. The head is asked at these positions alone where it can be."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    ids = torch.tensor([row.input_ids], device=model.device)
    places = torch.tensor(row.positions)  # on the CPU: it then fits a head on any GPU
    asks = "logits_to_keep" in inspect.signature(base.forward).parameters
    keywords: dict[str, Any] = {"logits_to_keep": places} if asks else {}
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **keywords).logits[0]
    return (logits if asks else logits[places]).float().cpu()


def record(model: PreTrainedModel | PeftModel, rows: Sequence[Row], folder: Path) -> None:
    """Write a model's logits on each row into `folder`, which another model, in another process, is compared with."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        save_file({"logits": logits_at(model, row)}, folder / f"{number}.safetensors")


def recorded(folder: Path, count: int) -> Iterator[torch.Tensor]:
    """The logits of each row, as `record` wrote them."""
    for number in range(count):
        yield load_file(folder / f"{number}.safetensors")["logits"]


@dataclass
class Difference:
    """Sums over tokens of how a model differs from a reference."""

    tokens: int = 0
    kl: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    same_top: int = 0
    values: int = 0
    scored: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: Sequence[int]) -> None:
        """Count one row.

        Args:
            reference: [tokens, vocabulary] of the model that is compared with.
            logits: the same of the other model.
            targets: tokens that follow, for the loss; may be empty.
        """
        wide = min(reference.shape[-1], logits.shape[-1])  # a resized vocabulary has rows that the other lacks
        for first in range(0, len(logits), BLOCK):
            block = slice(first, first + BLOCK)
            self._add(reference[block, :wide], logits[block, :wide], targets[block])

    def _add(self, reference: torch.Tensor, logits: torch.Tensor, targets: Sequence[int]) -> None:
        distance = (reference - logits).abs()
        self.tokens += len(logits)
        self.values += logits.numel()
        self.absolute += distance.sum(dtype=torch.float64).item()
        self.largest = _larger(self.largest, distance.max().item())
        self.same_top += int((reference.argmax(-1) == logits.argmax(-1)).sum())
        self.kl += kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum").item()
        if targets:
            wanted = torch.tensor(targets)
            self.scored += len(targets)
            self.loss += cross_entropy(logits, wanted, reduction="sum").item()
            self.reference_loss += cross_entropy(reference, wanted, reduction="sum").item()

    def join(self, other: "Difference") -> None:
        """Count what another has counted."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            setattr(self, item.name, _larger(mine, theirs) if item.name == "largest" else mine + theirs)

    def as_json(self) -> dict[str, Any]:
        """Means over tokens; KL(reference ‖ model) and losses in nats a token. Rounding below zero is cut off."""
        return {
            "max_abs_logit_difference": self.largest,
            "mean_abs_logit_difference": self.absolute / max(self.values, 1),
            "mean_kl": (self.kl if math.isnan(self.kl) else max(self.kl, 0.0)) / max(self.tokens, 1),
            "top1_agreement": self.same_top / max(self.tokens, 1),
            "loss": self.loss / self.scored if self.scored else None,
            "reference_loss": self.reference_loss / self.scored if self.scored else None,
            "tokens": self.tokens,
        }


def _larger(one: float, other: float) -> float:
    """The larger; NaN where either is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def recorded_differences(rows: Sequence[Row], reference: Path, folder: Path) -> dict[str, Any]:
    """How the model recorded in `folder` differs from the one recorded in `reference`."""
    return _differences(rows, reference, recorded(folder, len(rows)))


def differences(model: PreTrainedModel | PeftModel, rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """How `model` differs from the one whose logits `record` wrote into `folder`."""
    return _differences(rows, folder, (logits_at(model, row) for row in rows))


def _differences(rows: Sequence[Row], reference: Path, logits: Iterable[torch.Tensor]) -> dict[str, Any]:
    found = Difference()
    for row, before, after in zip(rows, recorded(reference, len(rows)), logits, strict=True):
        found.add(before, after, row.targets)
    return found.as_json()
