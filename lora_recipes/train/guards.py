"""A run ends within the step in which a number is no longer finite: before weights move, and with the rows of that step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor

from lora_recipes.errors import RefusedError
from lora_recipes.model.pieces import rows_of
from lora_recipes.model.sound import finite
from lora_recipes.train.saving import SavingTrainer

MOST_NAMED = 8  # rows that a message names
# fp16's gradient scaler begins at 2**16 and halves with every step that it skips: after 17 in a row it scales no more.
MOST_SKIPPED = 20


class GuardedTrainer(SavingTrainer):
    """Looks at loss and gradients before every optimizer step, and at what is trained before it is written.

    Attributes:
        name_row: what the user knows a row by, from its tokens.
    """

    name_row: Callable[[Sequence[int]], str] = staticmethod(lambda input_ids: f"a row of {len(input_ids)} tokens")

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._computed: list[tuple[dict[str, Any], torch.Tensor]] = []  # inputs and loss of this step's micro-batches
        self._skipped = 0  # optimizer steps in a row, by fp16's gradient scaler

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> torch.Tensor:
        """The Trainer's step, of which inputs and loss are kept until the optimizer steps."""
        loss = super().training_step(model, inputs, *more, **named)
        self._computed.append((inputs, loss.detach()))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once a step, between clipping and the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm)
        computed, self._computed = self._computed, []
        losses = torch.stack([loss for _, loss in computed])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2's
        told = losses.sum() if norm is None else torch.stack([losses.sum(), torch.as_tensor(whole).to(losses)])
        scaled = self.accelerator.scaler is not None
        if not self.any_rank(~torch.isfinite(told).all()):
            self._skipped = 0
            return norm
        fine = torch.isfinite(losses)
        if scaled and not self.any_rank(~fine.all()):
            self._require_not_always_skipped()
            return norm
        self._stop(computed, fine, norm)
        raise AssertionError("unreachable")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)

    def require_finite(self) -> None:
        """Raises RefusedError, on all ranks, when a trained weight is not finite."""
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        flags = torch.stack([finite(_local(weight)).to(self.args.device) for weight in trained.values()])
        if self.any_rank(~flags.all()):
            broken = [name for name, good in zip(trained, flags.tolist(), strict=True) if not good]
            named = f": {broken[0]} and {len(broken) - 1} more" if broken else ""
            raise RefusedError(
                f"step {self.state.global_step}: trained weights are not finite{named}. Nothing of it is written; the last good "
                "checkpoint is whole. Lower training.learning_rate, and see training.adam_epsilon"
            )

    def _require_not_always_skipped(self) -> None:
        """fp16 makes gradients infinite on purpose, and skips the step; on end it never finds a scale that works."""
        self._skipped += 1
        if self._skipped >= MOST_SKIPPED:
            raise RefusedError(
                f"step {self.state.global_step + 1}: the last {self._skipped} optimizer steps were skipped, because gradients "
                "overflow in fp16 at any scale. Set training.bf16=true, or training.fp16=false, or lower training.learning_rate"
            )

    def _stop(self, computed: list[tuple[dict[str, Any], torch.Tensor]], fine: torch.Tensor, norm: Any) -> None:
        """Raises RefusedError, the same on all ranks, with the rows of the micro-batches whose loss is not finite; where all
        losses are, with all rows of the step."""
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # whose engine has stepped already
            self.require_finite()  # weights that the last step broke are no fault of these rows
        blamed = [inputs for (inputs, _), good in zip(computed, fine.tolist(), strict=True) if not good]
        values = [loss.item() for (_, loss), good in zip(computed, fine.tolist(), strict=True) if not good]
        found = [(values[0] if values else None, self._named(blamed or [inputs for inputs, _ in computed]))]
        ranks = gather_object(found) if self.accelerator.num_processes > 1 else found
        losses = [value for value, _ in ranks if value is not None]
        names = [name for value, rows in ranks if (value is not None) == bool(losses) for name in rows]
        what = (
            f"loss is {losses[0]}" if losses else f"the loss is finite, but the norm of its gradient is {float(norm)}"
        )
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise RefusedError(
            f"step {self.state.global_step + 1}: {what}; the run has diverged and is stopped, no "
            f"adapter is published and the last good checkpoint is whole. Rows of {'the micro-batch' if losses else 'the step'}: "
            f"{', '.join(names[:MOST_NAMED])}{more}. Look at them (lora-recipes preview --row N), lower "
            "training.learning_rate, or use bf16 instead of fp16"
        )

    def _named(self, batches: list[dict[str, Any]]) -> list[str]:
        return [self.name_row(ids.tolist()) for inputs in batches for ids, _ in rows_of(inputs)]


def _local(weight: torch.Tensor) -> torch.Tensor:
    """What of a weight this rank holds; all of it where weights are not sharded."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    return getattr(weight, "ds_tensor", weight)  # of ZeRO-3, where the weight itself is empty between two uses
