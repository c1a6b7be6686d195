"""This machine's card is the one that its driver names."""

import pytest

from lora_recipes.plan.cards import CARDS, teraflops_of


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A10", "a10-24"),
        ("NVIDIA L40S", "l40s-48"),
        ("NVIDIA L4", "l4-24"),
        ("Tesla T4", "t4-16"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H200", "h200-141"),
        ("NVIDIA B200", "b200-180"),
        ("NVIDIA GeForce RTX 3090", "rtx3090-24"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24"),
        ("NVIDIA GeForce RTX 5090", "rtx5090-32"),
        ("NVIDIA RTX A6000", "a6000-48"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
    ],
)
def test_a_card_has_the_rate_of_its_own_data_sheet(name: str, card: str | None) -> None:
    assert teraflops_of(name) == (None if card is None else CARDS[card][1])
