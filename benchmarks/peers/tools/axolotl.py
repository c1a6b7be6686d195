"""axolotl 0.19: a YAML file; rows longer than max length are dropped."""

from pathlib import Path

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, TORCH, CannotError, Command, Job, Peer, write_config

# Its exact pins less what this job never imports (xformers, modal, lm_eval ...), beside the torch of all tools here.
PINS = (
    "packaging==26.0 huggingface_hub==1.17.0 peft==0.20.0 tokenizers==0.23.1 transformers==5.16.1 accelerate==1.13.0 "
    "datasets==4.8.4 trl==1.9.0 kernels>=0.16.0,<0.17.0 typing-extensions==4.15.0 pydantic==2.12.5 addict fire "
    "PyYAML==6.0.3 requests einops colorama numba>=0.63.1,<1.0 numpy>=2.1,<3.0 evaluate==0.4.1 scipy art "
    "python-dotenv==1.0.1 zstandard==0.22.0 fastcore schedulefree==1.4.1 posthog==6.7.11 bitsandbytes==0.50.2 "
    "sentencepiece tensorboard nvidia-ml-py==12.560.30 langdetect==1.0.9 immutabledict wandb mistral-common==1.11.5"
)
BARE = (
    "axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 hf_transfer hf_xet==1.4.3 "
    "optimum==1.16.2 trackio==0.19.0 torchao==0.17.0 openenv-core==0.1.0 triton==3.9.0"  # triton is imported, even without a GPU
)


def _train(lab: Lab, job: Job) -> Command:
    if job.bf16:
        raise CannotError("no key that allows bf16 on a CPU, which its Trainer refuses without `use_cpu`")
    out = lab.out("axolotl", job.name)
    rows = {
        "path": str(lab.messages),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
    }
    config = {
        "base_model": str(lab.base),
        "datasets": [rows],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(out / "prepared"),
        "val_set_size": 0,
        "output_dir": str(out),
        "adapter": "lora",
        "lora_r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(job.targets),
        "sequence_len": job.max_length,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "gradient_accumulation_steps": 1,
        "micro_batch_size": job.batch,
        "max_steps": job.steps,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": job.schedule,
        "learning_rate": job.learning_rate,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": bool(job.checkpointing),
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "save_steps": 100_000,
        "seed": SEED,
        "special_tokens": {"pad_token": "<|im_end|>"},
        "lora_qkv_kernel": False,  # triton kernels, switched on by themselves
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
    }
    return Command([lab.bin("axolotl", "axolotl"), "train", write_config(_config(lab, job.name), config)])


def _config(lab: Lab, job: str) -> Path:
    return lab.made("axolotl") / f"{job}.yaml"


def _merged(lab: Lab, job: str) -> Path:
    return lab.out("axolotl", job) / "merged"


def _merge(lab: Lab, job: str) -> list[Command]:
    adapter = f"--lora-model-dir={lab.out('axolotl', job)}"
    return [Command([lab.bin("axolotl", "axolotl"), "merge-lora", str(_config(lab, job)), adapter])]


PEER = Peer(
    name="axolotl",
    distribution="axolotl",
    pip=((TORCH,), ("--no-deps", *BARE.split()), tuple(PINS.split())),
    help=lambda lab: Command([lab.bin("axolotl", "axolotl"), "train", "--help"]),
    train=_train,
    merge=_merge,
    merged=_merged,
    adapter=lambda lab, job: lab.out("axolotl", job),
    differs="drops rows longer than max length; two runs with one seed differ",
)
