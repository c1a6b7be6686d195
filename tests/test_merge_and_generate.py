"""After training: merged logits equal adapter logits, answers are scored, and nothing wrong is ever published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_recipes.cli import main
from lora_recipes.errors import EXIT_USER
from lora_recipes.generate import generate
from lora_recipes.merge import merge
from lora_recipes.model.adapted import attach_adapter
from lora_recipes.model.build import load_base
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, read_json
from lora_recipes.train import launch
from tests.conftest import NF4

IDS = torch.arange(3, 60)[None]


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest) -> None:
    """A fresh process, which takes seconds, only where a test is about what users get."""
    if "served" not in request.node.name:
        request.getfixturevalue("quick_proof")


def trained(path: Path) -> RunDir:
    assert launch(str(path), []) == 0
    return RunDir.of(path.stem)


def adapter_logits(path: Path, *, quantized: bool) -> torch.Tensor:
    recipe = load_recipe(path)
    base = load_base(recipe, locate(recipe), choose(recipe), dtype="float32", quantized=quantized)
    with torch.no_grad():
        return attach_adapter(base, RunDir.of(path.stem).adapter)(input_ids=IDS).logits


def merged_logits(run_dir: RunDir) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(run_dir.merged)(input_ids=IDS).logits


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 2}}],
    ids=["lora", "rslora", "dora", "patterns"],
)
def test_merged_logits_equal_adapter_logits_and_differ_from_the_base(
    write_recipe: Callable[..., Path], tiny_model: Path, lora: dict
):
    path = write_recipe(lora=lora)
    run_dir = trained(path)
    report = merge(load_recipe(path))
    assert report["passed"] and report == read_json(run_dir.parity)
    torch.testing.assert_close(merged_logits(run_dir), adapter_logits(path, quantized=False), rtol=0, atol=1e-4)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=IDS).logits
    assert (merged_logits(run_dir) - base).abs().max() > 1e-2


def test_a_qlora_adapter_merges_into_the_dequantized_base_as_the_function_that_was_trained(
    write_recipe: Callable[..., Path],
):
    path = write_recipe(quantization=NF4, merge={"dtype": "float32", "base": "dequantized"})
    run_dir = trained(path)
    report = merge(load_recipe(path))
    torch.testing.assert_close(merged_logits(run_dir), adapter_logits(path, quantized=True), rtol=0, atol=1e-4)
    assert report["against_trained"]["greedy_agreement"] == 1.0
    assert "quantization_config" not in json.loads((run_dir.merged / "config.json").read_text())


@pytest.mark.parametrize(("compute", "share"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_an_adapter_that_answers_in_16_bits_need_not_say_every_word_of_the_merged_model(
    write_recipe: Callable[..., Path], compute: str, share: float
):
    """As the demo's QLoRA on a CPU with AMX: 239 of 240 answers."""
    path = write_recipe(
        quantization=NF4 | {"bnb_4bit_compute_dtype": compute},
        training={"bf16": compute == "bfloat16", "use_cpu": True},
        merge={"dtype": "float32", "base": "dequantized"},
    )
    trained(path)
    report = merge(load_recipe(path))
    assert report["passed"] and report["tolerance"]["greedy_agreement"] == 1.0
    assert report["answers_in_common"] == share


def test_a_qlora_adapter_merges_into_the_original_base_and_the_drift_is_reported(write_recipe: Callable[..., Path]):
    path = write_recipe(quantization=NF4)
    run_dir = trained(path)
    report = merge(load_recipe(path))
    torch.testing.assert_close(merged_logits(run_dir), adapter_logits(path, quantized=False), rtol=0, atol=1e-4)
    assert report["passed"]
    assert report["against_trained"]["max_abs_logit_difference"] > report["max_abs_logit_difference"]


