"""Plans a merge from headers alone: which tensors on disk become which of the model, what the adapter does to each,
and in which file the result lies. The model has no memory (meta device) while this is decided."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)

from lora_recipes.errors import RefusedError
from lora_recipes.merge.checkpoint import Checkpoint, Files, Stored

Layer: TypeAlias = LoraLayer | TrainableTokensLayer


@dataclass(frozen=True)
class Output:
    """A tensor that is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """What is computed together. Most often one tensor on disk, one parameter, one tensor that is written.

    Attributes:
        parameters: names in the model.
        stored: tensors on disk that they are made of; none where the adapter holds the whole parameter.
        patterns: of `stored`, which of the converter's sources each is.
        outputs: tensors that are written.
        loaded: type that the base is loaded in, before anything is done to it.
        converter: how the tensors on disk become the parameters; None where they are the parameter.
        layers: PEFT's layers that change the parameter, in the order PEFT merges them.
        whole: the parameter as the adapter holds it.
    """

    parameters: tuple[str, ...]
    stored: tuple[Stored, ...]
    outputs: tuple[Output, ...]
    loaded: torch.dtype
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    whole: torch.Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Everything that will be written, file by file.

    Attributes:
        model: the merged model without memory; its config is the merged model's.
        shards: file name → (unit, number of its output) in the order they lie in.
        dropped: tensors on disk that are no part of the model, or that another tensor is tied to.
    """

    model: PreTrainedModel
    shards: dict[str, list[tuple[Unit, int]]]
    dropped: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(unit.outputs[number].bytes for shard in self.shards.values() for unit, number in shard)


@dataclass(frozen=True)
class _Match:
    """Tensors on disk that are the parameters named."""

    parameters: tuple[str, ...]
    stored: tuple[Stored, ...]
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """What is known of the base before an adapter is put on it.

    Attributes:
        matches: parameter → what it is made of on disk.
        types: parameter → type that it is loaded in.
        homes: identity of a parameter → one of its names that `matches` knows.
        dropped: names on disk that the model has no place for, or that are tied to another.
    """

    checkpoint: Checkpoint
    matches: dict[str, _Match]
    types: dict[str, torch.dtype]
    homes: dict[int, str]
    dropped: list[str]


def read_base(model: PreTrainedModel, checkpoint: Checkpoint, loaded: torch.dtype, files: Files) -> Base:
    """Hold the checkpoint's names against the model on the meta device, by transformers' own rules for loading.

    Args:
        loaded: type that the model is loaded in.
    """
    matches, dropped = _match(model, checkpoint)
    dropped += _untie_what_differs(model, matches, loaded, files)
    where = {name: found for found in matches for name in found.parameters}
    parameters = model.state_dict(keep_vars=True)
    return Base(
        checkpoint,
        where,
        _types(parameters, model._get_dtype_plan(loaded)),
        {id(tensor): name for name, tensor in parameters.items() if name in where},
        dropped,
    )


def _match(base: PreTrainedModel, checkpoint: Checkpoint) -> tuple[list[_Match], list[str]]:
    """(which tensors on disk become which parameters, names on disk that the model has no place for)"""
    rules = get_model_conversion_mapping(base, None, None)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = base.state_dict()
    found: dict[str, tuple[WeightConverter | None, list[tuple[str | None, Stored]]]] = {}
    dropped = []
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda entry: _natural(entry[0])):
        target, pattern = rename_source_key(name, renamings, converters, base.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], base.base_model_prefix, known)
        if target not in known:
            dropped.append(name)
            continue
        rule = by_pattern[pattern] if pattern is not None else None
        found.setdefault(target, (rule, []))[1].append((pattern, stored))
    base._weight_conversions = [rule for rule in rules if rule.was_used()]
    matches = []
    for target, (rule, parts) in found.items():
        if rule is None:
            matches.append(_Match((target,), (parts[-1][1],)))
            continue
        converter = deepcopy(rule)
        for pattern, stored in parts:  # shapes only: to learn which parameters come out
            converter.add_tensor(target, stored.name, pattern, torch.empty(stored.shape, device="meta"))
        parameters = converter.convert(target, model=base, config=base.config)
        patterns = tuple(str(pattern) for pattern, _ in parts)
        matches.append(_Match(tuple(parameters), tuple(stored for _, stored in parts), rule, patterns))
    return matches, dropped


def _natural(name: str) -> list[Any]:
    """Experts in the order of their numbers: `10` after `2`, as transformers stacks them."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _untie_what_differs(
    base: PreTrainedModel, matches: Iterable[_Match], loaded: torch.dtype, files: Files
) -> list[str]:
    """Where a checkpoint holds both of two tied tensors, they are one only if they are equal.

    Returns:
        names on disk of those that are equal to what they are tied to, and so are not needed
    """
    stored = {found.parameters[0]: found.stored[0] for found in matches if found.converter is None}
    needless = []
    for target, origin in list(base.all_tied_weights_keys.items()):
        if target not in stored or origin not in stored:
            continue
        if files.equal(stored[target], stored[origin], loaded):
            needless.append(stored[target].name)
            continue
        parent, _, last = target.rpartition(".")
        parameter = base.get_parameter(target)
        setattr(base.get_submodule(parent), last, torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False))
    return needless


