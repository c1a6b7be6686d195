"""This project: a recipe of the job under `accelerate launch`, in the type that the machine is best at, or in float32.

On a GPU in bf16, with torch's own attention or with flash attention.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, CannotError, Command, Job, Peer, write_config

ROOT = Path(__file__).parent.parent.parent.parent
OWN, FLOAT32_ONLY, FLASH = "lora-recipes", "lora-recipes-float32", "lora-recipes-flash"


def _recipe(lab: Lab, job: Job, name: str) -> Path:
    checkpointing = bool(job.checkpointing)
    recipe: dict[str, Any] = {
        "model": {"pretrained_model_name_or_path": str(lab.base), "dtype": "float32"},
        "lora": {
            "r": job.rank,
            "lora_alpha": job.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(job.targets),
        },
        "dataset": {
            "path": "json",
            "data_files": str(lab.messages),
            "truncation": "keep_start",
            "max_duplicate_fraction": 1.0,
        },
        "training": {
            "max_length": job.max_length,
            "max_steps": job.steps,
            "per_device_train_batch_size": job.batch,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": job.schedule,
            "activation_checkpointing": checkpointing,
            "assistant_only_loss": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": SEED,
            "bf16": name != FLOAT32_ONLY,
        },
        "merge": {"dtype": "float32"},
    }
    if job.device == "gpu" and name != FLOAT32_ONLY:
        recipe["model"]["dtype"] = "bfloat16"
    if name == FLASH:
        recipe["model"]["attn_implementation"] = "flash_attention_2"
    path = lab.made(name) / f"{job.name}.yaml"
    write_config(path, recipe)
    return path


def _run_folder(lab: Lab, job: str, name: str) -> Path:
    return lab.out(name, job) / "outputs" / job


def _peer(name: str) -> Peer:
    def train(lab: Lab, job: Job) -> Command:
        if name == FLASH and (job.device == "cpu" or importlib.util.find_spec("flash_attn") is None):
            raise CannotError("needs a GPU" if job.device == "cpu" else "flash-attn is not installed")
        recipe = _recipe(lab, job, name)
        config = ROOT / "accelerate_configs" / ("cpu.yaml" if job.device == "cpu" else "single_gpu.yaml")
        words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        words += [str(config), str(ROOT / "run.py"), str(recipe)]
        return Command(words, cwd=lab.out(name, job.name))

    def merge(lab: Lab, job: str) -> list[Command]:
        recipe = lab.made(name) / f"{job}.yaml"
        words = [
            sys.executable,
            "-m",
            "lora_recipes",
            "merge",
            str(recipe),
            "merge.proof=weights",
        ]  # no peer proves more
        return [Command(words, {"PYTHONPATH": str(ROOT)}, cwd=lab.out(name, job))]

    return Peer(
        name=name,
        distribution="lora-recipes",
        pip=(),
        help=lambda lab: Command([sys.executable, "-m", "lora_recipes", "--help"], {"PYTHONPATH": str(ROOT)}),
        train=train,
        adapter=lambda lab, job: _run_folder(lab, job, name) / "adapter",
        merge=merge,
        merged=lambda lab, job: _run_folder(lab, job, name) / "merged",
        gpu=True,
        own=True,
    )


PEER, FLOAT32, FLASH_ATTENTION = _peer(OWN), _peer(FLOAT32_ONLY), _peer(FLASH)
