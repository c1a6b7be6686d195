"""Launches that share a model out among processes: what cannot be trained so is refused, and what is built whole stays whole.

Neither FSDP nor DeepSpeed runs on a CPU: what is held here is what is decided before they begin.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers.integrations import deepspeed

from lora_recipes import train
from lora_recipes.errors import EXIT_MACHINE, EXIT_PREEMPTED, MachineError, Preempted, RankLost, RecipeError
from lora_recipes.launch import sharding
from lora_recipes.model.build import meta_model, model_config
from lora_recipes.model.machine import choose
from lora_recipes.model.source import locate
from lora_recipes.recipe import load_recipe
from lora_recipes.run_dir import RunDir, read_json, write_json
from lora_recipes.train import launch, session
from lora_recipes.train.guards import _local
from lora_recipes.train.sharding import refuse_sharded
from lora_recipes.train.trainer import RecipeTrainer, training_arguments
from tests.conftest import NF4
from tests.train.runs import EVERY_STEP, cut_off, make_trainer

FSDP = {"ACCELERATE_USE_FSDP": "true"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
BF16 = {"bf16": True, "use_cpu": True}
IMPOSSIBLE: list[tuple[dict[str, str], dict[str, Any], str]] = [
    (FSDP, {"training": {"optim": "adamw_8bit"}}, "training.optim=adamw_torch_fused"),
    (FSDP, {"quantization": {"load_in_8bit": True}}, "would lose their scales"),
    (FSDP, {"quantization": NF4, "lora": {"use_dora": True}}, "DoRA's lengths"),
    (
        FSDP,
        {"quantization": NF4 | {"bnb_4bit_quant_storage": "float16"}, "training": BF16},
        "quantization.bnb_4bit_quant_storage=bfloat16",
    ),
    (FSDP, {"lora": {"modules_to_save": ["lm_head"]}}, "drop the head"),
    (ZERO3, {"lora": None, "merge": {"dtype": "bfloat16"}}, "drop the key"),
    ({"WORLD_SIZE": "2"}, {"model": {"device_map": "auto"}}, "--num_processes 1"),
]


def refused(path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(path)
    args = training_arguments(choose(recipe).training, RunDir.of(recipe.name))
    for name, value in environment.items():  # only now: TrainingArguments would look for the processes
        monkeypatch.setenv(name, value)
    refuse_sharded(recipe, args)


@pytest.mark.parametrize(("environment", "keys", "said"), IMPOSSIBLE)
def test_what_no_process_can_do_with_its_part_is_refused_with_the_way_out_and_alone_it_is_trained(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    keys: dict[str, Any],
    said: str,
):
    path = write_recipe(**keys)
    refused(path, {}, monkeypatch)
    with pytest.raises(RecipeError) as caught:
        refused(path, environment, monkeypatch)
    assert str(caught.value).startswith(f"{path}:") and said in str(caught.value)


def test_fsdp_without_a_gpu_is_refused(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MachineError, match="no GPU is visible"):
        refused(write_recipe(), FSDP, monkeypatch)


def test_a_launch_is_told_by_its_variables():
    assert sharding({}) == sharding({"ACCELERATE_USE_FSDP": "false"}) == "whole weights"
    assert sharding(FSDP) == "FSDP" and sharding(ZERO3) == "DeepSpeed ZeRO-3"
    assert sharding(ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}) == "DeepSpeed ZeRO-2"


@pytest.mark.promise("F13", "C2")
def test_a_run_goes_on_only_where_weights_are_shared_out_as_they_were(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture
):
    """Else optimizer and schedule would be looked for under other names, and begun anew in silence."""
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    run_dir = RunDir.of("tiny")
    cut_off(run_dir, after=1)
    manifest = read_json(run_dir.manifest)
    manifest["launch"]["environment"] |= ZERO3
    write_json(run_dir.manifest, manifest)
    for accepted in ((), ("launch",)):
        assert launch(str(path), [], accepted=accepted) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "launch: DeepSpeed ZeRO-3 then, whole weights now" in said and "can not change within a run" in said


def test_a_model_without_memory_is_whole_when_zero_3_shares_models_out(write_recipe: Callable[..., Path]):
    recipe = load_recipe(write_recipe())
    config = model_config(recipe, locate(recipe))
    hook = Mock(config={})  # of which all is true
    deepspeed.set_hf_deepspeed_config(hook)
    try:
        model = meta_model(config, recipe)  # DeepSpeed is not installed: it would be imported
        assert all(parameter.numel() and parameter.is_meta for parameter in model.parameters())
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_of_a_weight_that_is_shared_out_the_part_here_is_looked_at():
    whole, part = torch.zeros(0), torch.ones(3)
    whole.ds_tensor = part  # type: ignore[attr-defined]
    assert _local(whole) is part and _local(part) is part


def test_4_bit_weights_may_be_stored_as_floats(write_recipe: Callable[..., Path]):
    """As FSDP wants them; one packed byte in 128 looks like a number that is not finite."""
    trainer = make_trainer(write_recipe(quantization=NF4 | {"bnb_4bit_quant_storage": "bfloat16"}))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        same = torch.equal(before[name].view(torch.uint8), weight.detach().view(torch.uint8))
        assert same == ("lora_" not in name), name


def test_a_last_checkpoint_is_published_though_deepspeed_never_began(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    path = write_recipe(training=EVERY_STEP)
    assert launch(str(path), []) == 0
    weights = RunDir.of("tiny").adapter / "adapter_model.safetensors"
    trained, run = weights.read_bytes(), session._run
    cut_off(RunDir.of("tiny"))

    def with_deepspeed(trainer: RecipeTrainer, last: Path | None) -> None:
        run(trainer, last)
        trainer.is_deepspeed_enabled = True
        monkeypatch.setattr(trainer, "save_model", lambda *_: pytest.fail("it asks the engine"))

    monkeypatch.setattr(session, "_run", with_deepspeed)
    assert launch(str(path), []) == 0
    assert weights.read_bytes() == trained


@pytest.fixture
def rank(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., train._Begun]:
    """This process as a rank of two that has not begun to train."""
    recipe = load_recipe(write_recipe())
    RunDir.of("tiny").root.mkdir(parents=True)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def made(number: int, *, met: bool) -> train._Begun:
        monkeypatch.setenv("RANK", str(number))
        ready: Any = SimpleNamespace(met=met, opened=False, lock=None)
        return train._Begun(recipe, ready)

    return made


def test_what_one_rank_alone_lacks_is_said_by_it_and_is_how_the_run_ended(
    rank: Callable[..., train._Begun], capsys: pytest.CaptureFixture
):
    """Its launcher only tells the main process to end, as a scheduler does that wants to go on later."""
    assert train._failed(rank(1, met=True), MachineError("no memory"), debug=False) == EXIT_MACHINE
    assert "[rank 1] no memory" in capsys.readouterr().err
    assert train._preempted(rank(0, met=True), Preempted("stopped by SIGTERM")) == EXIT_MACHINE
    status = read_json(RunDir.of("tiny").status)
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", EXIT_MACHINE, "[rank 1] no memory")


def test_a_rank_that_was_left_alone_is_not_the_cause(rank: Callable[..., train._Begun], capsys: pytest.CaptureFixture):
    assert train._failed(rank(1, met=True), RankLost("rank 0 is gone"), debug=False) == EXIT_MACHINE
    assert capsys.readouterr().err == "" and not RunDir.of("tiny").status.exists()


def test_a_rank_writes_nothing_into_a_folder_that_the_main_process_may_not_have(rank: Callable[..., train._Begun]):
    running = {"state": "running", "step": 5}
    write_json(RunDir.of("tiny").status, running)
    assert train._preempted(rank(1, met=False), Preempted("stopped by SIGTERM")) == EXIT_PREEMPTED
    assert read_json(RunDir.of("tiny").status) == running
    assert train._preempted(rank(1, met=True), Preempted("stopped by SIGTERM")) == EXIT_PREEMPTED
    assert read_json(RunDir.of("tiny").status)["state"] == "preempted"