def layers_by_parameter(model: PeftModel) -> dict[int, list[Layer]]:
    """PEFT's layers by the identity of the base's parameter that each changes.

    Raises:
        RefusedError: a bias was trained where the base has none to add it to.
    """
    found: dict[int, list[Layer]] = {}
    for name, module in model.named_modules():
        changed: list[torch.Tensor | None] = []
        if isinstance(module, ParamWrapper):
            changed = [module.get_param()]
        elif isinstance(module, LoraLayer):
            base = module.get_base_layer()
            biased = any(module.lora_bias.values())
            if biased and getattr(base, "bias", None) is None:
                raise RefusedError(
                    f"{name}: was trained with `lora_bias`, and the base has no bias there, so no plain model can hold it; "
                    "serve it as an adapter"
                )
            changed = [base.weight, base.bias if biased else None]
        elif isinstance(module, TrainableTokensLayer):
            changed = [module.get_base_layer().weight]
        for parameter in changed:
            if parameter is not None:
                found.setdefault(id(parameter), []).append(module)
    return found


def lay_out(base: Base, model: PeftModel, cast: torch.dtype | None, max_shard_size: str | int | None) -> Layout:
    """Plan every tensor of the merged model. `model` is taken apart for it: what is left is the merged structure.

    Args:
        model: with the adapter's tensors in memory and the base's on the meta device.
        cast: type that everything is cast to before it is merged; None: it stays as it was loaded.
        max_shard_size: unset: the files are cut as the base's are.

    Raises:
        RefusedError: the checkpoint lacks a parameter, or has another shape than the model.
    """
    layers = layers_by_parameter(model)
    given = {
        name: tensor
        for name, tensor in model.named_parameters()
        if tensor.device.type != "meta" and ".original_module." not in name  # what a module trained whole has replaced
    }
    final: PreTrainedModel = model.unload()
    _note_untied(final)
    units: list[Unit] = []
    done: set[int | str] = set()
    for name, tensor in final.state_dict(keep_vars=True).items():
        if id(tensor) in done or name in (final._keys_to_ignore_on_save or []):
            continue
        done.add(id(tensor))
        loaded = base.types[name]
        home = name if name in base.matches else base.homes.get(id(tensor))
        if tensor.device.type == "meta" and home is None:
            raise RefusedError(f"{base.checkpoint.folder}: has no weights for {name}; it is not a whole model")
        found = base.matches[home] if home is not None else None
        if found is not None and found.converter is not None:
            if found.parameters[0] not in done:
                done.add(found.parameters[0])
                units.append(_converted(found, final, loaded, cast, layers))
            continue
        stored = found.stored[0] if found is not None else None
        written = Output(_saved_name(name, tensor, final), _written_as(loaded, cast), tuple(tensor.shape))
        changed = tuple(layers.get(id(tensor), []))
        if tensor.device.type != "meta":  # the adapter holds all of it
            units.append(Unit((name,), (), (written,), loaded, layers=changed, whole=tensor))
            continue
        assert stored is not None
        if stored.shape != written.shape:
            raise RefusedError(f"{stored.file}: {stored.name} has the shape {stored.shape}, the model {written.shape}")
        units.append(Unit((name,), (stored,), (written,), loaded, layers=changed))
    _require_all_used(given, units)
    return Layout(final, _shards(units, base.checkpoint, max_shard_size), base.dropped)


