"""The commands of the README, as a user types them: accelerate launch, exit codes behind launchers, error probes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_recipes.run_dir import RunDir, read_json
from tests.conftest import ROOT

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def run(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    env = inherited | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_accelerate_launch_without_a_config_trains_on_all_cores(write_recipe: Callable[..., Path], workdir: Path):
    ended = run([*LAUNCH, ROOT / "run.py", write_recipe(), "training.max_steps=2"], workdir)
    assert ended.returncode == 0, ended.stderr
    assert f"cpu, {len(os.sched_getaffinity(0))} threads" in ended.stderr
    assert read_json(RunDir.of("tiny").status)["step"] == 2


def test_accelerate_launch_with_the_cpu_config_and_resume(write_recipe: Callable[..., Path], workdir: Path):
    config = ["--config_file", ROOT / "accelerate_configs" / "cpu.yaml"]
    recipe = write_recipe()
    ended = run([*LAUNCH, *config, ROOT / "run.py", recipe, "training.max_steps=2", "--resume"], workdir)
    assert ended.returncode == 0, ended.stderr
    again = run([*LAUNCH, *config, ROOT / "run.py", recipe, "training.max_steps=2"], workdir)
    assert again.returncode == 0 and "0 steps to train" in again.stderr


def test_two_processes_learn_what_one_process_learns_from_the_same_rows(
    write_recipe: Callable[..., Path], workdir: Path
):
    words = ["training.use_cpu=true", "training.bf16=false", "training.train_sampling_strategy=sequential"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = run([*command, ROOT / "run.py", write_recipe("two"), *words], workdir)
    assert ended.returncode == 0, ended.stderr
    assert "8 rows = 4 a device x 1 accumulation x 2 processes" in ended.stderr
    assert ended.stderr.count("What will be trained") == 1
    alone = run(
        [sys.executable, ROOT / "run.py", write_recipe("one"), *words, "training.per_device_train_batch_size=8"],
        workdir,
    )
    assert alone.returncode == 0, alone.stderr
    two, one = (load_file(RunDir.of(name).adapter / "adapter_model.safetensors") for name in ("two", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_llama_recipe_stops_before_any_download_and_says_what_helps(workdir: Path):
    """Run where there is neither a GPU nor the gated weights."""
    cached = Path.home() / ".cache" / "huggingface" / "hub" / "models--meta-llama--Llama-2-7b-chat-hf"
    if cached.exists():
        pytest.skip("this machine has the weights")
    (workdir / "data").symlink_to(ROOT / "data")
    ended = run([*LAUNCH, "-q", ROOT / "run.py", ROOT / "recipes" / "llama2-7b-qlora.yaml"], workdir)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    for help_line in ("no GPU is visible", "not in the cache", "hf auth login", "recipes/smollm2-135m-lora.yaml"):
        assert help_line in ended.stderr
    assert not (workdir / "outputs").exists()


PROBES = {
    "misspelt key": (["training.learning_rat=1e-4"], 2, "did you mean `learning_rate`?"),
    "removed key": (["training.max_seq_length=512"], 2, "write training.max_length"),
    "wrong type": (["lora.r=sixteen"], 2, "must be an integer, found the text 'sixteen'"),
    "missing data file": (["dataset.data_files.train=nowhere.jsonl"], 2, "no such data file: nowhere.jsonl"),
    "no target": (["lora.target_modules=[q_prj]"], 2, "linear layers: down_proj, gate_proj"),
    "one target of two": (["lora.target_modules=[q_proj, v_prjo]"], 2, "'v_prjo' matches no module"),
    "fp16 without a gpu": (["training.fp16=true", "training.bf16=false"], 3, "fp16 training needs a GPU"),
    "no such model": (["model.pretrained_model_name_or_path=package:nope"], 3, "is not installed"),
    "a secret": (["model.revision=hf_" + "a" * 30], 4, "looks like a secret"),
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_bad_start_is_one_message_with_its_exit_code_and_leaves_no_run(
    probe: str, write_recipe: Callable[..., Path], workdir: Path
):
    words, exit_code, said = PROBES[probe]
    ended = run([sys.executable, ROOT / "run.py", write_recipe(), *words], workdir)
    assert ended.returncode == exit_code, ended.stderr
    assert said in ended.stderr and "Traceback" not in ended.stderr and ended.stderr.count("error:") == 1
    assert not RunDir.of("tiny").status.exists()


def test_the_exit_code_survives_the_launcher_through_the_train_verb(write_recipe: Callable[..., Path], workdir: Path):
    command = [sys.executable, "-m", "lora_recipes", "train", write_recipe(), "lora.target_modules=[q_prj]", "--json"]
    ended = run(command, workdir)
    assert ended.returncode == 2
    error = json.loads(ended.stdout)["error"]
    assert error["exit_code"] == 2 and "'q_prj' matches no module" in error["message"]
    assert "Traceback" not in ended.stderr


def test_the_train_verb_prints_one_json_object(write_recipe: Callable[..., Path], workdir: Path):
    ended = run([sys.executable, "-m", "lora_recipes", "train", write_recipe(), "--json"], workdir)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["state"] == "complete"


def test_an_abbreviated_option_is_refused(write_recipe: Callable[..., Path], workdir: Path):
    ended = run([sys.executable, ROOT / "run.py", write_recipe(), "--res"], workdir)
    assert ended.returncode == 2 and "--res" in ended.stderr
    assert not (workdir / "outputs").exists()


def test_run_py_stays_thin():
    assert len((ROOT / "run.py").read_text().splitlines()) <= 40
