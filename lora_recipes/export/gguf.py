"""Writes a model folder as one GGUF file, tensor by tensor, and reads every tensor back."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lora_recipes.errors import RefusedError
from lora_recipes.export.architecture import (
    add_hyperparameters,
    architecture_of,
    interleaved,
    interleaves,
    rope_factors,
)
from lora_recipes.export.tokenizer import Vocabulary

BLOCK = 1 << 22  # numbers that are converted at a time, which bounds the memory beside the tensor itself
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# Largest |written - weight| that rounding explains: a share of the weight, and for Q8_0 of the largest in its block of
# 32 (half a step of 127, and the scale itself in 16 bits). F16 has no exponents below its subnormals.
ROUNDING = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-10}
SUBNORMAL = 2.0**-25


@dataclass(frozen=True)
class Weight:
    """A tensor of the model and what becomes of it. `heads` is set where its rows are put into another order."""

    source: str
    file: Path
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    heads: int | None = None


def write_gguf(
    folder: Path,
    path: Path,
    outtype: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    expected: set[str],
    title: str,
) -> dict[str, Any]:
    """Write the model in `folder` to `path`.

    Args:
        outtype: a key of TYPES.
        expected: names of the model's own state, which must all be there.
        title: the model's name, as engines show it.

    Returns:
        {"tensors": how many, "notes": what a user should know}.

    Raises:
        NotBuiltIn: of an architecture or a tokenizer that this project does not convert.
        RefusedError: a tensor is missing, unknown, too large for `outtype`, or not what was written.
    """
    arch = architecture_of(config)
    vocabulary = Vocabulary.of(tokenizer, config, generation)
    weights = plan(folder, config, arch, outtype, expected)
    factors = rope_factors(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    notes = add_hyperparameters(writer, config)
    writer.add_file_type(TYPES[outtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.add_to(writer)
    for weight in weights:
        size = int(np.prod(quant_shape_to_byte_shape(weight.shape, weight.kind)))
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), size, raw_dtype=weight.kind)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Shards() as shards:
        for weight in weights:
            writer.write_tensor_data(_encoded(weight, shards))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        _require_written(path, weights, shards)
    kept = sorted({weight.kind.name for weight in weights if len(weight.shape) > 1} - {TYPES[outtype][0].name})
    if kept:
        notes.append(f"rows of some tensors do not divide into blocks of 32; these are {', '.join(kept)}")
    return {"tensors": len(weights) + (factors is not None), "notes": [*notes, *vocabulary.notes]}


class Shards(ExitStack):
    """The safetensors files of a model, each opened once and mapped, not read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[Path, Any] = {}

    def of(self, file: Path) -> Any:
        if file not in self.open:
            self.open[file] = self.enter_context(safe_open(file, framework="pt"))
        return self.open[file]


def plan(
    folder: Path, config: PreTrainedConfig, arch: gguf.MODEL_ARCH, outtype: str, expected: set[str]
) -> list[Weight]:
    """Every tensor of the folder under its GGUF name. Raises RefusedError for one that is missing or unknown."""
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaves(arch) else {}
    found: dict[str, Weight] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for source in tensors.keys():  # noqa: SIM118 - not a dict
                if source.endswith("rotary_emb.inv_freq"):  # computed from the numbers; old checkpoints hold it
                    continue
                name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if name is None or source not in expected:
                    raise RefusedError(f"{file}: {source} is no tensor of this architecture; nothing was written")
                shape = tuple(tensors.get_slice(source).get_shape())
                heads = permuted.get(source.split(".")[-2])
                found[source] = Weight(source, file, name, shape, _kind(shape, outtype), heads)
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and embedding and _equal(head, embedding):
        del found["lm_head.weight"]  # llama.cpp takes the embedding where there is no output.weight
    if config.tie_word_embeddings:
        expected = expected - {"lm_head.weight"}
    if missing := sorted(expected - found.keys()):
        raise RefusedError(f"{folder}: {missing[0]} is missing ({len(missing)} tensors are); nothing was written")
    return sorted(found.values(), key=lambda weight: (weight.file, weight.source))


def _kind(shape: tuple[int, ...], outtype: str) -> gguf.GGMLQuantizationType:
    """Norms and biases stay in 32 bits, and a row that does not divide into blocks in 16."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    kind = TYPES[outtype][0]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _equal(first: Weight, second: Weight) -> bool:
    with Shards() as shards:
        pairs = zip(_blocks(first, shards), _blocks(second, shards), strict=True)
        return first.shape == second.shape and all(np.array_equal(one, other) for one, other in pairs)


def _blocks(weight: Weight, shards: Shards) -> Iterator[np.ndarray]:
    """The tensor in float32, some rows at a time, in the order that is written."""
    if weight.heads:
        whole = interleaved(shards.of(weight.file).get_tensor(weight.source), weight.heads)
    else:
        whole = shards.of(weight.file).get_slice(weight.source)
    rows = weight.shape[0]
    step = max(1, BLOCK // max(1, int(np.prod(weight.shape[1:]))))
    for start in range(0, rows, step):
        yield whole[start : start + step].float().contiguous().numpy()


def _encoded(weight: Weight, shards: Shards) -> np.ndarray:
    """The tensor's bytes as the file holds them."""
    out = np.empty(int(np.prod(quant_shape_to_byte_shape(weight.shape, weight.kind))), np.uint8)
    position = 0
    for block in _blocks(weight, shards):
        with np.errstate(over="ignore"):
            data = quantize(block, weight.kind)
        if weight.kind.name in ("F16", "Q8_0") and not np.isfinite(_read(data, weight.kind)).all():
            raise RefusedError(
                f"{weight.file}: {weight.source} holds numbers that {weight.kind.name} cannot (up to "
                f"{np.abs(block).max():.3g}); nothing was written. Set export.outtype to bf16 or f32"
            )
        data = data.reshape(-1).view(np.uint8)
        out[position : position + data.size] = data
        position += data.size
    return out


def _read(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    return data if data.dtype in (np.float16, np.float32) else dequantize(data, kind)


def _require_written(path: Path, weights: list[Weight], shards: Shards) -> None:
    """Read the file back: every tensor is there, and differs from the model's by rounding alone."""
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for weight in weights:
        tensor = written[weight.name]
        rows = tensor.data.reshape(weight.shape[0], -1) if len(weight.shape) > 1 else tensor.data
        start = 0
        for block in _blocks(weight, shards):
            there = dequantize(rows[start : start + len(block)], weight.kind).reshape(block.shape)
            start += len(block)
            if not _rounded(block, there, weight.kind.name):
                raise RefusedError(f"{path.name}: {weight.name} is not {weight.source}; nothing was published")


def _rounded(block: np.ndarray, there: np.ndarray, kind: str) -> bool:
    """NaN fails the comparison."""
    scale = np.abs(block)
    if kind == "Q8_0":
        scale = scale.reshape(-1, 32).max(-1, keepdims=True).repeat(32, -1).reshape(block.shape)
    allowed = scale * ROUNDING[kind] + (0 if kind in ("F32", "BF16") else SUBNORMAL)
    return bool((np.abs(block - there) <= allowed).all())
