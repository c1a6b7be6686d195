"""TRL 1.16, its own command `trl sft`: the reference. Gradient checkpointing is on unless switched off."""

from pathlib import Path

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, TORCH, Command, Job, Peer, write_config


def _train(lab: Lab, job: Job) -> Command:
    config = {
        "model_name_or_path": str(lab.base),
        "dtype": job.dtype,
        "datasets": [{"path": "json", "data_files": str(lab.completions)}],
        "use_peft": True,
        "lora_r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(job.targets),
        "max_length": job.max_length,
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.schedule,
        "max_steps": job.steps,
        "logging_steps": 1,
        "save_steps": 100_000,
        "seed": SEED,
        "report_to": "none",
        "output_dir": str(lab.out("trl", job.name)),
        "use_cpu": job.device == "cpu",
        "bf16": job.bf16,
    }
    if job.checkpointing is not None:  # else its own default, on
        config["gradient_checkpointing"] = job.checkpointing
    path = write_config(lab.made("trl") / f"{job.name}.yaml", config)
    return Command([lab.bin("trl", "trl"), "sft", "--config", path])


def _adapter(lab: Lab, job: str) -> Path:
    return lab.out("trl", job)


PEER = Peer(
    name="trl",
    distribution="trl",
    pip=(
        (TORCH, "trl[peft]==1.16.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0"),
    ),
    help=lambda lab: Command([lab.bin("trl", "trl"), "sft", "--help"]),
    train=_train,
    adapter=_adapter,
    checkpointing=True,
    gpu=True,
)
