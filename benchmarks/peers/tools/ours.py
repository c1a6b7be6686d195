"""This project: a recipe of the job under `accelerate launch`, in the type that the machine is best at, or in float32."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, Command, Job, Peer, write_config

ROOT = Path(__file__).parent.parent.parent.parent
NAMES = {True: "lora-recipes", False: "lora-recipes-float32"}


def _recipe(lab: Lab, job: Job, bf16: bool) -> Path:
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
            "bf16": bf16,
        },
        "merge": {"dtype": "float32"},
    }
    path = lab.made(NAMES[bf16]) / f"{job.name}.yaml"
    write_config(path, recipe)
    return path


def _run_folder(lab: Lab, job: str, bf16: bool) -> Path:
    return lab.out(NAMES[bf16], job) / "outputs" / job


def _peer(bf16: bool) -> Peer:
    def train(lab: Lab, job: Job) -> Command:
        recipe = _recipe(lab, job, bf16)
        words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        words += [str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "run.py"), str(recipe)]
        return Command(words, cwd=lab.out(NAMES[bf16], job.name))

    def merge(lab: Lab, job: str) -> list[Command]:
        recipe = lab.made(NAMES[bf16]) / f"{job}.yaml"
        words = [sys.executable, "-m", "lora_recipes", "merge", str(recipe)]
        return [Command(words, {"PYTHONPATH": str(ROOT)}, cwd=lab.out(NAMES[bf16], job))]

    return Peer(
        name=NAMES[bf16],
        distribution="lora-recipes",
        pip=(),
        help=lambda lab: Command([sys.executable, "-m", "lora_recipes", "--help"], {"PYTHONPATH": str(ROOT)}),
        train=train,
        adapter=lambda lab, job: _run_folder(lab, job, bf16) / "adapter",
        merge=merge,
        merged=lambda lab, job: _run_folder(lab, job, bf16) / "merged",
        own=True,
    )


PEER, FLOAT32 = _peer(True), _peer(False)
