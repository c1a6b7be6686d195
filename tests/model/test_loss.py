"""The loss at the head: torch's cross entropy and its gradient, without all logits at once, and only where logits are the head's."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from lora_recipes.model import loss as room
from lora_recipes.model.loss import ends_at_head, head_loss, token_loss
from tests.model.test_fused import SIZES


def head_of(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 40, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("dft", [False, True], ids=["nll", "dft"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("count", [1, 7, 8, 23])
def test_the_loss_and_its_gradient_are_torchs(count: int, bias: bool, dft: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "TOKENS", 8)
    monkeypatch.setattr(room, "EXACT", 3 * 40)
    head, targets = head_of(bias), torch.arange(count) % 40
    hidden = torch.randn(count, 16, requires_grad=True)
    logits = head(hidden)
    each = cross_entropy(logits, targets, reduction="none")
    weights = (-each.detach()).exp() if dft else torch.ones(count)
    wanted = (weights * each).sum() / 5
    (slope,) = torch.autograd.grad(3 * wanted, hidden, retain_graph=True)
    for found, right in (
        head_loss(head, hidden, targets, 5, dft=dft),
        token_loss(logits.clone(), targets, 5, dft=dft),
    ):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(3 * found, hidden, retain_graph=True)[0], slope)
        assert torch.equal(right, logits.argmax(-1) == targets)


def test_in_bf16_the_loss_is_that_of_logits_in_bf16():
    head, targets = head_of().bfloat16(), torch.arange(30)
    hidden = torch.randn(30, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = head_loss(head, hidden, targets, 30)
        wanted = cross_entropy(head(hidden).float(), targets)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(loss, hidden)[0] for loss in (found, wanted))
    assert one.dtype == torch.float32 and float((one - other).norm() / other.norm()) < 0.01


def test_far_logits_and_no_tokens_at_all():
    head = head_of()
    hidden = torch.randn(4, 16, requires_grad=True) * 1e4
    found, _ = head_loss(head, hidden, torch.zeros(4, dtype=torch.long), 4)
    torch.testing.assert_close(found, cross_entropy(head(hidden), torch.zeros(4, dtype=torch.long)).detach())
    none = torch.zeros(0, 16, requires_grad=True)
    found, right = head_loss(head, none, torch.zeros(0, dtype=torch.long), 1)
    found.backward()
    assert found.item() == 0 and len(right) == 0 and none.grad.shape == (0, 16)


def test_no_more_logits_than_a_block_are_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "TOKENS", 8)
    sizes: list[int] = []
    real = room._turn
    monkeypatch.setattr(room, "_turn", lambda logits, *given: sizes.append(logits.numel()) or real(logits, *given))
    head_loss(head_of(), torch.randn(50, 16, requires_grad=True), torch.zeros(50, dtype=torch.long), 50)
    assert len(sizes) == 7 and max(sizes) == 8 * 40


@pytest.mark.parametrize(
    ("kind", "keys", "alone"),
    [
        ("llama", {}, True),
        ("gemma3_text", {}, True),
        ("gemma2", {}, False),  # caps its logits
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.5}, False),
    ],
    ids=str,
)
def test_models_that_make_more_of_their_logits_are_left_alone(kind: str, keys: dict, alone: bool):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **keys)).requires_grad_(False)
    head = model.get_output_embeddings()
    for dtype in (None, torch.bfloat16):
        assert ends_at_head(model, dtype) is alone
    assert "forward" not in vars(head)
    head.weight.requires_grad_(True)
    assert not ends_at_head(model, None)


def test_a_trained_bias_of_the_head_is_left_to_autograd():
    """`bias: all` trains it, where a model has one."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **SIZES)).requires_grad_(False)
    assert ends_at_head(model, None)
    model.get_output_embeddings().bias.requires_grad_(True)
    assert not ends_at_head(model, None)


def test_the_trial_draws_no_random_numbers_and_survives_code_that_looks_at_the_logits():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, attention_dropout=0.5)).train()
    model.requires_grad_(False)
    before = torch.random.get_rng_state()
    assert ends_at_head(model, None)
    assert torch.equal(torch.random.get_rng_state(), before)
    forward = type(model).forward

    class Cut(type(model)):
        def forward(self, *given, **named):
            found = forward(self, *given, **named)
            found.logits = found.logits[..., :100]
            return found

    class InPlace(type(model)):
        def forward(self, *given, **named):
            found = forward(self, *given, **named)
            found.logits *= 2
            return found

    for kind in (Cut, InPlace):
        model.__class__ = kind
        assert not ends_at_head(model, None)
