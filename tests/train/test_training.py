"""What training promises: the adapter moves, the base does not, a seed repeats, what is saved is what was trained."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from lora_recipes.cli import main
from lora_recipes.data.load import load_data
from lora_recipes.errors import MachineError, RefusedError, RunError
from lora_recipes.model.adapted import attach_adapter
from lora_recipes.model.build import end_token_ids, keep_canonical_4bit, load_base, load_tokenizer
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import Locked, RunDir, read_json, read_jsonl, write_json
from lora_recipes.train import launch
from lora_recipes.train.record import write_status
from lora_recipes.train.session import _require_state
from lora_recipes.train.trainer import RecipeTrainer, build_trainer, training_arguments
from tests.conftest import NF4, ROOT
from tests.train.runs import cut_off, reseal


def make_trainer(path: Path, *overrides: str) -> RecipeTrainer:
    recipe = load_recipe(path, overrides)
    source, choices = locate(recipe), choose(recipe)
    tokenizer = load_tokenizer(recipe, source)
    data = load_data(recipe, tokenizer, set(end_token_ids(recipe, source, tokenizer)))
    base = load_base(recipe, source, choices)
    args = training_arguments(choices.training, RunDir.of(recipe.name))
    return build_trainer(recipe, args, choices, base, tokenizer, data, [])


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_every_adapter_tensor_moves_and_no_base_tensor_does(
    write_recipe: Callable[..., Path], quantization: dict | None
):
    trainer = make_trainer(write_recipe(quantization=quantization))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        moved = not torch.equal(before[name], value)
        assert moved == ("lora_" in name), name


def test_two_runs_with_one_seed_give_byte_identical_adapters(write_recipe: Callable[..., Path], workdir: Path):
    digests = []
    for name in ("first", "second"):
        recipe = write_recipe(name, lora={"lora_dropout": 0.1})
        # A fresh process each: set order, hash seeds and import order may all differ.
        subprocess.run([sys.executable, ROOT / "run.py", recipe], cwd=workdir, check=True, capture_output=True)
        files = sorted((workdir / "outputs" / name / "adapter").iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    named = {"README.md", "provenance.json", "SHA256SUMS"}  # which say what the recipe is called
    same = [{name: digest for name, digest in found.items() if name not in named} for found in digests]
    assert same[0] == same[1]
    assert set(digests[0]) >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}


def test_another_seed_gives_another_adapter(write_recipe: Callable[..., Path]):
    first, second = (make_trainer(write_recipe(), f"training.seed={seed}") for seed in (1, 2))
    name = next(name for name, _ in first.model.named_parameters() if "lora_A" in name)
    assert not torch.equal(first.model.get_parameter(name), second.model.get_parameter(name))


def test_saved_adapter_reloads_with_every_key_and_equal_logits(write_recipe: Callable[..., Path], tiny_model: Path):
    path = write_recipe()
    trainer = make_trainer(path)
    trainer.train()
    folder = Path("adapter")
    trainer.save_model(str(folder))
    recipe = load_recipe(path)
    reloaded = attach_adapter(load_base(recipe, locate(recipe), choose(recipe)), folder)  # refuses any missing key
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("change", ["missing", "unexpected", "nan"])
def test_an_adapter_that_is_not_whole_is_refused(write_recipe: Callable[..., Path], change: str):
    path = write_recipe()
    trainer = make_trainer(path)
    trainer.save_model("adapter")
    tensors = load_file("adapter/adapter_model.safetensors")
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    else:
        tensors[name][0, 0] = float("nan")
    save_file(tensors, "adapter/adapter_model.safetensors", {"format": "pt"})
    recipe = load_recipe(path)
    with pytest.raises(RefusedError):
        attach_adapter(load_base(recipe, locate(recipe), choose(recipe)), Path("adapter"))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_cpu_loss_is_trls_loss_in_value_and_gradient(
    write_recipe: Callable[..., Path], loss_type: str, packing: bool, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(write_recipe(training={"loss_type": loss_type, "packing": packing}))
    # LoRA starts with B = 0, where A has no gradient: move off that point.
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def loss_and_gradients() -> tuple[float, dict[str, torch.Tensor]]:
        trainer.model.zero_grad()
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(100))
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    ours, our_gradients = loss_and_gradients()
    monkeypatch.setattr(RecipeTrainer, "_suits_cpu_loss", lambda self: False)
    torch.manual_seed(0)
    theirs, their_gradients = loss_and_gradients()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)


def test_4bit_gradients_are_the_same_before_and_after_an_evaluation(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(quantization=NF4))
    batch = next(iter(trainer.get_train_dataloader()))

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    before = gradients()
    trainer.evaluate()
    after = gradients()
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
    assert any(gradient.abs().max() > 0 for gradient in before.values())


def test_4bit_layers_never_take_the_path_that_repacks_weights_in_place(write_recipe: Callable[..., Path]):
    """The bug shows only on CPUs with AVX512_BF16, so the switch itself is held: as set there, then as we leave it."""
    import bitsandbytes as bnb

    trainer = make_trainer(write_recipe(quantization=NF4))
    layers = [module for module in trainer.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    keep_canonical_4bit(trainer.model.get_base_model())
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    packed = [layer.weight.data.clone() for layer in layers]
    trainer.evaluate()
    assert all(torch.equal(old, layer.weight.data) for old, layer in zip(packed, layers, strict=True))


def test_adapters_of_a_4bit_base_are_float32_when_training_is(write_recipe: Callable[..., Path]):
    trainer = make_trainer(write_recipe(quantization=NF4))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_run_leaves_its_evidence_and_only_safe_files(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 2})
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    status = read_json(run_dir.status)
    assert (status["state"], status["exit_code"], status["step"]) == ("complete", 0, 3)
    assert status["last_good_checkpoint"] == "outputs/tiny/checkpoints/checkpoint-3"
    losses = [line["loss"] for line in read_jsonl(run_dir.metrics) if "loss" in line]
    assert len(losses) == 3
    manifest = read_json(run_dir.manifest)
    assert manifest["versions"]["trl"] == "1.16.0"
    assert all(len(digest) == 64 for digest in manifest["data"].values())
    assert load_recipe(run_dir.recipe).plain() == load_recipe(path).plain()
    names = {file.name for file in run_dir.adapter.iterdir()}
    assert "training_args.bin" not in names and {"README.md", "provenance.json", "SHA256SUMS"} <= names
    card = (run_dir.adapter / "README.md").read_text()
    assert "None" not in card and manifest["chat_template_sha256"] in card and f"{losses[0]:.4f} at the first" in card
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in run_dir.adapter.iterdir())
    config = read_json(run_dir.adapter / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    shown = capsys.readouterr().err
    for fact in ("trainable of", "effective batch", "tokens a step", "green = trained", "dtype"):
        assert fact in shown


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streamed"])
def test_resume_goes_on_to_the_same_adapter_and_a_complete_run_trains_no_more(
    write_recipe: Callable[..., Path], streaming: bool
):
    keys = {
        "dataset": {"streaming": streaming},
        "training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    }
    whole = write_recipe("whole", **keys)
    assert launch(str(whole), []) == 0
    torn = write_recipe("torn", **keys)
    assert launch(str(torn), []) == 0
    run_dir = RunDir.of("torn")
    # As if killed in step 4, half way through writing its checkpoint.
    for file in run_dir.adapter.iterdir():
        file.unlink()
    run_dir.adapter.rmdir()
    (run_dir.checkpoints / "checkpoint-4" / "trainer_state.json").unlink()

    assert launch(str(torn), []) == 0
    weights = [RunDir.of(name).adapter / "adapter_model.safetensors" for name in ("whole", "torn")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    stamp = weights[1].stat().st_mtime_ns
    assert launch(str(torn), []) == 0
    assert weights[1].stat().st_mtime_ns == stamp


def test_a_stream_is_not_resumed_in_its_second_pass(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    """The 24 rows are one pass of 6 steps; where a later pass stands is not in a checkpoint."""
    path = write_recipe(
        dataset={"streaming": True}, training={"max_steps": 10, "save_strategy": "steps", "save_steps": 8}
    )
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    shutil.rmtree(RunDir.of("tiny").checkpoints / "checkpoint-10")
    assert launch(str(path), []) == 2
    assert "second pass" in capsys.readouterr().err


def test_a_stream_with_accumulation_makes_one_pass_at_most(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    keys = {"max_steps": 4, "gradient_accumulation_steps": 2}  # 8 rows a step, of 24
    assert launch(str(write_recipe(dataset={"streaming": True}, training=keys)), []) == 2
    assert "training.max_steps=3" in capsys.readouterr().err


@pytest.mark.promise("F12", "C5")
def test_a_last_step_that_was_saved_is_published_without_training_more(write_recipe: Callable[..., Path]):
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 3})
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    weights = (run_dir.adapter / "adapter_model.safetensors").read_bytes()
    cut_off(run_dir)
    assert launch(str(path), []) == 0
    assert (run_dir.adapter / "adapter_model.safetensors").read_bytes() == weights
    assert read_json(run_dir.status)["step"] == 3


@pytest.mark.promise("F13", "C2")
@pytest.mark.parametrize("word", ["training.seed=7", "lora.r=2", "training.max_steps=9", "dataset.split=train[:8]"])
def test_resuming_with_other_settings_is_refused_with_the_difference(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture, word: str
):
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 1})
    assert launch(str(path), []) == 0
    kept = RunDir.of("tiny").recipe.read_text()
    assert launch(str(path), [word]) == 2  # complete
    cut_off(RunDir.of("tiny"))
    capsys.readouterr()
    assert launch(str(path), [word]) == 2  # unfinished
    key, _, value = word.partition("=")
    assert f"{key}: " in capsys.readouterr().err and value
    assert RunDir.of("tiny").recipe.read_text() == kept


@pytest.mark.promise("F13")
def test_resuming_on_changed_data_is_refused(write_recipe: Callable[..., Path], tiny_data: dict, workdir: Path):
    shutil.copy(tiny_data["train"], workdir / "mine.jsonl")
    dataset = {"data_files": {"train": "mine.jsonl"}, "eval_split": None}
    path = write_recipe(dataset=dataset, training={"save_strategy": "steps", "save_steps": 1})
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    lines = (workdir / "mine.jsonl").read_text().splitlines()
    (workdir / "mine.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert launch(str(path), []) == 2


def test_resuming_with_another_file_under_a_pattern_is_refused(
    write_recipe: Callable[..., Path], tiny_data: dict, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copy(tiny_data["train"], workdir / "part-1.jsonl")
    dataset = {"data_files": {"train": "part-*.jsonl"}, "eval_split": None}
    path = write_recipe(dataset=dataset, training={"save_strategy": "steps", "save_steps": 1})
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    shutil.copy(tiny_data["heldout"], workdir / "part-2.jsonl")
    assert launch(str(path), []) == 2
    assert "part-2.jsonl: the file is new" in capsys.readouterr().err


def test_resuming_with_another_template_of_the_model_is_refused(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_model, workdir / "m")
    keys = {"model": {"pretrained_model_name_or_path": "m"}, "training": {"save_strategy": "steps", "save_steps": 1}}
    path = write_recipe(**keys)
    assert launch(str(path), []) == 0
    cut_off(RunDir.of("tiny"))
    template = workdir / "m" / "chat_template.jinja"
    template.write_text("{# changed #}" + template.read_text())
    assert launch(str(path), []) == 2
    assert "template: the chat template has changed" in capsys.readouterr().err


def test_a_share_that_was_trained_on_is_not_scored(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture):
    path = write_recipe(dataset={"eval_split": 0.2})
    assert launch(str(path), []) == 0
    assert main(["generate", str(path), "training.seed=7"]) == 2
    assert "rows that were trained on would be asked" in capsys.readouterr().err


def test_an_audit_of_a_trained_run_leaves_its_evidence(write_recipe: Callable[..., Path]):
    path = write_recipe()
    assert launch(str(path), []) == 0
    kept = RunDir.of("tiny").audit.read_text()
    assert main(["audit", str(path), "dataset.split=train[:4]"]) == 0
    assert RunDir.of("tiny").audit.read_text() == kept and read_json(RunDir.of("tiny").audit)["rows"] == 24


@pytest.mark.promise("C3")
def test_a_checkpoint_without_optimizer_or_with_nan_is_not_resumed(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(training={"max_steps": 4, "save_strategy": "steps", "save_steps": 1})
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    expected = (run_dir.adapter / "adapter_model.safetensors").read_bytes()
    cut_off(run_dir)
    (run_dir.checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    weights = run_dir.checkpoints / "checkpoint-3" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    reseal(run_dir.checkpoints / "checkpoint-3")
    state = run_dir.checkpoints / "checkpoint-2" / "trainer_state.json"
    write_json(state, read_json(state) | {"global_step": 1})
    reseal(run_dir.checkpoints / "checkpoint-2")
    capsys.readouterr()
    assert launch(str(path), []) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "optimizer.pt is gone" in shown and "holds NaN or infinity" in shown
    assert "`global_step` is 1, so it is the state of another step" in shown
    assert "Going on from outputs/tiny/checkpoints/checkpoint-1" in shown
    assert (run_dir.adapter / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"global_step": "x"}, "`global_step` is 'x'"),
        ({"global_step": 2}, "`global_step` is 2, so it is the state of another step"),
        ({"max_steps": "x"}, "`max_steps` is 'x'"),
        ({"log_history": 5}, "`log_history` is '5'"),
        ({"nobody": 1}, "holds what no transformers.TrainerState does"),
    ],
)
def test_a_state_that_is_not_the_checkpoints_is_passed_over(tmp_path: Path, change: dict[str, Any], said: str):
    """Its sums may be right: whoever changes a file can write them anew."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    TrainerState(global_step=3, max_steps=4).save_to_json(str(folder / "trainer_state.json"))
    _require_state(folder)
    state = read_json(folder / "trainer_state.json")
    write_json(folder / "trainer_state.json", state | change)
    with pytest.raises(RefusedError, match=re.escape(said)):
        _require_state(folder)


