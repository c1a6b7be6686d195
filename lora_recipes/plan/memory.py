"""Peak memory of a run by part, on one device: what is certain, what is expected, and what it may come to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from lora_recipes.model.machine import choose
from lora_recipes.model.pieces import (
    largest_piece,
    most_together,
    takes_flat,
    takes_functions,
    takes_own_loss,
    takes_pieces,
)
from lora_recipes.model.precision import cast_frozen
from lora_recipes.model.targets import expert_weights
from lora_recipes.plan.architecture import adapt, base_dtype, base_on_meta, layers_of, quantizable, set_adapter_dtype
from lora_recipes.plan.cards import Target
from lora_recipes.plan.quantized import as_quantized
from lora_recipes.plan.rehearsal import Loss, Rehearsal, Step
from lora_recipes.plan.storage import optimizer_bytes, tensor_bytes, weight_bytes
from lora_recipes.recipe import Recipe
from lora_recipes.recipe.defaults import DEVICE_BATCH, MAX_LENGTH

MIB = 2**20
# Bytes that a device holds once, and what an allocator holds beyond what is live as a share of what comes and goes:
# (name, expected, high), (expected, high). On CUDA, context with cuBLAS' workspaces and caching allocator: assumed, not
# measured, for want of a GPU. On a CPU, code and buffers of the libraries and C allocator: from benchmarks/memory.py.
ONCE = {"cuda": ("cuda_context", 500 * MIB, 900 * MIB), "cpu": ("runtime", 160 * MIB, 320 * MIB)}
FRAGMENTATION = {"cuda": (0.05, 0.15), "cpu": (0.0, 0.15)}
KEPT_FRAGMENTATION = (0.2, 0.45)  # on a CPU that keeps all activations (`machine.give_memory_back`)
MOST_ROWS = 1024
# The range that benchmarks/memory.py has held predictions against measurements in (docs/plan.md).
CHECKED_ROWS, CHECKED_LENGTH = 8, 1024


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `parts` add up to `expected`; `low` is what is certain whatever the rows are."""

    low: int
    expected: int
    high: int
    parts: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return {"low": self.low, "expected": self.expected, "high": self.high, "parts": self.parts}


