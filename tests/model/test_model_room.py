"""Targets are all hit or the run is refused; sources are found or it is said what is missing; machines choose aloud."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.utils import parse_flag_from_env
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_recipes.errors import MachineError, RecipeError, RefusedError
from lora_recipes.model import machine
from lora_recipes.model.build import attend_in_its_type, load_tokenizer, model_config
from lora_recipes.model.machine import choose
from lora_recipes.model.safe import MOST
from lora_recipes.model.source import locate, materialise
from lora_recipes.model.targets import find_targets
from lora_recipes.plan import target_of
from lora_recipes.recipe import load_recipe
from tests.conftest import NF4, ROOT


def targets_of(path: Path):
    recipe = load_recipe(path)
    return find_targets(recipe, model_config(recipe, locate(recipe)))


def test_the_tutorials_llama_trains_8388608_parameters_which_is_an_eighth_of_a_percent():
    recipe = load_recipe(ROOT / "recipes" / "llama2-7b-qlora.yaml")
    targets = find_targets(recipe, LlamaConfig())  # the class's own defaults are Llama-2-7B's sizes
    assert (targets.trainable, targets.total) == (8_388_608, 6_746_804_224)
    assert round(targets.percent, 4) == 0.1243
    assert targets.hits == {"q_proj": 32, "v_proj": 32}


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj' matches no module.*did you mean 'q_proj'.*down_proj, gate_proj"),
        ({"target_modules": ["q_proj", "v_prjo"]}, "'v_prjo' matches no module.*did you mean 'v_proj'"),
        ({"target_modules": "nothing.*"}, "cannot be applied"),
        ({"target_modules": ["act_fn"]}, "cannot be applied"),
        ({"exclude_modules": ["o_prj"]}, "'o_prj' matches no module"),
        ({"modules_to_save": ["embed_token"]}, "did you mean 'embed_tokens'"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "matches no module"),
        ({"rank_pattern": {"q_prj": 2}}, "`rank_pattern`: 'q_prj' matches none"),
        ({"alpha_pattern": {"x": 2}}, "`alpha_pattern`: 'x' matches none"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}, "no targeted module in layer 99"),
        ({"layer_replication": [[0, 1], [0, 5]]}, r"\[0, 5\] is no range of this model's layers; they are \[0, 2\]"),
        ({"layer_replication": [[1, 1]]}, r"\[1, 1\] is no range"),
        ({"layer_replication": [[0, 2]] * (MOST // 2 + 1)}, f"makes {MOST + 2:,} layers, more than {MOST:,}"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 0}}, "cannot be applied"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_the_real_names(
    write_recipe: Callable[..., Path], lora: dict, said: str
):
    with pytest.raises(RecipeError, match=r"(?s)tiny\.yaml:\d+: .*" + said):
        targets_of(write_recipe(lora=lora))


def test_all_linear_hits_each_linear_layer_but_the_head(write_recipe: Callable[..., Path]):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert targets_of(write_recipe()).hits == dict.fromkeys(names, 2)


def test_an_adapter_as_a_model_is_refused(write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path):
    (workdir / "a").mkdir()
    (workdir / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedError, match="is an adapter"):
        locate(load_recipe(write_recipe(model={"pretrained_model_name_or_path": "a"})))


@pytest.mark.promise("F16")
@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ("package:no_such_package", MachineError, "is not installed; pip install no-such-package"),
        ("package:yaml", MachineError, "holds 0 GGUF files"),
        ("./nowhere", RecipeError, "no folder"),
        ("just-a-name", RecipeError, "not a hub id"),
        ("a--b/c..d", RecipeError, "not a hub id"),
        ("owner/model", MachineError, "no GPU is visible"),
    ],
)
def test_a_model_that_is_not_there_says_what_helps(
    write_recipe: Callable[..., Path], named: str, error: type, said: str
):
    with pytest.raises(error, match=said):
        locate(load_recipe(write_recipe(model={"pretrained_model_name_or_path": named})))


@pytest.mark.promise("R12")
@pytest.mark.parametrize("known", [True, False], ids=["also on the hub", "a folder alone"])
def test_a_folder_that_is_called_as_a_hub_model_is_read_and_it_is_said(
    known: bool, write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_model, workdir / "owner" / "model")
    cached = workdir / "cache" / "models--owner--model"
    if known:
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (cached / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    for named in ("owner/model", "./owner/model"):
        model = {"pretrained_model_name_or_path": named, "cache_dir": str(workdir / "cache")}
        assert locate(load_recipe(write_recipe(model=model))).kind == "folder"
        said = " ".join(capsys.readouterr().err.split())
        shadows = "owner/model is a folder here, and is read instead of the hub's; write ./owner/model to say so"
        assert (shadows in said) == (known and named == "owner/model")


def test_a_folder_without_config_is_no_model(write_recipe: Callable[..., Path], workdir: Path):
    (workdir / "e").mkdir()
    with pytest.raises(RecipeError, match=r"no config\.json"):
        locate(load_recipe(write_recipe(model={"pretrained_model_name_or_path": "e"})))


def test_without_a_gpu_every_fallback_is_said(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(quantization=NF4, training={"optim": "paged_adamw_32bit"}))
    choices = choose(recipe)
    assert {choice.what for choice in choices.made} == {"device", "dtype", "4-bit compute dtype", "optimizer"}
    assert all(choice.why for choice in choices.made)
    assert choices.training["bf16"] is False and choices.training["optim"] == "adamw_torch"
    assert choices.quantization["bnb_4bit_compute_dtype"] == "float32"


def test_a_user_who_chose_the_cpu_keeps_bf16(write_recipe: Callable[..., Path]):
    choices = choose(load_recipe(write_recipe(training={"use_cpu": True, "bf16": True})))
    assert choices.training["bf16"] is True


def test_4_bits_compute_in_the_type_that_a_cpu_trains_in(write_recipe: Callable[..., Path]):
    training, four_bits = {"use_cpu": True, "bf16": True}, NF4 | {"bnb_4bit_compute_dtype": "float16"}
    choices = choose(load_recipe(write_recipe(training=training, quantization=four_bits)))
    assert choices.quantization["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["fp16", "tf32", "activation_offloading"])
def test_what_a_cpu_cannot_do_is_refused(write_recipe: Callable[..., Path], key: str):
    with pytest.raises(MachineError, match=rf"tiny\.yaml:\d+: .*{key}"):
        choose(load_recipe(write_recipe(training={key: True, "bf16": False})))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A machine that says it has a GPU: enough for what `choose` decides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)


@pytest.mark.parametrize("lora", [{}, None], ids=["adapter", "whole model"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("bf16", [True, None])
def test_a_gpu_without_bf16_is_told_what_to_set(
    write_recipe: Callable[..., Path], gpu: None, bf16: bool | None, dtype: str | None, lora: dict | None
):
    model = {} if dtype is None else {"dtype": dtype}
    path = write_recipe(training={"bf16": bf16}, model=model, lora=lora)
    with pytest.raises(MachineError, match=r"has no bf16; set training\.bf16=false training\.fp16=true") as told:
        choose(load_recipe(path))
    assert ("model.dtype=" in str(told.value)) == (dtype is not None)
    recipe = load_recipe(path, str(told.value).partition("; set ")[2].split())
    assert choose(recipe).device == "cuda" and recipe.get("model.dtype") != "bfloat16"


@pytest.mark.parametrize("bf16", [True, False])
def test_on_a_gpu_without_bf16_no_step_computes_4bit_in_it(write_recipe: Callable[..., Path], gpu: None, bf16: bool):
    choices = choose(load_recipe(write_recipe(quantization=NF4, training={"bf16": bf16})), training=False)
    assert choices.quantization["bnb_4bit_compute_dtype"] == "float16"
    assert not any("the GPU has it" in choice.why for choice in choices.made)
    assert "Tesla T4 has no bf16" in {choice.why for choice in choices.made}


def test_on_a_gpu_fp16_training_computes_4bit_in_fp16_and_keeps_paging(write_recipe: Callable[..., Path], gpu: None):
    training = {"bf16": False, "fp16": True, "optim": "paged_adamw_32bit"}
    choices = choose(load_recipe(write_recipe(quantization=NF4, training=training)))
    assert choices.device == "cuda" and choices.training["optim"] == "paged_adamw_32bit"
    assert choices.quantization["bnb_4bit_compute_dtype"] == "float16"
    assert "4-bit compute dtype" in {choice.what for choice in choices.made}


def test_use_cpu_wins_over_a_gpu(write_recipe: Callable[..., Path], gpu: None):
    choices = choose(load_recipe(write_recipe(training={"use_cpu": True, "bf16": False})))
    assert choices.device == "cpu"


@pytest.mark.parametrize("told", ["True", "1", "yes", "False", "0", "no"])
def test_a_launch_on_the_cpu_wins_over_a_gpu(
    write_recipe: Callable[..., Path], gpu: None, monkeypatch: pytest.MonkeyPatch, told: str
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)  # as `accelerate launch` does, and the Trainer reads it
    choices = choose(load_recipe(write_recipe()))
    assert (
        (choices.device == "cpu") == parse_flag_from_env("ACCELERATE_USE_CPU") == bool(choices.training.get("use_cpu"))
    )
    if choices.device == "cpu":
        assert "ACCELERATE_USE_CPU is set" in choices.made[0].why
        assert target_of(None, None, None).gpu is None
        hub = write_recipe("hub", model={"pretrained_model_name_or_path": "owner/model"})
        with pytest.raises(MachineError, match="ACCELERATE_USE_CPU is set"):
            locate(load_recipe(hub))


def test_the_steps_after_training_do_not_refuse_its_precision(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(training={"fp16": True, "bf16": False}))
    assert choose(recipe, training=False).device == "cpu"


def test_a_tokenizer_without_an_end_token_is_refused(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path
):
    import json
    import shutil

    shutil.copytree(tiny_model, workdir / "endless")
    config = json.loads((workdir / "endless" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (workdir / "endless" / "tokenizer_config.json").write_text(json.dumps(config))
    recipe = load_recipe(write_recipe(model={"pretrained_model_name_or_path": "endless"}))
    with pytest.raises(RecipeError, match="no end token"):
        load_tokenizer(recipe, locate(recipe))


def test_every_paged_optimizer_has_a_fallback_that_the_schema_knows():
    from lora_recipes.recipe.check import section_keys

    choices = section_keys("training")["optim"]["enum"]
    paged = {name for name in choices if name.startswith("paged_")}
    assert paged == set(machine.UNPAGED) & paged and set(machine.UNPAGED.values()) <= set(choices)


def test_the_launchers_single_thread_is_undone(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    import os

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        torch.set_num_threads(1)
        choose(load_recipe(write_recipe()))
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * len(os.sched_getaffinity(0))))
        choose(load_recipe(write_recipe()))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "attends"), [("float32", "sdpa"), ("bfloat16", "flash_attention_2")])
def test_flash_attention_is_left_where_numbers_have_32_bits(tiny_model: Path, dtype: str, attends: str):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    model.config._attn_implementation = "flash_attention_2"  # which cannot be loaded here
    attend_in_its_type(model)
    assert model.config._attn_implementation == attends


def test_a_folder_needs_no_unpacking(write_recipe: Callable[..., Path], tiny_model: Path):
    source = locate(load_recipe(write_recipe()))
    assert materialise(source) == source and source.location == str(tiny_model)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "10", "memory.stat": "inactive_file 4"}, None),
        ({"memory.max": "100", "memory.current": "30", "memory.stat": "file 9\ninactive_file 4"}, 74),
        ({"memory.max": "100", "memory.current": "120", "memory.stat": "inactive_file 4"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "100",
                "memory/memory.usage_in_bytes": "30",
                "memory/memory.stat": "total_inactive_file 5",
            },
            75,
        ),
    ],
    ids=["none", "no limit", "version 2", "over it", "version 1"],
)
def test_a_containers_limit_is_the_machines_memory(files: dict[str, str], left: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine._left_in_container(tmp_path, -1) == (-1 if left is None else left)
