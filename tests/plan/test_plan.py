"""`plan` counts what is trained, holds it against a card, says what to change, and what it says is true."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from lora_recipes.cli import main
from lora_recipes.errors import MachineError, RecipeError, RunError
from lora_recipes.model.build import load_base
from lora_recipes.model.machine import Gpu, choose
from lora_recipes.model.source import locate
from lora_recipes.plan import Estimate, config_of, plan, target_for, target_of
from lora_recipes.plan.cards import CARDS, GIB
from lora_recipes.plan.cost import flops_a_token
from lora_recipes.plan.storage import optimizer_bytes
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir
from tests.conftest import NF4, ROOT

LLAMA = ROOT / "recipes" / "llama2-7b-qlora.yaml"


def of(path: Path, *words: str, gpu: str | None = None, gpus: int | None = None, config: Path | None = None) -> dict:
    return plan(load_recipe(path, words), target_of(gpu, gpus, str(config) if config else None))


def parts_of(path: Path, *words: str, **where: Any) -> dict[str, int]:
    """Memory by part, without the advice, which takes several rehearsals."""
    config = where.pop("config", None)
    target = target_of(where.get("gpu"), where.get("gpus"), str(config) if config else None)
    return plan(load_recipe(path, words), target, advise=False)["memory"]["parts"]


def test_the_tutorials_llama_is_planned_offline(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", str(LLAMA), "--gpu", "24GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trainable"], found["all"], found["trainable_percent"]) == (8_388_608, 6_746_804_224, 0.1243)
    assert found["hits"] == {"q_proj": 32, "v_proj": 32}
    memory = found["memory"]
    assert memory["low"] < memory["expected"] == sum(memory["parts"].values()) < memory["high"]
    assert found["fits"] and not found["suggestions"] and found["max_micro_batch"] >= 4
    assert found["target"] == {"name": "24GiB", "memory": 24 * GIB, "gpus": 1, "sharding": "none", "measured": False}


@pytest.mark.parametrize("double", [False, True])
def test_4bit_weights_take_the_bytes_that_were_planned(write_recipe: Callable[..., Path], double: bool):
    path = write_recipe(quantization=NF4 | {"bnb_4bit_use_double_quant": double}, model={"dtype": "float32"})
    recipe = load_recipe(path)
    model = load_base(recipe, locate(recipe), choose(recipe))
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert parts_of(path)["base_weights"] == pytest.approx(held, rel=0.002)


def test_adapter_bytes_are_those_of_the_real_adapter(write_recipe: Callable[..., Path]):
    from tests.train.runs import make_trainer

    path = write_recipe()
    found = of(path)
    trained = [p for p in make_trainer(path).model.parameters() if p.requires_grad]
    assert found["trainable"] == sum(p.numel() for p in trained)
    assert found["memory"]["parts"]["adapter"] == sum(p.numel() * p.element_size() for p in trained)
    assert {p.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "lion_8bit", "lion_32bit", "ademamix", "sgd", "rmsprop"])
def test_optimizer_states_take_the_bytes_that_were_planned(write_recipe: Callable[..., Path], name: str):
    from torch.utils._pytree import tree_leaves

    from tests.train.runs import make_trainer

    trainer = make_trainer(write_recipe(training={"optim": name}), "lora.r=32")
    trainer.train()
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
    maps = {
        id(leaf): leaf for leaf in states if leaf.numel() == 256 and leaf.dtype == torch.float32
    }  # 8-bit code tables
    held = sum(t.numel() * t.element_size() for t in states if t.numel() > 1 and id(t) not in maps)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert optimizer_bytes(name, trained) == (pytest.approx(held, rel=0.05, abs=16), True)


def test_an_unknown_architecture_says_how_to_get_it(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe(model={"pretrained_model_name_or_path": "nobody/unheard-of"})
    assert main(["plan", str(path)]) == 3
    assert "hf download nobody/unheard-of config.json" in capsys.readouterr().err


def test_a_target_that_matches_nothing_is_an_error(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe(lora={"target_modules": ["q_proj", "w_proj"]})
    assert main(["plan", str(path)]) == 2
    assert f"{path}:" in (said := capsys.readouterr().err) and "'w_proj' matches no module" in " ".join(said.split())


# 13 GiB is less than Llama-2-7B's 16-bit weights.
@pytest.mark.parametrize("gpu", ["40GiB", "24GiB", "13GiB", "6GiB"])
def test_what_is_suggested_makes_it_fit_and_keeps_the_rows_of_a_step(gpu: str):
    words = ["quantization=null", "training.per_device_train_batch_size=16", "training.max_length=4096"]
    words += ["training.activation_checkpointing=false", "training.optim=adamw_torch"]
    recipe = load_recipe(LLAMA, words)
    target = target_of(gpu, None, None)
    found = plan(recipe, target)
    assert not found["fits"] and found["suggestions"]
    settings: dict[str, Any] = {}
    for suggestion in found["suggestions"]:
        settings |= suggestion["settings"]
    again = plan(recipe.changed(settings), target)
    assert again["fits"] == found["suggestions"][-1]["fits"] is True
    assert again["memory"]["expected"] == found["suggestions"][-1]["expected"]
    before, after = found["micro_batch"], again["micro_batch"]
    assert before["rows"] * before["accumulation"] == after["rows"] * after["accumulation"]
    costs = [suggestion["high"] for suggestion in found["suggestions"]]
    assert costs == sorted(costs, reverse=True)


def test_suggestions_come_cheapest_first_and_stop_when_it_fits():
    words = ["quantization=null", "training.per_device_train_batch_size=16", "training.max_length=4096"]
    order = [next(iter(one["settings"])) for one in of(LLAMA, *words, gpu="13GiB")["suggestions"]]
    assert order[:2] == ["training.per_device_train_batch_size", "quantization"]
    assert of(LLAMA, *words, gpu="80GiB")["suggestions"] == [] or order[0].startswith("training.per_device")


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    found = of(LLAMA, gpu="24GiB")
    most = found["max_micro_batch"]
    assert of(LLAMA, f"training.per_device_train_batch_size={most}", gpu="24GiB")["fits"]
    assert not of(LLAMA, f"training.per_device_train_batch_size={most + 1}", gpu="24GiB")["fits"]


def test_nothing_fits_on_a_card_smaller_than_the_weights():
    found = of(LLAMA, gpu="3GiB")
    assert not found["fits"] and found["max_micro_batch"] == 0 and not found["suggestions"][-1]["fits"]


def test_a_plan_is_applied_as_a_child_recipe(write_recipe: Callable[..., Path], workdir: Path, capsys: Any):
    path = write_recipe(model={"pretrained_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf"})
    words = ["training.per_device_train_batch_size=16", "training.max_length=4096", "training.bf16=true"]
    assert main(["plan", str(path), *words, "--gpu", "t4", "--apply", "on-t4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"training.bf16": False, "training.fp16": True}.items() <= found["required"].items()
    child = workdir / "on-t4.yaml"
    assert found["applied"] == str(child)
    assert "extends: tiny.yaml" in child.read_text(encoding="utf-8")
    recipe = load_recipe(child)
    assert recipe.get("training.fp16") is True and recipe.get("quantization.load_in_4bit") is True
    assert of(child, gpu="t4")["fits"] and not of(child, gpu="t4")["required"]


def test_a_card_without_bf16_is_planned_in_fp16_and_refused_otherwise(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(training={"bf16": True}))
    with pytest.raises(MachineError, match=r"t4-16 has no bf16; set training.bf16=false training.fp16=true"):
        Estimate(recipe, config_of(recipe), target_of("t4", None, None))
    assert plan(recipe, target_of("t4", None, None))["required"] == {"training.bf16": False, "training.fp16": True}


@pytest.mark.parametrize(
    ("word", "name", "memory"),
    [
        ("24GiB", "24GiB", 24 * GIB),
        ("24GB", "24GB", 24 * GIB),
        ("7.5g", "7.5g", 15 * GIB // 2),
        ("rtx4090", "rtx4090-24", 24564 * 2**20),
        ("4090", "rtx4090-24", 24564 * 2**20),
        ("A100-80", "a100-80", 81920 * 2**20),
        ("h100", "h100-80", 81559 * 2**20),
    ],
)
def test_cards_are_known_by_name_and_by_memory(word: str, name: str, memory: int):
    target = target_of(word, None, None)
    assert (target.name, target.memory) == (name, memory)
    assert target.gpu == Gpu(name, True)


@pytest.mark.parametrize(("word", "said"), [("a100", "which of a100-40, a100-80"), ("voodoo2", "known are t4-16")])
def test_other_cards_are_refused(word: str, said: str):
    with pytest.raises(RunError, match=said):
        target_of(word, None, None)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))])
def test_accelerate_reads_each_config_and_plan_understands_it(name: str):
    file = ROOT / "accelerate_configs" / f"{name}.yaml"
    assert load_config_from_file(str(file)).num_processes >= 1
    target = target_of("a100-80", None, str(file))
    assert target.sharding == (name if name in ("ddp", "fsdp2", "zero2", "zero3") else "none")


def test_sharing_takes_what_it_shares_off_each_device(tmp_path: Path):
    def four(kind: str) -> Path:
        file = tmp_path / f"{kind}.yaml"
        text = (ROOT / "accelerate_configs" / f"{kind}.yaml").read_text(encoding="utf-8")
        file.write_text(text.replace("num_processes: 2", "num_processes: 4"), encoding="utf-8")
        return file

    words = ["quantization=null", "lora.target_modules=all-linear", "lora.r=64"]
    one = parts_of(LLAMA, *words, gpu="a100-80")
    shared = {
        kind: parts_of(LLAMA, *words, gpu="a100-80", config=four(kind)) for kind in ("ddp", "fsdp2", "zero2", "zero3")
    }
    assert shared["ddp"]["base_weights"] == one["base_weights"] == shared["zero2"]["base_weights"]
    assert shared["ddp"]["communication"] == one["gradients"]
    for kind in ("fsdp2", "zero3"):
        assert shared[kind]["base_weights"] == pytest.approx(one["base_weights"] / 4, rel=0.01)
        assert shared[kind]["gradients"] == pytest.approx(one["gradients"] / 4, rel=0.01)
        assert shared[kind]["communication"] > 0
    assert shared["zero2"]["gradients"] == pytest.approx(one["gradients"] / 4, rel=0.01)
    assert shared["fsdp2"]["optimizer_states"] == pytest.approx(one["optimizer_states"] / 4, rel=0.01)
    assert all(parts["activations"] == one["activations"] for parts in shared.values())


def test_packed_4bit_weights_are_not_shared_unless_they_are_stored_as_floats():
    config = ROOT / "accelerate_configs" / "fsdp2.yaml"
    whole = parts_of(LLAMA, gpu="24GiB", config=config)["base_weights"]
    stored = parts_of(LLAMA, "quantization.bnb_4bit_quant_storage=bfloat16", gpu="24GiB", config=config)
    assert stored["base_weights"] < 0.6 * whole


def test_under_fsdp_an_optimizer_of_torch_is_required_and_none_of_bitsandbytes_advised():
    target = target_of("8GiB", None, str(ROOT / "accelerate_configs" / "fsdp2.yaml"))
    found = plan(load_recipe(LLAMA), target)  # of QLoRA: paged
    assert found["required"] == {"training.optim": "adamw_torch_fused"} and not found["fits"]
    assert found["suggestions"] and not any("training.optim" in change["settings"] for change in found["suggestions"])


def test_layers_are_spread_over_devices_where_the_recipe_says_so():
    mixtral = ROOT / "recipes" / "mixtral-8x7b-lora.yaml"
    target = target_for(load_recipe(mixtral), "a100-80", 2)
    assert target.sharding == "layers"
    found = plan(load_recipe(mixtral), target, advise=False)
    assert found["fits"] and not plan(load_recipe(mixtral), target_of("a100-80", None, None), advise=False)["fits"]


def test_gradients_of_a_full_run_are_subtracted_whole():
    words = ["training.per_device_train_batch_size=1", "training.max_length=64"]
    full = ROOT / "recipes" / "smollm2-135m-full.yaml"
    config = ROOT / "accelerate_configs" / "fsdp2.yaml"
    one, two = (
        parts_of(full, *words, f"training.gradient_accumulation_steps={n}", gpu="24GiB", config=config) for n in (1, 2)
    )
    assert one["activations"] <= 1.1 * two["activations"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a list", "is no accelerate config"),
        ("num_processes: two", "is no accelerate config"),
        ("distributed_type: MEGATRON_LM", "MEGATRON_LM is not planned"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP 1 is not planned"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}", "stage 1 is not planned"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {offload_param_device: cpu}", "offload_param_device is not"),
        ("distributed_type: MULTI_GPU\nnum_processes: 8", "--gpus 4, but .* says num_processes: 8"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(text: str, said: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=said):
        target_of("a100-80", 4, str(tmp_path / "c.yaml"))


def test_processes_of_a_cpu_share_its_memory_and_its_cores(write_recipe: Callable[..., Path]):
    one, four = (target_of(None, count, None) for count in (1, 4))
    assert four.memory == one.memory // 4 and four.sharding == "ddp"


def test_a_recipe_for_the_cpu_is_planned_for_it(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe(write_recipe(training={"use_cpu": True}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert target_for(recipe).gpu is None
    with pytest.raises(RunError, match=r"tiny.yaml:\d+: `use_cpu: true` computes on the CPU, and --gpu t4"):
        target_for(recipe, "t4")


def test_lora_fa_is_planned_with_half_the_weights(write_recipe: Callable[..., Path]):
    from tests.train.runs import make_trainer

    path = write_recipe(training={"lorafa": True})
    found = plan(load_recipe(path), advise=False)
    trained = [p for p in make_trainer(path).model.parameters() if p.requires_grad]
    assert found["trainable"] == sum(p.numel() for p in trained)
    assert found["memory"]["parts"]["gradients"] == sum(p.numel() * p.element_size() for p in trained)


def test_layers_that_are_not_checkpointed_are_rehearsed_as_such():
    demo = ROOT / "recipes" / "smollm2-135m-lora.yaml"
    every = [
        parts_of(demo, *(["training.activation_checkpointing=true", f"training.activation_checkpointing_kwargs={how}"]))
        for how in ("{every_n_layers: 1}", "{every_n_layers: 2}", "{every_n_layers: 3}")
    ]
    none = parts_of(demo)
    sizes = [parts["activations"] + parts["logits_and_loss"] for parts in [*every, none]]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_a_suggestion_keeps_the_rules_of_recipes():
    pissa = load_recipe(ROOT / "recipes" / "smollm2-135m-pissa.yaml")
    found = plan(pissa, target_of("1GiB", None, None))
    assert found["suggestions"] and not any("quantization" in one["settings"] for one in found["suggestions"])


def test_settings_that_are_not_rehearsed_are_said(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe(training={"label_smoothing_factor": 0.1}))
    assert any("label_smoothing_factor: not planned" in one for one in plan(recipe, advise=False)["extrapolated"])


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_other_kinds_of_models_are_refused(kind: str, write_recipe: Callable[..., Path], workdir: Path):
    AutoConfig.for_model(kind).save_pretrained(workdir / "m")
    path = write_recipe(model={"pretrained_model_name_or_path": str(workdir / "m")})
    with pytest.raises(RecipeError, match=r"tiny.yaml:\d+: .* is no causal language model"):
        plan(load_recipe(path))


def test_a_folder_that_is_not_there_is_one_message(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    assert main(["plan", str(write_recipe(model={"pretrained_model_name_or_path": "./nowhere/x"}))]) == 2
    assert "no folder './nowhere/x'" in capsys.readouterr().err


def test_an_audit_of_other_rows_is_not_trusted(write_recipe: Callable[..., Path], workdir: Path):
    path = write_recipe(training={"max_steps": -1})
    assert main(["audit", str(path)]) == 0
    assert of(path)["cost"]["tokens_are"].startswith("as audited")
    (workdir / "one.jsonl").write_text((ROOT / "data/orders/train.jsonl").read_text().splitlines()[0] + "\n")
    other = of(path, "dataset.data_files=one.jsonl", "dataset.eval_split=null")["cost"]
    assert other["rows"] == 1 and other["tokens_are"].startswith("at most")
    assert of(path, "training.max_length=200")["cost"]["tokens_are"].startswith("at most")


def test_packed_rows_are_fewer_and_full(write_recipe: Callable[..., Path]):
    path = write_recipe(training={"max_steps": -1})
    assert main(["audit", str(path)]) == 0
    alone, packed = of(path)["cost"], of(path, "training.packing=true")["cost"]
    assert packed["steps"] < alone["steps"] and packed["tokens"] >= alone["tokens"]


def test_what_cannot_be_applied_is_said(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    assert main(["plan", str(write_recipe()), "--apply", "same"]) == 2
    assert "there is nothing to change" in capsys.readouterr().err
    assert main(["plan", "--table", "--gpu", "t4"]) == 2
    assert "`--gpu` has no meaning for `plan --table`" in capsys.readouterr().err
    for memory in ("0GiB", "9999999999999999GiB", f"{'9' * 400}GiB"):
        assert main(["plan", str(write_recipe()), "--gpu", memory]) == 2


def test_sharding_needs_a_gpu():
    with pytest.raises(RunError, match="fsdp2 needs GPUs"):
        target_of(None, None, str(ROOT / "accelerate_configs" / "fsdp2.yaml"))


def test_steps_and_tokens_are_counted_from_the_rows_and_then_from_the_audit(write_recipe: Callable[..., Path]):
    path = write_recipe(training={"max_steps": -1, "num_train_epochs": 2})
    cost = of(path)["cost"]
    assert (cost["rows"], cost["steps"]) == (24, 12)  # 24 rows, 4 a step, 2 epochs
    assert cost["tokens"] == 12 * 4 * 160 and cost["tokens_are"].startswith("at most")
    assert main(["audit", str(path)]) == 0
    audited = of(path)["cost"]
    report = json.loads(RunDir.of("tiny").audit.read_text(encoding="utf-8"))
    assert (
        audited["tokens"] == pytest.approx(2 * report["epoch_tokens"], rel=0.01) and audited["tokens"] < cost["tokens"]
    )
    assert audited["flops"] < cost["flops"] and audited["seconds"] > 0


def test_rows_on_the_hub_are_not_guessed(write_recipe: Callable[..., Path]):
    path = write_recipe(
        dataset={"path": "somebody/rows", "data_files": None, "eval_split": 0.1}, training={"max_steps": -1}
    )
    cost = of(path)["cost"]
    assert (cost["rows"], cost["steps"], cost["tokens"], cost["seconds"]) == (None, None, None, None)
    assert of(path, "training.max_steps=7")["cost"]["steps"] == 7


def test_full_training_costs_about_six_operations_a_weight_and_token():
    recipe = load_recipe(LLAMA, ["quantization=null", "training.activation_checkpointing=false"]).changed(
        {"lora": None}
    )
    estimate = Estimate(recipe, config_of(recipe), target_of("h100", None, None))
    met = estimate.base_parameters - estimate.head_parameters  # without the input embedding
    assert flops_a_token(estimate, 0) == pytest.approx(6 * met, rel=0.02)


def test_a_token_meets_only_the_experts_it_passes():
    recipe = load_recipe(ROOT / "recipes" / "qwen3-30b-a3b-lora.yaml")
    estimate = Estimate(recipe, config_of(recipe), target_of("h100", None, None))
    assert 5e9 < flops_a_token(estimate, 0) / 3 < 8e9  # 3 B active of 30 B: forward, backward and once more


def test_a_measured_rate_gives_the_time(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    assert main(["plan", str(write_recipe()), "--gpu", "h100", "--tflops", "0.001", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["seconds"] == pytest.approx(cost["flops"] / 1e9) and cost["rate_is"] == "as given"


def test_disk_is_that_of_the_files(write_recipe: Callable[..., Path]):
    from lora_recipes.merge import merge
    from lora_recipes.train import launch
    from lora_recipes.train.checkpoints import numbered

    path = write_recipe(training={"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2})
    disk = of(path)["cost"]["disk"]
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    kept = [path for _, path in numbered(run_dir.checkpoints)]
    assert len(kept) == 2 and disk["checkpoints"] == 2 * disk["checkpoint"]
    size = sum((kept[0] / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt"))
    assert disk["checkpoint"] == pytest.approx(size, rel=0.35)  # the files have names and shapes in them as well
    merge(load_recipe(path))
    assert disk["merged"] == pytest.approx((run_dir.merged / "model.safetensors").stat().st_size, rel=0.05)


def test_what_lies_outside_the_checked_range_is_said(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe()
    assert of(path)["extrapolated"] == []
    assert main(["plan", str(path), "training.max_length=8192", "training.per_device_train_batch_size=64"]) == 0
    said = capsys.readouterr().err
    assert "extrapolated: 64 rows a micro-batch" in said and "extrapolated: 8192 tokens a row" in said


def test_a_longer_evaluation_batch_counts_where_it_is_computed_whole(write_recipe: Callable[..., Path]):
    keys = {"eval_strategy": "steps", "per_device_eval_batch_size": 64}
    whole = {"label_smoothing_factor": 0.1}  # a CPU computes all else in pieces
    parts = [parts_of(write_recipe(training=more)) for more in (whole, whole | keys, keys)]
    assert parts[0]["evaluation"] == 0 < parts[1]["evaluation"]
    assert parts[2]["evaluation"] < parts[1]["evaluation"]


def test_options_of_plan_belong_to_plan(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    assert main(["check", str(write_recipe()), "--gpu", "t4"]) == 2
    assert "`--gpu` belongs to `plan`" in capsys.readouterr().err


def test_every_card_has_memory_and_a_rate():
    assert all(memory > 15000 and rate > 0 for memory, rate, _ in CARDS.values())
