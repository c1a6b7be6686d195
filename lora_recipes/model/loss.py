"""The loss of a CPU's steps: logits turn into their own gradient where they lie, and only those of a block are held at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_recipes.model.fused import computing, is_watched
from lora_recipes.model.precision import computing_in

TOKENS = 256  # whose logits are held at a time; with fewer the head's weights are read too often
EXACT = 2**19  # logits that are in float32 at a time: 2 MiB, what a core's cache holds


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, divisor: float, *, dft: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of all tokens over a divisor, and for each token whether it was predicted.

    The values are those of torch's `cross_entropy` in float32; the gradient is rounded once, to the type of the logits.

    Args:
        logits: [tokens, vocabulary]; afterwards they hold their gradient, so nothing else may need them.
        targets: [tokens].
        dft: weigh each token by its own probability, as a constant (arXiv 2508.05629).

    Returns:
        the loss, float32 and without dimensions; [tokens] of bool.
    """
    return _TokenLoss.apply(logits, targets, divisor, dft)


def head_loss(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, divisor: float, *, dft: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_loss` of what a frozen head makes of hidden states, [tokens, width], without all logits at any time.

    The states' gradient is computed with the loss. Under autocast the head's products are of its type.
    """
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    bias = None if head.bias is None else head.bias.to(low)
    with torch.autocast("cpu", enabled=False):
        return _HeadLoss.apply(hidden.to(low), head.weight.to(low), bias, targets, divisor, dft)


def ends_at_head(model: PreTrainedModel, autocast: torch.dtype | None) -> bool:
    """Whether the model's logits are what a frozen linear head returns, which `head_loss` can take the place of.

    Not so where they are scaled or capped, or where something looks at the head's call. No values are looked at.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    if "forward" in vars(head) or is_watched(head):
        return False
    mark, ids = torch.ones(()), torch.ones((1, 2), dtype=torch.long)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            computing_in(autocast),
            computing({head: lambda hidden: mark}),
        ):
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception:  # a model's own code may stumble over logits without a vocabulary; it computes them all
        return False
    return logits is mark and mark._version == 0  # unchanged, in place as well


@contextmanager
def given_only(head: torch.nn.Module, pick: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Meanwhile the head is given what is picked of the hidden states, [rows, tokens, width], alone."""
    hook = head.register_forward_pre_hook(lambda module, arguments: (pick(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, divisor: float, dft: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.slopes = logits
        loss, right = _turn(logits, targets, divisor, dft)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor, None, None, None]:
        slopes = ctx.slopes
        del ctx.slopes
        return slopes.mul_(grad), None, None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        divisor: float,
        dft: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        block = hidden.new_empty(min(TOKENS, len(hidden)), len(weight))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = []
        for first in range(0, len(hidden), TOKENS):
            part = slice(first, first + TOKENS)
            logits = block[: len(hidden[part])]
            torch.mm(hidden[part], weight.T, out=logits)
            if bias is not None:
                logits.add_(bias)
            found.append(_turn(logits, targets[part], divisor, dft))
            if slopes is not None:
                torch.mm(logits, weight, out=slopes[part])
        ctx.slopes = slopes
        losses, right = zip(*found, strict=True) if found else ((torch.zeros(()),), (targets.bool(),))
        ctx.mark_non_differentiable(right := torch.cat(right))
        return torch.stack(losses).sum(), right

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor, None, None, None, None, None]:
        slopes = ctx.slopes
        del ctx.slopes
        return slopes.mul_(grad), None, None, None, None, None


def _turn(logits: torch.Tensor, targets: torch.Tensor, divisor: float, dft: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and which tokens were predicted; the logits turn into the loss's gradient."""
    total = torch.zeros((), dtype=torch.float32)
    right = torch.empty(targets.shape, dtype=torch.bool)
    rows = max(1, EXACT // logits.shape[-1])
    for first in range(0, len(targets), rows):
        part, wanted = logits[first : first + rows], targets[first : first + rows, None]
        most, guess = part.max(-1, keepdim=True)
        right[first : first + rows] = (guess == wanted)[:, 0]
        exact, most = part.float(), most.float()
        chosen = exact.gather(1, wanted).sub_(most)
        exact.sub_(most).exp_()
        whole = exact.sum(-1, keepdim=True)
        likely = chosen.sub_(whole.log())
        weight = likely.exp() / divisor if dft else torch.full_like(likely, 1 / divisor)
        total -= (weight * likely).sum()
        exact.mul_(weight / whole).scatter_add_(1, wanted, -weight)
        if exact is not part:
            part.copy_(exact)
    return total, right
