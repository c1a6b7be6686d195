"""Merges one parameter at a time: PEFT's own layers do the arithmetic, on weights that are lent to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lora_recipes.errors import RefusedError
from lora_recipes.merge.checkpoint import Files
from lora_recipes.merge.layout import Layer, Unit
from lora_recipes.merge.requantize import Requantizer

# A product cut into runs of rows has the same bits as the whole one where the rank is small enough for the kernels to
# keep one order of addition (seen with MKL up to 256; at 1,024 they differ).
LARGEST_RANK = 256


def by_rows(layer: Layer) -> bool:
    """Whether a layer's change of some rows needs only those rows, so that a weight is merged block by block."""
    if isinstance(layer, TrainableTokensLayer):
        return True
    (name,) = layer.active_adapters
    if layer.r[name] > LARGEST_RANK:
        return False
    variant = layer.lora_variant.get(name)
    if type(layer) is Linear:
        return not layer.fan_in_fan_out and (variant is None or isinstance(variant, DoraLinearVariant))
    return type(layer) is Embedding and variant is None


def merge_rows(layer: Layer, parameter: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """`weight` (rows from number `first` on of the parameter the layer changes) with the adapter in it.

    The rows given may be changed in place.

    Args:
        parameter: the layer's parameter on the meta device: says which one of a layer is meant, weight or bias.
    """
    rows = slice(first, first + len(weight))
    if isinstance(layer, TrainableTokensLayer):
        return _tokens(layer, weight, rows)
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        with _lent((base, layer.parameter_name, weight)):
            return _merged(layer, base, layer.parameter_name)
    (name,) = layer.active_adapters
    if parameter is getattr(base, "bias", None):
        return _bias(layer, base, name, weight, rows)
    partial = len(weight) < len(base.weight)
    with (
        _without_bias(layer, name),
        _lent((base, "weight", weight), *(_row_parts(layer, name, rows) if partial else ())),
    ):
        return _merged(layer, base, "weight")


def _row_parts(layer: LoraLayer, name: str, rows: slice) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """What belongs to these rows alone: (its holder, its name, the part)."""
    if isinstance(layer, Embedding):
        yield layer.lora_embedding_A, name, layer.lora_embedding_A[name][:, rows]
        return
    yield layer.lora_B[name], "weight", layer.lora_B[name].weight[rows]
    if name in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[name]
        yield magnitude, "weight", magnitude.weight[rows]


def _bias(layer: LoraLayer, base: torch.nn.Module, name: str, bias: torch.Tensor, rows: slice) -> torch.Tensor:
    """The bias alone: a weight without columns is merged along."""
    first, second = layer.lora_A[name], layer.lora_B[name]
    empty = torch.empty(len(bias), 0, dtype=bias.dtype)
    with _lent(
        (base, "bias", bias),
        (base, "weight", empty),
        (first, "weight", first.weight[:, :0]),
        (second, "weight", second.weight[rows]),
        (second, "bias", second.bias[rows]),
    ):
        return _merged(layer, base, "bias")


def _tokens(layer: TrainableTokensLayer, weight: torch.Tensor, rows: slice) -> torch.Tensor:
    (name,) = layer.active_adapters
    indices, values = layer.token_indices[name], layer.trainable_tokens_delta[name]
    inside = [number for number, token in enumerate(indices) if rows.start <= token < rows.stop]
    if not inside:
        return weight
    layer.token_indices[name] = [indices[number] - rows.start for number in inside]
    base = layer.get_base_layer()
    try:
        with _lent((base, "weight", weight), (layer.trainable_tokens_delta, name, values[inside])):
            return _merged(layer, base, "weight")
    finally:
        layer.token_indices[name] = indices


def _merged(layer: Layer, base: torch.nn.Module, name: str) -> torch.Tensor:
    """PEFT's own merge, unsafe: it adds in float32 and rounds once, where its safe one rounds twice (stack of 0.21)."""
    try:
        layer.merge(safe_merge=False)
        return getattr(base, name).data
    finally:
        layer.merged_adapters.clear()
        if isinstance(layer, LoraLayer):
            layer._caches.clear()  # DoRA keeps lengths there to undo the merge


@contextmanager
def _lent(*parts: tuple[Any, str, torch.Tensor]) -> Iterator[None]:
    """Give a layer tensors for a moment: (holder, name, tensor)."""
    kept = [(holder, name, getattr(holder, name)) for holder, name, _ in parts]
    try:
        for holder, name, tensor in parts:
            setattr(holder, name, torch.nn.Parameter(tensor, requires_grad=False))
        yield
    finally:
        for holder, name, tensor in kept:
            setattr(holder, name, tensor)


@contextmanager
def _without_bias(layer: LoraLayer, name: str) -> Iterator[None]:
    """A layer merges weight and bias together; the bias is a parameter of its own here."""
    had = layer.lora_bias.get(name, False)
    layer.lora_bias[name] = False
    try:
        yield
    finally:
        layer.lora_bias[name] = had


def convert_and_merge(
    unit: Unit, model: PreTrainedModel, files: Files, requantizer: Requantizer | None
) -> dict[str, torch.Tensor]:
    """The tensors that are written of a unit whose parameters are not laid out as on disk (experts in one tensor)."""
    assert unit.converter is not None
    converter = deepcopy(unit.converter)
    for stored, pattern in zip(unit.stored, unit.patterns, strict=True):
        converter.add_tensor(unit.parameters[0], stored.name, pattern, files.read(stored).to(unit.loaded))
    values = converter.convert(unit.parameters[0], model=model, config=model.config)
    written = unit.outputs[0].dtype
    merged = {}
    for name, value in values.items():
        tensor = value[0] if isinstance(value, list) else value
        if requantizer:
            tensor = requantizer.opened(name, tensor)
        tensor = tensor.to(written)
        parameter = model.get_parameter_or_buffer(name)
        for layer in unit.layers:
            if parameter is changed_by(layer):
                tensor = merge_rows(layer, parameter, tensor, 0)
        merged[name] = tensor
    return revert_weight_conversion(model, merged)


def changed_by(layer: Layer) -> torch.Tensor:
    """The parameter, on the meta device, whose values the layer changes first."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises RefusedError for NaN or infinity: both show in the extremes."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (isfinite(low.item()) and isfinite(high.item())):
            raise RefusedError(f"{name}: NaN or infinity after merging; nothing is published")


def rounded_away(layer: Layer, before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """(squared length of what rounding took from the change of these first rows, squared length of the change).

    Only for a layer that adds its change; (0, 0) for others.
    """
    if type(layer) is not Linear or layer.lora_variant or layer.fan_in_fan_out:
        return 0.0, 0.0
    (name,) = layer.active_adapters
    wanted = (
        layer.lora_B[name].weight[: len(before)].double() @ layer.lora_A[name].weight.double() * layer.scaling[name]
    )
    lost = after.double() - before.double() - wanted
    return lost.square().sum().item(), wanted.square().sum().item()
