"""Which models this project writes as GGUF itself, and what llama.cpp must know of them beside their weights."""

from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# model_type → architecture of llama.cpp. SmolLM is a llama; Mistral differs from it by its window alone.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}


class NotBuiltIn(Exception):
    """This project does not convert such a model; the text says why. A converter of llama.cpp may."""


def architecture_of(config: PreTrainedConfig) -> gguf.MODEL_ARCH:
    """The architecture of llama.cpp that computes what this model does. Raises NotBuiltIn where none is known to."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise NotBuiltIn(f"the model type {config.model_type!r} is not among those that are built in ({known})")
    if config.hidden_act != "silu":
        raise NotBuiltIn(f"hidden_act {config.hidden_act!r}: llama.cpp computes silu for {config.model_type}")
    if config.model_type.startswith("qwen") and getattr(config, "use_sliding_window", False):
        raise NotBuiltIn("use_sliding_window: llama.cpp attends to everything in this architecture")
    if config.model_type == "qwen3" and config.attention_bias:
        raise NotBuiltIn("attention_bias: llama.cpp has no biases in qwen3")
    if rotated(config) != head_dim(config):
        raise NotBuiltIn("partial_rotary_factor: only whole heads are rotated by the architectures that are built in")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        raise NotBuiltIn(f"rope_type {rope['rope_type']!r}")
    if rope.get("rope_type") == "yarn" and (
        odd := {key for key, value in rope.items() if value is not None} - YARN_KEYS
    ):
        raise NotBuiltIn(f"yarn with {', '.join(sorted(odd))}")
    return ARCHITECTURES[config.model_type]


def head_dim(config: PreTrainedConfig) -> int:
    """Numbers of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotated(config: PreTrainedConfig) -> int:
    """Numbers of a head that carry the position."""
    return int(head_dim(config) * (config.rope_parameters.get("partial_rotary_factor") or 1.0))


def add_hyperparameters(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> list[str]:
    """Write the numbers of the architecture. Returns what a user should know of them."""
    notes = []
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window and window < context:
        notes.append(
            f"the context is given as {window}, the model's sliding window (max_position_embeddings: {context}): "
            "llama.cpp has no window in this architecture, and within it both are the same"
        )
        context = window
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(rotated(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or context)
    return notes


def rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """What each rotary frequency is divided by under Llama 3's scaling: [head_dim / 2], float32; None without it.

    They are read off transformers' own frequencies, so both rotate by the same angles.
    """
    rope: dict[str, Any] = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, rotated(config), 2, dtype=torch.float32) / rotated(config)
    return (1.0 / rope["rope_theta"] ** exponents / scaled).numpy().astype(np.float32)


def interleaves(arch: gguf.MODEL_ARCH) -> bool:
    """Whether llama.cpp rotates neighbouring numbers of a head, where transformers rotates its two halves."""
    return bool(arch == gguf.MODEL_ARCH.LLAMA)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection ([heads * head_dim, ...]) in the order that `interleaves` asks for.

    Row i of a head's first half and row i of its second are rotated together, and become neighbours.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