def _require_all_used(given: dict[str, torch.Tensor], units: list[Unit]) -> None:
    """Raises RefusedError when a tensor of the adapter would change nothing."""
    used = {id(unit.whole) for unit in units}
    used |= {id(tensor) for unit in units for layer in unit.layers for tensor in layer.parameters()}
    unused = [name for name, tensor in given.items() if id(tensor) not in used]
    if unused:
        raise RefusedError(f"{len(unused)} tensors of the adapter would not be merged, such as {unused[0]}")


def _written_as(loaded: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    return cast if cast is not None and loaded.is_floating_point else loaded


def _types(parameters: dict[str, torch.Tensor], plan: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The types that transformers loads parameters in: some are kept in float32, by a plan (core_model_loading)."""
    types = {name: tensor.dtype for name, tensor in parameters.items()}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        hits = {name: hit for name in types if (hit := pattern.search(name))}
        types |= {name: plan[by_group[hit.lastgroup]] for name, hit in hits.items()}
    return types


def _note_untied(final: PreTrainedModel) -> None:
    """As PEFT does after merging: embeddings that became two are not said to be one."""
    if not getattr(final.config, "tie_word_embeddings", False):
        return
    first, last = final.get_input_embeddings(), final.get_output_embeddings()
    if first is not None and last is not None and first.weight is not last.weight:
        final.config.tie_word_embeddings = False


def _saved_name(name: str, tensor: torch.Tensor, final: PreTrainedModel) -> str:
    return next(iter(revert_weight_conversion(final, {name: tensor})))


def _converted(
    found: _Match, final: PreTrainedModel, loaded: torch.dtype, cast: torch.dtype | None, layers: dict[int, list[Layer]]
) -> Unit:
    parameters = {name: final.get_parameter_or_buffer(name) for name in found.parameters}
    written = _written_as(loaded, cast)
    shapes = {name: torch.empty(tensor.shape, dtype=written, device="meta") for name, tensor in parameters.items()}
    outputs = [
        Output(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in revert_weight_conversion(final, shapes).items()
    ]
    changed = dict.fromkeys(layer for tensor in parameters.values() for layer in layers.get(id(tensor), []))
    return Unit(found.parameters, found.stored, tuple(outputs), loaded, found.converter, found.patterns, tuple(changed))


def _shards(
    units: list[Unit], checkpoint: Checkpoint, max_shard_size: str | int | None
) -> dict[str, list[tuple[Unit, int]]]:
    """Tensors in the order of the base's files; new ones follow at the end."""
    of_name = {output.name: (unit, number) for unit in units for number, output in enumerate(unit.outputs)}
    # Most names are those on disk; what was saved without the prefix of a causal model gets it.
    renamed = {
        unit.stored[0].name: unit.outputs[0].name for unit in units if len(unit.stored) == len(unit.outputs) == 1
    }
    files = [[renamed.get(stored.name, stored.name) for stored in shard] for shard in checkpoint.shards.values()]
    files = [[name for name in names if name in of_name] for names in files]
    known = {name for names in files for name in names}
    files[-1] += [name for name in of_name if name not in known]
    if max_shard_size is not None:
        limit = parse_size_to_int(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        files = list(_cut([name for names in files for name in names], of_name, limit))
    files = [names for names in files if names]
    titles = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    titles = titles if len(files) > 1 else ["model.safetensors"]
    return {title: [of_name[name] for name in names] for title, names in zip(titles, files, strict=True)}


def _cut(names: list[str], of_name: dict[str, tuple[Unit, int]], limit: int) -> Iterator[list[str]]:
    """Runs of names whose tensors are together not larger than `limit` bytes; one that is larger is alone."""
    run: list[str] = []
    size = 0
    for name in names:
        unit, number = of_name[name]
        length = unit.outputs[number].bytes
        if run and size + length > limit:
            yield run
            run, size = [], 0
        run.append(name)
        size += length
    yield run
