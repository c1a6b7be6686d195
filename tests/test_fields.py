"""Every key a recipe may set has an effect on the real object that its owner builds. Nothing is accepted and ignored."""

import dataclasses
import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_recipes.data.audit import audit
from lora_recipes.data.chat_templates import settle
from lora_recipes.data.load import LoadedData, load_data
from lora_recipes.errors import RecipeError
from lora_recipes.judge import broken
from lora_recipes.model.answer import generation_config
from lora_recipes.model.build import end_token_ids, load_base, load_tokenizer, lora_config, quantization_config
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.recipe.check import section_keys
from lora_recipes.run_dir import RunDir
from lora_recipes.score import summary
from lora_recipes.train.optimizers import OPTIMIZER_KEYS
from lora_recipes.train.trainer import COMPILE_KEYS, CONSUMED, training_arguments


def another_value(schema: dict[str, Any], default: Any) -> Any:
    """A value that the schema allows and that is not the default."""
    if "anyOf" in schema:
        return another_value(schema["anyOf"][0], default)
    if "enum" in schema:
        return next(choice for choice in schema["enum"] if choice not in (default, None))
    kind = schema.get("type", "string")
    kind = next(k for k in kind if k != "null") if isinstance(kind, list) else kind
    if kind == "boolean":
        return default is not True
    if kind == "integer":
        return max(schema.get("minimum", 3), 3) + (default == 3)
    if kind == "number":
        return 0.25 if default != 0.25 else 0.5
    if kind == "array":
        items = schema.get("items", {"type": "string"})
        return [another_value(items, None)]
    if kind == "object":
        return {}
    return "something"


LORA_VALUES: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "exclude_modules": ["v_proj"],
    "layers_to_transform": [0],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "layer_replication": [[0, 1], [0, 2]],
    "init_lora_weights": "pissa",
    "eva_config": {"rho": 1.5},
    "velora_config": {"num_groups": 4},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 0.5},
    "monteclora_config": {"num_samples": 3},
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": [1, 2],
    "lora_bias": True,
}
LORA_COMPANIONS: dict[str, dict[str, Any]] = {
    "eva_config": {"init_lora_weights": "eva"},
    "lora_bias": {"init_lora_weights": True},
    "layers_pattern": {"layers_to_transform": [0]},
    "alora_invocation_tokens": {"task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("key", section_keys("lora"))
def test_lora_key_reaches_the_lora_config(key: str):
    from peft import LoraConfig

    default = {field.name: field.default for field in dataclasses.fields(LoraConfig)}[key]
    value = LORA_VALUES.get(key, another_value(section_keys("lora")[key], default))
    built = lora_config({"target_modules": ["q_proj"]} | LORA_COMPANIONS.get(key, {}) | {key: value})
    found = getattr(built, key)
    if dataclasses.is_dataclass(found):
        assert all(getattr(found, name) == wanted for name, wanted in value.items())
    else:
        assert (sorted(found) if isinstance(found, set) else found) == value


TRAINING_VALUES: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "optim": "adafactor",
    "report_to": ["tensorboard"],
    "debug": "underflow_overflow",
    "eval_strategy": "epoch",
    "eval_steps": 5,
    "logging_steps": 7,
    "save_steps": 9,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 0.25,
    "packing_strategy": "bfd_split",
    "include_num_input_tokens_seen": "all",
    "torch_compile_backend": "eager",
    "torch_compile_mode": "reduce-overhead",
    "dataloader_prefetch_factor": 3,
    "trackio_static_space_id": False,
    "optim_args": "a=1",
    "pad_to_multiple_of": 8,
    "load_best_model_at_end": True,
    "eos_token": "</s>",
    "use_cpu": True,
}
TRAINING_COMPANIONS: dict[str, dict[str, Any]] = {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "bf16": {"use_cpu": True},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},  # the linear one takes none
    # On a CPU each layer is compiled instead: tests/train/test_steps.py.
    **{key: {"use_cpu": False} for key in COMPILE_KEYS},
}
# SFTConfig itself refuses these where there is no GPU, or no process group.
NOT_BUILT_HERE = ("tf32", "fp16", "fp16_full_eval", "bf16_full_eval", "ddp_backend")


NOT_SFT = (*CONSUMED, *OPTIMIZER_KEYS, *NOT_BUILT_HERE)


