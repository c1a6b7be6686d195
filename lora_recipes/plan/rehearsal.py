"""One training step on tensors without memory: what it would hold at its peak, beside weights and optimizer states."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import moe

from lora_recipes.model.attention import Rows, attending, hands_on_rows
from lora_recipes.model.fused import computing, fused
from lora_recipes.model.loss import ends_at_head, given_only, head_loss, token_loss
from lora_recipes.plan.architecture import layers_of
from lora_recipes.plan.quantized import open_weight
from lora_recipes.plan.tracker import LiveTensors

# Tiles of TRL's fused loss: tokens x vocabulary (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768

# How a step gets from hidden states to its loss: through logits at the scored positions only (model/loss.py), or through
# TRL's fused head, which where there is no Triton scores every position, masked or not.
Loss = Literal["positions", "fused", "triton"]


@dataclass(frozen=True)
class Step:
    """What decides how much a step holds.

    Attributes:
        rows, length: of one micro-batch, in tokens with their padding.
        scored: share of the positions that have a loss.
        loss: how it is computed.
        autocast: type of the computation; None computes in the weights' own.
        checkpointing: keyword arguments of activation checkpointing; None keeps all activations.
        padded: rows of one micro-batch differ in length, so that attention needs a mask.
        packed: documents in one row are kept apart by a mask.
        accumulates: gradients of earlier micro-batches are there already.
        flat: tokens of each of the rows that lie end to end in the one row, as a CPU computes them; 0 where none do.
        fused: functions of our own stand for layers, as on a CPU (`model.fused`).
    """

    rows: int
    length: int
    scored: float = 1.0
    loss: Loss = "positions"
    autocast: torch.dtype | None = None
    checkpointing: dict[str, Any] | None = field(default_factory=dict)
    padded: bool = False
    packed: bool = False
    accumulates: bool = False
    flat: int = 0
    fused: bool = False

    def rows_inside(self) -> Rows:
        """Where rows that lie end to end do so, none of which shares its beginning."""
        return _OneBlock(0, (*range(self.flat, self.length, self.flat), self.length))


class _OneBlock(Rows):
    """Rows of which attention computes only the largest block of the longest: the others hold less, one after the other."""

    def spans(self) -> Iterator[tuple[int, int, int]]:
        yield max(super().spans(), key=lambda span: span[1] - span[0])

    def blocks(self, span: tuple[int, int, int], window: int | None) -> Iterator[Any]:
        yield list(super().blocks(span, window))[-1]


@dataclass(frozen=True)
class Peak:
    """Bytes beyond weights and optimizer states: at the peak of a step, and what of it head and loss add."""

    step: int
    head: int


class Rehearsal:
    """A model without weights that can be stepped. Decoder layers that are alike run once and count as often as they are.

    Args:
        model: on the meta device, with its adapter; it is taken over and cut to the layers that differ.
        every: of so many layers one is checkpointed, where any is (`every_n_layers`).
    """

    def __init__(self, model: PreTrainedModel | PeftModel, every: int = 1) -> None:
        self.model = model
        self.base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        layers = layers_of(self.base)
        kinds = [(*_kind(layer, index, self.base.config), index % every == 0) for index, layer in enumerate(layers)]
        kept = _distinct(kinds)
        # For each layer of the whole model: the kept one that stands for it. The first has no input with a gradient.
        self.order = [0] + [kinds.index(kind, 1) for kind in kinds[1:]]
        del layers[kept:]
        self.kept = layers
        self._marked: LiveTensors | None = None
        self._at_head = False
        for index, layer in enumerate(layers):
            _between_marks(layer, index, self._mark)
        self.fused = fused(self.base, open_weight)
        with self.mode:
            _without_memory(model)

    def takes_rows(self, autocast: torch.dtype | None) -> bool:
        """Whether its layers take rows that lie end to end; what they make of them no model without weights can tell."""
        with self.mode, _as_in_training(Step(1, 1, autocast=autocast)):
            return hands_on_rows(self.base, len(self.kept), autocast)

    def _try_head(self, step: Step) -> None:
        """Whether the head computes the loss at once, as in training."""
        with self.mode, _as_in_training(Step(1, 1, autocast=step.autocast)):
            self._at_head = step.loss == "positions" and ends_at_head(self.base, step.autocast)

    def peak(self, step: Step) -> Peak:
        """Run one micro-batch forward and backward."""
        self._try_head(step)
        with self.mode, _as_in_training(step), self._computing(step), LiveTensors() as tracker:
            self._prepare(step)
            tracker.ignore([*self.model.parameters(), *self.model.buffers()])
            for parameter in self.model.parameters():
                parameter.grad = torch.empty_like(parameter) if step.accumulates and parameter.requires_grad else None
                if parameter.grad is not None:
                    tracker.ignore([parameter.grad])
            start = len(tracker.events)
            self._marked = tracker
            loss = self._loss(step)
            loss.backward()
            del loss
            self._marked = None
            for parameter in self.model.parameters():
                parameter.grad = None
        return self._unrolled(tracker, start)

    def evaluation_peak(self, step: Step) -> int:
        """Bytes that a micro-batch without gradients holds at its peak."""
        self._try_head(step)
        with self.mode, _as_in_training(step), self._computing(step), torch.no_grad(), LiveTensors() as tracker:
            self.model.eval()
            tracker.ignore([*self.model.parameters(), *self.model.buffers()])
            self._loss(step)
        return tracker.peak

    @contextmanager
    def _computing(self, step: Step) -> Iterator[None]:
        with attending(self.base) if step.flat else nullcontext(), computing(self.fused if step.fused else {}):
            yield

    def _mark(self, label: tuple[str, int]) -> None:
        if self._marked is not None:
            self._marked.mark(label)

    def _prepare(self, step: Step) -> None:
        self.base.gradient_checkpointing_disable()
        if step.checkpointing is not None:
            keywords = {"use_reentrant": False} | step.checkpointing | {"preserve_rng_state": False}
            keywords.pop("offload", None)  # not rehearsed, and said so (`Estimate.extrapolates`)
            every = keywords.pop("every_n_layers", 1)
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords, every_n_layers=every)
            if self.model is not self.base:
                self.base.enable_input_require_grads()
        self.model.train()

    def _trunk(self, step: Step) -> torch.Tensor:
        mask = torch.ones((step.rows, step.length), dtype=torch.long) if step.padded else None
        inputs = torch.zeros((step.rows, step.length), dtype=torch.long)
        return self.base.base_model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state

    def _loss(self, step: Step) -> torch.Tensor:
        count = max(1, round(step.scored * step.rows * (step.length - 1)))
        if step.loss == "positions":
            return self._loss_at_positions(step, count)
        hidden = self._trunk(step)[:, :-1]
        head = self.base.get_output_embeddings()
        if step.loss == "triton":
            return -_TiledLoss.apply(_picked(hidden, count), head.weight).sum() / count
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        hidden = hidden.flatten(0, 1)
        targets = torch.zeros(hidden.shape[0], dtype=torch.long)
        outputs = ("log_probs", "entropy", "is_top1")
        found = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, targets, 1.0, TILE_VOCABULARY, None, 1.0, outputs
        )
        return -found[0].sum() / count

    def _loss_at_positions(self, step: Step, count: int) -> torch.Tensor:
        """The loss that `lora_recipes.train.trainer` computes on a CPU: logits at `count` positions only."""
        head, targets = self.base.get_output_embeddings(), torch.zeros(count, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": torch.zeros((step.rows, step.length), dtype=torch.long)}
        if step.flat:
            inputs |= {"position_ids": torch.zeros_like(inputs["input_ids"]), "rows": step.rows_inside()}

        def scored(hidden: torch.Tensor) -> torch.Tensor:
            return _picked(hidden[:, :-1], count)

        if self._at_head:

            def loss_of(hidden: torch.Tensor) -> torch.Tensor:
                return head_loss(head, scored(hidden), targets, count)[0]

            with computing({head: loss_of}):
                return self.model(**inputs, use_cache=False).logits
        with given_only(head, scored):
            # accelerate's autocast ends with the model, whose outputs it makes float32
            logits = self.model(**inputs, use_cache=False).logits.float()
        with torch.autocast("cpu", enabled=False):
            loss, _ = token_loss(logits, targets, count)
        return loss

    def _unrolled(self, tracker: LiveTensors, start: int) -> Peak:
        segments = _segments(tracker, start, len(self.kept))
        before, head, after = (segments.get((what, 0), []) for what in ("begin", "head", "end"))
        forward = [segments.get(("forward", index), []) for index in self.order]
        backward = [segments.get(("backward", index), []) for index in reversed(self.order)]
        whole = _highest([before, *forward, head, *backward, after])
        return Peak(whole, whole - _highest([before, *forward, [sum(head)], *backward, after]))


def _kind(layer: torch.nn.Module, index: int, config: Any) -> tuple[Any, ...]:
    """What makes two layers hold the same: their modules and shapes, and the type that the config gives them."""
    shapes = tuple((name, tuple(value.shape)) for name, value in layer.named_parameters())
    types = getattr(config, "layer_types", None)
    return (shapes, types[index] if types and index < len(types) else None)


def _distinct(kinds: list[tuple[Any, ...]]) -> int:
    """How many of the first layers hold each kind at least once after the very first one, and two at least."""
    needed = set(kinds[1:])
    for count in range(min(3, len(kinds)), len(kinds) + 1):
        if needed <= set(kinds[1:count]):
            return count
    return len(kinds)


class _Mark(torch.autograd.Function):
    """An identity that says when the run passes it, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, mark: Callable[[Any], None], ahead: Any, back: Any) -> torch.Tensor:
        ctx.mark, ctx.back = mark, back
        mark(ahead)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.mark(ctx.back)
        return grad, None, None, None


