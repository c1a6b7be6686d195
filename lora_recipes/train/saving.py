"""The Trainer's checkpoints, each whole or not there, and its stop at a signal: one step on all ranks, saved, nothing after."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from lora_recipes.errors import Preempted
from lora_recipes.run_dir import RunDir, read_json, write_json
from lora_recipes.train.checkpoints import STAGING, publish_checkpoint, retain, stopped_there
from lora_recipes.train.preemption import Stop

COUNTED = "logging_{}.json"  # of each rank: losses and metrics of the steps since the last line of the log


class SavingTrainer(SFTTrainer):
    """SFTTrainer that writes a checkpoint aside, on all ranks, and lets rank 0 show it when it is whole.

    A signal stops all ranks at the end of one step. An evaluation that is due there, or under way, is left to the run
    that goes on, which makes it first: evaluations draw random numbers, and name the best checkpoint.

    Attributes:
        limit: checkpoints that are kept. The Trainer deletes by name and age, whatever lies in the folder, so it is told
            of no limit.
        stop: whether this process was asked to end.
    """

    stop = Stop()
    control: TrainerControl
    _aside = False  # while a checkpoint is written
    _saved = -1  # step of the newest checkpoint
    _stopped: Mapping[str, bool] = {}  # see `stopped_there`

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.limit: int | None = self.args.save_total_limit
        self.args.save_total_limit = None

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder, STAGING)) if self._aside else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights and tokenizer, without the pickle of all arguments, which nobody could load safely."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, main = Path(self.args.output_dir), self.is_world_process_zero()
        if main:
            shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a save that was cut off
        self.accelerator.wait_for_everyone()
        self._aside = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            raise
        finally:
            self._aside = False
        self._name_best(folder)
        self.accelerator.wait_for_everyone()
        if main:
            staging = folder / STAGING / f"checkpoint-{self.state.global_step}"
            self.state.save_to_json(str(staging / "trainer_state.json"))
            manifest = read_json(RunDir(folder.parent).manifest)
            publish_checkpoint(staging, self.state.global_step, manifest, self.args.world_size, dict(self._stopped))
            retain(folder, manifest.get("run"), self.limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._saved = self.state.global_step

    def _name_best(self, folder: Path) -> None:
        """The best checkpoint by its own place: the Trainer looks for it where this one is being written."""
        step = self.state.best_global_step
        best = folder / f"checkpoint-{step}"
        here = step == self.state.global_step and not best.is_dir()
        stopped = self._stopped if here else stopped_there(best)
        if step and (here or best.is_dir()) and not stopped.get("unplanned"):
            self.state.best_model_checkpoint = str(best)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *more: Any, **named: Any
    ) -> None:
        stopping = self._asked()
        evaluates = self.control.should_evaluate
        planned = self.control.should_save or (evaluates and self.args.save_strategy == SaveStrategy.BEST)
        if stopping:
            self._stopped = {"owes_evaluation": evaluates, "unplanned": not planned}
            self.control.should_evaluate, self.control.should_save = False, True
        drawn = _random_state() if self.control.should_evaluate else None
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *more, **named)
        except Preempted:  # in the evaluation
            _restore(drawn)
            self._stopped = {"owes_evaluation": True, "unplanned": not planned}
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            stopping = True
        if stopping or (self._saved == self.state.global_step and self._asked()):
            step = self.state.global_step
            raise Preempted(
                f"stopped by {self.stop.by or 'a signal to another rank'} after step {step} of {self.state.max_steps}, which is "
                "saved; the same command goes on"
            )

    def prediction_step(self, *args: Any, **keywords: Any) -> Any:
        """A batch of an evaluation, unless somebody asked to end."""
        self.heed_stop()
        return super().prediction_step(*args, **keywords)

    def heed_stop(self) -> None:
        """Raises Preempted within an evaluation that somebody asked to end."""
        if self._asked():
            raise Preempted("stopped in an evaluation; the same command goes on from the newest checkpoint")

    def _save_rng_state(self, output_dir: str) -> None:
        """The random numbers of this rank, and what it has counted since a line was logged last."""
        super()._save_rng_state(output_dir)
        counted = {
            "loss": float(self._tr_loss),
            "logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "tokens": self._total_train_tokens,
        }
        write_json(Path(output_dir, COUNTED.format(self.args.process_index)), counted)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random numbers of a checkpoint come back, what was counted for the next line of the log does, and the
        evaluation that it was stopped in is made up for."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            counted = read_json(Path(checkpoint, COUNTED.format(self.args.process_index)))
            if counted:  # a checkpoint of an earlier version has none
                self._tr_loss = torch.tensor(counted["loss"], device=self.args.device)
                self._globalstep_last_logged = counted["logged"]
                self._total_train_tokens = counted["tokens"]
                self._metrics["train"].update(counted["metrics"])
        if checkpoint is not None and stopped_there(Path(checkpoint)).get("owes_evaluation"):
            if self.state.global_step >= self.state.max_steps and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                return  # nothing is trained any more, so the model was not shared out, and is not evaluated without it
            self._determine_best_metric(self._evaluate(None, None), None)
            self._name_best(Path(self.args.output_dir))

    def _asked(self) -> bool:
        """Whether any rank was asked to end; the same answer on all of them."""
        return self.any_rank(self.stop.by is not None)

    def any_rank(self, here: bool | torch.Tensor) -> bool:
        """Whether it is so on any rank; all of them have to ask. One synchronisation, and one exchange between ranks."""
        if self.accelerator.num_processes == 1:
            return bool(here)
        votes = torch.as_tensor(here, device=self.accelerator.device).float()
        return bool(self.accelerator.reduce(votes, "sum") > 0)


def _random_state() -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), devices


def _restore(drawn: tuple[Any, ...] | None) -> None:
    if drawn is None:
        return
    random.setstate(drawn[0])
    numpy.random.set_state(drawn[1])
    torch.set_rng_state(drawn[2])
    if drawn[3]:
        torch.cuda.set_rng_state_all(drawn[3])
