"""litgpt 0.5: flags, and the model in its own form, made once. Its adapter is a file of its own, not PEFT's."""

import shutil
from pathlib import Path

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, TORCH, CannotError, Command, Job, Peer

# Its own name of each layer; all of an attention's inputs are one matrix, of which LoRA can leave parts out.
FLAGS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "projection",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
SPLIT = 0.001  # it must hold rows out for its own validation, which is off: one row


def _model(lab: Lab) -> Path:
    return lab.made("litgpt") / "SmolLM2-135M-Instruct"


def _prepare(lab: Lab) -> list[Command]:
    model = _model(lab)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(lab.base, model)
    words = ["convert_to_litgpt", str(model), "--model_name", model.name]
    return [Command([lab.bin("litgpt", "litgpt"), *words])]


def _train(lab: Lab, job: Job) -> Command:
    if job.schedule != "constant":
        raise CannotError("has one schedule, a cosine after its warmup")
    if job.checkpointing:
        raise CannotError("no flag for gradient checkpointing on one device")
    flags = {
        "data": "JSON",
        "data.json_path": str(lab.instructions),
        "data.val_split_fraction": str(SPLIT),
        "data.mask_prompt": "true",
        "data.prompt_style": "smollm2",
        "out_dir": str(lab.out("litgpt", job.name)),
        "precision": "bf16-true" if job.bf16 else "32-true",
        "lora_r": str(job.rank),
        "lora_alpha": str(job.alpha),
        "lora_dropout": "0",
        "train.max_seq_length": str(job.max_length),
        "train.micro_batch_size": str(job.batch),
        "train.global_batch_size": str(job.batch),
        "train.max_steps": str(job.steps),
        "train.epochs": "1",
        "train.lr_warmup_steps": "1",
        "train.save_interval": "100000",
        "eval.interval": "100000",
        "eval.initial_validation": "false",
        "eval.final_validation": "false",
        "optimizer": f'{{"class_path": "torch.optim.AdamW", "init_args": {{"lr": {job.learning_rate}, "weight_decay": 0}}}}',
        "seed": str(SEED),
    }
    wanted = {FLAGS[target] for target in job.targets}
    flags |= {f"lora_{layer}": str(layer in wanted).lower() for layer in set(FLAGS.values())}
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    return Command([lab.bin("litgpt", "litgpt"), "finetune_lora", str(_model(lab)), *words])


def _merged(lab: Lab, job: str) -> Path:
    return lab.out("litgpt", job) / "merged"


def _merge(lab: Lab, job: str) -> list[Command]:
    final = lab.out("litgpt", job) / "final"
    (final / "lit_model.pth").unlink(missing_ok=True)  # written by training, which merges too; else nothing is done
    program = lab.bin("litgpt", "litgpt")
    convert = ["convert_from_litgpt", str(final), str(_merged(lab, job))]
    return [Command([program, "merge_lora", str(final)]), Command([program, *convert])]


def _adapter(lab: Lab, job: str) -> Path:
    raise CannotError("its adapter is a file of its own form, not PEFT's")


PEER = Peer(
    name="litgpt",
    distribution="litgpt",
    pip=((TORCH,), ("litgpt==0.5.13", "requests")),  # requests: it imports it and does not require it
    help=lambda lab: Command([lab.bin("litgpt", "litgpt"), "finetune_lora", "--help"]),
    train=_train,
    merge=_merge,
    merged=_merged,
    adapter=_adapter,
    prepare=_prepare,
    differs="learning rate: one step of warmup, then a cosine; merged weights are a model.pth",
)
