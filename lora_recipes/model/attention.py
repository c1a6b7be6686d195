"""Causal attention on a CPU of rows that lie end to end, behind a beginning that they share: in blocks of matrix products."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from lora_recipes.model.precision import computing_in

NAME = "rows_end_to_end"
BLOCK = 96  # tokens whose scores are computed at a time: fewer are slower products, more are scores that nobody needs
LAYERS = {"full_attention", "sliding_attention"}  # of a config's `layer_types`
LOW = (torch.float32, torch.bfloat16, torch.float16)
UNHEEDED = {"position_ids", "cache_position"}  # tensors that models hand on, and that `rows` says already
# Errors of the trial, over what its context does to a token: rounding is far below, any other rule of who sees whom above.
MOST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass
class Rows:
    """Where the rows of one flat sequence lie, and memory that the layers of its step use in turn.

    Memory that is mapped anew costs more than what is computed in it.

    Attributes:
        shared: tokens of the sequence's beginning, which is every row's beginning.
        ends: where the rest of each row ends; the first begins behind what is shared.
        layers: that have attended so far.
    """

    shared: int
    ends: tuple[int, ...]
    layers: int = field(default=0, init=False)
    _floats: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)
    _later: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(first, end, tokens before it that are of its row too) of what is shared, then of each row's rest."""
        if self.shared:
            yield 0, self.shared, 0
        first = self.shared
        for end in self.ends:
            yield first, end, self.shared
            first = end

    def blocks(self, span: tuple[int, int, int], window: int | None) -> Iterator["_Block"]:
        """The span in parts of about equal length, the last of which sees most."""
        first, end, before = span
        count = max(1, round((end - first) / BLOCK))
        cuts = [first + (end - first) * number // count for number in range(count + 1)]
        for at, to in pairwise(cuts):
            place = before + at - first
            oldest = max(0, place - window + 1) if window else 0
            yield _Block(at, to, place, window, slice(oldest, place + to - at))

    def reserve(self, heads: int) -> None:
        """Make room for the largest block of scores of a layer without a window, four times: a later one may have none."""
        blocks = (block for span in self.spans() for block in self.blocks(span, None))
        size = heads * max((one.end - one.first) * (one.columns.stop - one.columns.start) for one in blocks)
        if not self._floats or self._floats[0].numel() < size:
            self._floats = [torch.empty(size) for _ in range(4)]

    def room(self, number: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One of the four, in a shape, with whatever stands there."""
        size = torch.Size(shape).numel()
        return self._floats[number].view(dtype)[:size].view(shape)

    def later(self, count: int, group: int) -> torch.Tensor:
        """[tokens x group, tokens]: minus infinity where a token would see a later one, else 0."""
        if (count, group) not in self._later:
            self._later[count, group] = _hidden(torch.ones(count, count, dtype=torch.bool).triu_(1), group)
        return self._later[count, group]


@contextmanager
def attending(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the model takes flat sequences, of which `rows` says who sees whom; backward must be in it too."""
    AttentionInterface.register(NAME, attend)
    config = model.config.get_text_config()
    usual, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


def hands_on_rows(model: PreTrainedModel, layers: int, autocast: torch.dtype | None) -> bool:
    """Whether every layer of this model attends as `attend` does, when it is trained. No values are looked at.

    Args:
        layers: how many it has.
        autocast: type that it computes in, where not its weights' own.
    """
    config = model.config.get_text_config()
    usual = getattr(config, "_attn_implementation", None)
    if usual != "sdpa" or set(getattr(config, "layer_types", None) or LAYERS) - LAYERS:
        return False
    rows, trains = Rows(1, (2, 3)), model.training
    model.train()  # attention's dropout is there only in training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), attending(model), computing_in(autocast):
            places = torch.tensor([[0, 1, 1]])
            model(input_ids=torch.ones_like(places), position_ids=places, rows=rows, use_cache=False)
    except Exception:  # a model's own code may stumble in any way over what it does not know; it trains without
        return False
    finally:
        model.train(trains)
    return rows.layers == layers


def takes_rows(model: PreTrainedModel, autocast: torch.dtype | None) -> bool:
    """Whether this model computes of rows that lie end to end what it computes of each by itself: by trying it.

    Not so where a layer keeps a state from token to token or asks for more than `attend` does, or where the model's code
    does not hand on what it is given. The random state stays as it is.

    Args:
        model: with its adapter, if any.
        autocast: type that it computes in, where not its weights' own.
    """
    config = model.config.get_text_config()
    if not hands_on_rows(model, getattr(config, "num_hidden_layers", 0), autocast):
        return False
    ids = torch.arange(1, 13) * config.vocab_size // 14  # ordinary tokens: those that steer a chat stand at either end
    first, second = ids[:8], torch.cat((ids[:3], ids[8:]))
    places = torch.tensor([[*range(8), *range(3, 7)]])
    trains = model.training

    def logits(**inputs: Any) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits

    try:
        model.eval()
        with torch.no_grad(), computing_in(autocast):
            with attending(model):
                found = logits(input_ids=ids[None], position_ids=places, rows=Rows(3, (8, 12)))[0]
            wanted = torch.cat((logits(input_ids=first[None])[0], logits(input_ids=second[None])[0, 3:]))
            alone = logits(input_ids=ids[:, None])[:, 0]
    finally:
        model.train(trains)
    most = MOST_ERROR[autocast or found.dtype]
    error, effect = (found.float() - wanted.float()).norm(dim=-1), (alone.float() - wanted.float()).norm(dim=-1)
    return bool(error.max() < most * effect.median())


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    rows: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for one flat sequence.

    Args:
        query: [1, heads, tokens, size of a head]; key and value: [1, key heads, tokens, size].
        attention_mask: none: `rows` says who sees whom.

    Returns:
        [1, tokens, heads, size].

    Raises:
        NotImplementedError: the layer asks for more than causal attention with a window.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if dropout or not causal or softcap is not None or attention_mask is not None:
        raise NotImplementedError("attention with dropout, a cap, or a mask of the model's own")
    if more := {name for name, value in others.items() if isinstance(value, torch.Tensor)} - UNHEEDED:
        raise NotImplementedError(f"attention with {', '.join(sorted(more))}")  # sinks, a bias, chosen keys
    if sliding_window is None and _slides(module):
        raise NotImplementedError("a window that is only in the mask")
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if low not in LOW:
        raise NotImplementedError(f"attention in {low}")
    rows.layers += 1
    with torch.autocast("cpu", enabled=False):
        out = _Attention.apply(query[0], key[0], value[0], rows, scale, sliding_window, low)
    return out[None], None


def _slides(module: torch.nn.Module) -> bool:
    """Whether the model's config gives this layer a window."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    index = getattr(module, "layer_idx", None)
    return index is not None and index < len(types) and types[index] == "sliding_attention"


class _Attention(torch.autograd.Function):
    """Scores are computed from values of the low type and kept in float32; other products are of the low type.

    The heads that share a key lie beside each other as further rows of one product: [key heads, tokens x heads a key, size].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: Rows,
        scale: float,
        window: int | None,
        low: torch.dtype,
    ) -> torch.Tensor:
        heads, tokens, _ = query.shape
        group = heads // len(key)
        q, k, v = _by_key(query, group, low), key.to(low).contiguous(), value.to(low).contiguous()
        out = torch.empty(tokens, heads, v.shape[-1], dtype=low)
        exact_q, exact_k = q.float(), k.float()
        rows.reserve(heads)
        for span in rows.spans():
            keys, values = _seen(exact_k, span), _seen(v, span)
            for block in rows.blocks(span, window):
                own = slice(block.first * group, block.end * group)
                chance = _chances(rows, exact_q[:, own], keys[:, block.columns], scale, block, group)
                part = torch.bmm(_to(low, chance, rows), values[:, block.columns])
                _tokens_first(out, block, len(k)).copy_(part.view(len(k), -1, group, v.shape[-1]))
        ctx.save_for_backward(q, k, v)
        ctx.rows, ctx.scale, ctx.window, ctx.group = rows, scale, window, group
        ctx.types = query.dtype, key.dtype, value.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        rows, scale, group, low = ctx.rows, ctx.scale, ctx.group, q.dtype
        grad = _by_key(grad.transpose(0, 1), group, low)
        exact_q, exact_k, exact_v, exact_grad = q.float(), k.float(), v.float(), grad.float()
        tokens, heads = k.shape[1], len(k) * group
        of_q = torch.empty(tokens, heads, q.shape[-1], dtype=ctx.types[0])
        of_k, of_v = torch.zeros_like(exact_k), torch.zeros_like(exact_v)
        for span in rows.spans():
            keys, low_keys, values = _seen(exact_k, span), _seen(k, span), _seen(exact_v, span)
            slope_k, slope_v = torch.zeros_like(keys), torch.zeros_like(values)
            for block in rows.blocks(span, ctx.window):
                own, seen = slice(block.first * group, block.end * group), block.columns
                chance = _chances(rows, exact_q[:, own], keys[:, seen], scale, block, group)
                of_chance, of_scores = (rows.room(number, chance.shape) for number in (0, 2))
                torch.bmm(exact_grad[:, own], values[:, seen].mT, out=of_chance)
                torch._softmax_backward_data(of_chance, chance, -1, torch.float32, grad_input=of_scores)
                slope_v[:, seen] += torch.bmm(_to(low, chance, rows).mT, grad[:, own])
                slope = _to(low, of_scores, rows)
                slope_k[:, seen] += torch.bmm(slope.mT, q[:, own])
                part = torch.bmm(slope, low_keys[:, seen])
                _tokens_first(of_q, block, len(k)).copy_(part.view(len(k), -1, group, q.shape[-1]))
            first, end, shared = span
            for whole, part in ((of_k, slope_k), (of_v, slope_v)):
                whole[:, first:end] += part[:, shared:]
                whole[:, :shared] += part[:, :shared]
        of_q = of_q.mul_(scale).transpose(0, 1)
        return of_q, of_k.mul_(scale).to(ctx.types[1]), of_v.to(ctx.types[2]), None, None, None, None


@dataclass(frozen=True)
class _Block:
    """Tokens first to end of the sequence, which see `columns` of their row.

    Attributes:
        place: of the first token in its row.
        window: tokens that one sees, itself included.
    """

    first: int
    end: int
    place: int
    window: int | None
    columns: slice


def _chances(
    rows: Rows, query: torch.Tensor, keys: torch.Tensor, scale: float, block: _Block, group: int
) -> torch.Tensor:
    """[key heads, tokens x group, columns] in float32: how much each token takes of each that it sees."""
    scores = rows.room(0, (len(keys), query.shape[1], keys.shape[1]))
    torch.bmm(query, keys.mT, out=scores)
    scores.mul_(scale)
    count = block.end - block.first
    scores[..., -count:].add_(rows.later(count, group))
    if block.window and (old := block.place + count - block.window - block.columns.start) > 0:
        left = torch.ones(count, old, dtype=torch.bool).tril_(block.place - block.window - block.columns.start)
        scores[..., :old].add_(_hidden(left, group))
    return torch.softmax(scores, -1, out=rows.room(1, scores.shape))


def _hidden(pairs: torch.Tensor, group: int) -> torch.Tensor:
    """[tokens, columns] of bool -> [tokens x group, columns]: minus infinity for what a token does not see, else 0."""
    return torch.zeros(pairs.shape).masked_fill_(pairs, -torch.inf).repeat_interleave(group, 0)


def _by_key(heads_first: torch.Tensor, group: int, low: torch.dtype) -> torch.Tensor:
    """[heads, tokens, size] -> [key heads, tokens x group, size], in the low type."""
    heads, tokens, size = heads_first.shape
    found = torch.empty(heads // group, tokens, group, size, dtype=low)
    found.copy_(heads_first.unflatten(0, (-1, group)).transpose(1, 2))
    return found.view(heads // group, tokens * group, size)


def _tokens_first(whole: torch.Tensor, block: _Block, key_heads: int) -> torch.Tensor:
    """Of [tokens, heads, size] the block's part, as [key heads, tokens, group, size]."""
    return whole[block.first : block.end].unflatten(1, (key_heads, -1)).transpose(0, 1)


def _seen(whole: torch.Tensor, span: tuple[int, int, int]) -> torch.Tensor:
    """Of [key heads, tokens, size] all tokens of a span's row."""
    first, end, shared = span
    own = whole[:, first:end]
    return torch.cat((whole[:, :shared], own), dim=1) if shared else own


def _to(low: torch.dtype, values: torch.Tensor, rows: Rows) -> torch.Tensor:
    return values if values.dtype == low else rows.room(3, values.shape, low).copy_(values)
