"""The architectures this package knows offline: each file builds, and its count is the one its publisher names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_recipes.plan import CONFIGS

FILES = sorted(CONFIGS.glob("*.json"))
DTYPES = {"float32", "float16", "bfloat16"}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_forty_two_models_of_twenty_two_families_are_known():
    assert len(FILES) >= 42
    assert len({_read(file)["config"]["model_type"] for file in FILES}) >= 22


def test_it_says_where_it_comes_from_and_on_what_terms(file: Path):
    facts = _read(file)
    assert list(facts) == ["source", "config", "licence", "gated", "parameters"]
    named = file.stem.replace("--", "/", 1)
    assert facts["source"] == f"https://huggingface.co/{named}/blob/main/config.json"
    assert facts["config"]["dtype"] in DTYPES
    assert isinstance(facts["licence"], str) and facts["licence"]
    assert isinstance(facts["gated"], bool)
    assert facts["parameters"] is None or isinstance(facts["parameters"], int)


def test_it_builds_with_the_parameters_its_publisher_counts(file: Path):
    facts = _read(file)
    values = dict(facts["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())  # tied weights once
    assert count == pytest.approx(facts["parameters"] or count, rel=0.005)
