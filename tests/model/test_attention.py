"""Attention of rows that lie end to end is each row's own, to the values and gradients of torch's."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from lora_recipes.model import attention
from lora_recipes.model.attention import Rows, attend, attending, takes_rows

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def made(config: PreTrainedConfig, **keywords: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **keywords)
    for parameter in model.parameters():  # as they come, a token's context does next to nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def each_alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, window: int | None
) -> torch.Tensor:
    """[1, tokens, heads, size] by torch's own attention, row after row, of which the first tells what is shared."""
    found = [torch.zeros(1, query.shape[1], 0, value.shape[-1])]
    for first, end, shared in rows.spans():
        places = torch.cat((torch.arange(shared), torch.arange(first, end)))
        at = torch.arange(len(places))
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or len(at)))
        out = scaled_dot_product_attention(
            query[:, :, places], key[:, :, places], value[:, :, places], attn_mask=seen, enable_gqa=True, scale=0.3
        )
        found.append(out[:, :, shared:])
    return torch.cat(found, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(("shared", "lengths"), [(0, (5,)), (0, (20, 1, 9)), (1, (1, 1)), (11, (20, 3))], ids=str)
@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2)])
def test_values_and_gradients_are_those_of_each_row_by_itself(
    heads: int, keys: int, shared: int, lengths: tuple[int, ...], window: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "BLOCK", 4)  # most rows are several blocks
    torch.manual_seed(0)
    rows = Rows(shared, tuple(shared + end for end in accumulate(lengths)))
    tokens = rows.ends[-1]
    inputs = [
        torch.randn(1, tokens, count, size).transpose(1, 2).requires_grad_()
        for count, size in ((heads, 8), (keys, 8), (keys, 6))
    ]
    slope = torch.randn(1, tokens, heads, 6)
    ours, _ = attend(torch.nn.Module(), *inputs, None, rows=rows, scaling=0.3, sliding_window=window)
    torchs = each_alone(*inputs, rows, window)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(torchs, inputs, slope), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_bf16_it_is_no_further_from_the_exact_values_than_torchs_own():
    torch.manual_seed(0)
    rows = Rows(0, (150,))
    exact = [torch.randn(1, count, 150, 64).bfloat16().double().requires_grad_() for count in (6, 2, 2)]
    slope = torch.randn(1, 150, 6, 64).bfloat16()

    def far(found: torch.Tensor, inputs: list[torch.Tensor]) -> list[float]:
        gradients = torch.autograd.grad(found, inputs, slope.to(found.dtype))
        return [
            ((one.double() - other).norm() / other.norm()).item()
            for one, other in zip((found, *gradients), wanted, strict=True)
        ]

    def torchs(inputs: list[torch.Tensor]) -> torch.Tensor:
        return scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).transpose(1, 2)

    whole = torchs(exact)
    wanted = [whole, *torch.autograd.grad(whole, exact, slope.double())]
    short = [one.detach().bfloat16().requires_grad_() for one in exact]
    ours = far(attend(torch.nn.Module(), *short, None, rows=rows)[0], short)
    theirs = far(torchs(short), short)
    assert all(one < 1.5 * other for one, other in zip(ours, theirs, strict=True)), (ours, theirs)
    assert sum(ours) < sum(theirs)


TAKES = {
    "llama": LlamaConfig(**SIZES),
    "window": MistralConfig(sliding_window=4, **SIZES),
    "learnt places": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0),
    "windows and full": Gemma3TextConfig(sliding_window=4, head_dim=8, sliding_window_pattern=2, **SIZES),
}
MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
TAKES_NOT = {
    "a window that only the mask has": Qwen2MoeConfig(
        use_sliding_window=True, sliding_window=16, max_window_layers=2, **SIZES, **MOE
    ),
    "a mask that is learnt": DogeConfig(**SIZES),
    "dropout": LlamaConfig(attention_dropout=0.1, **SIZES),
    "a state from token to token": Mamba2Config(
        vocab_size=300, hidden_size=32, num_heads=8, head_dim=8, num_hidden_layers=2, state_size=8, n_groups=1
    ),
    "some layers with a state": Qwen3NextConfig(
        head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, **SIZES
    ),
    "dropout by another name": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.1),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", TAKES)
def test_a_model_of_plain_attention_takes_rows_and_is_left_as_it_was(kind: str, autocast: torch.dtype | None):
    model = made(TAKES[kind])
    model.train()
    usual, state = model.config._attn_implementation, torch.random.get_rng_state()
    assert takes_rows(model, autocast)
    assert model.training and model.config._attn_implementation == usual == "sdpa"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_types_that_it_does_not_compute_in_are_left_alone():
    assert not takes_rows(made(LlamaConfig(**SIZES)).double(), None)


@pytest.mark.parametrize("kind", TAKES_NOT)
def test_what_is_more_than_plain_attention_is_found_out_before_training(kind: str):
    model = made(TAKES_NOT[kind])
    model.train()
    assert not takes_rows(model, None)
    assert model.training


def test_a_model_that_computes_attention_in_another_way_keeps_it():
    assert not takes_rows(made(LlamaConfig(**SIZES), attn_implementation="eager"), None)


def test_a_layer_that_looks_at_its_neighbours_is_found_out():
    """It attends as all do, and besides hands a little of each token to the next one, across rows too."""
    model = made(LlamaConfig(**SIZES))
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out + out.roll(1, dims=1))
    assert not takes_rows(model, None)


@pytest.mark.parametrize("kind", TAKES)
def test_a_model_computes_of_a_flat_sequence_what_it_computes_of_each_row(kind: str):
    model = made(TAKES[kind]).eval()
    ids = torch.randint(0, 300, (1, 24))
    rows, places = Rows(6, (15, 24)), torch.tensor([[*range(15), *range(6, 15)]])
    with torch.no_grad():
        with attending(model):
            flat = model(input_ids=ids, position_ids=places, rows=rows, use_cache=False).logits[0]
        other = torch.cat((ids[:, :6], ids[:, 15:]), dim=1)
        one, two = (model(input_ids=given, use_cache=False).logits[0] for given in (ids[:, :15], other))
    torch.testing.assert_close(flat, torch.cat((one, two[6:])), rtol=1e-3, atol=1e-3)
