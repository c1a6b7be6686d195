"""RMS norms and LoRA layers as a CPU computes them with least traffic: each one function, with a backward of its own."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch.nn.functional import linear

from lora_recipes.model.quantizer import open_weight, opens

Forwards = Mapping[torch.nn.Module, Callable[..., torch.Tensor]]
# A 4-bit layer and a type → its weight in that type, [out, in].
Opening = Callable[[torch.nn.Module, torch.dtype], torch.Tensor]
# PEFT's on linear layers and on bitsandbytes' 4-bit ones; told by name, since the latter's module imports bitsandbytes.
LORA_LAYERS = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")
EVERY_MODULES = frozenset(vars(torch.nn.Module()))


@contextmanager
def computing(forwards: Forwards) -> Iterator[None]:
    """Meanwhile these modules are computed so; backward must be in it too, where activations are computed anew."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def fused(model: torch.nn.Module, opening: Opening = open_weight) -> Forwards:
    """The modules that this room has a function for: frozen RMS norms, and LoRA on linear layers, 4-bit ones too.

    Whether a norm is one is found out by trying it, on a weight that is made up. What is asked for more than that, a gate or
    more than plain LoRA, is left to the module itself, whenever it is.

    Args:
        opening: gives the weight of a 4-bit layer, forward and backward.
    """
    offsets: dict[tuple[Any, ...], int | None] = {}
    found = {}
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's
            continue
        if f"{type(module).__module__}.{type(module).__name__}" in LORA_LAYERS:
            found[module] = partial(_adapted, module, opening)
        elif _looks_normed(module):
            alike = (type(module), module.weight.shape, repr(_settings(module)))
            if alike not in offsets:
                offsets[alike] = _offset(module)
            if (offset := offsets[alike]) is not None:
                found[module] = partial(_normed, module, offset)
    return found


def _looks_normed(module: torch.nn.Module) -> bool:
    """Whether all that it has are one frozen weight and an epsilon."""
    if [*module._parameters, *module._buffers, *module._modules] != ["weight"]:
        return False
    weight = module.weight
    fits = isinstance(weight, torch.Tensor) and weight.dim() == 1 and not weight.requires_grad
    return fits and isinstance(_eps(module), float)


def _eps(module: torch.nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    """What its class has set on a module, beside what every module has."""
    return {name: value for name, value in vars(module).items() if name not in EVERY_MODULES}


def _offset(module: torch.nn.Module) -> int | None:
    """What a norm adds to its weight: nothing, or 1 as Gemma's do; None where it is no RMS norm."""
    made = torch.Generator().manual_seed(0)
    alike = copy.copy(module)
    alike._parameters = {"weight": torch.nn.Parameter(torch.rand(module.weight.shape, generator=made), False)}
    sizes = torch.tensor([_eps(module) ** 0.5, 1.0, 1e3])[
        :, None
    ]  # at the first, epsilon is half of what is divided by
    hidden = torch.randn(3, len(alike.weight), generator=made) * sizes
    try:
        wanted = alike(hidden)
    except Exception:  # a model's own code, on a shape that it may not know
        return None
    same = (offset for offset in (0, 1) if torch.allclose(_normed(alike, offset, hidden), wanted, 1e-4, 1e-5))
    return next(same, None)


def _normed(module: torch.nn.Module, offset: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    weight = module.weight
    # Of what type the result is where the weight has more bits, each model says itself.
    if args or kwargs or torch.promote_types(hidden.dtype, weight.dtype) != hidden.dtype:
        return type(module).forward(module, hidden, *args, **kwargs)
    return _Norm.apply(hidden, weight.float() + offset if offset else weight, _eps(module))


class _Norm(torch.autograd.Function):
    """hidden / root of its mean square x scale, computed in float32; arXiv 1910.07467."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        exact = hidden.float()
        inverse = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, scale, inverse)
        return torch.mul(exact, inverse).mul_(scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        hidden, scale, inverse = ctx.saved_tensors
        exact = hidden.float()
        slope = torch.mul(grad.float(), scale)
        along = torch.mul(slope, exact).sum(-1, keepdim=True)
        along.mul_(inverse.pow(3)).div_(-hidden.shape[-1])
        return slope.mul_(inverse).addcmul_(exact, along).to(hidden.dtype), None, None


def _adapted(module: LoraLayer, opening: Opening, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = _only_adapter(module)
    if name is None or args or kwargs:
        return type(module).forward(module, x, *args, **kwargs)
    base, first, second = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    autocast, quantized = torch.is_autocast_enabled("cpu"), type(base) is not torch.nn.Linear
    low = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    own = base.compute_dtype if quantized else base.weight.dtype
    if (quantized and own != low) or not (autocast or own == first.dtype == second.dtype == low):
        return type(module).forward(module, x)
    frozen = partial(opening, base, low) if quantized else partial(base.weight.to, low)
    with torch.autocast("cpu", enabled=False):
        out = _Adapted.apply(x, frozen, base.bias, first, second, module.scaling[name], low)
    return out.view(*x.shape[:-1], base.out_features)


def _only_adapter(module: LoraLayer) -> str | None:
    """The adapter, where the layer does no more than W x + b + scaling B A x, and nothing looks on."""
    names, base = module.active_adapters, module.base_layer
    if len(names) != 1 or module.disable_adapters or module.merged:
        return None
    if type(base) is not torch.nn.Linear and not opens(base):
        return None
    name = names[0]
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return None
    dropped = module.lora_dropout[name]
    drops = dropped.training and not isinstance(dropped, torch.nn.Identity)
    trained = any(parameter.requires_grad for parameter in base.parameters())
    return None if drops or trained or any(map(is_watched, (base, module.lora_A[name], module.lora_B[name]))) else name


def is_watched(module: torch.nn.Module) -> bool:
    """Whether something looks at its calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


class _Adapted(torch.autograd.Function):
    """A linear layer with its adapter, in the low type: the adapter's share is added to the products where they lie.

    The frozen weight is asked for in forward and in backward, so that what is opened or cast for one is not kept for the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        frozen: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        scaling: float,
        low: torch.dtype,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(low)
        low_first, low_second = first.to(low), second.to(low)
        inner = torch.mm(rows, low_first.T).mul_(scaling)
        out = linear(rows, frozen(), None if bias is None else bias.to(low)).addmm_(inner, low_second.T)
        _, _, _, first_learns, second_learns, *_ = ctx.needs_input_grad
        # What only a frozen matrix's gradient would need is not kept (LoRA-FA).
        kept = rows if first_learns else None, inner if second_learns else None
        ctx.save_for_backward(*kept, low_first, low_second)
        ctx.frozen, ctx.scaling, ctx.shape, ctx.types = frozen, scaling, x.shape, (x.dtype, first.dtype, second.dtype)
        return out  # [rows, width]: a view of it could not be changed in place, as some models do

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, first, second = ctx.saved_tensors
        of_x, of_first, of_second = ctx.types
        slope = torch.mm(grad, second).mul_(ctx.scaling)
        behind = None
        if ctx.needs_input_grad[0]:
            behind = torch.mm(grad, ctx.frozen()).addmm_(slope, first).view(ctx.shape).to(of_x)
        first_slope = None if rows is None else (slope.T @ rows).to(of_first)
        second_slope = None if inner is None else (grad.T @ inner).to(of_second)
        return behind, None, None, first_slope, second_slope, None, None
