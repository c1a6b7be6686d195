"""Experts are no layers: a recipe that means them reaches them or is refused, and one that leaves them out is counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lora_recipes.errors import RecipeError
from lora_recipes.model.targets import find_targets
from lora_recipes.recipe import load_recipe

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "deepseek_v2": {  # its first layer is dense, and shared experts are plain layers: names of theirs do match
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

ATTENTION = dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 2)
LATENT = dict.fromkeys(["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], 2)
REACHED = {
    "gpt_oss": ATTENTION | {"gate_up_proj": 2, "down_proj": 2},
    "deepseek_v2": LATENT | {"gate_up_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3},  # shared, dense, experts
}


def config_of(kind: str) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **TINY | MIXTURES[kind])


def expert_parameters(kind: str) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind))
    return sum(weight.numel() for name, weight in model.named_parameters() if name.endswith(tuple(EXPERTS)))


def line_of(path: Path, key: str) -> int:
    return next(n for n, row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if f'"{key}"' in row)


LINES = "\n  target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt_oss", "all-linear"),  # PEFT adapts the attention, and says nothing
        ("gpt_oss", r".*\.(q|o|gate|up|down)_proj"),
        ("gpt_oss", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", ["q_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("mixtral", r".*\.(q|o|gate|up|down)_proj"),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
    ids=str,
)
def test_who_means_the_experts_and_does_not_reach_them_is_told_the_lines_to_write(
    write_recipe: Callable[..., Path], kind: str, targets: Any
):
    path = write_recipe(lora={"target_modules": targets})
    with pytest.raises(RecipeError) as told:
        find_targets(load_recipe(path), config_of(kind))
    message = str(told.value)
    assert message.startswith(f"{path}:{line_of(path, 'target_modules')}: `target_modules`")
    assert "frozen in silence" in message and f"{LINES}]\n  lora_dropout: 0.0" in message


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "gate_proj", "up_proj", "down_proj"],
        ["q_proj", "down_proj"],
        r".*\.(q|gate|up|down)_proj",
    ],
    ids=str,
)
@pytest.mark.parametrize("parameters", [None, EXPERTS], ids=["modules only", "with experts"])
def test_layers_whose_names_are_taken_for_the_experts_are_not_left_out(
    write_recipe: Callable[..., Path], targets: Any, parameters: list[str] | None
):
    path = write_recipe(lora={"target_modules": targets, "target_parameters": parameters})
    with pytest.raises(RecipeError) as told:  # PEFT would adapt the experts' down_proj, and no other
        find_targets(load_recipe(path), config_of("deepseek_v2"))
    message = str(told.value)
    assert message.startswith(f"{path}:{line_of(path, 'target_modules')}: `target_modules` does not reach the layers ")
    assert f"{LINES}, down_proj.weight" in message and "]\n  lora_dropout: 0.0" in message


@pytest.mark.parametrize(("kind", "targets"), [("gpt_oss", "all-linear"), ("deepseek_v2", "all-linear")])
def test_the_lines_that_it_names_reach_all_that_was_meant(write_recipe: Callable[..., Path], kind: str, targets: Any):
    with pytest.raises(RecipeError) as told:
        find_targets(load_recipe(write_recipe(lora={"target_modules": targets})), config_of(kind))
    lines = yaml.safe_load(str(told.value).partition("`lora`:\n")[2])
    found = find_targets(load_recipe(write_recipe(lora=lines)), config_of(kind))
    assert found.frozen_experts == 0
    assert found.hits == REACHED[kind]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_all_linear_is_not_refused_where_it_reaches_every_expert(write_recipe: Callable[..., Path], kind: str):
    found = find_targets(load_recipe(write_recipe()), config_of(kind))
    assert found.frozen_experts == 0
    assert (
        found.hits["gate_up_proj"] == found.hits["down_proj"] == found.hits["gate"] == 2
    )  # the router as well: it shows


@pytest.mark.parametrize(
    "targets", [["q_proj", "o_proj"], r".*\.[qo]_proj", r".*self_attn\..*_proj\w*"], ids=["list", "pattern", "wide"]
)
@pytest.mark.parametrize("kind", MIXTURES)
def test_attention_alone_is_a_choice_and_its_frozen_experts_are_counted(
    write_recipe: Callable[..., Path], kind: str, targets: Any
):
    found = find_targets(load_recipe(write_recipe(lora={"target_modules": targets})), config_of(kind))
    assert found.frozen_experts == expert_parameters(kind)
    assert found.hits["q_proj"] == 2


def test_half_of_the_experts_is_a_choice_and_the_other_half_is_counted(write_recipe: Callable[..., Path]):
    path = write_recipe(lora={"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:], "lora_dropout": 0.0})
    assert find_targets(load_recipe(path), config_of("mixtral")).frozen_experts == 2 * 4 * 128 * 32


def test_experts_that_are_trained_whole_are_not_frozen(write_recipe: Callable[..., Path]):
    path = write_recipe(lora={"target_modules": ["q_proj"], "modules_to_save": ["experts"]})
    assert find_targets(load_recipe(path), config_of("mixtral")).frozen_experts == 0


def test_a_dense_model_has_no_experts(write_recipe: Callable[..., Path]):
    for kind, more in (("llama", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})):  # 3-D: convolutions
        found = find_targets(load_recipe(write_recipe()), AutoConfig.for_model(kind, **TINY | more))
        assert found.frozen_experts == 0


@pytest.mark.parametrize(("key", "value"), [("lora_dropout", 0.05), ("use_dora", True), ("lora_bias", True)])
def test_what_does_not_go_with_experts_is_refused_at_its_own_line(
    write_recipe: Callable[..., Path], key: str, value: Any
):
    path = write_recipe(lora={"target_modules": ["q_proj"], "target_parameters": EXPERTS, key: value})
    with pytest.raises(RecipeError, match=f"{path}:{line_of(path, key)}: .*does not work with {key}"):
        find_targets(load_recipe(path), config_of("mixtral"))
