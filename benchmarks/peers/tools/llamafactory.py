"""LLaMA-Factory 0.9.5: a YAML file. Gradient checkpointing is on unless switched off."""

import json
from pathlib import Path

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, TORCH, Command, Job, Peer, write_config

# What it requires, less torchvision and torchaudio: the torchaudio that pip finds cannot load beside this torch.
PINS = (
    "accelerate<=1.11.0 datasets<=4.0.0 einops fastapi fire hf-transfer matplotlib modelscope numpy omegaconf packaging "
    "pandas peft>=0.18.0,<=0.18.1 protobuf pydantic pyyaml safetensors scipy sentencepiece sse-starlette tiktoken "
    "transformers>=4.55.0,<=5.6.0 trl<=0.24.0 tyro<0.9.0 uvicorn av<=16.0.0 gradio>=4.38.0,<=5.50.0"
)
ENVIRONMENT = {"DISABLE_VERSION_CHECK": "1"}
# It imports torchaudio for every run, and uses it for none of text.
STUB = "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'torchaudio.py').touch()"


def _prepare(lab: Lab) -> list[Command]:
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    rows = {"file_name": str(lab.messages), "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    described = lab.made("llamafactory") / "dataset_info.json"
    described.parent.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps({"train": rows}), encoding="utf-8")
    return [Command([lab.bin("llamafactory", "python"), "-c", STUB])]


def _train(lab: Lab, job: Job) -> Command:
    config = {
        "model_name_or_path": str(lab.base),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(job.targets),
        "dataset_dir": str(lab.made("llamafactory")),
        "dataset": "train",
        "template": "smollm2",
        "cutoff_len": job.max_length,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "output_dir": str(lab.out("llamafactory", job.name)),
        "overwrite_output_dir": True,
        "logging_steps": 1,
        "save_steps": 100_000,
        "report_to": "none",
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.schedule,
        "max_steps": job.steps,
        "seed": SEED,
        "use_cpu": job.device == "cpu",
        "bf16": job.bf16,
        "disable_gradient_checkpointing": not job.checkpointing,
    }
    path = write_config(lab.made("llamafactory") / f"{job.name}.yaml", config)
    return Command([lab.bin("llamafactory", "llamafactory-cli"), "train", path], ENVIRONMENT)


def _merged(lab: Lab, job: str) -> Path:
    return lab.out("llamafactory", job) / "merged"


def _merge(lab: Lab, job: str) -> list[Command]:
    config = {
        "model_name_or_path": str(lab.base),
        "adapter_name_or_path": str(lab.out("llamafactory", job)),
        "template": "smollm2",
        "export_dir": str(_merged(lab, job)),
        "export_device": "cpu",
        "export_size": 5,
    }
    path = write_config(lab.made("llamafactory") / f"{job}-merge.yaml", config)
    return [Command([lab.bin("llamafactory", "llamafactory-cli"), "export", path], ENVIRONMENT)]


PEER = Peer(
    name="llamafactory",
    distribution="llamafactory",
    pip=((TORCH,), ("--no-deps", "llamafactory==0.9.5", "torchdata<=0.11.0"), tuple(PINS.split())),
    help=lambda lab: Command([lab.bin("llamafactory", "llamafactory-cli"), "help"], ENVIRONMENT),
    train=_train,
    merge=_merge,
    merged=_merged,
    adapter=lambda lab, job: lab.out("llamafactory", job),
    prepare=_prepare,
)
