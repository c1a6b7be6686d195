"""Functions that stand for a model's layers: the same values and gradients, and only where a layer does no more than they."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as Lora4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BambaConfig, BambaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lora_recipes.model.fused import computing, fused
from lora_recipes.model.quantizer import open_weight

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LORA = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}


class Layered(LlamaRMSNorm):
    """Looks like an RMS norm and is none."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(hidden, hidden.shape[-1:], self.weight, eps=self.variance_epsilon)


class Outside(LlamaRMSNorm):
    """Adds epsilon to the root, not under it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Centred(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.ones(size))


def made(
    kind: str = "llama", lora: dict[str, Any] = LORA, compute: torch.dtype | None = None, **config: Any
) -> nn.Module:
    """A model with its adapter; on 4 bits that compute in this type, if one is given."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **config))
    if compute:
        quantize(base, compute)
    model = get_peft_model(base, LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "norm" in name:
                parameter.normal_(0.3, 0.1)
    return model.train()


def quantize(base: nn.Module, compute: torch.dtype) -> None:
    """Every linear layer but the head becomes bitsandbytes' of nested NF4."""
    for name, old in list(base.named_modules()):
        if type(old) is nn.Linear and name != "lm_head":
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, old.bias is not None, compute_dtype=compute, quant_type="nf4"
            )
            new.load_state_dict(old.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, new.to("cpu"))
    base.is_loaded_in_4bit = True


def step(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The loss and all gradients of one step."""
    ids = torch.arange(2, 26).view(2, 12)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach()} | grads


def by_us(out: torch.Tensor) -> bool:
    """Whether a LoRA layer's result, or what it is a view of, comes from our function."""
    last = out.grad_fn
    return "_AdaptedBackward" in (last.name(), *(node.name() for node, _ in last.next_functions if node))


def frozen(norm: nn.Module) -> nn.Module:
    nn.init.normal_(norm.weight, 0.5)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_models_own(kind: type, dtype: torch.dtype):
    norm = frozen(kind(24)).to(dtype)
    hidden = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 5, 24)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        out = norm(hidden)
        (slope,) = torch.autograd.grad((out.float() * weight).sum(), hidden)
        return out, slope

    wanted = both()
    with computing(fused(norm)):
        found = both()
    assert "forward" not in vars(norm)
    near = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **near)
    assert found[0].grad_fn.name() == "_NormBackward"


@pytest.mark.parametrize(
    "norm",
    [LlamaRMSNorm(8), frozen(Layered(8)), frozen(Outside(8)), frozen(Centred(8)), frozen(nn.LayerNorm(8))],
    ids=repr,
)
def test_a_norm_that_is_trained_or_does_something_else_is_left_alone(norm: nn.Module):
    assert not fused(norm)


def test_a_norm_says_itself_of_what_type_its_result_is():
    """Of a bf16 input and a float32 weight Llama makes float32, and Gemma bf16."""
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    for kind, dtype in ((LlamaRMSNorm, torch.float32), (Gemma3RMSNorm, torch.bfloat16)):
        norm = frozen(kind(8))
        with computing(fused(norm)):
            assert norm(hidden).dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "qwen2"])