@pytest.mark.promise("F14", "R11")
def test_two_runs_in_one_folder_are_refused_and_the_first_is_left_alone(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe()
    run_dir = RunDir.of("tiny")
    run_dir.root.mkdir(parents=True)
    write_status(run_dir, state="running", step=5)
    first = Locked(run_dir.lock)
    first.acquire(wait=False)
    assert launch(str(path), []) == 2
    assert "in use by another process (pid" in capsys.readouterr().err
    assert read_json(run_dir.status) == {"state": "running", "step": 5}
    first.release()
    assert launch(str(path), []) == 0


def test_an_adapter_names_its_base_as_the_recipe_does(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path
):
    (workdir / "base").symlink_to(tiny_model)
    assert launch(str(write_recipe(model={"pretrained_model_name_or_path": "base"})), []) == 0
    assert read_json(RunDir.of("tiny").adapter / "adapter_config.json")["base_model_name_or_path"] == "base"


def test_a_run_whose_loss_is_nan_stops_and_publishes_nothing(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    broken = workdir / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite itself: a base with NaN is refused before training
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    path = write_recipe(model={"pretrained_model_name_or_path": str(broken)})
    assert launch(str(path), []) == 4
    assert not RunDir.of("tiny").adapter.exists()
    status = read_json(RunDir.of("tiny").status)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 4, 0)
    assert "diverged" in capsys.readouterr().err


@pytest.mark.promise("R11")
def test_a_read_only_output_folder_is_refused_before_training(write_recipe: Callable[..., Path], workdir: Path):
    path = write_recipe()
    (workdir / "outputs").write_text("a file where the folder should be")
    with pytest.raises(MachineError, match="cannot write the run folder"):
        RunDir.of("tiny").require_writable()
    assert launch(str(path), []) == 3


def test_text_rows_train_on_the_assistants_words(write_recipe: Callable[..., Path]):
    files = {"train": str(ROOT / "data" / "tutorial.jsonl")}
    dataset = {"data_files": files, "eval_split": None}
    trainer = make_trainer(write_recipe(dataset=dataset, training={"max_length": 512}))
    before = trainer.model.get_parameter(
        next(name for name, _ in trainer.model.named_parameters() if "lora_B" in name)
    ).clone()
    trainer.train()
    after = trainer.model.get_parameter(next(n for n, _ in trainer.model.named_parameters() if "lora_B" in n))
    assert not torch.equal(before, after)


def test_generate_needs_a_trained_adapter(write_recipe: Callable[..., Path]):
    with pytest.raises(RunError, match=r"accelerate launch run\.py"):
        RunDir.of("tiny").require_adapter(write_recipe())


def test_no_status_is_written_by_a_refused_start(write_recipe: Callable[..., Path]):
    path = write_recipe(lora={"target_modules": ["q_prj"]})
    assert launch(str(path), []) == 2
    assert not RunDir.of("tiny").status.exists()
    assert json.loads(path.read_text())["lora"]["target_modules"] == ["q_prj"]


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("training", {"report_to": "wandb"}, "wandb"),
        ("training", {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"}, "strategy"),
        (
            "lora",
            {"use_rslora": True, "lora_bias": True, "init_lora_weights": "olora"},
            "`lora` is refused by peft.LoraConfig",
        ),
    ],
)
def test_what_an_owner_refuses_is_one_message_with_the_recipes_line(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture, section: str, keys: dict, said: str
):
    path = write_recipe(**{section: keys})
    assert launch(str(path), []) == 2
    shown = capsys.readouterr().err
    assert f"error: {path}:" in shown and said in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("generation", {"sequence_bias": {}}, "`sequence_bias` has to be"),
        ("training", {"optim_args": "a=b,c"}, "optim_args"),
        ("training", {"optim": "rmsprop", "optim_args": "momentum=x"}, "optim"),
        ("training", {"optim": "galore_adamw"}, "pip install git+https://github.com/jiaweizzhao/GaLore"),
        ("training", {"optim": "adalomo"}, "lomo"),
        ("training", {"optim": "adamw_anyprecision"}, "anyprecision"),
        ("training", {"optim": "adamw_torch_xla"}, "torch_xla"),
        ("training", {"torch_compile": True, "torch_compile_backend": "nope"}, "nope"),
        ("training", {"torch_compile": True, "torch_compile_mode": "nope"}, "nope"),
    ],
)
def test_what_would_be_refused_later_is_told_before_weights_are_loaded(
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    keys: dict[str, Any],
    said: str,
):
    monkeypatch.setattr("lora_recipes.train.session.load_base", lambda *args: pytest.fail("the weights were loaded"))
    path = write_recipe(**{section: keys})
    assert launch(str(path), []) == 2
    shown = capsys.readouterr().err
    assert f"error: {path}:" in shown and said in shown and "Traceback" not in shown


def test_what_an_optimizer_refuses_while_it_is_made_is_one_message(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    path = write_recipe(training={"optim": "sgd", "optim_args": "momentum=-5"})
    assert launch(str(path), []) == 2
    said = "no optimizer can be made of `optim: sgd` and `optim_args: momentum=-5`: Invalid momentum value: -5.0"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_model_folder_without_weights_is_one_message(
    write_recipe: Callable[..., Path], tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(tiny_model, workdir / "hollow")
    (workdir / "hollow" / "model.safetensors").write_bytes(b"torn")
    assert launch(str(write_recipe(model={"pretrained_model_name_or_path": "hollow"})), []) == 4
    assert "no safetensors file" in capsys.readouterr().err