def _between_marks(layer: torch.nn.Module, index: int, mark: Callable[[Any], None]) -> None:
    kind = type(layer)

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        hidden = _Mark.apply(hidden, mark, ("forward", index), ("before", index))
        result = kind.__call__(self, hidden, *args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        first = _Mark.apply(first, mark, ("after", index), ("backward", index))
        return (first, *result[1:]) if isinstance(result, tuple) else first

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "forward": kind.forward})


def _segments(tracker: LiveTensors, start: int, kept: int) -> dict[tuple[str, int], list[int]]:
    """Events by what ran: ("begin", 0), ("forward", i) of kept layer i, ("head", 0), ("backward", i), ("end", 0).

    What lies between two layers belongs to the one before it.
    """
    found: dict[tuple[str, int], list[int]] = {}
    marks = [(("begin", 0), start), *tracker.marks, (("end", 0), len(tracker.events))]
    for (label, position), (_, end) in pairwise(marks):
        what, index = label
        if what == "after":
            label = ("forward", index) if index + 1 < kept else ("head", 0)
        elif what == "before":
            label = ("backward", index) if index else ("end", 0)
        found.setdefault(label, []).extend(tracker.events[position:end])
    return found


def _highest(segments: list[list[int]]) -> int:
    live = peak = 0
    for events in segments:
        for size in events:
            live += size
            peak = max(peak, live)
    return peak