class Estimate:
    """What a recipe needs on a target. Building it makes the model without weights; asking it rehearses a step.

    Args:
        recipe: with `lora` names that match (`model.targets.find_targets`).

    Raises:
        MachineError: the target cannot compute in the type that the recipe asks for.
    """

    def __init__(self, recipe: Recipe, config: PreTrainedConfig, target: Target) -> None:
        self.recipe, self.config, self.target = recipe, config, target
        self.choices = choose(recipe, gpu=target.gpu)
        training, quantization = self.choices.training, self.choices.quantization
        base = base_on_meta(recipe, config)
        self.weights = weight_bytes(base, quantization)
        self.base_parameters = sum(parameter.numel() for parameter in base.parameters())
        self.head_parameters = base.get_output_embeddings().weight.numel()
        self.expert_parameters = sum(parameter.numel() for parameter in expert_weights(base).values())
        self.dtype = base_dtype(recipe, config)
        quantized = bool(quantization)
        if quantized:
            as_quantized(base, quantizable(base, quantization.get("llm_int8_skip_modules")), quantization)
        model = adapt(recipe, base)
        self.bf16 = training.get("bf16") is not False and not training.get("fp16")  # unset and null mean true
        set_adapter_dtype(recipe, model, quantized=quantized, bf16=self.bf16)
        # What is loaded in float32 and cast then, in bytes.
        self.cast = 0 if target.gpu or not self.bf16 else cast_frozen(model)
        self.weights["kept"] -= self.cast
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        self._wide = {id(parameter) for module in embeddings for parameter in module.parameters()}
        layers = layers_of(model)
        self.largest_layer = max(tensor_bytes(layer.parameters()) for layer in layers)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        self.outside_layers = tensor_bytes(parameter for parameter in model.parameters() if id(parameter) not in inside)
        every = (training.get("activation_checkpointing_kwargs") or {}).get("every_n_layers", 1)
        self.rehearsal = Rehearsal(model, every)
        self._needs: dict[int, int] = {}  # high estimate by rows

    @property
    def memory_of_states(self) -> int:
        """Bytes of the optimizer's states, whole."""
        return optimizer_bytes(self.optimizer, self.trained, self._wide)[0]

    @property
    def optimizer(self) -> str:
        return self.choices.training.get("optim", "adamw_torch_fused")

    @property
    def rows(self) -> int:
        """Of one micro-batch."""
        return self.choices.training.get("per_device_train_batch_size", DEVICE_BATCH)

    @property
    def accumulation(self) -> int:
        return self.choices.training.get("gradient_accumulation_steps", 1)

    @property
    def length(self) -> int:
        """Of the longest row, in tokens."""
        found = self.choices.training.get("max_length", MAX_LENGTH)
        return found or getattr(self.config, "max_position_embeddings", None) or MAX_LENGTH

    def step(self) -> Step:
        """The recipe's own micro-batch, all rows as long as they may be."""
        training = self.choices.training
        packed = bool(training.get("packing") or training.get("padding_free")) and not self.cuts
        rows, length = self._held(self.rows, packed)
        return Step(
            rows=rows,
            length=length,
            loss=self._loss(),
            autocast=self._compute,
            checkpointing=dict(training.get("activation_checkpointing_kwargs") or {})
            if training.get("activation_checkpointing", True)
            else None,
            padded=self._pads(rows),
            packed=packed,
            accumulates=self.accumulation > 1 or (self.cuts and length < self.rows * self.length),
            flat=self.length if self._together else 0,
            fused=self.cuts and takes_functions(training),
        )

    def memory(self, step: Step | None = None) -> Memory:
        """Peak bytes of one device, in the recipe's own micro-batch or another."""
        step = step or self.step()
        certain = self._certain()
        peak = self.rehearsal.peak(step)
        moving = max(0, peak.step - (0 if step.accumulates else tensor_bytes(self.trained)))  # its gradients are whole
        head = min(peak.head, moving)
        evaluation = self._evaluation(step)
        parts = certain | {
            "activations": moving - head,
            "logits_and_loss": head,
            "evaluation": max(0, evaluation - moving),  # beyond training's own, which it comes after
        }
        parts |= self._sharing(certain)
        coming = parts["activations"] + parts["logits_and_loss"] + parts["evaluation"]
        loading = self._loading() - sum(certain.values()) - coming
        if loading > 0:
            parts["loading"] = loading
        name, once, once_high = ONCE[self.choices.device]
        keeps = step.checkpointing is None and self.target.gpu is None
        share, share_high = KEPT_FRAGMENTATION if keeps else FRAGMENTATION[self.choices.device]
        coming += certain["gradients"] if keeps else 0  # which come and go once a step
        parts |= {name: once, "fragmentation": int(share * coming)}
        expected = sum(parts.values())
        high = expected - parts["fragmentation"] + int(share_high * coming) + once_high - once
        return Memory(sum(certain.values()), expected, high, parts)

    def extrapolates(self) -> list[str]:
        """What of the step lies outside the range that predictions were held against measurements in."""
        found = []
        if self.rows > CHECKED_ROWS:
            found.append(f"{self.rows} rows a micro-batch: checked up to {CHECKED_ROWS}")
        if self.length > CHECKED_LENGTH:
            found.append(f"{self.length} tokens a row: checked up to {CHECKED_LENGTH}")
        if not optimizer_bytes(self.optimizer, [])[1]:
            found.append(f"optimizer {self.optimizer}: counted as AdamW")
        return found + self._not_planned()

    def _not_planned(self) -> list[str]:
        """Settings that change the memory and are not part of a rehearsal."""
        training = self.choices.training
        how = training.get("activation_checkpointing_kwargs") or {}
        asked = {
            "training.activation_offloading": training.get("activation_offloading"),
            "training.activation_checkpointing_kwargs.offload": how.get("offload"),
            "training.activation_checkpointing_kwargs.selective": how.get("selective"),
            "training.label_smoothing_factor": training.get("label_smoothing_factor"),
            "training.torch_compile": training.get("torch_compile"),
            "model.max_memory": self.recipe.get("model.max_memory"),
            "the checkpoint's own quantization": getattr(self.config, "quantization_config", None),
        }
        found = [f"{name}: not planned, counted as if it were not there" for name, value in asked.items() if value]
        if "flash" in str(self.recipe.get("model.attn_implementation")):
            found.append("model.attn_implementation: counted as sdpa, which holds a mask for padded or packed rows")
        return found

    def most_rows(self, limit: int | None = None) -> int:
        """The largest micro-batch whose high estimate fits, up to MOST_ROWS; 0 when not even one row fits.

        Args:
            limit: bytes of another device of the same kind.
        """
        found, limit = self._needs, limit or self.target.memory

        def needs(rows: int) -> int:
            if rows not in found:
                found[rows] = self.memory(self.with_rows(rows)).high
            return found[rows]

        if needs(1) > limit:
            return 0
        good, bad = 1, MOST_ROWS + 1
        while bad - good > 1:  # what a step holds is nearly a straight line in the rows: guess on it, then look
            near = [rows for rows in sorted(found) if rows <= good][-2:]
            low, high = (near[0], near[-1]) if len(near) > 1 else (good, good + 1)
            slope = max(1.0, (needs(high) - needs(low)) / (high - low))
            guess = good + int((limit - needs(good)) / slope)
            guess = min(max(guess, good + 1), bad - 1)
            good, bad = (guess, bad) if needs(guess) <= limit else (good, guess)
            if bad - good > 1 and bad in found:  # between two that are known the line is above the curve, or on it
                inside = good + int((limit - needs(good)) / ((needs(bad) - needs(good)) / (bad - good)))
                inside = min(max(inside, good + 1), bad - 1)
                good, bad = (inside, bad) if needs(inside) <= limit else (good, inside)
        return good

    def with_rows(self, rows: int) -> Step:
        """The recipe's step with another number of rows in a micro-batch."""
        step = self.step()
        rows, length = self._held(rows, step.packed)
        return replace(step, rows=rows, length=length, padded=self._pads(rows))

    @property
    def cuts(self) -> bool:
        """Whether micro-batches are computed in pieces."""
        return self.target.gpu is None and takes_pieces(self.choices.training, self.config)

    @cached_property
    def _together(self) -> int:
        """Tokens of a piece of several rows end to end; 0 where each row is a piece."""
        allowed = self.cuts and takes_flat(self.choices.training, self.recipe.section("lora"))
        return most_together(self._compute) if allowed and self.rehearsal.takes_rows(self._compute) else 0

    @property
    def _compute(self) -> torch.dtype | None:
        return torch.bfloat16 if self.bf16 or self.choices.training.get("fp16") else None

    def _loss(self) -> Loss:
        if self.target.gpu:
            return "triton"
        return "positions" if takes_own_loss(self.choices.training, self.config) else "fused"

    def _pads(self, rows: int) -> bool:
        """Whether attention is given a mask: `model.loss`'s path needs none."""
        return self._loss() != "positions" and rows > 1

    def _held(self, rows: int, packed: bool) -> tuple[int, int]:
        """(rows, tokens) that a micro-batch is computed in: one row of all where it is packed, on a CPU a piece of it."""
        if self.cuts:
            return 1, largest_piece(rows, self.length, self._together)
        return (1, self.length * rows) if packed else (rows, self.length)

    def _certain(self) -> dict[str, int]:
        """Bytes of weights, adapter, gradients and states on one device of however many."""
        trained = tensor_bytes(self.trained)
        lora = bool(self.recipe.section("lora"))
        states = self.memory_of_states
        weights = self.weights["quantized"] + self.weights["kept"] + self.weights["buffers"]
        parts = {
            "base_weights": weights,
            "adapter": trained if lora else 0,
            "gradients": trained,
            "optimizer_states": states,
        }
        count, sharding = self.target.gpus, self.target.sharding
        if sharding == "zero2":
            parts["gradients"] //= count
            parts["optimizer_states"] = self._with_masters(states) // count
        elif sharding == "zero3":
            parts = {name: size // count for name, size in parts.items()}
            parts["optimizer_states"] = self._with_masters(states) // count
            parts["base_weights"] = self._shared_weights(count)
        elif sharding == "fsdp2":
            if self._mixed():  # accelerate makes what is trained float32
                trained = sum(4 * parameter.numel() for parameter in self.trained)
                parts |= {"gradients": trained, "adapter": trained if lora else 0}
                parts["optimizer_states"] = optimizer_bytes(self.optimizer, map(_float32, self.trained))[0]
            parts = {name: size // count for name, size in parts.items()}
            parts["base_weights"] = self._shared_weights(count)
        elif sharding == "layers":  # `device_map: auto`: each device holds its share of the layers, and all of theirs
            parts = {name: size // count for name, size in parts.items()}
        return parts

    def _mixed(self) -> bool:
        return self.bf16 or bool(self.choices.training.get("fp16"))

    def _with_masters(self, states: int) -> int:
        """DeepSpeed's 16-bit engines keep float32 copies of what is trained, and float32 states."""
        if not self._mixed():
            return states
        masters = sum(4 * parameter.numel() for parameter in self.trained)
        return masters + optimizer_bytes(self.optimizer, map(_float32, self.trained))[0]

    def _shared_weights(self, count: int) -> int:
        """Weights of which each device holds a share; packed 4-bit ones are shared only when stored in a float type."""
        storage = self.choices.quantization.get("bnb_4bit_quant_storage") or "uint8"
        whole = self.weights["quantized"] if storage in ("uint8", "int8") else 0
        rest = self.weights["quantized"] - whole + self.weights["kept"]
        if not self.recipe.section("lora") and self.target.sharding == "fsdp2" and self._mixed():
            rest = 4 * self.base_parameters
        return whole + rest // count + self.weights["buffers"]

    def _sharing(self, certain: Mapping[str, int]) -> dict[str, int]:
        """What sharing itself takes: DDP's buckets are copies of the gradients; the sharded gather layer after layer."""
        if self.target.sharding == "ddp":
            return {"communication": certain["gradients"]}
        if self.target.sharding in ("fsdp2", "zero3"):
            # The layer that computes and the next; what lies outside the layers is gathered for the whole pass.
            return {"communication": 2 * self.largest_layer + self.outside_layers}
        if self.target.sharding == "layers":
            return {"communication": self.largest_layer}  # layers are not cut: a device may hold one more
        if self.target.sharding == "zero2":
            hidden = getattr(self.config.get_text_config(), "hidden_size", 4096)
            return {"communication": 2 * hidden * hidden * 2}  # two buckets of hidden x hidden 16-bit values ("auto")
        return {}

    def _loading(self) -> int:
        """What a CPU holds before weights are in the type they are trained in: float32 ones that are cast; or where they are
        quantized the mapped file, and what is made of it (benchmarks/memory.py)."""
        if self.target.gpu or not self.weights["quantized"]:
            return max(0, self.cast) and sum(self.weights.values()) + self.cast
        stored = getattr(torch, str(self.config.dtype or torch.float32).removeprefix("torch."))
        return self.base_parameters * stored.itemsize + self.weights["quantized"]

    def _evaluation(self, step: Step) -> int:
        training = self.choices.training
        if training.get("eval_strategy", "no") == "no" and not training.get("eval_on_start"):
            return 0
        rows = training.get("per_device_eval_batch_size", DEVICE_BATCH)
        rows, length = self._held(rows, packed=False)
        return self.rehearsal.evaluation_peak(replace(step, rows=rows, length=length, packed=False, padded=False))


def _float32(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device="meta")
