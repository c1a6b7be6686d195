"""The loss of a CPU's steps: each logit is turned into its own gradient where it lies, so that none is held twice."""

from typing import Any

import torch
from torch.nn.functional import log_softmax

BLOCK = 2**19  # logits that are in float32 at a time: 2 MiB, what a core's cache holds


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


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, divisor: float, dft: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros((), dtype=torch.float32)
        right = torch.empty(targets.shape, dtype=torch.bool)
        rows = max(1, BLOCK // logits.shape[-1])
        for first in range(0, len(targets), rows):
            part, wanted = logits[first : first + rows], targets[first : first + rows, None]
            right[first : first + rows] = part.argmax(-1) == wanted[:, 0]
            likely = log_softmax(part, -1, dtype=torch.float32)
            chosen = likely.gather(1, wanted)
            weight = chosen.exp() / divisor if dft else torch.full_like(chosen, 1 / divisor)
            total -= (weight * chosen).sum()
            slope = likely.exp_().scatter_add_(1, wanted, -torch.ones_like(chosen))
            part.copy_(slope.mul_(weight))
        ctx.slopes = logits
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor, None, None, None]:
        slopes = ctx.slopes
        del ctx.slopes
        return slopes.mul_(grad), None, None, None