def test_merge_after_generate_is_the_same_as_merge_alone_for_4bit(write_recipe: Callable[..., Path]):
    path = write_recipe(quantization=NF4, merge={"dtype": "float32", "base": "dequantized"})
    run_dir = trained(path)
    merge(load_recipe(path))
    alone = load_file(run_dir.merged / "model.safetensors")
    shutil.rmtree(run_dir.merged)
    generate(load_recipe(path))
    merge(load_recipe(path))
    after = load_file(run_dir.merged / "model.safetensors")
    assert all(torch.equal(alone[name], after[name]) for name in alone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_merge_is_saved_in_that_type_and_passes_its_own_tolerance(
    write_recipe: Callable[..., Path], dtype: str
):
    path = write_recipe(merge={"dtype": dtype, "max_shard_size": "20KB"})
    run_dir = trained(path)
    assert merge(load_recipe(path))["passed"]
    assert AutoModelForCausalLM.from_pretrained(run_dir.merged).dtype == getattr(torch, dtype)
    assert len(list(run_dir.merged.glob("*.safetensors"))) > 1


def test_a_merged_folder_is_a_whole_model_that_can_be_served(write_recipe: Callable[..., Path], tiny_model: Path):
    path = write_recipe()
    run_dir = trained(path)
    merge(load_recipe(path))
    config = json.loads((run_dir.merged / "config.json").read_text())
    generation = json.loads((run_dir.merged / "generation_config.json").read_text())
    assert config["use_cache"] is True and generation["use_cache"] is True
    assert generation["eos_token_id"] == [2]
    saved, original = (AutoTokenizer.from_pretrained(folder) for folder in (run_dir.merged, tiny_model))
    assert saved.chat_template == original.chat_template
    assert saved("order 12")["input_ids"] == original("order 12")["input_ids"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in run_dir.merged.iterdir())


def test_merge_twice_leaves_the_first_as_it_was(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe()
    run_dir = trained(path)
    capsys.readouterr()
    assert main(["merge", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    stamps = {file: file.stat().st_mtime_ns for file in run_dir.merged.iterdir()}
    assert main(["merge", str(path), "--json"]) == 2
    assert "exists and is left as it is" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert stamps == {file: file.stat().st_mtime_ns for file in run_dir.merged.iterdir()}


def test_merge_and_generate_before_train_name_the_training_command(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe()
    for verb in ("merge", "generate"):
        assert main([verb, str(path)]) == 2
        assert f"accelerate launch run.py {path}" in capsys.readouterr().err


def test_a_nan_adapter_is_never_merged(write_recipe: Callable[..., Path]):
    path = write_recipe()
    run_dir = trained(path)
    weights = run_dir.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]][0, 0] = float("inf")
    save_file(tensors, weights, {"format": "pt"})
    assert main(["merge", str(path)]) == 4
    assert not run_dir.merged.exists()


@pytest.mark.promise("M8")
def test_a_base_that_is_quantized_on_disk_is_refused(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    quantized = workdir / "quantized"
    shutil.copytree(tiny_model, quantized)
    path = write_recipe(model={"pretrained_model_name_or_path": str(quantized)})
    run_dir = trained(path)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    assert main(["merge", str(path)]) == EXIT_USER
    assert "is quantized on disk" in " ".join(capsys.readouterr().err.split()) and not run_dir.merged.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_does_not_answer_like_the_adapter_is_not_published(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, dtype: str
):
    """The positive control of the proof: a merge that loses the adapter must fail it."""
    path = write_recipe(merge={"dtype": dtype}, training={"learning_rate": 1e-3})  # a weak adapter
    run_dir = trained(path)
    monkeypatch.setattr("lora_recipes.merge.stream.merge_rows", lambda layer, parameter, weight, first: weight)
    assert main(["merge", str(path)]) == 4
    assert "does not answer like the adapter" in " ".join(capsys.readouterr().err.split())
    assert not run_dir.merged.exists() and not list(run_dir.root.glob(".merged*"))
    assert read_json(run_dir.parity)["passed"] is False


def test_what_a_killed_merge_left_is_gone_after_the_next(write_recipe: Callable[..., Path]):
    path = write_recipe()
    trained(path)
    left = RunDir.of("tiny").root / ".parity" / "base"
    left.mkdir(parents=True)
    (left / "0.safetensors").write_bytes(b"half a file")
    assert merge(load_recipe(path))["passed"]
    assert not list(RunDir.of("tiny").root.glob(".parity*"))


def test_status_tells_what_is_proved_and_what_to_type_next(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe()

    def status() -> dict:
        capsys.readouterr()
        assert main(["status", str(path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert (status()["state"], status()["verdict"]) == ("not started", "do not ship")
    trained(path)
    assert status()["gates"]["trained"] is True and status()["next"][0].startswith("lora-recipes merge")
    merge(load_recipe(path))
    generate(load_recipe(path))
    found = status()
    assert found["gates"]["merge_parity"] is True and found["gates"]["merged_answers"] is True
    assert found["gates"]["answers"] is True and found["gates"]["improved"] is None
    assert found["verdict"] == "do not ship" and found["next"] == [f"lora-recipes evaluate {path}"]
    weights = RunDir.of("tiny").adapter / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    found = status()  # trained again, so to speak: what was merged is of another adapter
    assert found["gates"]["merge_parity"] is None and found["next"][0].endswith(f"lora-recipes merge {path}")


def test_the_dequantized_base_is_quantized_from_the_type_it_was_trained_in(write_recipe: Callable[..., Path]):
    path = write_recipe(
        quantization=NF4, model={"dtype": "bfloat16"}, merge={"dtype": "float32", "base": "dequantized"}
    )
    run_dir = trained(path)
    report = merge(load_recipe(path))
    recipe = load_recipe(path)
    with torch.no_grad():
        trained_model = attach_adapter(load_base(recipe, locate(recipe), choose(recipe)), run_dir.adapter)
        expected = trained_model(input_ids=IDS).logits.float()
    assert (merged_logits(run_dir) - expected).abs().max() < 0.1  # bf16 activations against float32
    assert report["against_trained"]["mean_kl"] < 1e-4


def test_the_steps_after_training_refuse_another_recipes_adapter(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe()
    run_dir = trained(path)
    for verb in ("generate", "merge"):
        capsys.readouterr()
        assert main([verb, str(path), "lora.lora_alpha=99"]) == 4
        assert "lora.lora_alpha: 8 then, 99 now" in capsys.readouterr().err
    assert not run_dir.merged.exists() and not run_dir.generations.exists()