def test_a_step_is_the_step_of_the_models_own_layers(kind: str):
    model = made(kind)
    layers = fused(model)
    names = {type(module).__name__ for module in layers}
    assert "Linear" in names and any("RMSNorm" in name for name in names)
    wanted = step(model)
    with computing(layers):
        found = step(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_step_on_4_bits_is_the_step_of_bitsandbytes_and_peft(kind: str):
    model = made(kind, compute=torch.float32)
    layers = fused(model)
    assert sum(type(module) is Lora4bit for module in layers) == 14
    wanted = step(model)
    with computing(layers):
        found = step(model)
        q_proj = next(module for module in layers if type(module) is Lora4bit)
        assert by_us(q_proj(torch.randn(3, 32)))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_an_open_weight_is_kept_by_no_layer():
    layer = next(module for module in made(compute=torch.float32).modules() if type(module) is Lora4bit)
    with computing(fused(layer)):
        out = layer(torch.randn(3, 32, requires_grad=True))
    kept = [one for one in out.grad_fn.next_functions[0][0].saved_tensors if one is not None]
    assert sorted(one.shape for one in kept) == [(3, 4), (3, 32), (4, 32), (32, 4)]


def test_4_bits_that_compute_in_another_type_than_the_step_are_left_to_peft():
    layer = next(module for module in made(compute=torch.bfloat16).modules() if type(module) is Lora4bit)
    x = torch.randn(3, 32, requires_grad=True)
    wanted = layer(x)
    with computing(fused(layer)):
        assert not by_us(layer(x)) and torch.equal(layer(x), wanted)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert by_us(layer(x))


def _lost(layer: nn.Module) -> None:
    """As FSDP does it: bitsandbytes then takes the state that the layer has."""
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


def _lying(layer: nn.Module) -> None:
    """Quantized from [in, out], as by other tools: bitsandbytes warns, and computes."""
    weight = bnb.nn.Params4bit(torch.randn(32, 48), requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to("cpu")


@pytest.mark.parametrize(("change", "ours"), [(_lost, True), (_lying, False)])
def test_a_4_bit_weight_that_is_not_as_it_was_made_is_computed_as_bitsandbytes_does(change: Any, ours: bool):
    layer = next(module for name, module in made(compute=torch.float32).named_modules() if name.endswith("up_proj"))
    change(layer.base_layer)
    x = torch.randn(3, 32, requires_grad=True)
    wanted = layer(x)
    with computing(fused(layer)):
        assert by_us(layer(x)) is ours
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("four_bits", [False, True])
def test_in_bf16_a_lora_layer_is_as_near_to_the_exact_one_as_pefts(four_bits: bool):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 384)).requires_grad_(False)
    exactly = copy.deepcopy(base)
    if four_bits:
        quantize(base, torch.bfloat16)
        exactly[0].weight.copy_(open_weight(base[0], torch.float32))
    config = LoraConfig(r=8, lora_alpha=16)
    layer = (Lora4bit if four_bits else LoraLinear)(base[0], "default", config=config, r=8)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    exact_layer = LoraLinear(exactly[0], "default", config=config, r=8)
    for matrix in ("lora_A", "lora_B"):
        getattr(exact_layer, matrix).load_state_dict(getattr(layer, matrix).state_dict())
    x, weight = torch.randn(200, 512), torch.randn(200, 384)

    def results(layer: nn.Module, dtype: torch.dtype | None) -> list[torch.Tensor]:
        given = x.to(layer.lora_A["default"].weight.dtype).requires_grad_()
        matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out = layer(given)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), [given, *matrices])]

    exact = results(exact_layer.double(), None)
    own = results(layer, torch.bfloat16)
    with computing(fused(layer)):
        found = results(layer, torch.bfloat16)
    for wanted, theirs, ours in zip(exact, own, found, strict=True):
        assert 0 < (ours - wanted).norm() < 1.01 * (theirs - wanted).norm()


@pytest.mark.parametrize("kind", [Gemma3RMSNorm, LlamaRMSNorm])
def test_a_norm_of_bf16_is_as_near_to_the_exact_one_as_the_models_own(kind: type):
    norm = frozen(kind(512)).bfloat16()
    hidden = torch.randn(64, 512, dtype=torch.bfloat16)
    exact = kind(512).double()
    exact.weight.data = norm.weight.data.double()
    wanted = exact(hidden.double())
    own = norm(hidden)
    with computing(fused(norm)):
        found = norm(hidden)
    assert (found - wanted).norm() < 1.01 * (own - wanted).norm()