@pytest.mark.parametrize("key", [key for key in section_keys("training") if key not in NOT_SFT])
def test_training_key_reaches_the_sft_config(key: str, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    from trl import SFTConfig

    for name in ("BACKEND", "MODE"):  # where SFTConfig tells accelerate what to compile: gone after this test
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    field = {field.name: field for field in dataclasses.fields(SFTConfig)}[key]
    default = field.default if field.default is not dataclasses.MISSING else None
    value = TRAINING_VALUES.get(key, another_value(section_keys("training")[key], default))
    section = {"use_cpu": True, "bf16": False} | TRAINING_COMPANIONS.get(key, {}) | {key: value}
    found = getattr(training_arguments(section, RunDir.of("x")), key)
    found = getattr(found, "value", found)
    if key == "debug":
        found = found[0].value
    assert found == value


def test_every_training_key_is_either_the_configs_or_read_by_the_data_room():
    from trl import SFTConfig

    names = {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(section_keys("training")) <= names | set(OPTIMIZER_KEYS)  # those in tests/train/test_methods.py
    assert set(CONSUMED) <= set(section_keys("training"))


@pytest.mark.parametrize("key", section_keys("quantization"))
def test_quantization_key_reaches_the_bitsandbytes_config(key: str):
    values = {"load_in_8bit": True, "bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": "float16"}
    value = values.get(key, another_value(section_keys("quantization")[key], None))
    built = quantization_config({key: value})
    found = getattr(built, key)
    assert (str(found).removeprefix("torch.") if isinstance(found, torch.dtype) else found) == value


OWN_GENERATION_KEYS = ("prompts", "batch_size", "max_rows")  # observed in test_generate and below
GENERATION_VALUES: dict[str, Any] = {
    "early_stopping": True,
    "watermarking_config": {"bias": 2.5},
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "exponential_decay_length_penalty": [5, 1.5],
    "sequence_bias": {"x": 1.0},
    "eos_token_id": 7,
}


@pytest.mark.parametrize("key", [key for key in section_keys("generation") if key not in OWN_GENERATION_KEYS])
def test_generation_key_reaches_the_generation_config(key: str, tiny_model: Path):
    from transformers import AutoTokenizer

    value = GENERATION_VALUES.get(key, another_value(section_keys("generation")[key], None))
    built = generation_config({key: value}, [2], AutoTokenizer.from_pretrained(tiny_model))
    found = getattr(built, key)
    if key == "watermarking_config":
        found = {"bias": found["bias"] if isinstance(found, dict) else found.bias}
    assert found == value


def base_of(path: Path) -> Any:
    recipe = load_recipe(path)
    return load_base(recipe, locate(recipe), choose(recipe))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_dtype_is_the_dtype_of_the_weights(write_recipe: Callable[..., Path], dtype: str):
    assert base_of(write_recipe(model={"dtype": dtype})).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_model_attn_implementation_is_the_one_in_use(write_recipe: Callable[..., Path], attention: str):
    model = base_of(write_recipe(model={"attn_implementation": attention}))
    assert model.config._attn_implementation == attention


def test_model_variant_and_subfolder_pick_the_files(write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, workdir / "m" / "inner")
    shutil.copy(tiny_model / "config.json", workdir / "m")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    model.save_pretrained(workdir / "m" / "inner", variant="odd")
    keys = {"pretrained_model_name_or_path": str(workdir / "m"), "subfolder": "inner"}
    assert base_of(write_recipe(model=keys)).model.norm.weight[0] == 1.0
    assert base_of(write_recipe(model=keys | {"variant": "odd"})).model.norm.weight[0] == 3.0


def test_use_safetensors_refuses_other_weights(write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path):
    shutil.copytree(tiny_model, workdir / "m")
    (workdir / "m" / "model.safetensors").unlink()
    keys = {"pretrained_model_name_or_path": str(workdir / "m"), "use_safetensors": True}
    with pytest.raises(RecipeError, match="safetensors"):
        base_of(write_recipe(model=keys))


def test_device_map_on_a_cpu_is_said_to_be_unused(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(model={"device_map": "auto"}))
    assert "device_map" in {choice.what for choice in choose(recipe).made}


def test_hub_keys_reach_from_pretrained(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """No hub here: the real `from_pretrained` must be called with them, and it alone knows what they mean."""
    import transformers

    seen: dict[str, Any] = {}
    real = transformers.AutoModelForCausalLM.from_pretrained

    def spy(location: str, **keywords: Any) -> Any:
        seen.update(keywords)
        return real(location, **keywords)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    keys = {"revision": "a" * 40, "trust_remote_code": True, "local_files_only": True, "cache_dir": "cache"}
    base_of(write_recipe(model=keys))
    assert keys.items() <= seen.items()


def test_every_model_key_is_tested_here():
    tested = {
        "pretrained_model_name_or_path",
        "dtype",
        "attn_implementation",
        "variant",
        "subfolder",
        "use_safetensors",
    }
    tested |= {"device_map", "max_memory", "revision", "trust_remote_code", "local_files_only", "cache_dir"}
    assert set(section_keys("model")) == tested


def test_chat_template_and_end_token_reach_the_tokenizer(write_recipe: Callable[..., Path], workdir: Path):
    (workdir / "t.jinja").write_text("{{ messages[0]['content'] }}")
    recipe = load_recipe(write_recipe(training={"chat_template_path": "t.jinja", "eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(recipe, locate(recipe))
    settle(tokenizer, recipe, ["messages"])
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert tokenizer.eos_token == "<|endoftext|>"


def loaded(path: Path) -> tuple[LoadedData, dict[str, Any]]:
    recipe = load_recipe(path)
    source = locate(recipe)
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    return data, audit(data, 1, 1)


def trained(data: LoadedData) -> str:
    """What the first row trains."""
    return data.sources[0].masker.tokenizer.decode([label for label in data.train()[0]["labels"] if label >= 0])


def kinds(report: dict[str, Any]) -> set[str]:
    return {problem["kind"] for problem in report["problems"]}


ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
LONG = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes no " * 99}]}
CONTROL = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "yes"}]}
# Key of `dataset` → (rows of the training file, None for the demo data; other keys; what tells its effect).
TEXT_AND_CHAT = {**ROW, "text": "Human: a\nAssistant: b"}
DATASET_CASES: dict[str, tuple[list[Any] | None, dict[str, Any], Callable[[LoadedData, dict[str, Any]], bool]]] = {
    "split": (None, {"split": "train[:5]"}, lambda data, report: report["train_rows"] == 5),
    "eval_split": (None, {"eval_split": 0.25}, lambda data, report: report["heldout_rows"] == 6),
    "weight": (None, {"weight": 2}, lambda data, report: len(data.train()) == 48),
    "format": (
        [TEXT_AND_CHAT],
        {"format": "text"},
        lambda data, report: report["sources"][0]["format"] == "text" and trained(data) == "b<|im_end|>",
    ),
    "columns": (
        [{"q": "hi", "a": "yes"}],
        {"columns": {"prompt": "q", "completion": "a"}},
        lambda data, r: len(data.train()) == 1,
    ),
    "bad_rows": (
        [ROW, {"messages": []}],
        {"bad_rows": "skip"},
        lambda data, report: report["train_rows"] == 1 and not kinds(report),
    ),
    "max_bad_fraction": (
        [ROW, {"messages": []}],
        {"bad_rows": "skip", "max_bad_fraction": 0.1},
        lambda data, report: kinds(report) == {"max_bad_fraction"},
    ),
    "truncation": ([ROW, LONG], {"truncation": "keep_start"}, lambda data, r: len(data.train()[1]["input_ids"]) == 160),
    "max_truncated_fraction": (
        [ROW, LONG],
        {"truncation": "drop", "max_truncated_fraction": 0.1},
        lambda data, report: kinds(report) == {"max_truncated_fraction"},
    ),
    "max_duplicate_fraction": (
        [ROW, ROW],
        {"max_duplicate_fraction": 0.1},
        lambda data, report: kinds(report) == {"max_duplicate_fraction"},
    ),
    "overlap": (
        [ROW],
        {"data_files": {"train": "rows.jsonl", "same": "rows.jsonl"}, "eval_split": "same", "overlap": "allow"},
        lambda data, report: report["overlap"] == 1 and not kinds(report),
    ),
    "control_tokens": ([CONTROL], {"control_tokens": "escape"}, lambda data, report: not kinds(report)),
    "streaming": (None, {"streaming": True}, lambda data, report: not hasattr(data.train(), "__len__")),
    "data_dir": (
        None,
        {"data_dir": "inner", "data_files": {"train": "a.jsonl"}, "eval_split": None},
        lambda data, report: report["rows"] == 1,
    ),
    "data_files": ([ROW], {}, lambda data, report: report["rows"] == 1),
    "path": ([ROW], {"path": "text", "format": "text"}, lambda data, report: kinds(report) == {"bad_rows", "no_rows"}),
}
HUB_KEYS = ("name", "cache_dir", "revision")


@pytest.mark.parametrize("key", DATASET_CASES)
def test_dataset_key_has_an_effect_on_the_rows(key: str, write_recipe: Callable[..., Path], workdir: Path):
    rows, keys, holds = DATASET_CASES[key]
    (workdir / "inner").mkdir()
    (workdir / "inner" / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    if rows is not None:
        (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"data_files": {"train": "rows.jsonl"}, "eval_split": None} | keys
    data, report = loaded(write_recipe(dataset=keys))
    assert holds(data, report), report["problems"]


def test_hub_keys_reach_load_dataset(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """No hub here: the call must carry the keys, and it alone knows what they mean."""
    import datasets

    seen: dict[str, Any] = {}

    def spy(**keywords: Any) -> Any:
        seen.update(keywords)
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", spy)
    keys = {"name": "mine", "cache_dir": "here", "revision": "a" * 40, "data_files": "x.parquet", "data_dir": "inner"}
    data, report = loaded(write_recipe(dataset=keys | {"path": "org/data", "eval_split": None}))
    assert keys.items() <= seen.items() and seen["path"] == "org/data"
    assert report["rows"] == 1 and data.sources[0].train.prepared.place(0) == "org/data train row 1"


def test_every_dataset_key_is_tested_here():
    assert set(section_keys("dataset")) == {*DATASET_CASES, *HUB_KEYS}


# Key of `checks` → (value, answer of the trained model to "q", whose right answer is "yes"; what has failed then).
CHECKS_CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "prompts": ([{"prompt": "q", "contains": "yes"}], {"text": "no", "stopped": "eos"}, ["prompts"]),
    "scores": ({"exact_match": {"min": 1}}, {"text": "no", "stopped": "eos"}, ["exact_match"]),
    "min_stopped": (0.5, {"text": "yes", "stopped": "length"}, ["min_stopped"]),
}


@pytest.mark.parametrize("key", CHECKS_CASES)
def test_checks_key_refuses_an_answer(key: str):
    value, given, failed = CHECKS_CASES[key]
    rows = [{"prompt": "q", "expected": "yes", "adapter": given}]
    off = {"min_stopped": 0}
    assert summary(rows, off)["failed"] == []
    assert [failure["check"] for failure in summary(rows, off | {key: value})["failed"]] == failed


def test_every_checks_key_is_tested_here():
    assert set(section_keys("checks")) == {*CHECKS_CASES, "forgetting"}  # which is what `evaluate` asks


# Key of an entry of `checks.prompts` → (value, what the trained model answers; the base answers "no").
EXPECTATION_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "contains": ("yes", {"text": "no way"}),
    "equals": ("yes", {"text": "yes!"}),
    "regex": ("^yes", {"text": "oh yes"}),
    "json": (True, {"text": "yes"}),
    "stops": (True, {"text": "yes", "fault": "ran into the limit of new tokens"}),
    "differs_from_base": (True, {"text": "no"}),
}


@pytest.mark.parametrize("key", EXPECTATION_CASES)
def test_expectation_key_refuses_an_answer(key: str):
    value, given = EXPECTATION_CASES[key]
    assert broken({"prompt": "q", "stops": False}, given, "no") == []
    [failed] = broken({"prompt": "q", "stops": False, key: value}, given, "no")
    assert failed["check"] == key


def test_every_expectation_key_is_tested_here():
    asked = section_keys("checks")["prompts"]["items"]["properties"]
    assert set(asked) == {*EXPECTATION_CASES, "prompt", "max_new_tokens"}  # these two reach the model: test_generate


def test_hints_of_nested_lora_sections_are_classes_that_peft_has():
    from peft import LoraConfig

    hints = typing.get_type_hints(LoraConfig)
    nested = [key for key, schema in section_keys("lora").items() if "properties" in json.dumps(schema)]
    for key in nested:
        assert any(dataclasses.is_dataclass(member) for member in (hints[key], *typing.get_args(hints[key])))
