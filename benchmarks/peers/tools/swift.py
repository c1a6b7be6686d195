"""ms-swift 4.6: flags; rows longer than max length are dropped."""

from pathlib import Path

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, TORCH, Command, Job, Peer, last_checkpoint

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what the base's own template adds


def _environment(lab: Lab) -> dict[str, str]:
    return {"USE_HF": "1", "MODELSCOPE_CACHE": str(lab.made("swift"))}


def _train(lab: Lab, job: Job) -> Command:
    flags = {
        "model": str(lab.base),
        "model_type": "llama",
        "template": "chatml",
        "system": SYSTEM,
        "dataset": str(lab.messages),
        "tuner_type": "lora",
        "lora_rank": str(job.rank),
        "lora_alpha": str(job.alpha),
        "lora_dropout": "0",
        "max_length": str(job.max_length),
        "per_device_train_batch_size": str(job.batch),
        "gradient_accumulation_steps": "1",
        "learning_rate": str(job.learning_rate),
        "lr_scheduler_type": job.schedule,
        "warmup_ratio": "0",
        "weight_decay": "0",
        "max_steps": str(job.steps),
        "gradient_checkpointing": str(bool(job.checkpointing)).lower(),
        "logging_steps": "1",
        "save_steps": "100000",
        "split_dataset_ratio": "0",
        "torch_dtype": job.dtype,
        "use_cpu": str(job.device == "cpu").lower(),
        "output_dir": str(lab.out("swift", job.name)),
        "add_version": "false",
        "report_to": "none",
        "dataset_num_proc": "1",
        "dataloader_num_workers": "0",
        "attn_impl": "sdpa",
        "load_from_cache_file": "false",
        "use_hf": "true",
        "seed": str(SEED),
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    return Command([lab.bin("swift", "swift"), "sft", *words, "--target_modules", *job.targets], _environment(lab))


def _adapter(lab: Lab, job: str) -> Path:
    return last_checkpoint(lab.out("swift", job))


def _merged(lab: Lab, job: str) -> Path:
    return lab.out("swift", job) / "merged"


def _merge(lab: Lab, job: str) -> list[Command]:
    words = ["--adapters", str(_adapter(lab, job)), "--merge_lora", "true", "--output_dir", str(_merged(lab, job))]
    return [Command([lab.bin("swift", "swift"), "export", *words, "--use_hf", "true"], _environment(lab))]


PEER = Peer(
    name="swift",
    distribution="ms-swift",
    pip=((TORCH,), ("ms-swift==4.6.0",)),
    help=lambda lab: Command([lab.bin("swift", "swift"), "sft", "--help"], _environment(lab)),
    train=_train,
    merge=_merge,
    merged=_merged,
    adapter=_adapter,
    differs="drops rows longer than max length; asks its hub when it starts, also offline",
)