def test_a_norm_that_is_given_a_gate_computes_itself():
    torch.manual_seed(0)
    config = BambaConfig(**SIZES, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, attn_layer_indices=[1])
    model = BambaForCausalLM(config).requires_grad_(False)
    layers = fused(model)
    gated = [module for module in layers if "Gated" in type(module).__name__]
    ids = torch.arange(2, 14)[None]
    wanted = model(input_ids=ids, use_cache=False).logits
    with computing(layers):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5)
        for norm in gated:
            hidden, gate = torch.randn(2, 3, len(norm.weight)), torch.randn(2, 3, len(norm.weight))
            torch.testing.assert_close(norm(hidden, gate), type(norm).forward(norm, hidden, gate))
    assert gated


def test_what_a_lora_layer_returns_may_be_changed_in_place():
    """OLMo clips its queries so."""
    layer = next(module for name, module in made().named_modules() if name.endswith("q_proj"))
    x = torch.randn(2, 3, 32)
    weight = layer.lora_B["default"].weight

    def slope() -> torch.Tensor:
        out = layer(x)
        out.clamp_(-0.2, 0.2)
        return torch.autograd.grad(out.square().sum(), weight)[0]

    wanted = slope()
    with computing(fused(layer)):
        torch.testing.assert_close(slope(), wanted)


@pytest.mark.parametrize(
    ("lora", "plain"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"lora_dropout": 0.5}, False),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
        ({"bias": "lora_only"}, False),
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_is_left_to_peft(lora: dict[str, Any], plain: bool):
    model = made("qwen2", LORA | lora)  # which has biases
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    x = torch.randn(3, 32, requires_grad=True)
    with computing(fused(model)):
        assert by_us(layer(x)) is plain
        model.eval()
        assert by_us(layer(x)) is (plain or "lora_dropout" in lora)
        with model.disable_adapter():
            assert not by_us(layer(x))
            torch.testing.assert_close(layer(x), layer.base_layer(x))
        seen: list[Any] = []
        with layer.base_layer.register_forward_hook(lambda *given: seen.append(given)):
            layer(x)
        assert seen


def test_merged_and_further_adapters_are_left_to_peft():
    model = made()
    model.add_adapter("other", LoraConfig(**LORA))
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    x = torch.randn(3, 32)
    with computing(fused(model)):
        model.set_adapter("other")
        other = layer(x)
        torch.testing.assert_close(other, layer.base_layer(x))  # its B is 0
        model.set_adapter("default")
        one = layer(x)
        assert not torch.allclose(one, other)
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(layer(x), one)
        model.set_adapter("default")
        model.merge_adapter()
        torch.testing.assert_close(layer(x), one, rtol=1e-4, atol=1e-5)


def test_weights_of_another_type_than_the_adapters_are_left_to_peft_unless_autocast_says_what_to_compute_in():
    model = made()
    layer = copy.deepcopy(next(module for name, module in model.named_modules() if name.endswith("q_proj")))
    layer.base_layer.bfloat16()
    x = torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)
    with computing(fused(layer)):
        assert layer(x).dtype == torch.bfloat16 and not by_us(layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16 and by_us(layer(x))


def test_a_frozen_matrix_gets_no_gradient_and_its_input_is_not_kept():
    """LoRA-FA trains B alone."""
    model = made()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    wanted = step(model)
    with computing(fused(model)):
        found = step(model)
        out = layer(torch.randn(3, 32, requires_grad=True))
    saved = out.grad_fn.next_functions[0][0].saved_tensors
    assert saved[0] is None and saved[1] is not None
    assert found.keys() == wanted.keys() and not any("lora_A" in name for name in found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_forward_that_somebody_else_has_put_there_stays():
    norm = frozen(LlamaRMSNorm(8))
    norm.forward = theirs = lambda hidden: hidden * 2
    assert not fused(norm)
    with computing({norm: torch.relu}), computing({norm: torch.exp}):
        assert norm(torch.zeros(1)) == 1
    assert norm.forward is theirs


def test_after_an_error_every_module_has_its_own_forward_again():
    model = made()
    with pytest.raises(ZeroDivisionError), computing(fused(model)):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
