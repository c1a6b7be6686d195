"""torchtune 0.6: the model is put together from its parts in a YAML file, the tokenizer from vocabulary and merges."""

import json
from pathlib import Path

from benchmarks.peers.lab import Lab
from benchmarks.peers.peer import SEED, TORCH, CannotError, Command, Job, Peer, write_config

RECIPE = "lora_finetune_single_device"
ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")


def _prepare(lab: Lab) -> list[Command]:
    """Write the tokenizer's two parts: it reads no tokenizer.json but for special tokens."""
    made = lab.made("torchtune")
    made.mkdir(parents=True, exist_ok=True)
    parts = json.loads((lab.base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (made / "vocab.json").write_text(json.dumps(parts["vocab"], ensure_ascii=False), encoding="utf-8")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in parts["merges"])
    (made / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs), encoding="utf-8")
    return []


def _train(lab: Lab, job: Job) -> Command:
    if job.schedule != "constant":
        raise CannotError("has cosine schedules only, of which one without cycles is constant")
    out, made = str(lab.out("torchtune", job.name)), lab.made("torchtune")
    layers = json.loads((lab.base / "config.json").read_text(encoding="utf-8"))
    all_linear = job.name == "all-linear"
    model = {
        "_component_": "torchtune.models.llama3_2.lora_llama3_2",
        "lora_attn_modules": list(ATTENTION) if all_linear else list(job.targets),
        "apply_lora_to_mlp": all_linear,
        "apply_lora_to_output": False,
        "vocab_size": layers["vocab_size"],
        "num_layers": layers["num_hidden_layers"],
        "num_heads": layers["num_attention_heads"],
        "num_kv_heads": layers["num_key_value_heads"],
        "embed_dim": layers["hidden_size"],
        "max_seq_len": layers["max_position_embeddings"],
        "intermediate_dim": layers["intermediate_size"],
        "rope_base": int(layers["rope_parameters"]["rope_theta"]),
        "scale_factor": 1,
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
    }
    config = {
        "output_dir": out,
        "model": model,
        "tokenizer": {
            "_component_": "torchtune.models.qwen2.qwen2_tokenizer",
            "path": str(made / "vocab.json"),
            "merges_file": str(made / "merges.txt"),
            "special_tokens_path": str(lab.base / "tokenizer.json"),
            "max_seq_len": job.max_length,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(lab.base),
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": out,
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": str(lab.messages),
            "split": "train",
            "conversation_column": "messages",
            "conversation_style": "openai",
            "train_on_input": False,
        },
        "seed": SEED,
        "shuffle": True,
        "batch_size": job.batch,
        "optimizer": {"_component_": "torch.optim.AdamW", "weight_decay": 0.0, "lr": job.learning_rate},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
            "num_cycles": 0,  # the cosine of 0 all the way: constant
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": job.steps,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": None,
        "compile": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": f"{out}/logs"},
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "device": "cpu",
        "dtype": "bf16" if job.bf16 else "fp32",
        "enable_activation_checkpointing": bool(job.checkpointing),
        "enable_activation_offloading": False,
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
    }
    path = write_config(made / f"{job.name}.yaml", config)
    return Command([lab.bin("torchtune", "tune"), "run", RECIPE, "--config", path])


def _adapter(lab: Lab, job: str) -> Path:
    return lab.out("torchtune", job) / "epoch_0"


PEER = Peer(
    name="torchtune",
    distribution="torchtune",
    # It does not pin torchao; 0.18 has no torchao.dtypes.nf4tensor, which it imports.
    pip=((TORCH,), ("torchtune==0.6.1", "torchao==0.11.0")),
    help=lambda lab: Command([lab.bin("torchtune", "tune"), "run", "--help"]),
    train=_train,
    adapter=_adapter,
    prepare=_prepare,
    differs="no gradient clipping; a chat template without the system's turn; its recipe merges while it trains, if at all",
)