def _picked(hidden: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the positions, copied together as a boolean mask does: [rows, length, width] -> [count, width]."""
    row, column = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    return hidden[row, column]


class _TiledLoss(torch.autograd.Function):
    """What TRL's fused loss holds where there is Triton: one tile of logits, float32 sums, a float32 gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight)
        ctx.compute = compute
        sums = [torch.zeros(hidden.shape[0], dtype=torch.float32) for _ in range(7)]
        tile = torch.empty(_tile(hidden, weight), dtype=compute)
        for start in range(0, hidden.shape[0], TILE_TOKENS):
            part = hidden[start : start + TILE_TOKENS].to(compute)
            shown = weight[:TILE_VOCABULARY].to(compute)
        del tile, part, shown
        return sums[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        for_hidden = torch.zeros(hidden.shape, dtype=torch.float32)
        for_weight = torch.zeros(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = torch.empty(_tile(hidden, weight), dtype=ctx.compute)
        part, shown = hidden[:TILE_TOKENS].to(ctx.compute), weight[:TILE_VOCABULARY].to(ctx.compute)
        del tile, part, shown
        return for_hidden.to(hidden.dtype), None if for_weight is None else for_weight.to(weight.dtype)


def _tile(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    return min(hidden.shape[0], TILE_TOKENS), TILE_VOCABULARY


def _without_memory(model: torch.nn.Module) -> None:
    """Meta tensors become fake CPU tensors, which choose the kernels that real ones would; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _as_in_training(step: Step) -> Iterator[None]:
    """Autocast as asked; no packing mask where nothing is packed (transformers assumes one when it sees fake tensors).

    Experts in float32 take transformers' own operator: torch's multiplies float32, but without memory it does bf16 only.
    """
    found, groups = masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm
    if not step.packed:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    moe._can_use_grouped_mm = lambda *given: given[1].dtype == torch.bfloat16 and groups(*given)
    around: AbstractContextManager[Any] = torch.autocast("cpu", step.autocast) if step.autocast else nullcontext()
    try:
        with warnings.catch_warnings(), around:
            warnings.simplefilter("ignore")
            yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm = found, groups
