"""A trained model as hashes, one a tensor: what a repetition of its run is held against, and where two models differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Gap:
    """How far the tensors of two models of one shape are apart.

    Attributes:
        largest: of all differences of two numbers; infinite where one of them is NaN.
        name: of the tensor that has it.
        relative: length of the difference of all numbers, over the length of those of the first model.
    """

    largest: float
    name: str
    relative: float


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Name → sha256 of type, shape and content, of every tensor in a folder's safetensors."""
    return {name: _hash(tensor) for name, tensor in _tensors(folder)}


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the tensors that are not the same in both, or in one alone."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def gap(folder: Path, other: Path) -> Gap | None:
    """How far two models are apart; None when they have not the same tensors."""
    files = {name: file for file in _files(other) for name in _names(file)}
    largest, at, squares, length, seen = 0.0, "", 0.0, 0.0, 0
    for name, one in _tensors(folder):
        if name not in files:
            return None
        with safe_open(files[name], framework="pt") as opened:
            two = opened.get_tensor(name)
        if one.shape != two.shape:
            return None
        seen += 1
        difference = (two.double() - one.double()).abs().nan_to_num(nan=float("inf"))
        most = float(difference.max()) if difference.numel() else 0.0
        if most > largest:
            largest, at = most, name
        squares += float(difference.square().sum())
        length += float(one.double().square().sum())
    return Gap(largest, at, (squares / length) ** 0.5 if length else squares**0.5) if seen == len(files) else None


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _hash(tensor: torch.Tensor) -> str:
    found = sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
