"""The longest rows first: what does not fit fails before the first step, not at step 164."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_recipes.data.load import LoadedData

if TYPE_CHECKING:
    from lora_recipes.train.trainer import RecipeTrainer

# Their engines own forward and backward, and count each of them as a step.
UNPROBED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class LongestFirst(TrainerCallback):
    """One forward and backward on the longest rows before the first step, of which nothing stays.

    On a GPU these are a micro-batch; on a CPU the largest piece that one is computed in.

    Gradients are dropped, the random state and TRL's counters are put back: the run is the one it would have been. The
    optimizer's states do not exist yet, so what the probe leaves room for must hold them: twice the adapter.
    """

    def __init__(self, trainer: "RecipeTrainer", data: LoadedData) -> None:
        self.trainer, self.data = trainer, data
        self.done = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.done or self.trainer.accelerator.distributed_type in UNPROBED:
            return
        self.done = True
        rows = self.data.longest(args.per_device_train_batch_size)
        if rows:
            self._run(rows)

    def _run(self, rows: list[dict[str, list[int]]]) -> None:
        trainer = self.trainer
        counters = {
            mode: {name: list(values) for name, values in kept.items()} for mode, kept in trainer._metrics.items()
        }
        tokens = trainer._total_train_tokens
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        trainer.model_wrapped.train()
        with torch.random.fork_rng(devices=devices):
            inputs = trainer._prepare_inputs(trainer.largest_piece(trainer.data_collator(rows)))
            with trainer.compute_loss_context_manager():
                count = (inputs["labels"][:, 1:] >= 0).sum()
                loss = trainer.compute_loss(trainer.model_wrapped, inputs, num_items_in_batch=count)
            trainer.accelerator.backward(loss)
        trainer.model.zero_grad(set_to_none=True)
        for mode, kept in counters.items():
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(kept)
        trainer._total_train_tokens = tokens
