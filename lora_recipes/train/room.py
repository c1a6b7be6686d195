"""Whether the disk holds what a run will write, asked before any weight is loaded."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_recipes.model.targets import Targets
from lora_recipes.plan.cost import checkpoints_kept
from lora_recipes.plan.storage import optimizer_bytes
from lora_recipes.run_dir import RunDir, require_room

LEAST = 2  # bytes of a trained weight: some are trained in 16 bits, and what surely fits shall not be refused
BESIDE = 32 * 2**20  # bytes of tokenizer, configs, random states, evidence


def require_disk(run_dir: RunDir, training: Mapping[str, Any], targets: Targets, steps: int) -> None:
    """Raises MachineError when checkpoints and the result surely do not fit beside what is there already.

    Args:
        training: settings by the names of trl.SFTConfig.
    """
    kept = checkpoints_kept(training, steps)
    count = kept + 1 if kept else 0  # one more while it is written
    weights = LEAST * targets.trainable
    side = math.isqrt(targets.trainable)  # adafactor keeps a row and a column of a matrix
    trained = torch.empty(side, side, dtype=torch.bfloat16, device="meta")
    states = optimizer_bytes(training.get("optim", "adamw_torch_fused"), [trained])[0]
    require_room(
        run_dir.root,
        count * (weights + states) + weights + BESIDE,
        f"{count} checkpoints of at least {(weights + states) / 2**20:,.0f} MiB and what is trained ({weights / 2**20:,.0f} MiB)",
        "set training.save_total_limit, save less often (training.save_steps), make room, or run from a folder on another disk",
        reused=sum(file.stat().st_size for file in run_dir.checkpoints.rglob("*") if file.is_file()),
    )
