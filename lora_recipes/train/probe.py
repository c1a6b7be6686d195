"""The longest rows early: what does not fit fails at the beginning, not at step 164."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_recipes.data.load import LoadedData
from lora_recipes.model.machine import memory_available, peak_rss_bytes

if TYPE_CHECKING:
    from lora_recipes.train.trainer import RecipeTrainer

# Their engines own forward and backward, and count each of them as a step.
UNPROBED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class LongestFirst(TrainerCallback):
    """One forward and backward on the longest rows before the first step, of which nothing stays.

    On a GPU these are a micro-batch; on a CPU the largest piece that one is computed in.

    Gradients are dropped, the random state and TRL's counters are put back: the run is the one it would have been. The
    optimizer's states do not exist yet, so what the probe leaves room for must hold them: twice the adapter.

    A GPU does this in no time. On a CPU it takes as long as a step, so there the first step goes first and shows what a
    micro-batch takes; the longest one is tried before the second step, and only where it may not fit.
    """

    def __init__(self, trainer: "RecipeTrainer", data: LoadedData) -> None:
        self.trainer, self.data = trainer, data
        self.trained: tuple[int, ...] | None = None  # shape of what was computed last in the first step
        self.done = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.done or self.trainer.accelerator.distributed_type in UNPROBED:
            return
        if self.trained is None and self._measures():
            return
        self.done = True
        rows = self.data.longest(args.per_device_train_batch_size)
        if not rows:
            return
        batch = self.trainer.largest_piece(self.trainer.data_collator(rows))
        if self.trained is None or not fits(tuple(batch["input_ids"].shape), self.trained):
            self._run(batch)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trained = self.trained or self.trainer.batch_shape

    def _measures(self) -> bool:
        """On a CPU, by one process: ranks could disagree on the memory that is left, and backward waits for all of them."""
        return self.trainer.args.device.type == "cpu" and self.trainer.accelerator.num_processes == 1

    def _run(self, batch: dict[str, Any]) -> None:
        trainer = self.trainer
        counters = {
            mode: {name: list(values) for name, values in kept.items()} for mode, kept in trainer._metrics.items()
        }
        tokens = trainer._total_train_tokens
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        trainer.model_wrapped.train()
        with torch.random.fork_rng(devices=devices):
            inputs = trainer._prepare_inputs(batch)
            # Both are entered around a training_step, by RecipeTrainer and by TRL.
            with trainer.computing(), trainer.maybe_activation_offload_context:
                with trainer.compute_loss_context_manager():
                    count = (inputs["labels"][:, 1:] >= 0).sum()
                    loss = trainer.compute_loss(trainer.model_wrapped, inputs, num_items_in_batch=count)
                trainer.accelerator.backward(loss)
        trainer.model.zero_grad(set_to_none=True)
        for mode, kept in counters.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(kept)
        trainer._total_train_tokens = tokens


def fits(batch: tuple[int, ...], trained: tuple[int, ...]) -> bool:
    """Whether a micro-batch of this shape (rows, tokens) surely fits, after one that has been trained.

    What a micro-batch takes grows in proportion to its rows, and with their length at most as its square (attention that
    keeps its scores). The process's peak is taken to grow so, weights and all: that is the margin.
    """
    longer = batch[1] / trained[1]
    growth = batch[0] / trained[0] * longer * max(1.0, longer)
    return (growth - 1) * peak_rss_bytes() <= memory_available()
